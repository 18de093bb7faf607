"""`init`: a key is made or imported once, and never printed."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.init_command import init_command
from ngpu_daemon.keystore import Kdf, open_keystore, write_keystore
from ngpu_protocol.identity import Account

KEY = bytes(range(32, 64))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "passphrase").write_text("secret\n")
    (tmp_path / "passphrase").chmod(0o600)
    return tmp_path


def init(folder: Path, *arguments: str, passphrase: str | None = "passphrase") -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("init")(init_command(folder / "data"))
    given = [] if passphrase is None else ["--passphrase-file", str(folder / passphrase)]
    return CliRunner().invoke(app, [*given, "--kdf", "light", *arguments])


def test_a_new_key_is_made_stored_and_named(folder: Path) -> None:
    result = init(folder)
    account = open_keystore(folder / "data" / "keystore.json", "secret")
    assert result.exit_code == 0
    assert f"nodeAddr  {account.address}\nPeerId    {account.peer_id}\n" in result.stdout
    assert account.key_bytes.hex() not in result.output


def test_two_new_keys_differ(folder: Path) -> None:
    addresses = {
        json.loads(init(folder, "--json", "--data-dir", str(folder / name)).stdout)["nodeAddr"] for name in "ab"
    }
    assert len(addresses) == 2


@pytest.mark.parametrize("text", [KEY.hex(), "0x" + KEY.hex().upper() + "\n", "  " + KEY.hex() + "\r\n"])
def test_a_hex_key_is_imported(folder: Path, text: str) -> None:
    (folder / "key").write_text(text)
    result = init(folder, "--import-key", str(folder / "key"), "--json")
    account = Account.from_key(KEY)
    assert json.loads(result.stdout) == {
        "nodeAddr": account.address,
        "peerId": account.peer_id,
        "keystore": str(folder / "data" / "keystore.json"),
    }
    assert open_keystore(folder / "data" / "keystore.json", "secret").key_bytes == KEY


def test_a_keystore_is_imported_under_a_new_passphrase(folder: Path) -> None:
    write_keystore(folder / "theirs.json", Account.from_key(KEY), "old", Kdf.LIGHT)
    (folder / "theirs.json").chmod(0o644)
    (folder / "old").write_text("old")
    (folder / "old").chmod(0o600)
    result = init(
        folder, "--import-keystore", str(folder / "theirs.json"), "--import-passphrase-file", str(folder / "old")
    )
    assert result.exit_code == 0, result.output
    ours = folder / "data" / "keystore.json"
    assert open_keystore(ours, "secret").key_bytes == KEY
    assert stat.S_IMODE(ours.stat().st_mode) == 0o600


def test_a_second_init_changes_nothing(folder: Path) -> None:
    init(folder)
    before = (folder / "data" / "keystore.json").read_bytes()
    result = init(folder)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"error: {folder / 'data' / 'keystore.json'} exists already: an account key is never overwritten\n"
    )
    assert (folder / "data" / "keystore.json").read_bytes() == before


def test_a_directory_in_use_is_left_alone(folder: Path) -> None:
    with DataDirectory(folder / "data").lock():
        result = init(folder)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: data directory {folder / 'data'} is in use by process ")
    assert not (folder / "data" / "keystore.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (KEY.hex()[:-2], "64 hexadecimal digits"),
        ("not a key", "64 hexadecimal digits"),
        ("", "64 hexadecimal digits"),
        (KEY.hex() + "00", "64 hexadecimal digits"),
        ("00" * 32, "zero or too large"),
        ("ff" * 32, "zero or too large"),
        ("é" * 64, "64 hexadecimal digits"),
    ],
)
def test_a_file_without_a_key_is_one_line_that_does_not_repeat_it(folder: Path, text: str, message: str) -> None:
    (folder / "key").write_text(text)
    result = init(folder, "--import-key", str(folder / "key"))
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not text or text not in result.stderr
    assert not (folder / "data" / "keystore.json").exists()


def test_a_key_file_that_is_not_there_is_one_line(folder: Path) -> None:
    result = init(folder, "--import-key", str(folder / "none"))
    assert (result.exit_code, result.stderr) == (
        1,
        f"error: cannot read the key file {folder / 'none'}: No such file or directory\n",
    )


def test_the_wrong_passphrase_of_an_imported_keystore_is_one_line(folder: Path) -> None:
    write_keystore(folder / "theirs.json", Account.from_key(KEY), "old", Kdf.LIGHT)
    result = init(folder, "--import-keystore", str(folder / "theirs.json"))
    assert (result.exit_code, result.stderr) == (
        1,
        f"error: the passphrase does not open the keystore {folder / 'theirs.json'}\n",
    )


def test_two_imports_at_once_are_refused(folder: Path) -> None:
    result = init(folder, "--import-key", "a", "--import-keystore", "b")
    assert (result.exit_code, result.stderr) == (1, "error: give --import-key or --import-keystore, not both\n")


def test_nobody_to_ask_for_a_passphrase_is_one_line(folder: Path) -> None:
    result = init(folder, passphrase=None)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no passphrase: give --passphrase-file")
