"""The secret by which this bootstrap decides what nobody may foresee: when a node is challenged, which tasks run again.

32 random bytes in a file of the data directory, readable by nobody else, made at the first start. It signs and opens
nothing; whoever reads it could only foresee the checks.
"""

from __future__ import annotations

import os
from pathlib import Path

from ngpu_daemon.errors import OperatorError

FILE = "trust.secret"
SECRET_BYTES = 32


class TrustSecretError(OperatorError):
    """The file cannot be read or made."""


def trust_secret(directory: Path) -> bytes:
    """Return the secret of the data *directory*, made if there is none.

    Raises:
        TrustSecretError: it cannot be read or made, or is not one.
    """
    path = directory / FILE
    try:
        if not path.exists():
            fresh = path.with_suffix(".new")
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(os.urandom(SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        secret = path.read_bytes()
    except OSError as error:
        raise TrustSecretError(f"cannot use {path}: {error.strerror}") from None
    if len(secret) != SECRET_BYTES:
        raise TrustSecretError(f"{path} does not have {SECRET_BYTES} bytes: remove it, and another is made")
    return secret
