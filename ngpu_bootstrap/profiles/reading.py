"""What a profile wants to know of a request's body, read while the body passes, and what goes on in its place.

Owns which reader a body gets: JSON, a multipart form, an urlencoded one, or none. Whatever its type says, a body that
begins like a JSON object is read as one where a model is looked for, since clients send what their libraries default
to. A credential found in a body does not go on: the workspace's public id does.

Pure: pieces come in, pieces go out; where they are kept meanwhile is `front.spool`'s.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ngpu_bootstrap.errors import BadRequest
from ngpu_bootstrap.profiles.declaration import MAX_READ_BYTES, Credential, FormBounds, Profile, Route
from ngpu_bootstrap.profiles.form_bodies import (
    ANY_FORM,
    MULTIPART,
    URLENCODED,
    MultipartScan,
    media_type,
    public_id,
    read_urlencoded,
)
from ngpu_bootstrap.profiles.model_of_body import Member, ObjectScan, text_of
from ngpu_bootstrap.profiles.places import Place
from ngpu_bootstrap.profiles.schemas import check_document, validator_of
from ngpu_bootstrap.profiles.strict_json import SHORT_BYTES, read_json
from ngpu_protocol.job_answers import at_pointer

_ROUTED = ("model", "project")


@dataclass(slots=True)
class BodyFacts:
    """What was read of a body.

    Attributes:
        credentials: texts by place, not judged.
        values: texts at wanted places.
        document: the body as a JSON value, where a job repeats some of it.
    """

    model: str | None = None
    project: str | None = None
    credentials: dict[Credential, str] = field(default_factory=dict, repr=False)
    values: dict[Place, str] = field(default_factory=dict)
    document: Any = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is looked for in the bodies of one route; made once.

    Attributes:
        routed: `model` and `project` count.
        schema: what holds the parsed body to the declared schema; None: anything goes.
        json_only: whatever its type says, it is read as JSON.
        parses: the body is parsed whole, so it has at most `MAX_READ_BYTES` and `strict_json.MAX_VALUES`.
        keeps: it is kept as a JSON value for longer.
    """

    routed: bool
    credentials: tuple[Credential, ...]
    places: tuple[Place, ...]
    form: FormBounds
    schema: Any
    has_form: bool
    json_only: bool
    parses: bool
    keeps: bool

    @property
    def anything(self) -> bool:
        """Whether bodies are looked into at all."""
        return bool(
            self.routed or self.credentials or self.places or self.schema is not None or self.has_form or self.json_only
        )


def wanted_of(profile: Profile, route: Route) -> Wanted:
    """Return what is looked for in the bodies of *route*."""
    places = [one for one in route.affinity if one.where in ("json", "form")]
    if route.job is not None and route.job.key is not None and route.job.key.where in ("json", "form"):
        places.append(route.job.key)
    repeats = route.job is not None and route.job.repeats_request
    deep = repeats or any(place.where == "json" and (place.pointer or "").count("/") != 1 for place in places)
    return Wanted(
        routed=profile.workspace == "model",
        credentials=tuple(one for one in profile.credentials if one.where in ("json", "form")),
        places=tuple(places),
        form=route.form or ANY_FORM,
        schema=None if route.body_schema is None else validator_of(route.body_schema),
        has_form=route.form is not None,
        json_only=route.json_only,
        parses=deep or route.body_schema is not None,
        keeps=repeats,
    )


