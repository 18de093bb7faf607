"""A registry that can go wrong: the distribution API over plain HTTP on loopback, with faults to be switched on.

Only the standard library, a thread a connection: the engine under test is a real one and talks real HTTP to it. Images
are made here too, of layers of random bytes. What a test may set is `FakeRegistry`'s fields; what happened is in
`requests`.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import random
import socket
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
PIECE = 16 * 1024


@dataclass(frozen=True)
class MadeImage:
    """An image, before it is anywhere.

    Attributes:
        blobs: configuration and layers by digest.
        layers: digests of the layers, from the bottom up.
    """

    manifest: bytes
    config: str
    layers: tuple[str, ...]
    blobs: dict[str, bytes] = field(repr=False)

    @classmethod
    def of(cls, config: bytes, layers: Sequence[bytes]) -> MadeImage:
        """Return the image of a configuration and gzipped layers."""
        blobs = {digest_of(blob): blob for blob in (*layers, config)}
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "size": len(config), "digest": digest_of(config)},
            "layers": [{"mediaType": LAYER, "size": len(layer), "digest": digest_of(layer)} for layer in layers],
        }
        digests = tuple(digest_of(layer) for layer in layers)
        return cls(json.dumps(manifest).encode(), digest_of(config), digests, blobs)

    @property
    def digest(self) -> str:
        return digest_of(self.manifest)

    @property
    def size(self) -> int:
        return sum(len(self.blobs[layer]) for layer in self.layers)


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def layer_of(content: bytes, name: str) -> tuple[bytes, str]:
    """Return a gzipped layer that holds one file, and the digest of it unpacked."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), compresslevel=1, mtime=0), digest_of(packed.getvalue())


def make_image(
    sizes: Sequence[int], seed: object, *, architecture: str = "amd64", base: Sequence[bytes] = ()
) -> MadeImage:
    """Return an image of layers of *sizes* random bytes, the same for the same *seed*.

    Args:
        base: contents of layers below these, for images that share some.
    """
    source = random.Random(str(seed))
    contents = [*base, *(source.randbytes(size) for size in sizes)]
    layers, unpacked = [], []
    for number, content in enumerate(contents):
        data, diff_id = layer_of(content, f"data-{number}")
        layers.append(data)
        unpacked.append(diff_id)
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Cmd": ["/data-0"], "Labels": {"seed": str(seed)}},
        "rootfs": {"type": "layers", "diff_ids": unpacked},
    }
    return MadeImage.of(json.dumps(config).encode(), layers)


def list_of(*images: tuple[str, MadeImage]) -> bytes:
    """Return a manifest list: an image for each architecture."""
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": LIST,
            "manifests": [
                {
                    "mediaType": MANIFEST,
                    "size": len(image.manifest),
                    "digest": image.digest,
                    "platform": {"os": "linux", "architecture": architecture},
                }
                for architecture, image in images
            ],
        }
    ).encode()


