"""Keys of operators: who may manage what over HTTP, and until when.

Kept beside the database in `operator_keys.json` of the data directory, names and hashes alone: a key is shown once,
when it is made. The file is small and read again when it changed, so that a key made on the command line counts at
once in the running daemon. Written whole and renamed, mode 0600: a reader never sees half of it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ngpu_bootstrap.credentials import OPERATOR_PREFIX, SECRET_BYTES, Token, make_token, opens, stored_hash
from ngpu_bootstrap.errors import Forbidden, Unauthorized
from ngpu_daemon.errors import OperatorError

FILE_NAME = "operator_keys.json"


class Scope(StrEnum):
    """What a key may do; `ALL` does everything, any other its own."""

    ALL = "all"
    READ = "read"  # whatever shows and changes nothing
    WORKSPACES = "workspaces"  # workspaces and their tokens
    TASKS = "tasks"  # clients' tasks: cancel them
    NODES = "nodes"  # nodes: admit, drain, challenge
    ACCOUNTS = "accounts"  # users and products of existing NGPU clients


class KeyStatus(StrEnum):
    """What comes of a key that is shown."""

    ALLOWED = "allowed"
    UNKNOWN = "unknown"
    EXPIRED = "expired"
    OUT_OF_SCOPE = "out_of_scope"


_NAME = re.compile(r"[A-Za-z0-9_.]{1,64}")
_NOBODY = bytes(32)


class OperatorKeysError(OperatorError):
    """The file cannot be used, or what was asked of it makes no sense."""


@dataclass(frozen=True, slots=True)
class OperatorKey:
    """A key by what may be known of it."""

    name: str
    hash: bytes
    created_at_ms: int
    scopes: frozenset[Scope] = frozenset({Scope.ALL})
    expires_at_ms: int | None = None


class OperatorKeys:
    """The operator keys of one data directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self._stamp: tuple[int, int] | None = None
        self._keys: dict[str, OperatorKey] = {}

    def all(self) -> Sequence[OperatorKey]:
        """Return every key, oldest first."""
        self._refresh()
        return sorted(self._keys.values(), key=lambda key: key.created_at_ms)

    def judge(self, token: Token, scope: Scope, now_ms: int) -> KeyStatus:
        """Return whether *token* is a key that may do *scope* now. How long it takes tells nothing of any secret."""
        self._refresh()
        known = self._keys.get(token.subject.removeprefix(OPERATOR_PREFIX))
        if not opens(token, known.hash if known is not None else _NOBODY) or known is None or not token.is_operator_key:
            return KeyStatus.UNKNOWN
        if known.expires_at_ms is not None and now_ms >= known.expires_at_ms:
            return KeyStatus.EXPIRED
        if Scope.ALL in known.scopes or scope in known.scopes:
            return KeyStatus.ALLOWED
        return KeyStatus.OUT_OF_SCOPE

    def require(self, token: Token | None, scope: Scope, now_ms: int) -> None:
        """Return if *token* is a key that may do *scope* now.

        Raises:
            Unauthorized: there is none, or it is unknown or expired.
            Forbidden: it is a workspace's token, or a key for something else.
            OperatorKeysError: keys cannot be checked.
        """
        if token is None:
            raise Unauthorized("key_missing", "this call needs an operator key: send `Authorization: Bearer <key>`")
        if not token.is_operator_key:
            raise Forbidden("key_needed", "this call needs an operator key; a workspace token is not enough")
        match self.judge(token, scope, now_ms):
            case KeyStatus.UNKNOWN:
                raise Unauthorized("key_unknown", "this operator key is not known here")
            case KeyStatus.EXPIRED:
                raise Unauthorized("key_expired", "this operator key has expired; have another made")
            case KeyStatus.OUT_OF_SCOPE:
                raise Forbidden("key_scope", f"this operator key may not do this: it lacks the scope {scope.value}")

    def add(self, name: str, *, scopes: Iterable[Scope] = (Scope.ALL,), expires_in_s: float | None = None) -> Token:
        """Make a key called *name* and return it; it is not to be had again.

        Raises:
            OperatorKeysError: the name is taken, or no name.
        """
        if _NAME.fullmatch(name) is None:
            raise OperatorKeysError(f"{name[:64]!r} is no name for a key: use 1 to 64 letters, digits, _ and .")
        self._refresh()
        if name in self._keys:
            raise OperatorKeysError(f"there is a key called {name} already: choose another name, or remove it first")
        token = make_token(OPERATOR_PREFIX + name, secrets.token_bytes(SECRET_BYTES))
        now_ms = time.time_ns() // 1_000_000
        expires_at_ms = None if expires_in_s is None else now_ms + int(expires_in_s * 1000)
        self._keys[name] = OperatorKey(name, stored_hash(token), now_ms, frozenset(scopes), expires_at_ms)
        self._write()
        return token

    def remove(self, name: str) -> None:
        """Remove a key: it opens nothing any more.

        Raises:
            OperatorKeysError: there is none of this name.
        """
        self._refresh()
        if self._keys.pop(name, None) is None:
            raise OperatorKeysError(f"there is no key called {name[:64]}; `ngpu-bootstrap key list` shows them")
        self._write()

    def _refresh(self) -> None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            self._stamp, self._keys = None, {}
            return
        except OSError as error:
            raise OperatorKeysError(f"{self._path} cannot be looked at: {error.strerror}") from None
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp == self._stamp:
            return
        try:
            document = json.loads(self._path.read_bytes())
            self._keys = {
                entry["name"]: OperatorKey(
                    entry["name"],
                    bytes.fromhex(entry["hash"]),
                    entry["created_at_ms"],
                    frozenset(map(Scope, entry.get("scopes", [Scope.ALL]))),
                    entry.get("expires_at_ms"),
                )
                for entry in document["keys"]
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OperatorKeysError(
                f"{self._path} cannot be read ({type(error).__name__}): remove it and make the keys anew"
            ) from None
        self._stamp = stamp

    def _write(self) -> None:
        keys = [
            {
                "name": key.name,
                "hash": key.hash.hex(),
                "created_at_ms": key.created_at_ms,
                "scopes": sorted(key.scopes),
                "expires_at_ms": key.expires_at_ms,
            }
            for key in self._keys.values()
        ]
        new = self._path.with_suffix(".new")
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump({"keys": keys}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            new.rename(self._path)
        except OSError as error:
            raise OperatorKeysError(f"cannot write {self._path}: {error.strerror}") from None
        self._stamp = None
