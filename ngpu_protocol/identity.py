"""Account keys: one secp256k1 key is a peer's Ethereum address, its libp2p PeerId and its signature.

Owns the forms of that key (address text, PeerId text, public key), signing of 32-byte digests and recovery of the
signer. What is signed is `typed_data`'s business; how the key rests on disk is the keystore's.

A PeerId of a secp256k1 key is an *identity* multihash: the bytes ``00 25`` (identity, 37 bytes), then the protobuf
``08 02 12 21`` (key type secp256k1, 33 bytes) and the compressed key (libp2p peer-ids specification). So the key, and
with it the address, can be read back from the PeerId.

Signatures are 65 bytes ``r | s | v`` with v 27 or 28 and s in the lower half of the curve's order (EIP-2): each
digest has one valid signature per key and nonce, so a third party cannot turn one receipt into two.

Invariant: an `Address` exists only with its EIP-55 checksum, so equal addresses are equal strings.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NewType

import base58
from coincurve import PrivateKey, PublicKey

from ngpu_protocol.ecdsa import recover_point, sign_recoverable
from ngpu_protocol.errors import AddressError, SignatureError
from ngpu_protocol.keccak import keccak

__all__ = [
    "Account",
    "Address",
    "AddressError",
    "SignatureError",
    "address_bytes",
    "address_of_peer_id",
    "address_of_public_key",
    "gpu_id",
    "keccak",
    "parse_address",
    "peer_id_of_public_key",
    "public_key_of_peer_id",
    "recover",
]

Address = NewType("Address", str)

_CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
_HALF_CURVE_ORDER = (_CURVE_ORDER // 2).to_bytes(32, "big")
_PEER_ID_HEAD = bytes.fromhex("002508021221")
_MAX_PEER_ID_CHARS = 64  # 39 bytes are at most 54 base58 digits; decoding is quadratic, so the cap comes first
_ADDRESS_TEXT = re.compile(r"(?:0[xX])?([0-9a-fA-F]{40})")


@lru_cache(maxsize=8192)
def _checksummed(raw: bytes) -> Address:
    """Return the EIP-55 text of 20 bytes: letters in upper case where keccak of the text has a nibble of 8 or more."""
    text = raw.hex()
    mask = keccak(text.encode()).hex()
    return Address("0x" + "".join(c.upper() if m >= "8" else c for c, m in zip(text, mask, strict=False)))


def parse_address(text: str | bytes) -> Address:
    """Return the checksummed address.

    Args:
        text: 40 hexadecimal digits with or without ``0x``, or the 20 bytes themselves. Text in one case is taken as
            it is; in mixed case it must carry the right EIP-55 checksum.

    Raises:
        AddressError: for anything else.
    """
    if isinstance(text, bytes):
        if len(text) != 20:
            raise AddressError(f"an address has 20 bytes, not {len(text)}")
        return _checksummed(text)
    match = _ADDRESS_TEXT.fullmatch(text)
    if match is None:
        raise AddressError(f"not an address (40 hexadecimal digits, with or without 0x): {text[:64]!r}")
    digits = match[1]
    address = _checksummed(bytes.fromhex(digits))
    if digits not in (digits.lower(), digits.upper(), address[2:]):
        raise AddressError(f"the checksum of address {text} is wrong: a digit was probably mistyped")
    return address


def address_bytes(address: Address) -> bytes:
    """Return the 20 bytes of *address*."""
    return bytes.fromhex(address[2:])


def gpu_id(node: Address, uuid: str) -> bytes:
    """Return the 32-byte public name of a GPU: keccak of its node's address and its UUID, hiding the serial."""
    return keccak(address_bytes(node) + uuid.encode())


@lru_cache(maxsize=8192)
def _address_of_point(point: bytes) -> Address:
    """Return the address of an uncompressed public key given without its leading 04."""
    return _checksummed(keccak(point)[12:])


def address_of_public_key(public_key: bytes) -> Address:
    """Return the address of a 33-byte compressed or 65-byte uncompressed public key.

    Raises:
        AddressError: if it is not a point of the curve.
    """
    try:
        return _address_of_point(PublicKey(public_key).format(compressed=False)[1:])
    except (ValueError, TypeError) as error:
        raise AddressError("not a secp256k1 public key") from error


