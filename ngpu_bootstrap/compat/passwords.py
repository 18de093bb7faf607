"""Passwords of accounts, kept as argon2id of what clients send: the hexadecimal MD5 of what a person types.

MD5 is the clients' doing and protects nothing; what is stored is argon2id over it, with a salt. Blocking, some tens of
milliseconds and 64 MiB each: callers use a thread, and bound how many at once.
"""

from __future__ import annotations

import hashlib
import re

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


NOBODY = stored_form(sent_form("nobody's"))
"""Verified in place of an account's that does not exist, so that both take as long."""


def verify(stored: str, sent: str) -> bool:
    """Return whether *sent* is the password that *stored* stands for."""
    try:
        return _hasher.verify(stored, sent.lower())
    except (VerificationError, InvalidHashError):
        return False
