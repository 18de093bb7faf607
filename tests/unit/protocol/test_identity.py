"""One key as address, PeerId and signature."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from coincurve import PublicKey
from eth_account import Account as ForeignAccount
from eth_utils import keccak as foreign_keccak
from eth_utils import to_checksum_address
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.crypto.secp256k1 import create_new_key_pair
from libp2p.peer.id import ID

from ngpu_protocol.identity import (
    Account,
    AddressError,
    SignatureError,
    address_bytes,
    address_of_peer_id,
    gpu_id,
    keccak,
    parse_address,
    peer_id_of_public_key,
    recover,
)
from ngpu_protocol.keccak import published_keccak

ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
keys = st.integers(1, ORDER - 1).map(lambda number: number.to_bytes(32, "big"))
digests = st.binary(min_size=32, max_size=32)


@given(st.binary(max_size=700))
@settings(max_examples=50)
def test_keccak_is_ethereums(data: bytes) -> None:
    assert keccak(data) == published_keccak(data) == foreign_keccak(data)


@given(keys)
@settings(max_examples=25, deadline=None)
def test_address_and_peer_id_are_those_of_other_libraries(key: bytes) -> None:
    account = Account.from_key(key)
    assert account.address == ForeignAccount.from_key(key).address
    assert account.peer_id == str(ID.from_pubkey(create_new_key_pair(key).public_key))
    assert address_of_peer_id(account.peer_id) == account.address
    assert account.key_bytes == key
    assert len(account.public_key) == 33


@given(keys, digests)
@settings(max_examples=50)
def test_signature_recovers_to_its_signer_and_has_a_low_s(key: bytes, digest: bytes) -> None:
    account = Account.from_key(key)
    signature = account.sign(digest)
    assert len(signature) == 65
    assert signature[64] in (27, 28)
    assert int.from_bytes(signature[32:64], "big") <= ORDER // 2
    assert recover(digest, signature) == account.address
    assert ForeignAccount._recover_hash(digest, signature=signature) == account.address


@given(keys, digests)
@settings(max_examples=25)
def test_malleable_twin_of_a_signature_is_refused(key: bytes, digest: bytes) -> None:
    signature = Account.from_key(key).sign(digest)
    high_s = ORDER - int.from_bytes(signature[32:64], "big")
    twin = signature[:32] + high_s.to_bytes(32, "big") + bytes([55 - signature[64]])
    assert ForeignAccount._recover_hash(digest, signature=twin) == Account.from_key(key).address  # valid, but second
    with pytest.raises(SignatureError, match="upper half"):
        recover(digest, twin)


def test_s_of_exactly_half_the_order_is_not_refused_as_high() -> None:
    half = (ORDER // 2).to_bytes(32, "big")
    generator_x = PublicKey.from_secret(bytes(31) + b"\x01").point()[0].to_bytes(32, "big")
    recover(b"\x01" * 32, generator_x + half + b"\x1b")
    above = (ORDER // 2 + 1).to_bytes(32, "big")
    with pytest.raises(SignatureError, match="upper half"):
        recover(b"\x01" * 32, generator_x + above + b"\x1b")


@pytest.mark.parametrize(
    "signature",
    [
        b"",
        bytes(64),
        bytes(65),
        bytes(66),
        bytes(64) + b"\x1b",
        b"\xff" * 32 + bytes(31) + b"\x01\x1b",  # r is not below the order
        bytes(31) + b"\x05" + bytes(31) + b"\x01\x1b",  # no point has x = 5
        bytes(31) + b"\x01" + bytes(32) + b"\x1b",  # s is zero
        bytes(31) + b"\x01" + bytes(31) + b"\x01\x00",
        bytes(31) + b"\x01" + bytes(31) + b"\x01\x1d",  # v 29: r above the order, which Ethereum refuses too
    ],
)
def test_unusable_signature_is_a_signature_error(signature: bytes) -> None:
    with pytest.raises(SignatureError):
        recover(bytes(32), signature)


@given(digest=st.binary(max_size=40), signature=st.binary(max_size=70))
def test_recover_raises_nothing_but_signature_error(digest: bytes, signature: bytes) -> None:
    try:
        recover(digest, signature)
    except SignatureError:
        return
    assert len(digest) == 32
    assert len(signature) == 65


def test_only_32_byte_digests_are_signed() -> None:
    with pytest.raises(ValueError, match="32-byte"):
        Account.from_key(b"\x01" * 32).sign(b"hello")


@pytest.mark.parametrize("key", [b"", bytes(32), b"\x01" * 31, ORDER.to_bytes(32, "big"), b"\xff" * 32])
def test_impossible_key_is_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match="private key"):
        Account.from_key(key)


def test_account_never_prints_its_key() -> None:
    account = Account.from_key(b"\xab" * 32)
    assert repr(account) == f"Account({account.address})"
    assert "abab" not in f"{account} {account!r} {[account]}"


@given(st.binary(min_size=20, max_size=20))
def test_every_spelling_of_an_address_parses_to_one(raw: bytes) -> None:
    address = parse_address(raw)
    assert address == to_checksum_address(raw)
    assert address_bytes(address) == raw
    for spelling in (raw.hex(), "0x" + raw.hex(), raw.hex().upper(), "0X" + raw.hex().upper(), address, address[2:]):
        assert parse_address(spelling) == address


def test_mixed_case_with_a_wrong_checksum_is_refused() -> None:
    address = Account.from_key(b"\x01" * 32).address
    position = next(i for i, c in enumerate(address) if i > 1 and c.isalpha())
    mistyped = address[:position] + address[position].swapcase() + address[position + 1 :]
    with pytest.raises(AddressError, match="checksum"):
        parse_address(mistyped)


@pytest.mark.parametrize(
    "text", ["", "0x", "0x12", "z" * 40, "0x" + "1" * 41, "1" * 40 + "\n", "\u0661" * 40, b"1" * 40, b""]
)
def test_what_is_no_address_is_refused(text: str | bytes) -> None:
    with pytest.raises(AddressError):
        parse_address(text)


def test_peer_id_of_another_kind_is_refused() -> None:
    ed25519 = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
    not_on_the_curve = peer_id_of_public_key(b"\x02" + b"\xff" * 32)
    for text in (ed25519, not_on_the_curve, "", "16Uiu2HA", "Qm" + "a" * 44, "0OIl", "é", "1" * 100_000):
        with pytest.raises(AddressError):
            address_of_peer_id(text)


@given(st.text(max_size=80))
def test_peer_id_parser_raises_nothing_but_address_error(text: str) -> None:
    with pytest.raises(AddressError):
        address_of_peer_id(text)


def test_gpu_id_hides_the_serial_and_differs_by_node() -> None:
    one, other = Account.from_key(b"\x01" * 32).address, Account.from_key(b"\x02" * 32).address
    uuid = "GPU-8f9c1b1e-0000-4000-8000-000000000001"
    assert gpu_id(one, uuid) == foreign_keccak(bytes.fromhex(one[2:]) + uuid.encode())
    assert gpu_id(one, uuid) != gpu_id(other, uuid)


def test_threads_that_hash_at_once_do_not_disturb_each_other() -> None:
    texts = [str(number).encode() * 40 for number in range(2000)]
    expected = [published_keccak(text) for text in texts]
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: [keccak(text) for text in texts], range(4)):
            assert found == expected
