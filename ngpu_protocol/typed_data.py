"""EIP-712 digests and the msgpack form of flat, signed records, both from one line of type text.

A record's type text, such as ``Acknowledgement(bytes32 receiptHash,address node,…)``, is EIP-712's own
``encodeType``. It says everything: the order of the fields, how each is encoded for hashing, what each may hold, and
its key in the msgpack map. The Python attribute is the same name in snake case. So there is one table per record and
nothing to keep in step.

Theory (https://eips.ethereum.org/EIPS/eip-712)::

    digest     = keccak(19 01 | domainSeparator | structHash)
    structHash = keccak(typeHash | field_1 | … | field_n)      each field 32 bytes
    uintN, bool, address   left-padded number       string    keccak of its UTF-8
    bytes32                as it is                 bytes32[] keccak of the items, joined

A general encoder spends 0.3 ms on a receipt; this one spends 9 us, because type hashes and domain separators are
computed once, hashes of texts that repeat (methods, outcomes, workspaces) are remembered, nothing is parsed, and one
`struct` packs all words.

The msgpack form is one map: the field names above and ``signature``. Addresses are 20 raw bytes. Unknown keys are
allowed: a later version may add some. Decoding caps the size first, and whatever the bytes are it raises
`MalformedError` or returns a record whose every field has its declared type and range.
"""

from __future__ import annotations

import binascii
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from operator import attrgetter
from typing import Any, Generic, TypeVar

import msgpack  # type: ignore[import-untyped]

from ngpu_protocol.errors import AddressError, MalformedError
from ngpu_protocol.identity import Address, address_bytes, keccak, parse_address

RecordT = TypeVar("RecordT")

DOMAIN_NAME = "NGPU"
DOMAIN_VERSION = "1"
ZERO32 = bytes(32)

MAX_LIST_ITEMS = 256
"""Items a list field may have: far more GPUs than one task holds."""

MAX_NUMBER = 2**63 - 1
"""Largest number accepted from a peer, whatever its type allows: SQL integers end here, honest values far below."""

_SIGNATURE_BYTES = 65
_HASH_OF_NOTHING = keccak(b"")

_REMEMBERED = 509  # digests kept by each type; prime, since addresses of objects have a pattern
_TYPE_TEXT = re.compile(r"(\w+)\(((?:[a-z0-9\[\]]+ \w+,?)+)\)")


@lru_cache(maxsize=4096)
def _text_hash(text: str) -> bytes:
    return keccak(text.encode())


@lru_cache(maxsize=64)
def domain_separator(chain_id: int) -> bytes:
    """Return the 32-byte separator of the domain ``{name: "NGPU", version: "1", chainId}``."""
    return keccak(
        keccak(b"EIP712Domain(string name,string version,uint256 chainId)")
        + _text_hash(DOMAIN_NAME)
        + _text_hash(DOMAIN_VERSION)
        + chain_id.to_bytes(32, "big")
    )


@lru_cache(maxsize=64)
def _digest_head(chain_id: int) -> bytes:
    return b"\x19\x01" + domain_separator(chain_id)


@dataclass(frozen=True, slots=True)
class _FieldCodec:
    """How one field is hashed, packed, and checked when it arrives (`accept` raises ValueError or AddressError).

    Attributes:
        word: the `struct` format of its 32 bytes; where it takes bytes, they are 32 and nothing else.
        hashed: makes what *word* takes of the value; None where that is the value itself.
    """

    word: str
    hashed: Callable[[Any], bytes] | None
    packed: Callable[[Any], Any] | None
    accept: Callable[[Any], Any]


def _uint(bits: int) -> _FieldCodec:
    most = min((1 << bits) - 1, MAX_NUMBER)

    def accept(value: object) -> int:
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"must be a number from 0 to {most}")
        return value

    return _FieldCodec({16: "30xH", 32: "28xI", 64: "24xQ"}[bits], None, None, accept)


