"""The proof over HTTP, one at a time on each GPU: the product takes most of the memory, there is no room for two.

    GET  /health             {"status": "ok", "arrays": "torch on cuda:0"}
    POST /proof              a puzzle, with the number of the GPU that is meant ("gpu", 0 where it is not said) and whom
                             it is for ("for"); answers {"proof": id, "root": …, "version": 2} when the product is
                             committed to
    POST /proof/{id}/walk    {"salt": …}; answers {"ends": …} when the chains that it leads to are
    POST /proof/{id}/open    {"tiles": [[block, tile], …], "walkers": […]}; answers the openings
    DELETE /proof/{id}       gives the memory back; else that happens after `KEPT_S`

The number in the way of a proof that is not there any more is answered with 404, a second proof with 409.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .arrays import Arrays
from .prover import Proof

#: Of what is computed: a bootstrap that means another one says so, and finds nobody wrong for it.
VERSION = 2
KEPT_S = 120.0
MAX_BODY_BYTES = 1 << 20


class Refused(Exception):
    """A request that cannot be done; *status* is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Provers:
    """A prover for each GPU.

    Args:
        owner: nodeAddr of the node this runs beside: puzzles for others are refused, so that nobody lets it answer in
            his place. Empty: whoever asks.
    """

    def __init__(self, arrays: Sequence[Arrays], owner: str = "") -> None:
        self.arrays = ", ".join(each.name for each in arrays)
        self._provers = [Prover(each) for each in arrays]
        self._owner = owner.lower()

    def begin(self, puzzle: Any) -> dict[str, Any]:
        """Multiply and commit, on the GPU that the puzzle names."""
        number = puzzle.get("gpu", 0) if isinstance(puzzle, dict) else 0
        if type(number) is not int or not 0 <= number < len(self._provers):
            raise Refused(404, "there is no such GPU here")
        if self._owner and not _is_for(self._owner, puzzle):
            raise Refused(403, "this puzzle is for another node")
        return self._provers[number].begin(puzzle)

    def named(self, name: str) -> Prover:
        """Return the prover that holds the proof of this name."""
        for prover in self._provers:
            if prover.holds(name):
                return prover
        raise Refused(404, "no such proof")


def _is_for(owner: str, puzzle: Any) -> bool:
    """Return whether a puzzle's seed is made of its nonce, *owner* and one GPU, as it says."""
    try:
        named = puzzle["for"]
        node, gpu = bytes.fromhex(named["node"].removeprefix("0x")), bytes.fromhex(named["gpu"])
        made = hashlib.sha256(b"ngpu challenge of" + bytes.fromhex(named["nonce"]) + node + gpu).hexdigest()
        return bool(made == puzzle["seed"] and named["node"].lower() == owner)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _salt(value: Any) -> bytes:
    try:
        return bytes.fromhex(value["salt"])
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(400, "the salt of the chains is missing, or not hexadecimal") from error


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
            return {"proof": self._id, "root": proof.root.hex(), "version": VERSION, "seconds": proof.seconds}

    def holds(self, name: str) -> bool:
        """Return whether its proof has this name."""
        return self._proof is not None and secrets.compare_digest(name.encode(), self._id.encode())

    def walk(self, name: str, salt: bytes) -> dict[str, Any]:
        """Follow the chains and commit to their ends."""
        with self._one:
            proof = self._named(name)
            proof.walk(salt)
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
        if self._proof is None or not self.holds(name):
            raise Refused(404, "no such proof")
        self._used_s = time.monotonic()
        return self._proof

    def _end(self) -> None:
        if self._proof is not None:
            self._proof.close()
        self._proof, self._id = None, ""


def serve(host: str, port: int, provers: Provers) -> ThreadingHTTPServer:
    """Return a server that listens; the caller runs `serve_forever`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            known = self.path in ("/", "/health")
            self._answer(200 if known else 404, {"status": "ok", "arrays": provers.arrays} if known else {})

        def do_POST(self) -> None:
            self._do(self._post)

        def do_DELETE(self) -> None:
            self._do(self._delete)

        def _do(self, action: Any) -> None:
            try:
                self._answer(200, action())
            except Refused as refused:
                self._answer(refused.status, {"message": str(refused)})
            except Exception as error:  # out of memory above all: the server lives on
                self._answer(500, {"message": f"{type(error).__name__}: {error}"[:500]})

        def _delete(self) -> dict[str, Any]:
            name = self.path.removeprefix("/proof/")
            provers.named(name).close(name)
            return {}

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
                return provers.begin(value)
            if len(parts) == 3 and parts[0] == "proof" and parts[2] == "walk":
                return provers.named(parts[1]).walk(parts[1], _salt(value))
            if len(parts) == 3 and parts[0] == "proof" and parts[2] == "open":
                return provers.named(parts[1]).open(parts[1], value)
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
