"""The form of a profile: what a TOML declaration may say, and what of it makes no sense.

Owns names, defaults and the rules between them, nothing of what happens to a call. A key that is not known is an
error, since it is a mistyped one. Paths are patterns of whole segments: a literal, `{name}` for one segment that is
not empty, `{name...}` for the rest, at the end only. The same names stand in `target`, the path in the workspace.

Where a value stands in a request is said alike everywhere (`places`); what a job is, in `job_declaration`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StrictBool, StrictInt, StringConstraints, model_validator

from ngpu_bootstrap.config import checked_host_port
from ngpu_bootstrap.credentials import TOKEN_HEADER
from ngpu_bootstrap.errors import BadRequest
from ngpu_bootstrap.front.paths import check_path
from ngpu_bootstrap.profiles.job_declaration import AskedJob, JobDeclaration, SubmittedJob
from ngpu_bootstrap.profiles.links import MAX_LINKS
from ngpu_bootstrap.profiles.places import Declared, Place
from ngpu_bootstrap.profiles.schemas import check_declared

MIB = 1024 * 1024
# A body that is validated, or whose credential lies in it, is in memory while that is done.
MAX_READ_BYTES = 16 * MIB

_SEGMENT = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@%-]+")
_PARAMETER = re.compile(r"\{([a-z_][a-z0-9_]*)(\.\.\.)?\}")
_TARGET = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*")
_NAME = r"^[a-z][a-z0-9_-]{0,31}$"


# Headers that say how a request is to be read, or whose it is.
_NO_CREDENTIAL = frozenset(
    {"accept-encoding", "connection", "content-encoding", "content-length", "content-type", "cookie", "expect", "host"}
    | {"idempotency-key", "te", "trailer", "transfer-encoding", "upgrade"}
)
_OWN_HEADER = TOKEN_HEADER.decode()
# Keys that mean something for what is answered here.
_OF_ANY = frozenset({"method", "path", "mode", "dialect", "about"})
_OF_ANSWERED = {"fixed": _OF_ANY | {"answer"}, "models": _OF_ANY | {"at_once", "queue", "queue_wait_s"}}


class Dialect(StrEnum):
    """How errors look to the caller."""

    NGPU = "ngpu"
    """`{"reason", "message"}`, as everywhere else here."""
    OPENAI = "openai"
    """`{"error": {"message", "type", "param", "code"}}`."""
    CODE_MESSAGE = "code_message"
    """`{"code", "message"}`, code not 0."""
    MODEL_SERVER = "model_server"
    """Both of the two before in one object: each kind of client finds its own and leaves the rest alone."""
    ERROR_DETAILS = "error_details"
    """`{"error", "details"}`, both text."""
    CODE_MSG_DATA = "code_msg_data"
    """`{"code", "msg", "data"}`, data null; code is the HTTP status."""
    CODE_INFO_MSG = "code_info_msg"
    """`{"code", "info", "msg"}`, info null; code not 0."""


class Mode(StrEnum):
    """What is done with a call."""

    TRANSPARENT = "transparent"
    """Passed through as it comes, and so is the answer; streams stay streams."""
    WRAPPED = "wrapped"
    """The answer is kept with the task and released once the receipt is verified."""
    JOB = "job"
    """A call of a job that the workspace runs by itself (`Route.job`)."""
    MODELS = "models"
    """Answered here: the list of models, or the one that `{model...}` names."""
    FIXED = "fixed"
    """Answered here, always alike and to everybody (`Route.answer`)."""


class Credential(Place):
    """Where a workspace token may stand. Taken out of there; in a body the workspace's public id takes its place.

    Attributes:
        scheme: of a header: whether a word such as `Bearer` stands before the token: `optional`, `required`, `none`.
    """

    scheme: Literal["optional", "required", "none"] = "optional"

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.where in ("cookie", "path"):
            raise ValueError(f"a credential in a {self.where} would be logged or sent by others; use another place")
        if self.where == "json" and (self.pointer or "").count("/") != 1:
            raise ValueError("a credential's pointer must name a member of the body itself, such as /token")
        name = (self.name or "").lower()
        if self.where == "header" and (name in _NO_CREDENTIAL or (name.startswith("ngpu-") and name != _OWN_HEADER)):
            raise ValueError(f"the header {self.name} has another meaning, and would be taken out; use another")
        return self


class FixedAnswer(Declared):
    """An answer that is always the same: `json` or `text`."""

    status: Annotated[int, Field(ge=200, le=599)] = 200
    json_: Any = Field(None, alias="json")
    text: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.json_ is None) == (self.text is None):
            raise ValueError("give json or text")
        return self


class Envelope(Declared):
    """A JSON object around the JSON a workspace answered with success, for a wrapped call.

    Attributes:
        member: that holds the workspace's answer.
        beside: the other members.
    """

    member: Annotated[str, Field(min_length=1, max_length=64)] = "data"
    beside: dict[str, Any] = Field(default_factory=dict)


class FormBounds(Declared):
    """What a multipart body may have.

    Attributes:
        parts: at most, fields and files together.
        required: names of fields or files that must be there.
        allowed: names that may be there; empty for any.
        once: names that may be there once only.
    """

    parts: Annotated[int, Field(ge=1, le=10_000)] = 256
    required: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    once: tuple[str, ...] = ()


class Links(Declared):
    """Texts in a route's JSON answers that become signed URLs of this bootstrap: those that begin with *prefix*.

    A route with `signed = true` answers them, from the workspace and the node whose answer named the file.

    Attributes:
        most: of one answer; the texts after those stay. Each is signed, which takes some 50 us.
    """

    prefix: Annotated[str, StringConstraints(pattern=r"^/[!#-\[\]-~]{1,255}$")]
    expires_s: Annotated[int, Field(ge=1, le=31_536_000)] = 86_400
    most: Annotated[int, Field(ge=1, le=20_000)] = MAX_LINKS


def _path_pattern(path: str) -> str:
    if not path.startswith("/") or "//" in path:
        raise ValueError("must begin with / and have no empty segment")
    segments = path[1:].split("/")
    for number, segment in enumerate(segments):
        parameter = _PARAMETER.fullmatch(segment)
        if parameter is not None and parameter[2] and number != len(segments) - 1:
            raise ValueError("{name...} takes the rest of the path: it can only be the last segment")
        if parameter is None and segment not in ("",) and _SEGMENT.fullmatch(segment) is None:
            raise ValueError(f"{segment!r} is neither a literal segment nor {{name}} nor {{name...}}")
        if segment in (".", ".."):
            raise ValueError("must not contain . or .. segments")
    names = parameters_of(path)
    if len(set(names)) != len(names):
        raise ValueError("each {name} may appear once")
    _check_climbing(path)
    return path


def _target_pattern(target: str) -> str:
    if target:
        if not target.startswith("/") or target.startswith("//"):
            raise ValueError("must begin with one /")
        if _TARGET.fullmatch(_PARAMETER.sub("x", target)) is None:
            raise ValueError("must hold only what a path and a query may, the rest percent-encoded; no # either")
        _check_climbing(target.partition("?")[0])
    return target


def _check_climbing(path: str) -> None:
    try:
        check_path(path)
    except BadRequest:
        raise ValueError("must not climb (`..`, plain or encoded), nor hold encoded control characters") from None


def _method(name: str) -> str:
    if re.fullmatch(r"[A-Z]{1,16}", name) is None:
        raise ValueError("must be a method in capital letters, such as GET or POST")
    if name in ("CONNECT", "TRACE", "HEAD"):
        raise ValueError(f"{name} is not declared" + ("; GET answers it" if name == "HEAD" else ""))
    return name


def parameters_of(path: str) -> tuple[str, ...]:
    """Return the names of the parameters of a path pattern, in order."""
    return tuple(matched[1] for matched in _PARAMETER.finditer(path))


PathPattern = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_path_pattern)]
TargetPattern = Annotated[str, Field(max_length=1024), AfterValidator(_target_pattern)]
Method = Annotated[str, AfterValidator(_method)]


class Route(Declared):
    """One call: a method and a path of clients, and what happens to it.

    Attributes:
        method: of the client, and of the call to the workspace unless `target_method` says otherwise.
        target: path in the workspace, with the route's parameters and a query if it always has one; the same path
            when empty. The client's own query follows.
        port: in the workspace; its first when not given.
        mode: see `Mode`.
        max_body_bytes: of the request; the operator's own limit counts as well. See `body_limit`.
        at_once: calls of this route running at once, over all clients; 0 sets no limit.
        queue: calls that may wait for one of those places; the next gets 429.
        queue_wait_s: how long one may wait there.
        timeout_s: what one call may take; the workspace's own limit when not given.
        gpu_types: GPU models that are preferred for this call, the best first; others serve as well.
        body_schema: written `schema`: JSON schema (draft 2020-12) of a JSON body, or of the object a form's fields
            make. The body is read whole for it, so `max_body_bytes` is at most 16 MiB.
        form: what a multipart body may have.
        json_only: a body is read as JSON whatever its type says, and refused if it is none.
        file_urls: paths of files in the JSON of an answer become URLs here (`"url": "/home/..."`).
        links: texts of an answer that become signed URLs here.
        signed: opened by such a URL, and by nothing else.
        dialect: of this route's errors, where it is not the profile's.
        affinity: calls of one client with one value here go to one node, after a restart and from a sibling too. A
            field of one name is one key, on all routes of the profile and wherever it stands.
        affinity_away: what becomes of such a call while that node is away: `move`, it goes to another; `refuse`.
        affinity_away_s: how long such a call is refused before it moves: a node that starts again takes some seconds.
        envelope: for `wrapped`.
        answer: for `fixed`.
        job: for `job`.
        about: a sentence for people.
    """

    method: Method = "POST"
    path: PathPattern
    target: TargetPattern = ""
    target_method: Method | None = None
    port: Annotated[StrictInt, Field(ge=1, le=65535)] | None = None
    mode: Mode = Mode.TRANSPARENT
    max_body_bytes: Annotated[StrictInt, Field(ge=0)] | None = None
    at_once: Annotated[StrictInt, Field(ge=0, le=100_000)] = 0
    queue: Annotated[StrictInt, Field(ge=0, le=100_000)] = 100
    queue_wait_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    gpu_types: tuple[Annotated[str, Field(min_length=1, max_length=128)], ...] = ()
    body_schema: dict[str, Any] | None = Field(None, alias="schema")
    form: FormBounds | None = None
    json_only: StrictBool = False
    file_urls: StrictBool = False
    links: Links | None = None
    signed: StrictBool = False
    dialect: Dialect | None = None
    affinity: tuple[Place, ...] = ()
    affinity_away: Literal["move", "refuse"] = "move"
    affinity_away_s: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    envelope: Envelope | None = None
    answer: FixedAnswer | None = None
    job: JobDeclaration | None = None
    about: Annotated[str, Field(max_length=500)] = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.answer is not None) != (self.mode is Mode.FIXED):
            raise ValueError('mode = "fixed" and an answer go together')
        if (self.job is not None) != (self.mode is Mode.JOB):
            raise ValueError('mode = "job" and a table [routes.job] go together')
        if self.envelope is not None and self.mode is not Mode.WRAPPED:
            raise ValueError('an envelope needs mode = "wrapped"')
        if (self.file_urls or self.signed) and self.mode is not Mode.TRANSPARENT:
            raise ValueError('file_urls and signed need mode = "transparent"')
        if self.links is not None and self.mode not in (Mode.TRANSPARENT, Mode.JOB):
            raise ValueError('links need mode = "transparent" or "job"')
        if self.json_only and self.form is not None:
            raise ValueError("json_only and form exclude each other")
        if self.signed and self.method != "GET":
            raise ValueError("a signed URL is fetched with GET")
        meant = _OF_ANSWERED.get(self.mode.value)
        if meant is not None and (idle := sorted(_written(self) - meant)):
            raise ValueError(f'{", ".join(idle)} would have no effect: mode = "{self.mode.value}" is answered here')
        if unknown := set(parameters_of(self.target)) - set(parameters_of(self.path)):
            raise ValueError(f"target uses {{{sorted(unknown)[0]}}}, which is not in path")
        if self.body_schema is not None:
            if self.body_limit > MAX_READ_BYTES:
                raise ValueError(f"a body that is validated is read whole: max_body_bytes is at most {MAX_READ_BYTES}")
            check_declared(self.body_schema, self.body_limit)
        if self.mode is Mode.MODELS and self.method != "GET":
            raise ValueError('mode = "models" takes method = "GET"')
        keys = [("affinity", place) for place in self.affinity]
        keys += [("job.key", self.job.key)] if self.job is not None and self.job.key is not None else []
        for key, place in keys:
            if place.where == "path" and place.name not in parameters_of(self.path):
                raise ValueError(f"{key} names {{{place.name}}}, which is not in path")
        return self

    @property
    def refuses_s(self) -> float:
        """How long a call whose node is away is refused."""
        return math.inf if self.affinity_away == "refuse" else self.affinity_away_s

    @property
    def body_limit(self) -> int:
        """The largest body: as declared, else 16 MiB where it is validated and 256 MiB where it is not."""
        if self.max_body_bytes is not None:
            return self.max_body_bytes
        return 256 * MIB if self.body_schema is None else MAX_READ_BYTES

    @property
    def target_path(self) -> str:
        """The pattern of the path in the workspace."""
        return self.target or self.path


def _status(text: str) -> str:
    if re.fullmatch(r"[45][0-9]{2}", text) is None:
        raise ValueError("must be the status of an error, such as 400")
    return text


Status = Annotated[str, AfterValidator(_status)]


def _listen(text: str) -> str:
    return checked_host_port(text) if text else text


def _written(route: Route) -> set[str]:
    """Return the keys that a route's declaration has."""
    fields = type(route).model_fields
    return {fields[name].alias or name for name in route.model_fields_set}