class BodyReader:
    """Reads one body. `feed` each piece, then `end`, then look at `facts`.

    Args:
        content_type: of the request, None without one.
    """

    def __init__(self, wanted: Wanted, content_type: bytes | None) -> None:
        self.facts = BodyFacts()
        self._wanted = wanted
        media, parameters = media_type(content_type)
        self._media = media
        self._kept: bytearray | None = bytearray() if wanted.parses else None
        self._json: ObjectScan | None = None
        self._form: MultipartScan | None = None
        self._urlencoded: bytearray | None = None
        self._members: dict[str, Credential] = {_member(one): one for one in wanted.credentials if one.where == "json"}
        self._fields: dict[str, Credential] = {one.name or "": one for one in wanted.credentials if one.where == "form"}
        self._held = bytearray()  # of the credential under way
        self._held_at = 0
        self._begun = False
        if media == MULTIPART and not wanted.json_only:
            self._kept = None
            self._form = MultipartScan(
                parameters.get(b"boundary", b""),
                wanted=(*(_ROUTED if wanted.routed else ()), *(one.name or "" for one in wanted.places)),
                credentials=self._fields,
                bounds=wanted.form,
                keep_texts=wanted.parses,
            )

    def feed(self, data: bytes) -> bytes:
        """Take the next piece; return what goes on.

        Raises:
            BadRequest: the body is not what it must be.
        """
        if not self._begun and data:
            self._begin(data)
        if self._form is not None:
            return self._form.feed(data)
        if self._urlencoded is not None:
            self._urlencoded += data
            if len(self._urlencoded) > MAX_READ_BYTES:
                raise BadRequest("body_too_large", f"a form has at most {MAX_READ_BYTES} bytes", status=413)
            return b""
        if self._json is None:
            return data
        out = self._rewritten(data) if self._members else data
        if not self._members:
            self._json.feed(data)
        if self._kept is not None:
            self._kept += out
            if len(self._kept) > MAX_READ_BYTES:
                raise BadRequest("body_too_large", f"the body has more than {MAX_READ_BYTES} bytes", status=413)
        return out

    @property
    def held_bytes(self) -> int:
        """How much of the body is in memory, to be parsed."""
        return len(self._kept or self._urlencoded or b"")

    @property
    def is_long(self) -> bool:
        """Whether `end` takes so long that it should not be awaited by others."""
        return self.held_bytes > SHORT_BYTES

    def end(self) -> bytes:
        """Take note that the body is complete; return the last piece that goes on.

        Raises:
            BadRequest: the body is not what it must be.
        """
        out = b""
        document: Any = None
        if self._form is not None:
            self._form.end()
            out = self._form.feed(b"") if self._fields else b""
            self._take_fields(self._form.values, self._form.credentials)
            document = self._form.document
        elif self._urlencoded is not None:
            values, credentials, out = read_urlencoded(bytes(self._urlencoded), self._fields)
            self._take_fields(values, credentials)
            document = values
        elif self._json is not None:
            self._json.end()
            out = bytes(self._held)
            if self._kept is not None:
                self._kept += out
            document = self._take_members(self._json.found)
        elif self._wanted.has_form or self._wanted.json_only or self._wanted.schema is not None:
            raise BadRequest("body_missing", "this call needs a body")
        if self._wanted.schema is not None:
            check_document(self._wanted.schema, document)
        if self._wanted.keeps:
            self.facts.document = document
        return out

    def _begin(self, data: bytes) -> None:
        self._begun = True
        if self._form is not None:
            return
        starts = data.lstrip(b" \t\r\n\xef\xbb\xbf")[:1]
        is_json = self._media == "application/json" or self._media.endswith("+json")
        if self._media == URLENCODED and starts != b"{" and not self._wanted.json_only:
            self._urlencoded = bytearray()
        elif (
            is_json
            or starts == b"{"
            or self._wanted.json_only
            or self._wanted.routed
            or self._wanted.schema is not None
        ):
            names = [*self._members, *(_member(one) for one in self._wanted.places if one.where == "json")]
            self._json = ObjectScan((*names, *(_ROUTED if self._wanted.routed else ())))

    def _rewritten(self, data: bytes) -> bytes:
        """Return what goes on of *data*, with public ids for the credentials that end in it; hold back one that does
        not."""
        scan = self._json
        assert scan is not None
        before = set(scan.found)
        self._held += data
        scan.feed(data)
        out = bytearray()
        for name in sorted(scan.found.keys() - before, key=lambda one: scan.found[one].start):
            member = scan.found[name]
            if name in self._members and member.end:
                out += self._held[: member.start - self._held_at]
                out += json.dumps(public_id(_text(member))).encode()
                del self._held[: member.end - self._held_at]
                self._held_at = member.end
        ready = scan.kept_from - self._held_at
        out += self._held[:ready]
        del self._held[:ready]
        self._held_at += ready
        return bytes(out)

    def _take_members(self, found: dict[str, Member]) -> Any:
        """Note what was found; return the whole body as a value, where it is parsed."""
        facts = self.facts
        for name, credential in self._members.items():
            if name in found:
                if found[name].raw is None:  # it was not taken out
                    raise BadRequest("credential_not_text", f"{name} must be a text, the workspace token")
                facts.credentials[credential] = _text(found[name]).strip()
        if self._wanted.routed:
            facts.model = text_of(found.get("model"), "model")
            facts.project = text_of(found.get("project"), "project")
        document = None
        if self._kept is not None:
            document = read_json(self._kept)
        for place in self._wanted.places:
            if place.where == "json":
                value = (
                    at_pointer(document, place.pointer or "")
                    if document is not None
                    else found[_member(place)].value
                    if _member(place) in found
                    else None
                )
                if isinstance(value, str | int | float) and not isinstance(value, bool):
                    facts.values[place] = str(value)
        return document

    def _take_fields(self, values: dict[str, str], credentials: dict[str, str]) -> None:
        facts = self.facts
        for name, text in credentials.items():
            facts.credentials[self._fields[name]] = text
        if self._wanted.routed:
            facts.model = values.get("model") or None
            facts.project = values.get("project") or None
        for place in self._wanted.places:
            if place.where == "form" and values.get(place.name or ""):
                facts.values[place] = values[place.name or ""]


def _member(place: Place) -> str:
    return (place.pointer or "").removeprefix("/").replace("~1", "/").replace("~0", "~")


def _text(member: Member) -> str:
    value = member.value
    return value if isinstance(value, str) else ""
