"""The account key at rest: a Web3 Secret Storage v3 file (scrypt, AES-128-CTR), and the passphrase that opens it.

The format is Ethereum's (https://ethereum.org/en/developers/docs/data-structures-and-encoding/web3-secret-storage/).
This module owns the file's mode, a shape checked before anything is computed from it, bounds on the work a foreign file
may ask for, and one class for each way it can fail. The cryptography is OpenSSL's. `eth_keyfile`, which the tests
compare with, would do it too, but takes 0.6 s to import, which every start of a daemon would pay.

The passphrase comes from a file or a systemd credential, never from the command line or the environment, which other
processes and children can read.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
import uuid
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from pydantic import BaseModel, Field, ValidationError

from ngpu_daemon.errors import OperatorError
from ngpu_protocol.identity import Account, Address, parse_address
from ngpu_protocol.keccak import keccak

CREDENTIAL_NAME = "passphrase"
MAX_FILE_BYTES = 64 * 1024
# scrypt takes 128 * r * (n + p) bytes, and works through 128 * n * r of them p times; geth's and our standard (n=2**18,
# r=8, p=1) is 256 MiB and about a second
MAX_SCRYPT_BYTES = 1 << 30
MAX_PBKDF2_ROUNDS = 10_000_000


class KeystoreError(OperatorError):
    """The keystore cannot be used; `path` says which."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


class KeystoreMissing(KeystoreError):
    """There is no keystore where it should be."""


class KeystoreExists(KeystoreError):
    """There is a keystore already, and an account key is never overwritten."""


class KeystoreReadableByOthers(KeystoreError):
    """Users other than the owner may read or write the file."""


class KeystoreDamaged(KeystoreError):
    """The file is not a keystore this software can read, whatever the passphrase."""


class WrongPassphrase(KeystoreError):
    """The passphrase does not open the keystore (or its ciphertext was changed: the two cannot be told apart)."""


class PassphraseUnavailable(OperatorError):
    """No passphrase was given, or its file cannot be read."""


class PassphraseReadableByOthers(PassphraseUnavailable):
    """Every user of the machine may read the passphrase's file, or others than its owner may write it."""


class Kdf(StrEnum):
    """How much work the passphrase costs to try."""

    STANDARD = "standard"  # n=2**18: about a second and 256 MiB, what other Ethereum software writes
    LIGHT = "light"  # n=2**12: milliseconds, for keys of no value


_SCRYPT_N = {Kdf.STANDARD: 1 << 18, Kdf.LIGHT: 1 << 12}
_SCRYPT_R, _SCRYPT_P = 8, 1


# -- the file ----------------------------------------------------------------------------------------------------------


