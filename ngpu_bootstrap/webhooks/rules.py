"""What may be called back, what is sent, and when it is tried again. Pure.

A client names the URL, so this bootstrap would be a way into its operator's own network if it called just anything. So:
`https` only, plain `http` for this machine's own loopback where the clients are on this machine too; no credentials in
the URL; and no address that is not public, unless the operator allows its network. A name is resolved once, every
address it has must be allowed, and the connection goes to the address that was judged, so that a second answer of the
name's owner (DNS rebinding) changes nothing. Redirects are not followed.

The signature is HMAC-SHA256 over `<timestamp>.<body>`. Its key follows from the token the task was asked for with, so
there is nothing to hand out or to keep: HMAC-SHA256(SHA-256(token), "ngpu-webhook-v1"). The bootstrap has that hash of
the token and not the token; the client has the token.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from ngpu_bootstrap.store.records import TaskRecord
from ngpu_daemon.addresses import IpAddress, carried, is_public

IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_KEY_LABEL = b"ngpu-webhook-v1"
_FIRST_PAUSE_MS = 2_000
_LONGEST_PAUSE_MS = 2 * 3600 * 1000
# 2 s, 8 s, 32 s ... 2 h, 2 h: about a day in all
MAX_TRIES = 18


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart. *path* has the query."""

    secure: bool
    host: str
    port: int
    path: str
    authority: str


@dataclass(frozen=True, slots=True)
class WebhookRules:
    """What this bootstrap calls.

    Attributes:
        allowed: networks that may be called though they are not public.
        loopback: this machine's own loopback may be called: its clients are on this machine.
    """

    allowed: tuple[IpNetwork, ...] = ()
    loopback: bool = False

    def problem(self, url: str) -> str:
        """Return what is wrong with *url* as it stands, empty when it may be tried."""
        try:
            target = parse_url(url)
        except ValueError as error:
            return str(error)
        address = _literal(target.host)
        if address is not None:
            return self.address_problem(address, secure=target.secure)
        if not target.secure and target.host != "localhost":
            return "it must begin with https://"
        if target.host == "localhost" and not self.loopback and not self.allowed:
            return "this machine itself is not called"
        return ""

    def address_problem(self, address: IpAddress, *, secure: bool) -> str:
        """Return why *address* is not called, empty when it is."""
        inner = carried(address)
        if any(inner.version == network.version and inner in network for network in self.allowed):
            return "" if secure or inner.is_loopback else "it must begin with https://"
        if inner.is_loopback and self.loopback:
            return ""
        if not is_public(address):
            return f"{address} is no public address"
        return "" if secure else "it must begin with https://"

    def choose(self, addresses: Sequence[str], *, secure: bool) -> tuple[str, str]:
        """Return the address to connect to among those a name has, or "" and why not: each of them must be allowed."""
        if not addresses:
            return "", "its name has no address"
        for text in addresses:
            problem = self.address_problem(ipaddress.ip_address(text.partition("%")[0]), secure=secure)
            if problem:
                return "", problem
        return addresses[0], ""


def parse_url(url: str) -> Target:
    """Return *url* taken apart.

    Raises:
        ValueError: it is none, or has parts that no call needs; the message says so.
    """
    if not url.isascii() or any(ord(letter) <= 32 or ord(letter) == 127 for letter in url) or "\\" in url:
        raise ValueError("it holds characters that no URL has")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("it is no URL") from None
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ValueError("it must begin with https://")
    if "@" in parts.netloc or parts.fragment:
        raise ValueError("it must hold neither credentials nor a fragment")
    secure = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(secure, parts.hostname, port or (443 if secure else 80), path, parts.netloc)


def signing_key(token_hash: bytes) -> bytes:
    """Return the key that signs the calls for tasks asked for with the token of this hash."""
    return hmac.digest(token_hash, _KEY_LABEL, hashlib.sha256)


def signature(key: bytes, timestamp_s: int, body: bytes) -> str:
    """Return the field `Ngpu-Webhook-Signature`."""
    return "v1=" + hmac.new(key, b"%d." % timestamp_s + body, hashlib.sha256).hexdigest()


def body_of(task: TaskRecord) -> bytes:
    """Return what is sent: how the task ended. Its data is asked for with the id."""
    document = {
        "taskID": task.task_id,
        "taskId": task.task_id,
        "workspace": task.client,
        "api": task.api,
        "state": int(task.state),
        "state_name": task.state.name.lower(),
        "result_code": task.result_code,
        "reason": task.reason,
        "message": task.message,
        "verdict": task.verdict,
        "accepted_at_ms": task.accepted_at_ms,
        "finished_at_ms": task.finished_at_ms,
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def next_pause_ms(tries: int, draw: float) -> int | None:
    """Return how long to wait after the *tries*-th failed call, None to give up; *draw* in [0, 1) spreads them."""
    if tries >= MAX_TRIES:
        return None
    pause_ms = min(_FIRST_PAUSE_MS * 4 ** (tries - 1), _LONGEST_PAUSE_MS)
    return int(pause_ms * (0.75 + draw / 2))


def _literal(host: str) -> IpAddress | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        # what a resolver reads as an address although it is none: 127.1, 0x7f000001, 2130706433
        return None