class Profile(Declared):
    """A family of calls.

    Attributes:
        dialect: how errors look on all of its routes.
        error_words: by HTTP status, what stands in `error` of the dialect `error_details`.
        workspace: what a call runs on. `token`: the workspace the credential is of. `model`: whatever serves the
            model the body names, among what the credential may use. `bound`: the one the operator named for this
            profile (`[profiles.bind]`).
        credentials: places looked at in this order; the first that holds something counts, all are emptied. Our own
            header `Ngpu-Token` is always taken, and counts before them. `Authorization` where none is given.
        listen: a listener of its own that the profile is meant for, HOST:PORT, used where the operator turns it on.
        settings: names in `[profiles.settings.<name>]` that the operator may set, with their defaults: what a
            declaration leaves to the operator. Used as `"$name"` where a number or text is expected.
    """

    name: Annotated[str, StringConstraints(pattern=_NAME)]
    summary: Annotated[str, Field(max_length=500)] = ""
    dialect: Dialect = Dialect.NGPU
    error_words: dict[Status, Annotated[str, Field(min_length=1, max_length=200)]] = Field(default_factory=dict)
    workspace: Literal["token", "model", "bound"] = "token"
    credentials: tuple[Credential, ...] = (Credential.model_validate({"in": "header", "name": "authorization"}),)
    listen: Annotated[str, AfterValidator(_listen)] = ""
    log: Literal["", "http_request"] = ""
    settings: dict[str, int | float | str | bool] = Field(default_factory=dict)
    routes: Annotated[tuple[Route, ...], Field(max_length=500)]

    def dialect_of(self, route: Route | None) -> Dialect:
        """Return how errors of *route* look; None: of a call that none of its routes is."""
        return self.dialect if route is None or route.dialect is None else route.dialect

    @functools.cached_property
    def has_linked_jobs(self) -> bool:
        """Whether answers about any of its jobs hold what becomes a signed URL."""
        return any(route.links is not None and route.job is not None for route in self.routes)

    def links_of_job(self, name: str) -> Links | None:
        """Return what becomes a signed URL in answers about the jobs called *name*; None: nothing does."""
        submitting, asking = None, None
        for route in self.routes:
            if isinstance(route.job, SubmittedJob) and route.job.name == name:
                submitting = route.links
            elif isinstance(route.job, AskedJob) and route.job.of == name:
                asking = asking or route.links
        return asking or submitting


def problems_between(profile: Profile) -> Iterator[str]:
    """Yield what is wrong between the routes of a profile, each of which is right by itself."""
    if not profile.routes:
        yield "routes: a profile has at least one"
    seen: set[tuple[str, str]] = set()
    for route in profile.routes:
        key = (route.method, re.sub(r"\{[^}]*\}", "{}", route.path))
        if key in seen:
            yield f"routes: {route.method} {route.path} is declared twice"
        seen.add(key)
    names = [route.job.name for route in profile.routes if isinstance(route.job, SubmittedJob)]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"two routes submit jobs named {name}: give each its own name in [routes.job]"
    for route in profile.routes:
        if isinstance(route.job, AskedJob) and route.job.of not in names:
            known = ", ".join(names) or "none"
            yield f"{route.path} asks for jobs named {route.job.of}, and no route submits such: {known}"