def _accept_bool(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError("must be true or false")
    return value


# A long text is hashed anew each time, so that a peer's long targets cannot fill the memory of short ones.
def _hash_text(value: str) -> bytes:
    return _text_hash(value) if len(value) <= 256 else keccak(value.encode())


def _accept_text(value: object) -> str:
    if type(value) is not str:
        raise ValueError("must be text")
    value.encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair, which JSON can spell
    return value


@lru_cache(maxsize=4096)
def _hash_address(value: Address) -> bytes:
    raw = address_bytes(value)
    if len(raw) != 20:
        raise ValueError(f"{value} is not an address")
    return raw.rjust(32, b"\0")


def _accept_address(value: object) -> str:
    if type(value) is not bytes:
        raise ValueError("must be the 20 bytes of an address")
    return parse_address(value)


def _hash_bytes32(value: bytes) -> bytes:
    if len(value) != 32:
        raise ValueError(f"{len(value)} bytes where 32 belong")
    return value


def _accept_bytes32(value: object) -> bytes:
    if type(value) is not bytes or len(value) != 32:
        raise ValueError("must be 32 bytes")
    return value


def _hash_bytes32_list(value: tuple[bytes, ...]) -> bytes:
    return keccak(b"".join(map(_hash_bytes32, value))) if value else _HASH_OF_NOTHING


def _accept_bytes32_list(value: object) -> tuple[bytes, ...]:
    if type(value) is not tuple or len(value) > MAX_LIST_ITEMS:
        raise ValueError(f"must be a list of at most {MAX_LIST_ITEMS} items")
    return tuple(map(_accept_bytes32, value))


_CODECS: dict[str, _FieldCodec] = {
    "uint16": _uint(16),
    "uint32": _uint(32),
    "uint64": _uint(64),
    "bool": _FieldCodec("31x?", None, None, _accept_bool),
    "string": _FieldCodec("32s", _hash_text, None, _accept_text),
    "address": _FieldCodec("32s", _hash_address, address_bytes, _accept_address),
    "bytes32": _FieldCodec("32s", _hash_bytes32, None, _accept_bytes32),
    "bytes32[]": _FieldCodec("32s", _hash_bytes32_list, None, _accept_bytes32_list),
}


class SignedType(Generic[RecordT]):
    """One record type: its digest, and its msgpack map with the signature beside the fields.

    Attributes:
        text: EIP-712's encodeType of the record, which is also the table this object works by.
        fields: ``(solidity type, name)`` in order.
        attributes: the record's attribute per field.
        record: the dataclass.
        values: gives the values of a record's fields, in order.
    """

    def __init__(self, text: str, record: type[RecordT], *, what: str, max_bytes: int) -> None:
        """Build the codec of *record*.

        Args:
            text: the type text; *record* is a dataclass with the same fields in the same order, in snake case.
            record: called with the fields' values in order.
            what: the word for it in a `MalformedError`.
            max_bytes: the largest msgpack map that is decoded.
        """
        match = _TYPE_TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"not a flat EIP-712 type: {text}")
        self.text = text
        self.what = what
        self.max_bytes = max_bytes
        self.primary_type = match[1]
        self.fields = [(kind, name) for kind, name in (part.split(" ") for part in match[2].split(","))]
        self.attributes = [re.sub(r"(?=[A-Z])", "_", name).lower() for _, name in self.fields]
        if self.attributes != [field.name for field in fields(record)]:  # type: ignore[arg-type]
            raise ValueError(f"the fields of {record.__name__} are not those of {text}")
        self.record = record
        self._type_hash = keccak(text.encode())
        self._remembered: list[tuple[RecordT, int, bytes] | None] = [None] * _REMEMBERED
        self.values: Callable[[RecordT], tuple[Any, ...]] = attrgetter(*self.attributes)
        codecs = [_CODECS[kind] for kind, _ in self.fields]
        self._words = struct.Struct(">" + "".join(codec.word for codec in codecs)).pack
        self._hashed = [codec.hashed for codec in codecs]
        self._packed = [(name, codec.packed) for (_, name), codec in zip(self.fields, codecs, strict=True)]
        self._accept = [(name, codec.accept) for (_, name), codec in zip(self.fields, codecs, strict=True)]

    def struct_hash(self, record: RecordT) -> bytes:
        """Return EIP-712's hashStruct, 32 bytes.

        Raises:
            ValueError: if a field is out of its type's range: our own mistake, since decoding never lets one in.
        """
        values = [
            value if hashed is None else hashed(value)
            for hashed, value in zip(self._hashed, self.values(record), strict=True)
        ]
        try:
            return keccak(self._type_hash + self._words(*values))
        except struct.error as error:
            raise ValueError(f"a number of this {self.what} does not fit its type: {error}") from error

    def digest(self, record: RecordT, chain_id: int) -> bytes:
        """Return the 32 bytes that are signed, and by which other records refer to this one."""
        # A record is digested when it is signed, judged and referred to; records are frozen, so once is enough. The
        # memo is direct-mapped by identity (it holds the record, so no other can have its id) and needs no lock.
        place = (id(record) >> 4) % _REMEMBERED
        known = self._remembered[place]
        if known is not None and known[0] is record and known[1] == chain_id:
            return known[2]
        digest = keccak(_digest_head(chain_id) + self.struct_hash(record))
        self._remembered[place] = (record, chain_id, digest)
        return digest

    def pack(self, record: RecordT, signature: bytes) -> bytes:
        """Return the msgpack map of *record* and *signature*, fields in declared order."""
        values = self.values(record)
        wire = {
            name: value if packed is None else packed(value)
            for (name, packed), value in zip(self._packed, values, strict=True)
        }
        wire["signature"] = signature
        return msgpack.packb(wire)  # type: ignore[no-any-return]

    def unpack(self, data: bytes) -> tuple[RecordT, bytes]:
        """Return the record and its 65-byte signature, which is not judged here.

        Raises:
            MalformedError: whatever else *data* is.
        """
        wire = unpack_map(data, what=self.what, max_bytes=self.max_bytes, max_items=MAX_LIST_ITEMS)
        signature = wire.get("signature")
        if type(signature) is not bytes or len(signature) != _SIGNATURE_BYTES:
            raise MalformedError(self.what, "signature must be 65 bytes")
        return self._from_wire(wire), signature

    def _from_wire(self, wire: dict[Any, Any]) -> RecordT:
        values = []
        for name, accept in self._accept:
            try:
                values.append(accept(wire[name]))
            except KeyError:
                raise MalformedError(self.what, f"{name} is missing") from None
            except UnicodeEncodeError:
                raise MalformedError(self.what, f"{name} must be valid Unicode text") from None
            except (ValueError, AddressError) as error:
                raise MalformedError(self.what, f"{name} {error}") from None
        return self.record(*values)

    def to_json(self, record: RecordT, signature: bytes) -> dict[str, Any]:
        """Return the record with its signature for a JSON file: byte strings as 0x text, addresses checksummed."""
        values = dict(zip((name for _, name in self.fields), self.values(record), strict=True))
        values["signature"] = signature
        return {name: _json_value(value) for name, value in values.items()}

    def from_json(self, document: object) -> tuple[RecordT, bytes]:
        """Return what `to_json` was given.

        Raises:
            MalformedError: if *document*, of any type, is anything else.
        """
        if not isinstance(document, dict):
            raise MalformedError(self.what, "must be an object")
        wire: dict[Any, Any] = {}
        for name, kind in (*((name, kind) for kind, name in self.fields), ("signature", "bytes")):
            value = document.get(name)
            if kind in ("address", "bytes32", "bytes"):
                wire[name] = self._bytes_of_json(name, value)
            elif kind == "bytes32[]" and isinstance(value, list):
                wire[name] = tuple(self._bytes_of_json(name, item) for item in value[: MAX_LIST_ITEMS + 1])
            elif name in document:
                wire[name] = value
        signature = wire["signature"]
        if len(signature) != _SIGNATURE_BYTES:
            raise MalformedError(self.what, "signature must be 65 bytes")
        return self._from_wire(wire), signature

    def _bytes_of_json(self, name: str, value: object) -> bytes:
        if not isinstance(value, str) or not value.startswith("0x"):
            raise MalformedError(self.what, f"{name} must be 0x and hexadecimal digits")
        try:
            return binascii.unhexlify(value[2:])
        except ValueError:
            raise MalformedError(self.what, f"{name} must be 0x and hexadecimal digits") from None


