"""Which images this node fetched, who may use them, and which of them may go.

Owns the list, `images.json` in the data directory, and the choice of what to collect. Only what is on the list is ever
removed, so it is written before a pull begins: a daemon that is killed in the middle of one still knows afterwards
that the image, if it arrived, is its own. An image that was on the engine already when it was first used is on the
list as `borrowed`, for the sake of what is remembered about it, and never collected.

What is remembered beside: to which digest each holder's reference was resolved, so that a moved tag changes nothing
under a running revision and a restart needs no registry; and which workspaces have shown that they may have an image
that is not for everybody. Holders (`service/workspace/revision`) and workspaces (`service/workspace`) are texts to
this module.

Decisions are pure functions of entries; the class around them only keeps and writes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import structlog
import trio

from ngpu_daemon.outbound import without_query
from ngpu_protocol.image_references import ImageReferenceError, parse_image_reference

log = structlog.get_logger(__name__)

MAX_ENTRIES = 4096
MAX_PROVEN = 256
MAX_REMEMBERED = 256


@dataclass(slots=True)
class Entry:
    """One image.

    Attributes:
        name: what the engine knows it by and what is removed: `repository@sha256:…`, or the tag given to a tar.
        reference: as a client wrote it, for people and for the owner's pins; a URL without its query, often a secret.
        id: the engine's id; empty while it is being fetched.
        digest: SHA-256 that receipts name, hexadecimal.
        size: unpacked bytes, as the engine counts; of layers shared with others too.
        borrowed: not this node's to remove.
        restricted: fetched with credentials: only for workspaces in *proven*.
        proven: workspaces that have shown credentials for it.
        used_ms: UTC milliseconds when it was last wanted.
        resolved: holders whose reference came to this image.
    """

    name: str
    reference: str
    id: str = ""
    digest: str = ""
    size: int = 0
    borrowed: bool = False
    restricted: bool = False
    proven: list[str] = field(default_factory=list)
    used_ms: int = 0
    resolved: list[str] = field(default_factory=list)

    def may_be_used_by(self, workspace: str) -> bool:
        """Tell whether *workspace* needs no more proof to have it."""
        return not self.restricted or workspace in self.proven


def collectable(
    entries: Iterable[Entry], *, used_ids: set[str], held_names: set[str], keep: Sequence[str]
) -> list[Entry]:
    """Return what may be removed, least recently used first.

    Args:
        used_ids: images that containers use.
        held_names: images that deployments hold or that are being fetched.
        keep: references the owner wants kept.
    """
    free = [
        entry
        for entry in entries
        if entry.id
        and not entry.borrowed
        and entry.name not in held_names
        and entry.id not in used_ids
        and not any(is_pinned(entry, pin) for pin in keep)
    ]
    return sorted(free, key=lambda entry: (entry.used_ms, entry.name))


def is_pinned(entry: Entry, pin: str) -> bool:
    """Tell whether the owner's *pin* means *entry*: its repository, and its tag or digest where the pin has one."""
    try:
        wanted = parse_image_reference(pin)
        named = parse_image_reference(entry.reference)
    except ImageReferenceError:
        return without_query(pin) == entry.reference  # an image by URL
    if wanted.name != named.name:
        return False
    if wanted.digest is not None:
        return wanted.digest == "sha256:" + entry.digest
    return wanted.tag is None or wanted.tag == named.tag


class Shelf:
    """The list, in memory and on disk."""

    def __init__(self, path: Path | None) -> None:
        """Read *path*; without one, or with one that cannot be read, the list is empty and no image is ours."""
        self._path = path
        self._entries: dict[str, Entry] = {}
        self._writing = trio.Lock()
        if path is not None:
            self._entries = {entry.name: entry for entry in _read(path)}

    def entries(self) -> list[Entry]:
        """Return all of them."""
        return list(self._entries.values())

    def get(self, name: str) -> Entry | None:
        """Return the entry of *name*."""
        return self._entries.get(name)

    def with_id(self, image_id: str) -> list[Entry]:
        """Return what is known under one id of the engine: a repository each."""
        return [entry for entry in self._entries.values() if entry.id == image_id]

    def resolved(self, holder: str) -> Entry | None:
        """Return what *holder*'s reference came to before."""
        return next((entry for entry in self._entries.values() if holder in entry.resolved and entry.id), None)

    def remember(self, entry: Entry, holder: str, now_ms: int) -> None:
        """Note that *holder* has come to use *entry*, and no other any more."""
        self.forget(holder)
        entry.resolved.append(holder)
        del entry.resolved[:-MAX_REMEMBERED]
        entry.used_ms = max(entry.used_ms, now_ms)

    def forget(self, holder: str) -> None:
        """Note that *holder* needs nothing remembered any more."""
        for entry in self._entries.values():
            if holder in entry.resolved:
                entry.resolved.remove(holder)

    def put(self, entry: Entry) -> None:
        """Add or replace; written by the next `save`."""
        if entry.name not in self._entries and len(self._entries) >= MAX_ENTRIES:
            idle = [e for e in self._entries.values() if e.borrowed and not e.resolved]
            for old in sorted(idle, key=lambda e: e.used_ms)[:1]:
                self._entries.pop(old.name)
        self._entries[entry.name] = entry

    def drop(self, name: str) -> None:
        """Take off the list."""
        self._entries.pop(name, None)

    async def save(self) -> None:
        """Write the list so that a crash leaves the old one or the new one.

        A disk that refuses is logged, not raised: the list in memory holds, and at worst an image is never collected.
        """
        if self._path is None:
            return
        async with self._writing:
            document = {"images": [asdict(entry) for entry in self._entries.values()]}
            try:
                await trio.to_thread.run_sync(_write, self._path, document)
            except OSError as error:
                log.warning("images_list_not_written", path=str(self._path), reason=str(error))


def prove(entry: Entry, workspace: str) -> None:
    """Note that *workspace* has shown it may have *entry*; the oldest proofs go when there are too many."""
    if workspace in entry.proven:
        entry.proven.remove(workspace)
    entry.proven.append(workspace)
    del entry.proven[:-MAX_PROVEN]


def _read(path: Path) -> list[Entry]:
    known = {field.name: field.type for field in fields(Entry)}
    try:
        document = json.loads(path.read_text())
        found = []
        for item in document["images"]:
            entry = Entry(**{key: value for key, value in item.items() if key in known})
            _check(entry)
            entry.reference = without_query(entry.reference)  # versions before wrote URLs whole
            found.append(entry)
        return found
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning(
            "images_list_unreadable", path=str(path), reason=str(error), hint="no image on the engine is removed"
        )
        return []


def _check(entry: Entry) -> None:
    defaults: dict[str, Any] = asdict(Entry(name="", reference=""))
    for key, default in defaults.items():
        if type(getattr(entry, key)) is not type(default):
            raise ValueError(f"{key} of {entry.name!r} is not {type(default).__name__}")


def _write(path: Path, document: dict[str, Any]) -> None:
    temporary = path.with_suffix(".new")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