def peer_id_of_public_key(public_key: bytes) -> str:
    """Return the base58 PeerId, ``16Uiu2HA…``, of a 33-byte compressed key.

    Raises:
        AddressError: if it has another length.
    """
    if len(public_key) != 33:
        raise AddressError(f"a compressed public key has 33 bytes, not {len(public_key)}")
    return base58.b58encode(_PEER_ID_HEAD + public_key).decode("ascii")


def public_key_of_peer_id(peer_id: str) -> bytes:
    """Return the 33-byte compressed key inlined in *peer_id*; that it is a point of the curve is not checked.

    Raises:
        AddressError: if the PeerId is of another key type, hashed, or no PeerId at all.
    """
    raw = b""
    if len(peer_id) <= _MAX_PEER_ID_CHARS:
        try:
            raw = base58.b58decode(peer_id)
        except ValueError:  # also UnicodeEncodeError, for text that is not ASCII
            raw = b""
    if len(raw) != 39 or not raw.startswith(_PEER_ID_HEAD):
        raise AddressError(f"not the PeerId of a secp256k1 key (16Uiu2HA…): {peer_id[:64]!r}")
    return raw[len(_PEER_ID_HEAD) :]


def address_of_peer_id(peer_id: str) -> Address:
    """Return the address of the key inlined in *peer_id*.

    Raises:
        AddressError: if the PeerId is of another key type, hashed, or no PeerId at all.
    """
    return address_of_public_key(public_key_of_peer_id(peer_id))


class Account:
    """The holder of one secp256k1 key; prints as its address only.

    Attributes:
        address: the account's address.
        public_key: 33 bytes, compressed.
        peer_id: the libp2p PeerId text, ``16Uiu2HA…``.
    """

    __slots__ = ("_private_key", "address", "peer_id", "public_key")

    def __init__(self, private_key: PrivateKey) -> None:
        self._private_key = private_key
        self.public_key: bytes = private_key.public_key.format()
        self.address: Address = address_of_public_key(self.public_key)
        self.peer_id: str = peer_id_of_public_key(self.public_key)

    @classmethod
    def from_key(cls, key: bytes) -> Account:
        """Return the account of a 32-byte private key.

        Raises:
            ValueError: if it has another length, is zero or is not below the curve's order.
        """
        if len(key) != 32 or not 0 < int.from_bytes(key, "big") < _CURVE_ORDER:
            raise ValueError("a private key is 32 bytes, not zero and below the order of secp256k1")
        return cls(PrivateKey(key))

    @property
    def key_bytes(self) -> bytes:
        """The 32 secret bytes, for the keystore and the libp2p host; never for a log."""
        return self._private_key.secret

    def sign(self, digest: bytes) -> bytes:
        """Return the 65-byte signature ``r | s | v`` of a 32-byte digest: v 27 or 28, low s, nonce by RFC 6979.

        Raises:
            ValueError: if *digest* is not 32 bytes.
        """
        if len(digest) != 32:
            raise ValueError(f"only a 32-byte digest can be signed, not {len(digest)} bytes")
        signature = sign_recoverable(self._private_key, digest)  # libsecp256k1 always gives the low s
        return signature[:64] + (b"\x1b", b"\x1c")[signature[64]]

    def __repr__(self) -> str:
        return f"Account({self.address})"


def recover(digest: bytes, signature: bytes) -> Address:
    """Return the address whose key made *signature* over a 32-byte digest.

    Raises:
        SignatureError: if the signature is not 65 bytes, v is not 27 or 28, s is in the upper half of the order (the
            malleable twin of a valid signature), or no key recovers.
    """
    if len(digest) != 32:
        raise SignatureError(f"a digest has 32 bytes, not {len(digest)}")
    if len(signature) != 65:
        raise SignatureError(f"a signature has 65 bytes, not {len(signature)}")
    recovery_id = signature[64] - 27
    if recovery_id not in (0, 1):
        raise SignatureError(f"v must be 27 or 28, not {signature[64]}")
    if signature[32:64] > _HALF_CURVE_ORDER:
        raise SignatureError("s is in the upper half of the curve's order")
    try:
        point = recover_point(digest, signature[:64], recovery_id)
    except ValueError as error:
        raise SignatureError("no key recovers from the signature") from error
    return _address_of_point(point[1:])