class FakeRegistry:
    """One registry on a port of its own.

    Attributes:
        login: user name and password it wants; None for everybody.
        tokens: with a login, hands out tokens instead of taking the password itself.
        answers: status codes to give instead, one after the other, by a part of the path; the last of 0 ends them.
        retry_after: seconds, said with 429.
        bytes_per_s: how fast a blob comes; None for as fast as it goes.
        corrupt: digests of blobs that come damaged.
        cuts: how often a blob's connection is cut in its middle, by digest.
        stalls: digests whose middle never comes, while `stalling` is set.
        requests: method and path of every request.
        open_blobs: blobs on their way now, small ones left out.
    """

    def __init__(self) -> None:
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.login: tuple[str, str] | None = None
        self.tokens = False
        self.answers: dict[str, list[int]] = {}
        self.retry_after: int | None = None
        self.bytes_per_s: float | None = None
        self.corrupt: set[str] = set()
        self.cuts: Counter[str] = Counter()
        self.stalls: set[str] = set()
        self.requests: list[str] = []
        self.authorizations: list[str] = []
        self.open_blobs = 0
        self.stopped = threading.Event()
        self.lock = threading.Condition()
        registry = self

        class Handler(_Handler):
            owner = registry

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"

    def push(self, image: MadeImage, name: str, *tags: str) -> str:
        """Take *image* in as *name*; return the reference of its first tag."""
        self.blobs.update(image.blobs)
        for target in (*tags, image.digest):
            self.manifests[name, target] = (MANIFEST, image.manifest)
        return f"{self.host}/{name}:{tags[0]}" if tags else f"{self.host}/{name}@{image.digest}"

    def push_list(self, listing: bytes, name: str, *tags: str) -> None:
        """Take a manifest list in; its images are pushed by themselves."""
        for target in (*tags, digest_of(listing)):
            self.manifests[name, target] = (LIST, listing)

    def count(self, part: str) -> int:
        """Return how many requests had *part* in their path."""
        return sum(part in request for request in self.requests)

    def wait_for_downloads(self, count: int) -> None:
        """Wait until *count* blobs are on their way, for 10 s at most."""
        with self.lock:
            assert self.lock.wait_for(lambda: self.open_blobs == count, timeout=10), f"{self.open_blobs} downloads"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Stop, with every connection."""
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def a_registry() -> Iterator[FakeRegistry]:
    """Yield a running registry without images and without faults."""
    registry = FakeRegistry()
    registry.start()
    try:
        yield registry
    finally:
        registry.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def server_bind(self) -> None:
        # the standard one asks for this machine's name, and may wait for it
        socket.socket.bind(self.socket, self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    owner: FakeRegistry
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        owner, path = self.owner, urlsplit(self.path).path
        with owner.lock:
            owner.requests.append(f"{self.command} {path}")
            if authorization := self.headers.get("Authorization"):
                owner.authorizations.append(authorization)
        if path == "/token":
            return self._give_token()
        if not self._is_authorized():
            return self._ask_for_login()
        status = self._scripted(path)
        if status:
            return self._error(
                status, {429: "TOOMANYREQUESTS", 500: "UNKNOWN"}.get(status, "DENIED"), f"as told: {status}"
            )
        if path in ("/v2", "/v2/"):
            return self._send(200, b"{}", "application/json")
        name, _, rest = path.removeprefix("/v2/").partition("/manifests/")
        if rest:
            found = owner.manifests.get((name, rest))
            if found is None:
                return self._error(404, "MANIFEST_UNKNOWN", "manifest unknown")
            return self._send(200, found[1], found[0])
        digest = path.rpartition("/blobs/")[2]
        blob = owner.blobs.get(digest)
        if blob is None:
            return self._error(404, "BLOB_UNKNOWN", "blob unknown")
        return self._send_blob(digest, blob)

    def _scripted(self, path: str) -> int:
        with self.owner.lock:
            for part, statuses in self.owner.answers.items():
                if part in path and statuses:
                    return statuses.pop(0) if len(statuses) > 1 else statuses[0]
        return 0

    def _is_authorized(self) -> bool:
        login = self.owner.login
        if login is None:
            return True
        given = self.headers.get("Authorization", "")
        return given == ("Bearer good-token" if self.owner.tokens else _basic(login))

    def _ask_for_login(self) -> None:
        if self.owner.tokens:
            challenge = f'Bearer realm="http://{self.owner.host}/token",service="fake"'
        else:
            challenge = 'Basic realm="fake"'
        self._error(401, "UNAUTHORIZED", "authentication required", {"WWW-Authenticate": challenge})

    def _give_token(self) -> None:
        assert self.owner.login is not None
        if self.headers.get("Authorization") != _basic(self.owner.login):
            return self._error(401, "UNAUTHORIZED", "incorrect username or password")
        assert parse_qs(urlsplit(self.path).query).get("scope")
        return self._send(200, b'{"token": "good-token"}', "application/json")

    def _error(self, status: int, code: str, message: str, fields: dict[str, str] | None = None) -> None:
        body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
        fields = dict(fields or {})
        if status == 429 and self.owner.retry_after is not None:
            fields["Retry-After"] = str(self.owner.retry_after)
        self._send(status, body, "application/json", fields)

    def _send(self, status: int, body: bytes, kind: str, fields: dict[str, str] | None = None) -> None:
        self._head(status, len(body), kind, {"Docker-Content-Digest": digest_of(body), **(fields or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, kind: str, fields: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_blob(self, digest: str, blob: bytes) -> None:
        owner = self.owner
        if digest in owner.corrupt:
            blob = blob[:-20] + bytes(byte ^ 0xFF for byte in blob[-20:])
        with owner.lock:
            cut = owner.cuts[digest] > 0
            owner.cuts[digest] -= cut
            owner.open_blobs += len(blob) > PIECE
            owner.lock.notify_all()
        try:
            self._head(200, len(blob), "application/octet-stream", {"Docker-Content-Digest": digest})
            for start in range(0, len(blob), PIECE):
                if start >= len(blob) // 2:
                    if cut:
                        self.close_connection = True
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                    while digest in owner.stalls and not owner.stopped.is_set():
                        if _has_left(self.connection):
                            return
                        time.sleep(0.02)
                self.wfile.write(blob[start : start + PIECE])
                if owner.bytes_per_s is not None and owner.stopped.wait(PIECE / owner.bytes_per_s):
                    return
        except OSError:
            self.close_connection = True
        finally:
            with owner.lock:
                owner.open_blobs -= len(blob) > PIECE
                owner.lock.notify_all()


def _has_left(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)


def _basic(login: tuple[str, str]) -> str:
    return "Basic " + base64.b64encode(":".join(login).encode()).decode()