def _json_value(value: object) -> object:
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, str):
        return str(value)  # an enumeration's plain word
    return value


def unpack_map(data: bytes, *, what: str, max_bytes: int, max_items: int) -> dict[Any, Any]:
    """Return the msgpack map in *data* with text keys, its arrays as tuples.

    *max_items* caps each array and map inside, and with it memory: msgpack allocates a whole array when it reads its
    header, and headers nest up to 1,024 deep, so that without a cap a few KiB of headers would claim gigabytes.

    Raises:
        MalformedError: if it is larger than *max_bytes*, not msgpack, not a map, or something follows it.
    """
    if len(data) > max_bytes:
        raise MalformedError(what, f"{len(data)} bytes, of which {max_bytes} are allowed")
    try:
        wire = msgpack.unpackb(
            data, use_list=False, max_array_len=max_items, max_map_len=max_items, max_ext_len=0, strict_map_key=True
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise MalformedError(what, "not one msgpack value within the limits") from error
    if not isinstance(wire, dict):
        raise MalformedError(what, "not a map")
    return wire


def to_text(data: bytes) -> str:
    """Return *data* as base64url without padding, the form of orders and receipts in headers."""
    return binascii.b2a_base64(data, newline=False).rstrip(b"=").translate(_TO_URL).decode("ascii")


def from_text(text: str | bytes, *, what: str, max_bytes: int) -> bytes:
    """Return what `to_text` was given.

    Args:
        text: a header's value; nothing but the alphabet is accepted, not even white space or padding.
        what: the word for it in a `MalformedError`.
        max_bytes: the longest *text* that is decoded.

    Raises:
        MalformedError: if it is too long or not base64url.
    """
    if len(text) > max_bytes:
        raise MalformedError(what, f"{len(text)} characters, of which {max_bytes} are allowed")
    try:
        raw = text.encode("ascii") if isinstance(text, str) else bytes(text)
        if _NOT_URL.search(raw):
            raise ValueError
        return binascii.a2b_base64(raw.translate(_FROM_URL) + b"=" * (-len(raw) % 4), strict_mode=True)
    except ValueError:
        raise MalformedError(what, "not base64url without padding") from None


_TO_URL = bytes.maketrans(b"+/", b"-_")
_FROM_URL = bytes.maketrans(b"-_", b"+/")
_NOT_URL = re.compile(rb"[^A-Za-z0-9_-]")


def bytes32(value: object, what: str) -> bytes:
    """Return the 32 bytes that *value* of a document writes as `0x` and 64 digits.

    Raises:
        MalformedError: of *what*; it is no such text.
    """
    if isinstance(value, str) and len(value) == 66 and value.startswith("0x"):
        try:
            return bytes.fromhex(value[2:])
        except ValueError:
            pass
    raise MalformedError(what, "a hash must be 0x and 64 hexadecimal digits")
