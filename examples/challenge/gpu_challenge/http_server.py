"""The proof over HTTP, one at a time: the product takes most of the memory, there is no room for two.

    GET  /health             {"status": "ok", "arrays": "torch on cuda:0"}
    POST /proof              a puzzle; answers {"proof": id, "root": …} when the product is committed to
    POST /proof/{id}/walk    answers {"ends": …} when the chains are
    POST /proof/{id}/open    {"tiles": [[block, tile], …], "walkers": […]}; answers the openings
    DELETE /proof/{id}       gives the memory back; else that happens after `KEPT_S`

The number in the way of a proof that is not there any more is answered with 404, a second proof with 409.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .arrays import Arrays
from .prover import Proof

KEPT_S = 120.0
MAX_BODY_BYTES = 1 << 20


class Refused(Exception):
    """A request that cannot be done; *status* is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Prover:
    """Holds the one proof under way; its methods are called from any thread, one at a time does something."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        self._one = threading.Lock()
        self._id = ""
        self._proof: Proof | None = None
        self._used_s = 0.0

    def begin(self, puzzle: Any) -> dict[str, Any]:
        """Multiply and commit."""
        with self._one:
            if self._proof is not None and time.monotonic() - self._used_s < KEPT_S:
                raise Refused(409, "another proof is under way")
            self._end()
            try:
                proof = Proof(self.arrays, puzzle)
            except (KeyError, TypeError, ValueError) as error:
                raise Refused(400, f"not a puzzle: {error}") from error
            try:
                proof.compute()
            except BaseException:
                proof.close()
                raise
            self._id, self._proof, self._used_s = secrets.token_hex(8), proof, time.monotonic()
            return {"proof": self._id, "root": proof.root.hex(), "seconds": proof.seconds}

    def walk(self, name: str) -> dict[str, Any]:
        """Follow the chains and commit to their ends."""
        with self._one:
            proof = self._named(name)
            proof.walk()
            return {"ends": proof.ends.hex(), "seconds": proof.seconds}

    def open(self, name: str, spots: Any) -> dict[str, Any]:
        """Open what is asked."""
        with self._one:
            proof = self._named(name)
            try:
                return proof.open(spots["tiles"], spots["walkers"])
            except (KeyError, TypeError, ValueError) as error:
                raise Refused(400, f"cannot open that: {error}") from error

    def close(self, name: str) -> None:
        """Give the memory back."""
        with self._one:
            self._named(name)
            self._end()

    def _named(self, name: str) -> Proof:
        if self._proof is None or not secrets.compare_digest(name, self._id):
            raise Refused(404, "no such proof")
        self._used_s = time.monotonic()
        return self._proof

    def _end(self) -> None:
        if self._proof is not None:
            self._proof.close()
        self._proof, self._id = None, ""


def serve(host: str, port: int, prover: Prover) -> ThreadingHTTPServer:
    """Return a server that listens; the caller runs `serve_forever`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            known = self.path in ("/", "/health")
            self._answer(200 if known else 404, {"status": "ok", "arrays": prover.arrays.name} if known else {})

        def do_POST(self) -> None:
            self._do(self._post)

        def do_DELETE(self) -> None:
            self._do(lambda: prover.close(self.path.removeprefix("/proof/")) or {})

        def _do(self, action: Any) -> None:
            try:
                self._answer(200, action())
            except Refused as refused:
                self._answer(refused.status, {"message": str(refused)})
            except Exception as error:  # out of memory above all: the server lives on
                self._answer(500, {"message": f"{type(error).__name__}: {error}"[:500]})

        def _post(self) -> dict[str, Any]:
            length = int(self.headers.get("Content-Length", 0))
            if length > MAX_BODY_BYTES:
                self.close_connection = True
                raise Refused(413, "too long")
            body = self.rfile.read(length)
            try:
                value = json.loads(body or b"{}")
            except ValueError as error:
                raise Refused(400, "not JSON") from error
            parts = self.path.strip("/").split("/")
            if parts == ["proof"]:
                return prover.begin(value)
            if len(parts) == 3 and parts[0] == "proof" and parts[2] == "walk":
                return prover.walk(parts[1])
            if len(parts) == 3 and parts[0] == "proof" and parts[2] == "open":
                return prover.open(parts[1], value)
            raise Refused(404, "nothing is here")

        def _answer(self, status: int, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    return ThreadingHTTPServer((host, port), Handler)