def write_keystore(path: Path, account: Account, passphrase: str, kdf: Kdf = Kdf.STANDARD) -> None:
    """Encrypt the account's key into a new file at *path*, mode 0600, whole or not at all.

    Raises:
        KeystoreExists: there is a file already; it is left as it is.
        KeystoreError: the file cannot be written.
    """
    document = _encrypted(account, passphrase.encode(), _SCRYPT_N[Kdf(kdf)])
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(document, file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            # link, not rename: it fails where a file stands already, so that no key is ever replaced
            os.link(draft, path)
        finally:
            draft.unlink()
        _sync_directory(path.parent)
    except FileExistsError:
        raise KeystoreExists(path, f"{path} exists already: an account key is never overwritten") from None
    except OSError as error:
        raise KeystoreError(path, f"cannot write the keystore {path}: {error.strerror}") from None


def open_keystore(path: Path, passphrase: str, *, private: bool = True) -> Account:
    """Return the account in the keystore at *path*. Takes about a second of CPU for a standard one.

    Args:
        private: refuse a file that other users may read; off for a keystore that is only being imported.

    Raises:
        KeystoreMissing, KeystoreReadableByOthers, KeystoreDamaged, WrongPassphrase: as their names say.
        KeystoreError: the file cannot be read.
    """
    document = _parse(path, _read_private(path, private=private))
    try:
        key = _decrypted(document["crypto"], passphrase.encode())
    except (ValueError, OverflowError, MemoryError) as error:
        raise KeystoreDamaged(path, f"keystore {path} is damaged: {type(error).__name__} when decrypting it") from None
    if key is None:
        raise WrongPassphrase(path, f"the passphrase does not open the keystore {path}")
    try:
        account = Account.from_key(key)
    except ValueError:
        raise KeystoreDamaged(path, f"keystore {path} is damaged: it does not hold a secp256k1 key") from None
    stated = document.get("address")
    if stated is not None and stated.lower().removeprefix("0x") != account.address.lower().removeprefix("0x"):
        raise KeystoreDamaged(path, f"keystore {path} is damaged: it names {stated} but holds {account.address}")
    return account


def keystore_address(path: Path) -> Address:
    """Return the address a keystore says it holds: public, so no passphrase is asked for.

    Raises:
        KeystoreMissing, KeystoreReadableByOthers, KeystoreDamaged, KeystoreError: as `open_keystore`.
    """
    stated = _parse(path, _read_private(path, private=True)).get("address")
    if stated is None:
        raise KeystoreDamaged(path, f"keystore {path} does not name its address: import it anew with `init`")
    return parse_address("0x" + stated.lower().removeprefix("0x"))


def _read_private(path: Path, *, private: bool) -> bytes:
    try:
        # O_NONBLOCK: opening a FIFO must not hang
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise KeystoreMissing(path, f"there is no keystore at {path}: run `init` first") from None
    except OSError as error:
        raise KeystoreError(path, f"cannot read the keystore {path}: {error.strerror}") from None
    try:
        # asked of the open file, not of the path: nobody can swap it in between
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise KeystoreDamaged(path, f"keystore {path} is not a regular file")
        if private and mode & 0o077:
            raise KeystoreReadableByOthers(
                path, f"keystore {path} can be read by other users (mode {stat.S_IMODE(mode):04o}): chmod 600 it"
            )
        content = os.read(descriptor, MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_FILE_BYTES:
        raise KeystoreDamaged(path, f"keystore {path} is damaged: larger than {MAX_FILE_BYTES} bytes")
    return content


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- its cryptography --------------------------------------------------------------------------------------------------


def _encrypted(account: Account, passphrase: bytes, n: int) -> dict[str, Any]:
    salt, iv = secrets.token_bytes(32), secrets.token_bytes(16)
    derived = _scrypt(passphrase, salt, n, _SCRYPT_R, _SCRYPT_P)
    ciphertext = _aes_ctr(derived[:16], iv, account.key_bytes)
    return {
        "address": account.address.lower().removeprefix("0x"),
        "crypto": {
            "cipher": "aes-128-ctr",
            "cipherparams": {"iv": iv.hex()},
            "ciphertext": ciphertext.hex(),
            "kdf": "scrypt",
            "kdfparams": {"dklen": 32, "n": n, "r": _SCRYPT_R, "p": _SCRYPT_P, "salt": salt.hex()},
            "mac": keccak(derived[16:] + ciphertext).hex(),
        },
        "id": str(uuid.uuid4()),
        "version": 3,
    }


def _decrypted(crypto: Mapping[str, Any], passphrase: bytes) -> bytes | None:
    """Return the key in the `crypto` part of a parsed document, or None if it is another passphrase's."""
    parameters = crypto["kdfparams"]
    salt = _bytes(parameters["salt"])
    if crypto["kdf"] == "scrypt":
        derived = _scrypt(passphrase, salt, parameters["n"], parameters["r"], parameters["p"])
    else:
        derived = hashlib.pbkdf2_hmac("sha256", passphrase, salt, parameters["c"], 32)
    ciphertext = _bytes(crypto["ciphertext"])
    if not hmac.compare_digest(keccak(derived[16:] + ciphertext), _bytes(crypto["mac"])):
        return None
    return _aes_ctr(derived[:16], _bytes(crypto["cipherparams"]["iv"]), ciphertext)


def _scrypt(passphrase: bytes, salt: bytes, n: int, r: int, p: int) -> bytes:
    # OpenSSL counts a little more than the formula of MAX_SCRYPT_BYTES, which was looked at before
    return hashlib.scrypt(passphrase, salt=salt, n=n, r=r, p=p, maxmem=MAX_SCRYPT_BYTES + (1 << 26), dklen=32)


def _aes_ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    """Encrypt or decrypt, which is the same."""
    cipher = Cipher(AES(key), CTR(iv)).encryptor()
    return cipher.update(data) + cipher.finalize()


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.lower().removeprefix("0x"))


# -- its shape ---------------------------------------------------------------------------------------------------------

_Hex = Annotated[str, Field(pattern=r"^(0[xX])?([0-9a-fA-F]{2})*$")]
_Hex32 = Annotated[str, Field(pattern=r"^(0[xX])?[0-9a-fA-F]{64}$")]


class _CipherParameters(BaseModel, strict=True):
    iv: Annotated[str, Field(pattern=r"^(0[xX])?[0-9a-fA-F]{32}$")]


class _KdfParameters(BaseModel, strict=True):
    salt: _Hex
    dklen: Literal[32]
    n: Annotated[int, Field(ge=2)] | None = None
    r: Annotated[int, Field(ge=1)] | None = None
    p: Annotated[int, Field(ge=1, le=64)] | None = None
    c: Annotated[int, Field(ge=1, le=MAX_PBKDF2_ROUNDS)] | None = None
    prf: Literal["hmac-sha256"] | None = None


class _Crypto(BaseModel, strict=True):
    cipher: Literal["aes-128-ctr"]
    cipherparams: _CipherParameters
    ciphertext: _Hex32
    kdf: Literal["scrypt", "pbkdf2"]
    kdfparams: _KdfParameters
    mac: _Hex32


class _Document(BaseModel, strict=True):
    version: Literal[3]
    crypto: _Crypto
    address: _Hex | None = None


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        document = _lower_keys(json.loads(content))
    except (ValueError, RecursionError):
        raise KeystoreDamaged(path, f"keystore {path} is damaged: not JSON (cut short?)") from None
    try:
        crypto = _Document.model_validate(document).crypto
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the whole"
        raise KeystoreDamaged(path, f"keystore {path} is damaged: {where}: {problem['msg']}") from None
    parameters = crypto.kdfparams
    if crypto.kdf == "scrypt":
        n, r, p = parameters.n, parameters.r, parameters.p
        if n is None or r is None or p is None:
            raise KeystoreDamaged(path, f"keystore {path} is damaged: crypto.kdfparams lacks n, r or p")
        if n & (n - 1) or 128 * r * (n + p) > MAX_SCRYPT_BYTES or 128 * n * r * p > MAX_SCRYPT_BYTES:
            raise KeystoreDamaged(path, f"keystore {path} is damaged: scrypt n={n} r={r} p={p} is out of bounds")
    elif parameters.c is None or parameters.prf is None:
        raise KeystoreDamaged(path, f"keystore {path} is damaged: crypto.kdfparams lacks c or prf")
    assert isinstance(document, dict)
    return document


def _lower_keys(value: Any) -> Any:
    """Return *value* with the keys of all objects in lower case: early geth wrote `Crypto`."""
    if isinstance(value, dict):
        return {str(key).lower(): _lower_keys(item) for key, item in value.items()}
    return value


# -- the passphrase ----------------------------------------------------------------------------------------------------

_TO_OTHERS = stat.S_IRWXO | stat.S_IWGRP


def read_passphrase(file: Path | None, environ: Mapping[str, str] = os.environ) -> str:
    """Return the passphrase from *file*, else from the systemd credential `passphrase`.

    One line end at the end of the file is not part of it; everything else is.

    Raises:
        PassphraseUnavailable: neither is there, or what is there cannot be read or is empty.
        PassphraseReadableByOthers: the file is there for all to read.
    """
    path = file
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if path is None and directory:
        path = Path(directory) / CREDENTIAL_NAME
    if path is None:
        raise PassphraseUnavailable(
            "no passphrase: give --passphrase-file, or LoadCredential=passphrase:/path in the systemd unit"
        )
    try:
        with path.open("rb") as opened:
            # asked of the open file, not of the path: nobody can swap it in between
            mode = os.fstat(opened.fileno()).st_mode
            content = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PassphraseUnavailable(f"cannot read the passphrase file {path}: {error.strerror}") from None
    # A pipe is nobody's to read, and who may read a credential is systemd's to say. A group may read: that is how root
    # gives a file to one service's user.
    if stat.S_ISREG(mode) and mode & _TO_OTHERS and (not directory or path.parent != Path(directory)):
        raise PassphraseReadableByOthers(
            f"the passphrase file {path} is open to other users (mode {stat.S_IMODE(mode):04o}): chmod 600 it"
        )
    try:
        passphrase = content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise PassphraseUnavailable(f"the passphrase file {path} is not UTF-8 text") from None
    if not passphrase or len(content) > MAX_FILE_BYTES:
        raise PassphraseUnavailable(f"the passphrase file {path} is {'empty' if not passphrase else 'too long'}")
    return passphrase
