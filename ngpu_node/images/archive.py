"""A `docker save` tar from a stranger, made fit for this engine's `docker load` while it streams through.

Loading a tar as it comes would do whatever it says: move the owner's tags to other images, bring several images, or
files an unpacker stumbles over. So the tar is read member by member and written anew: what is not needed is left out
(`repositories`, `index.json`, `oci-layout`), the one image of `manifest.json` gets a tag of ours instead of its own,
and `manifest.json` goes last, and only after the caller has seen that the checksum of the whole is right. Without it
the engine has nothing to load, so a file with a wrong checksum leaves nothing behind.

Never more than one chunk, a header and `manifest.json` are in memory. Formats: ustar, GNU and pax, plain or gzipped.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from ngpu_node.images.problems import BadArchive

BLOCK = 512
CHUNK = 256 * 1024
MAX_MANIFEST_BYTES = 1024 * 1024
MAX_EXTENSION_BYTES = 1024 * 1024
MAX_MEMBERS = 100_000

_GZIP = b"\x1f\x8b"
_LEFT_OUT = frozenset({"repositories", "index.json", "oci-layout"})
_KEPT = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE})


async def gunzipped(source: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield *source* unpacked if it is gzipped, else as it is, in pieces of at most `CHUNK` or the source's own.

    Raises:
        BadArchive: it begins like gzip and is none.
    """
    head = b""
    async for part in source:
        head += part
        if len(head) >= len(_GZIP):
            break
    if not head.startswith(_GZIP):
        if head:
            yield head
        async for part in source:
            yield part
        return
    unpacker, part = zlib.decompressobj(wbits=31), head
    while True:
        try:
            while part:
                if unpacker.eof:  # another member may follow, as concatenated files have it
                    unpacker = zlib.decompressobj(wbits=31)
                data = unpacker.decompress(part, CHUNK)
                part = unpacker.unconsumed_tail or unpacker.unused_data
                if data:
                    yield data
        except zlib.error as error:
            raise BadArchive(f"the file is damaged: {error}") from error
        try:
            part = await anext(source)
        except StopAsyncIteration:
            break
    try:
        if rest := unpacker.flush():
            yield rest
    except zlib.error as error:
        raise BadArchive(f"the file is damaged: {error}") from error
    if not unpacker.eof:
        raise BadArchive("the file ends in the middle")


