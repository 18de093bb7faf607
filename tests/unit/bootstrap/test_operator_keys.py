"""Operator keys: made, found again by another process, removed, and never kept in the clear."""

from __future__ import annotations

from pathlib import Path

import pytest

from ngpu_bootstrap.credentials import make_token, reveal
from ngpu_bootstrap.operator_keys import FILE_NAME, KeyStatus, OperatorKeys, OperatorKeysError, Scope


def test_a_key_opens_until_it_is_removed_in_every_process(tmp_path: Path) -> None:
    daemon, command = OperatorKeys(tmp_path), OperatorKeys(tmp_path)
    key = command.add("alice")
    assert daemon.judge(key, Scope.NODES, 0) is KeyStatus.ALLOWED
    assert daemon.judge(make_token("op_alice", bytes(24)), Scope.NODES, 0) is KeyStatus.UNKNOWN
    assert daemon.judge(make_token("op_bob", bytes(24)), Scope.NODES, 0) is KeyStatus.UNKNOWN
    assert daemon.judge(make_token("alice", bytes.fromhex(key.secret)), Scope.NODES, 0) is KeyStatus.UNKNOWN
    command.remove("alice")
    assert daemon.judge(key, Scope.NODES, 0) is KeyStatus.UNKNOWN


def test_a_key_does_what_its_scopes_say_until_it_expires(tmp_path: Path) -> None:
    keys = OperatorKeys(tmp_path)
    key = keys.add("watch", scopes=[Scope.READ, Scope.NODES], expires_in_s=60)
    (made,) = OperatorKeys(tmp_path).all()
    assert made.scopes == {Scope.READ, Scope.NODES}
    now_ms = made.created_at_ms
    assert keys.judge(key, Scope.READ, now_ms) is KeyStatus.ALLOWED
    assert keys.judge(key, Scope.WORKSPACES, now_ms) is KeyStatus.OUT_OF_SCOPE
    assert keys.judge(key, Scope.READ, now_ms + 59_999) is KeyStatus.ALLOWED
    assert keys.judge(key, Scope.READ, now_ms + 60_000) is KeyStatus.EXPIRED


def test_the_file_is_private_and_holds_no_key(tmp_path: Path) -> None:
    key = OperatorKeys(tmp_path).add("alice")
    file = tmp_path / FILE_NAME
    assert file.stat().st_mode & 0o777 == 0o600
    assert key.secret not in file.read_text()
    assert reveal(key).startswith("op_alice-")


@pytest.mark.parametrize("name", ["", "a b", "a-b", "x" * 65, "../x"])
def test_a_name_is_a_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(OperatorKeysError):
        OperatorKeys(tmp_path).add(name)


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    keys = OperatorKeys(tmp_path)
    keys.add("alice")
    with pytest.raises(OperatorKeysError, match="already"):
        OperatorKeys(tmp_path).add("alice")
    with pytest.raises(OperatorKeysError, match="no key called"):
        keys.remove("bob")
    assert [key.name for key in keys.all()] == ["alice"]


def test_a_damaged_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(OperatorKeysError, match="cannot be read"):
        OperatorKeys(tmp_path).all()
