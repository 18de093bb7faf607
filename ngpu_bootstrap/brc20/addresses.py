"""Bitcoin addresses: base58check, bech32 and bech32m, with the network each is of. Pure.

An address is text with a checksum, so a mistyped one is found here and no indexer is asked for it. Formats:
base58check (version byte, 20 bytes, four bytes of double SHA-256); BIP 173 (bech32, witness version 0) and BIP 350
(bech32m, witness versions 1 to 16), both a BCH code over 5-bit groups whose constant tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import base58

MAX_CHARS: Final = 90  # BIP 173; base58 addresses are shorter

Network = Literal["mainnet", "testnet", "regtest"]

_BASE58_VERSIONS: Final[dict[int, tuple[Network, str]]] = {
    0x00: ("mainnet", "p2pkh"),
    0x05: ("mainnet", "p2sh"),
    0x6F: ("testnet", "p2pkh"),
    0xC4: ("testnet", "p2sh"),
}
_PREFIXES: Final[dict[str, Network]] = {"bc": "mainnet", "tb": "testnet", "bcrt": "regtest"}
_CHARSET: Final = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATORS: Final = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
_BECH32, _BECH32M = 1, 0x2BC830A3


class AddressProblem(ValueError):
    """The text is no Bitcoin address; the message says why."""


@dataclass(frozen=True, slots=True)
class BitcoinAddress:
    """A valid address: as it is looked up (bech32 in lower case), its network, and the kind of script it stands for."""

    text: str
    network: Network
    kind: str


def parse_bitcoin_address(text: str) -> BitcoinAddress:
    """Return the address in *text*.

    Raises:
        AddressProblem: it is none.
    """
    if not text:
        raise AddressProblem("it is empty")
    if len(text) > MAX_CHARS:
        raise AddressProblem(f"it has {len(text)} characters, more than any address")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise AddressProblem("it holds characters that no address has")
    prefix = text.lower().rpartition("1")[0]
    if prefix in _PREFIXES:
        return _segwit(text, prefix)
    return _base58(text)


def _base58(text: str) -> BitcoinAddress:
    try:
        payload = base58.b58decode_check(text)
    except ValueError:
        raise AddressProblem("it is neither bech32 (bc1...) nor base58 with a right checksum") from None
    if len(payload) != 21:
        raise AddressProblem(f"it stands for {len(payload)} bytes, an address for 21")
    found = _BASE58_VERSIONS.get(payload[0])
    if found is None:
        raise AddressProblem(f"its version byte {payload[0]:#04x} is of no Bitcoin address")
    return BitcoinAddress(text, *found)


def _segwit(text: str, prefix: str) -> BitcoinAddress:
    if text not in (text.lower(), text.upper()):
        raise AddressProblem("it mixes upper and lower case")
    text = text.lower()
    encoded = text[len(prefix) + 1 :]
    if len(encoded) < 7 or any(character not in _CHARSET for character in encoded):
        raise AddressProblem("it holds characters that bech32 has not, or too few")
    groups = [_CHARSET.index(character) for character in encoded]
    constant = _polymod([*(ord(c) >> 5 for c in prefix), 0, *(ord(c) & 31 for c in prefix), *groups])
    if constant not in (_BECH32, _BECH32M):
        raise AddressProblem("its checksum is wrong: a character was probably mistyped")
    version, program = groups[0], _bytes_of(groups[1:-6])
    if version > 16 or not 2 <= len(program) <= 40:
        raise AddressProblem("it is bech32, and no address: its witness version or length is none")
    if version == 0 and len(program) not in (20, 32):
        raise AddressProblem(f"its witness program has {len(program)} bytes, version 0 has 20 or 32")
    if constant != (_BECH32 if version == 0 else _BECH32M):
        raise AddressProblem("its checksum is of the other kind: bech32 is for version 0, bech32m for those after")
    kind = {(0, 20): "p2wpkh", (0, 32): "p2wsh", (1, 32): "p2tr"}.get((version, len(program)), f"witness v{version}")
    return BitcoinAddress(text, _PREFIXES[prefix], kind)


def _polymod(values: list[int]) -> int:
    check = 1
    for value in values:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate(_GENERATORS):
            if top >> bit & 1:
                check ^= generator
    return check


def _bytes_of(groups: list[int]) -> bytes:
    """Return the bytes in 5-bit groups; what is left over must be less than a group, and zero."""
    held, bits, made = 0, 0, bytearray()
    for group in groups:
        held = (held << 5 | group) & 0xFFF
        bits += 5
        if bits >= 8:
            bits -= 8
            made.append(held >> bits & 0xFF)
    if bits >= 5 or held & ((1 << bits) - 1):
        raise AddressProblem("its padding is wrong: it is bech32, and no address")
    return bytes(made)
