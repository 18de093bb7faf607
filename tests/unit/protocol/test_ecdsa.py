"""The quick way to sign and recover agrees with coincurve's published one, in every thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from coincurve import PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.ecdsa import published_recover, published_sign, recover_point, sign_recoverable
from ngpu_protocol.keccak import keccak

digests = st.binary(min_size=32, max_size=32)
keys = st.integers(1, 2**64).map(lambda number: PrivateKey(number.to_bytes(32, "big")))


def test_the_quick_way_is_in_use() -> None:
    assert sign_recoverable is not published_sign
    assert recover_point is not published_recover


@given(keys, digests)
def test_signatures_and_keys_are_those_of_the_published_interface(key: PrivateKey, digest: bytes) -> None:
    signature = sign_recoverable(key, digest)
    assert signature == published_sign(key, digest)
    assert recover_point(digest, signature[:64], signature[64]) == key.public_key.format(compressed=False)


@given(st.binary(min_size=64, max_size=64), digests, st.integers(0, 3))
def test_any_signature_recovers_what_the_published_interface_does_or_nothing(
    compact: bytes, digest: bytes, recovery_id: int
) -> None:
    try:
        expected = published_recover(digest, compact, recovery_id)
    except ValueError:
        with pytest.raises(ValueError, match="no key"):
            recover_point(digest, compact, recovery_id)
    else:
        assert recover_point(digest, compact, recovery_id) == expected


@pytest.mark.parametrize(("digest", "compact", "recovery_id"), [(31, 64, 0), (32, 63, 0), (32, 64, 4), (32, 64, -1)])
def test_nothing_of_another_length_reaches_the_library(digest: int, compact: int, recovery_id: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        recover_point(bytes(digest), bytes(compact), recovery_id)
    if digest != 32:
        with pytest.raises(ValueError, match="bytes"):
            sign_recoverable(PrivateKey(b"\1" * 32), bytes(digest))


def test_threads_do_not_share_what_they_work_in() -> None:
    key = PrivateKey(b"\7" * 32)
    point = key.public_key.format(compressed=False)

    def work(thread: int) -> bool:
        for number in range(200):
            digest = keccak(b"%d %d" % (thread, number))
            signature = sign_recoverable(key, digest)
            if recover_point(digest, signature[:64], signature[64]) != point:
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
