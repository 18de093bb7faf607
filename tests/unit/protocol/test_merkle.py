"""Merkle trees: the shape of RFC 6962, and proofs that lead to the root for the right leaf only."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.merkle import inclusion_path, leaf_hash, node_hash, root_by_path, tree_root

LEAVES = st.lists(st.binary(max_size=8).map(leaf_hash), max_size=40)

# the test data of Certificate Transparency's own implementations: eight leaves and the roots of their first n
DATA = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def by_definition(leaves: list[bytes]) -> bytes:
    """The recursive definition in the RFC."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    split = 1 << ((len(leaves) - 1).bit_length() - 1)
    return node_hash(by_definition(leaves[:split]), by_definition(leaves[split:]))


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_those_other_implementations_publish(size: int) -> None:
    assert tree_root([leaf_hash(bytes.fromhex(text)) for text in DATA[:size]]).hex() == ROOTS[size - 1]


@given(LEAVES)
def test_root_is_the_one_of_the_recursive_definition(leaves: list[bytes]) -> None:
    assert tree_root(leaves) == by_definition(leaves)


@given(st.integers(1, 70), st.data())
def test_path_of_a_leaf_leads_to_the_root_and_from_no_other_place(size: int, data: st.DataObject) -> None:
    leaves = [leaf_hash(number.to_bytes(2, "big")) for number in range(size)]
    index = data.draw(st.integers(0, size - 1))
    path = inclusion_path(leaves, index)
    root = tree_root(leaves)
    assert root_by_path(leaves[index], index, size, path) == root
    other = data.draw(st.integers(0, size - 1))
    if other != index:
        assert root_by_path(leaves[index], other, size, path) != root
        assert root_by_path(leaves[other], index, size, path) != root
    assert root_by_path(leaves[index], index, size, (*path, bytes(32))) is None
    if path:
        assert root_by_path(leaves[index], index, size, path[:-1]) is None


@pytest.mark.parametrize(("index", "size"), [(-1, 3), (3, 3), (0, 0)])
def test_a_place_outside_the_tree_leads_nowhere(index: int, size: int) -> None:
    assert root_by_path(bytes(32), index, size, ()) is None
    with pytest.raises(IndexError):
        inclusion_path([bytes(32)] * size, index)
