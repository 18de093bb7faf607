"""Bytes only one peer can read: sealed to its account key.

A client's registry password and secret environment values travel from bootstrap to node, and lie in the bootstrap's
database, in this form. Owns the box; what is inside is `workspace_secrets`. ECIES, in the shape of SEC 1 section 5.1
with today's primitives (RFC 5869 for the key, NIST SP 800-38D for the cipher)::

    sealed = 01 | E (33 bytes) | ciphertext | tag (16 bytes)
    E      = the compressed public key of an ephemeral secp256k1 key, made for this box alone
    S      = the x coordinate, 32 bytes, of ephemeral key times recipient's public key (ECDH)
    K | N  = HKDF-SHA256(S, salt = E | R, info = "NGPU sealed 1", 44 bytes)     R: the recipient, compressed
    ciphertext, tag = AES-256-GCM(key K, nonce N, associated data = "NGPU sealed 1" 00 | revision (4 bytes) | workspace)

The recipient's key follows from its PeerId, so nothing needs to be exchanged first. A key and nonce are used once,
since the ephemeral key is. Workspace and revision are bound, so that a box cannot be moved under another workspace,
whose image would read it.

What it does not give: proof of who sealed it. Anyone can seal something for a node; a node takes boxes only from a
bootstrap it trusts, on that bootstrap's own connection.

Pure: the caller brings the ephemeral key, 32 bytes fresh from the operating system each time.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.identity import Account

MAX_SEALED_BYTES = 256 * 1024
"""What a box may measure: room for a large environment, and little enough that a list of them fits a message."""

OVERHEAD_BYTES = 1 + 33 + 16

_VERSION = 1
_DOMAIN = b"NGPU sealed 1"
_KEY_BYTES = 32
_NONCE_BYTES = 12
_CURVE = ec.SECP256K1()
_WHAT = "sealed secrets"


def seal(plaintext: bytes, recipient: bytes, *, workspace: str, revision: int, ephemeral_key: bytes) -> bytes:
    """Return *plaintext* sealed so that only the holder of *recipient*'s private key can read it.

    Args:
        recipient: 33-byte compressed public key (`identity.public_key_of_peer_id`).
        workspace: id of the workspace the secrets belong to.
        revision: and its revision, both needed to open the box.
        ephemeral_key: 32 fresh random bytes, never used again: two boxes of one key would share key and nonce.

    Raises:
        ValueError: *recipient* is no public key, *ephemeral_key* no private one, or the box would be too large.
    """
    if len(plaintext) + OVERHEAD_BYTES > MAX_SEALED_BYTES:
        raise ValueError(f"secrets of {len(plaintext)} bytes are too large: {MAX_SEALED_BYTES - OVERHEAD_BYTES} fit")
    ephemeral = Account.from_key(ephemeral_key)
    key, nonce = _keys(ephemeral, _point(recipient), sender=ephemeral.public_key, recipient=recipient)
    sealed = AESGCM(key).encrypt(nonce, plaintext, _associated(workspace, revision))
    return bytes((_VERSION,)) + ephemeral.public_key + sealed


def open_sealed(sealed: bytes, account: Account, *, workspace: str, revision: int) -> bytes:
    """Return what was sealed for *account* under *workspace* and *revision*.

    Raises:
        MalformedError: it is for another key, workspace or revision, was altered, or is no box at all. Which of these
            it was is not told apart, except by form.
    """
    if not OVERHEAD_BYTES <= len(sealed) <= MAX_SEALED_BYTES:
        raise MalformedError(_WHAT, f"{len(sealed)} bytes; {OVERHEAD_BYTES} to {MAX_SEALED_BYTES} are possible")
    if sealed[0] != _VERSION:
        raise MalformedError(_WHAT, f"version {sealed[0]} is not known")
    sender = sealed[1:34]
    try:
        point = _point(sender)
    except ValueError:
        raise MalformedError(_WHAT, "its key is not a compressed point of secp256k1") from None
    key, nonce = _keys(account, point, sender=sender, recipient=account.public_key)
    try:
        return AESGCM(key).decrypt(nonce, sealed[34:], _associated(workspace, revision))
    except InvalidTag:
        raise MalformedError(_WHAT, "sealed for another key, workspace or revision, or altered") from None


def _point(public_key: bytes) -> ec.EllipticCurvePublicKey:
    if len(public_key) != 33:
        raise ValueError(f"a compressed public key has 33 bytes, not {len(public_key)}")
    return ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, public_key)


def _keys(
    account: Account, other: ec.EllipticCurvePublicKey, *, sender: bytes, recipient: bytes
) -> tuple[bytes, bytes]:
    private = ec.derive_private_key(int.from_bytes(account.key_bytes, "big"), _CURVE)
    shared = private.exchange(ec.ECDH(), other)
    derived = HKDF(SHA256(), _KEY_BYTES + _NONCE_BYTES, salt=sender + recipient, info=_DOMAIN).derive(shared)
    return derived[:_KEY_BYTES], derived[_KEY_BYTES:]


def _associated(workspace: str, revision: int) -> bytes:
    return _DOMAIN + b"\0" + revision.to_bytes(4, "big") + workspace.encode()
