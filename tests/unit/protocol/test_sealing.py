"""Sealed secrets: readable by their recipient under their workspace and revision, by nobody else, in no other form."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.identity import Account, keccak, public_key_of_peer_id
from ngpu_protocol.sealing import MAX_SEALED_BYTES, OVERHEAD_BYTES, open_sealed, seal
from ngpu_protocol.workspace_secrets import NO_SECRETS, RegistryCredentials, WorkspaceSecrets
from tests.vectors import generate

NODE = Account.from_key(keccak(b"sealing: node"))
OTHER = Account.from_key(keccak(b"sealing: other"))
EPHEMERAL = keccak(b"sealing: ephemeral")


def sealed(plaintext: bytes = b"secret", ephemeral_key: bytes = EPHEMERAL) -> bytes:
    return seal(plaintext, NODE.public_key, workspace="7", revision=2, ephemeral_key=ephemeral_key)


@given(st.binary(max_size=300), st.text(max_size=20), st.integers(0, 2**32 - 1), st.binary(min_size=32, max_size=32))
def test_what_is_sealed_for_a_node_it_can_open(plaintext: bytes, workspace: str, revision: int, seed: bytes) -> None:
    recipient = public_key_of_peer_id(NODE.peer_id)
    box = seal(plaintext, recipient, workspace=workspace, revision=revision, ephemeral_key=keccak(seed))
    assert len(box) == len(plaintext) + OVERHEAD_BYTES
    assert open_sealed(box, NODE, workspace=workspace, revision=revision) == plaintext


@pytest.mark.parametrize(
    ("account", "workspace", "revision"), [(OTHER, "7", 2), (NODE, "8", 2), (NODE, "7", 3), (NODE, "", 2)]
)
def test_nobody_else_and_no_other_workspace_or_revision_opens_it(
    account: Account, workspace: str, revision: int
) -> None:
    with pytest.raises(MalformedError):
        open_sealed(sealed(), account, workspace=workspace, revision=revision)


def test_a_box_altered_in_any_byte_does_not_open() -> None:
    box = sealed()
    for place in range(len(box)):
        for change in (0x01, 0x80):
            altered = bytearray(box)
            altered[place] ^= change
            with pytest.raises(MalformedError):
                open_sealed(bytes(altered), NODE, workspace="7", revision=2)


def test_a_box_cut_or_extended_does_not_open() -> None:
    box = sealed()
    for part in [box[:length] for length in range(len(box))] + [box + b"\0", b"\0" + box]:
        with pytest.raises(MalformedError):
            open_sealed(part, NODE, workspace="7", revision=2)


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_malformed(data: bytes) -> None:
    with pytest.raises(MalformedError):
        open_sealed(data, NODE, workspace="7", revision=2)


def test_the_error_names_neither_key_nor_plaintext() -> None:
    with pytest.raises(MalformedError) as caught:
        open_sealed(sealed(b"hunter2"), OTHER, workspace="7", revision=2)
    assert "hunter2" not in repr(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_another_ephemeral_key_makes_another_box() -> None:
    assert sealed() != sealed(ephemeral_key=keccak(b"another"))


def test_too_much_and_bad_keys_are_refused_where_they_are_sealed() -> None:
    sealed(bytes(MAX_SEALED_BYTES - OVERHEAD_BYTES))
    with pytest.raises(ValueError, match="too large"):
        sealed(bytes(MAX_SEALED_BYTES - OVERHEAD_BYTES + 1))
    for recipient in (b"", bytes(33), b"\x02" + b"\xff" * 32, b"\x04" + bytes(64)):
        with pytest.raises(ValueError):  # noqa: PT011 - whatever its words
            seal(b"", recipient, workspace="7", revision=1, ephemeral_key=EPHEMERAL)
    for key in (b"", bytes(32), b"\xff" * 32):
        with pytest.raises(ValueError, match="private key"):
            sealed(ephemeral_key=key)


def test_stored_vectors_open_and_are_sealed_alike() -> None:
    for vector in json.loads((generate.FOLDER / "sealed.json").read_text()):
        account = Account.from_key(bytes.fromhex(vector["privateKey"][2:]))
        bound = {"workspace": vector["workspace"], "revision": vector["revision"]}
        box = bytes.fromhex(vector["sealed"][2:])
        plaintext = vector["plaintext"].encode()
        assert open_sealed(box, account, **bound) == plaintext
        ephemeral = bytes.fromhex(vector["ephemeralKey"][2:])
        recipient = public_key_of_peer_id(vector["recipient"])
        assert seal(plaintext, recipient, ephemeral_key=ephemeral, **bound) == box


class TestSecrets:
    def test_they_survive_the_way_through_text(self) -> None:
        secrets = WorkspaceSecrets(
            registry=RegistryCredentials(username="u", password='p:ü \\ "'), env={"A": "1\n2", "B": ""}
        )
        assert WorkspaceSecrets.decode(secrets.encode()) == secrets
        assert NO_SECRETS.encode() == b"{}"
        assert NO_SECRETS.is_empty
        assert not secrets.is_empty

    def test_they_never_print(self) -> None:
        secrets = WorkspaceSecrets(registry=RegistryCredentials(username="u", password="hunter2"), env={"A": "hunter2"})
        for text in (str(secrets), repr(secrets), repr(secrets.registry), f"{secrets.registry}"):
            assert "hunter2" not in text

    @pytest.mark.parametrize(
        "document",
        [
            b"",
            b"[]",
            b"null",
            b'{"registry": {"username": "hunter2"}}',
            b'{"registry": {"username": "a\\nb", "password": "hunter2"}}',
            b'{"env": {"no name": "hunter2"}}',
            b'{"env": {"A": "hunter2\\u0000"}}',
            b'{"env": ["hunter2"]}',
            b"\xff",
        ],
    )
    def test_what_is_not_such_a_document_is_malformed_and_not_repeated(self, document: bytes) -> None:
        with pytest.raises(MalformedError) as caught:
            WorkspaceSecrets.decode(document)
        assert "hunter2" not in str(caught.value)

    def test_a_later_versions_keys_are_ignored(self) -> None:
        assert WorkspaceSecrets.decode(b'{"files": {}, "env": {"A": "1"}}') == WorkspaceSecrets(env={"A": "1"})
