"""Passwords of accounts, kept as argon2id of what clients send: the hexadecimal MD5 of what a person types.

MD5 is the clients' doing and protects nothing; what is stored is argon2id over it, with a salt. Blocking, some tens of
milliseconds and 64 MiB each: callers use a thread, and bound how many at once.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

_SENT = re.compile(r"[0-9a-fA-F]{32}")
_hasher = PasswordHasher()


def sent_form(password: str) -> str:
    """Return what clients send for the password a person types."""
    return hashlib.md5(password.encode(), usedforsecurity=False).hexdigest()


def is_sent_form(text: str) -> bool:
    """Return whether *text* can be what a client sends."""
    return _SENT.fullmatch(text) is not None


def stored_form(sent: str) -> str:
    """Return what is stored for what clients send."""
    return _hasher.hash(sent.lower())


def verify(stored: str | None, sent: str) -> bool:
    """Return whether *sent* is the password that *stored* stands for; None is an account that does not exist.

    Both take as long, so that the time does not tell who has an account.
    """
    nobodys = _nobodys()  # made before the first check, of whomever
    try:
        return _hasher.verify(stored or nobodys, sent.lower()) and stored is not None
    except (VerificationError, InvalidHashError):
        return False


@cache
def _nobodys() -> str:
    """What is verified where there is no account. Not made when the module loads, which would cost every start."""
    return stored_form(sent_form("nobody's"))