class _Bytes:
    """Exact reads from a stream of pieces."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self._source = source
        self._held = b""

    async def exactly(self, count: int) -> bytes:
        return b"".join([part async for part in self.pieces(count)])

    async def pieces(self, count: int) -> AsyncIterator[bytes]:
        while count:
            if not self._held:
                try:
                    self._held = await anext(self._source)
                except StopAsyncIteration:
                    raise BadArchive("the tar ends in the middle") from None
            part, self._held = self._held[:count], self._held[count:]
            count -= len(part)
            if part:
                yield part

    async def drain(self) -> None:
        self._held = b""
        async for _ in self._source:
            pass


async def for_engine(
    source: AsyncIterator[bytes], *, tag: str, confirm: Callable[[], Awaitable[None]]
) -> AsyncGenerator[bytes, None]:
    """Yield the tar to be loaded for the one in *source*.

    Args:
        tag: the only name the image will have.
        confirm: called when *source* has ended; raises if it is not the file that was wanted.

    Raises:
        BadArchive: *source* is not the tar of one image.
    """
    reader = _Bytes(source)
    manifest: bytes | None = None
    names: set[str] = set()
    members = 0
    while True:
        member = await _next_member(reader)
        if member is None:
            break
        members += 1
        if members > MAX_MEMBERS:
            raise BadArchive(f"the tar has more than {MAX_MEMBERS} files")
        padded = -(-member.size // BLOCK) * BLOCK if member.isreg() else 0
        if member.name == "manifest.json":
            if manifest is not None or not member.isreg() or member.size > MAX_MANIFEST_BYTES:
                raise BadArchive("the tar's manifest.json is not one small file")
            manifest = (await reader.exactly(padded))[: member.size]
        elif member.name in _LEFT_OUT:
            async for _ in reader.pieces(padded):
                pass
        else:
            names.add(member.name)
            yield member.tobuf(tarfile.PAX_FORMAT)
            async for part in reader.pieces(padded):
                yield part
    await reader.drain()
    rewritten = _rewritten(manifest, names, tag)
    await confirm()
    last = tarfile.TarInfo("manifest.json")
    last.size = len(rewritten)
    yield last.tobuf(tarfile.PAX_FORMAT) + rewritten + bytes(-len(rewritten) % BLOCK) + bytes(2 * BLOCK)


async def _next_member(reader: _Bytes) -> tarfile.TarInfo | None:
    """Return the next file, folder or link, its name and size in full; None at the end of the tar."""
    path = link = ""
    size: int | None = None
    while True:
        block = await reader.exactly(BLOCK)
        if not block.strip(b"\0"):
            return None
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise BadArchive(f"the file is not a tar: {error}") from error
        if member.size < 0:
            raise BadArchive("the tar has a file of negative size")
        if member.type not in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            break
        if member.size > MAX_EXTENSION_BYTES:
            raise BadArchive("the tar has an extended header of absurd size")
        data = (await reader.exactly(-(-member.size // BLOCK) * BLOCK))[: member.size]
        if member.type == tarfile.XHDTYPE:
            records = _pax_records(data)
            path, link = records.get("path", path), records.get("linkpath", link)
            if "size" in records:
                if not records["size"].isascii() or not records["size"].isdigit():
                    raise BadArchive("the tar has an extended header that cannot be read")
                size = int(records["size"][:18])
        elif member.type == tarfile.GNUTYPE_LONGNAME:
            path = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif member.type == tarfile.GNUTYPE_LONGLINK:
            link = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    if member.type not in _KEPT:
        raise BadArchive(f"the tar has a member of a kind that no image needs ({member.type!r})")
    clean = tarfile.TarInfo(_plain_name(path or member.name))
    clean.type, clean.mode, clean.mtime = member.type, member.mode & 0o777, member.mtime
    if member.isreg():
        clean.size = member.size if size is None else size
    if member.issym() or member.islnk():
        clean.linkname = link or member.linkname
        if clean.linkname.startswith("/") or (member.islnk() and ".." in clean.linkname.split("/")):
            raise BadArchive(f"the tar has a link to somewhere else: {clean.linkname[:100]!r}")
    return clean


def _plain_name(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or not parts or "\0" in name:
        if not parts and not name.startswith("/"):
            return "."
        raise BadArchive(f"the tar has a member outside itself: {name[:100]!r}")
    return "/".join(parts)


def _pax_records(data: bytes) -> dict[str, str]:
    """Return the records of a pax extended header: `<length> <key>=<value>\\n`, each length counting all of it."""
    records: dict[str, str] = {}
    while data:
        length, space, _ = data[:20].partition(b" ")
        if not space or not length.isdigit() or not len(length) + 3 <= int(length) <= len(data):
            raise BadArchive("the tar has an extended header that cannot be read")
        record, data = data[len(length) + 1 : int(length)], data[int(length) :]
        key, _, value = record.rstrip(b"\n").partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return records


def _rewritten(manifest: bytes | None, names: set[str], tag: str) -> bytes:
    if manifest is None:
        raise BadArchive("the tar has no manifest.json: it is not one that `docker save` writes")
    try:
        (image,) = json.loads(manifest)
        config, layers = image["Config"], image["Layers"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadArchive("the tar's manifest.json does not describe exactly one image") from None
    if not isinstance(layers, list):
        raise BadArchive("the tar's manifest.json has no list of layers")
    for path in [config, *layers]:
        if not isinstance(path, str) or _plain_name(path) not in names:
            raise BadArchive(f"the tar lacks a file that its manifest.json names: {str(path)[:100]!r}")
    return json.dumps([{"Config": config, "RepoTags": [tag], "Layers": layers}]).encode()
