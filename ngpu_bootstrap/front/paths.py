"""Request targets taken apart and judged: which port and path of a workspace a call means, and whether it may.

Owns every rule about targets: ports, climbing paths, absolute URLs, parameters given twice. Bytes that pass are
forwarded as they came: a path is decoded only to be judged, since decoding and encoding again would change what the
workspace sees. A path climbs when any reading of it a workspace might make does: percent-decoded once or more often,
`\\` read as `/`, `..;x` read as `..` (servlet path parameters). Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote_plus, unquote_to_bytes

from ngpu_bootstrap.errors import BadRequest, Refusal
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.orders import MAX_TARGET_CHARS

_DECODINGS = 4
_SUSPICIOUS = re.compile(r"\.\.|%|\\")
_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f#]")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a call goes inside a workspace: a declared port, and `/path?query` exactly as the workspace gets it."""

    port: int
    target: str


def split_target(target: str) -> tuple[str, str | None]:
    """Return the path and the raw query (None without `?`) of a request target in origin or absolute form.

    Raises:
        BadRequest: neither form (`*`, an authority), or characters that no target may hold.
    """
    if _FORBIDDEN.search(target) or not target.isascii():
        raise BadRequest("bad_target", "the request target holds characters that must be percent-encoded")
    if not target.startswith("/"):
        scheme, separator, rest = target.partition("://")
        if not separator or scheme.lower() not in ("http", "https"):
            raise BadRequest("bad_target", "the request target must be a path that starts with /")
        slash = rest.find("/")
        target = rest[slash:] if slash >= 0 else "/"
    path, separator, query = target.partition("?")
    return path, query if separator else None


def unslipped(path: str, query: str | None) -> tuple[str, str | None]:
    """Return path and query of a documented call whose `?` was written as `&`, as the documents do in places."""
    path, separator, rest = path.partition("&")
    if not separator:
        return path, query
    return path, rest if query is None else f"{rest}&{query}"


def proxied_target(path: str, query: str | None, declared: Sequence[int]) -> Target:
    """Return what `/proxy/<port>/<path>` means.

    Raises:
        BadRequest: no port, a port out of range, or a path that climbs.
        Refusal: a port the workspace does not declare, a target too long to be signed.
    """
    port_text, separator, rest = path.removeprefix("/proxy/").partition("/")
    port = parse_port(port_text, declared)
    return workspace_target(port, "/" + rest if separator else "/", query)


def workspace_target(port: int, path: str, query: str | None) -> Target:
    """Return the target for *path* (with its leading slash) of a workspace, judged.

    Raises:
        BadRequest: the path climbs or holds control characters.
        Refusal: too long.
    """
    check_path(path)
    target = path if query is None else f"{path}?{query}"
    if len(target) > MAX_TARGET_CHARS:
        raise Refusal(
            414,
            "target_too_long",
            f"path and query are {len(target)} characters, more than the {MAX_TARGET_CHARS} an order can name",
        )
    return Target(port, target)


def parse_port(text: str, declared: Sequence[int]) -> int:
    """Return the port written in *text*; an empty text means the first port the workspace declares.

    Raises:
        BadRequest: not a port number.
        Refusal: 404, the workspace does not declare it.
    """
    if not text and declared:
        return declared[0]
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536):
        raise BadRequest("bad_port", "the port must be a number from 1 to 65535")
    port = int(text)
    if port not in declared:
        known = ", ".join(str(known) for known in declared) or "none"
        raise Refusal(404, "port_undeclared", f"the workspace does not declare port {port}; it declares: {known}")
    return port


def check_path(path: str) -> None:
    """Refuse a path that climbs out of its place, or hides control characters, in any reading of it.

    Raises:
        BadRequest: with the reason `path_climbs` or `bad_path`.
    """
    if not _SUSPICIOUS.search(path):
        return
    reading = path.encode()
    for _ in range(_DECODINGS):
        for segment in reading.replace(b"\\", b"/").split(b"/"):
            if segment.partition(b";")[0] == b"..":
                raise BadRequest("path_climbs", "the path climbs (`..`, plain or encoded); send the path itself")
        decoded = unquote_to_bytes(reading)
        if decoded == reading:
            break
        reading = decoded
        if any(byte < 0x20 or byte == 0x7F for byte in reading):
            raise BadRequest("bad_path", "the path holds an encoded control character; remove it")


def parameter_target(param_url: str, param_port: str, declared: Sequence[int]) -> Target:
    """Return what `paramUrl` (decoded) and `paramPort` of `POST /user/schedulingTask` mean.

    `paramUrl` is a path of the workspace, with or without its leading slash, and may bring its own query.

    Raises:
        BadRequest: an absolute URL, a path that climbs, characters no target may hold, a bad port.
        Refusal: an undeclared port, a target too long.
    """
    if _ABSOLUTE.match(param_url) or param_url.replace("\\", "/").startswith("//"):
        raise BadRequest(
            "absolute_url",
            "paramUrl is an absolute URL; send only the path inside the workspace, such as sdapi/v1/txt2img",
        )
    if _FORBIDDEN.search(param_url) or not param_url.isascii():
        raise BadRequest(
            "bad_path", "paramUrl holds spaces, control characters, # or non-ASCII text; percent-encode them"
        )
    path, separator, query = param_url.partition("?")
    port = parse_port(param_port, declared)
    return workspace_target(port, "/" + path.removeprefix("/"), query if separator else None)


def parse_parameters(query: str | None, known: Sequence[str]) -> dict[str, str]:
    """Return the decoded values of the *known* parameters of a raw query; parameters not named there are left alone.

    Raises:
        BadRequest: one of them is given twice: which one counts would be a guess.
    """
    values: dict[str, str] = {}
    if not query:
        return values
    for part in query.split("&"):
        raw_name, _, raw_value = part.partition("=")
        name = unquote_plus(raw_name)
        if name not in known:
            continue
        if name in values:
            raise BadRequest("duplicate_parameter", f"the parameter {name} is given more than once; send it once")
        values[name] = unquote_plus(raw_value, errors="replace")
    return values
