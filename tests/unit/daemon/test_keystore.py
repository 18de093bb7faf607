"""The key at rest: what opens it, and every way a hostile or damaged file is refused in one line."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eth_keyfile
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ngpu_daemon.keystore import (
    Kdf,
    KeystoreDamaged,
    KeystoreError,
    KeystoreExists,
    KeystoreMissing,
    KeystoreReadableByOthers,
    PassphraseReadableByOthers,
    PassphraseUnavailable,
    WrongPassphrase,
    open_keystore,
    read_passphrase,
    write_keystore,
)
from ngpu_protocol.identity import Account

ACCOUNT = Account.from_key(bytes(range(1, 33)))
PASSPHRASE = "corréct horse"


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("keystore") / "keystore.json"
    write_keystore(path, ACCOUNT, PASSPHRASE, Kdf.LIGHT)
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


@pytest.fixture
def keystore(tmp_path: Path, document: dict[str, Any]) -> Path:
    return store(tmp_path, json.dumps(document))


def store(folder: Path, text: str | bytes) -> Path:
    path = folder / "keystore.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(0o600)
    return path


# -- what works --------------------------------------------------------------------------------------------------------


def test_what_was_written_opens_with_its_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "keystore.json"
    write_keystore(path, ACCOUNT, PASSPHRASE, Kdf.LIGHT)
    assert open_keystore(path, PASSPHRASE).key_bytes == ACCOUNT.key_bytes
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["keystore.json"]


def test_the_mode_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_keystore(tmp_path / "keystore.json", ACCOUNT, PASSPHRASE, Kdf.LIGHT)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keystore.json").stat().st_mode) == 0o600


def test_the_standard_cost_is_that_of_other_ethereum_software(tmp_path: Path) -> None:
    path = tmp_path / "keystore.json"
    write_keystore(path, ACCOUNT, PASSPHRASE)
    parameters = json.loads(path.read_text())["crypto"]["kdfparams"]
    assert (parameters["n"], parameters["r"], parameters["p"], parameters["dklen"]) == (262144, 8, 1, 32)


def test_the_key_is_nowhere_in_the_file(keystore: Path) -> None:
    assert ACCOUNT.key_bytes.hex() not in keystore.read_text().lower()


def test_an_existing_keystore_is_never_overwritten(keystore: Path) -> None:
    before = keystore.read_bytes()
    with pytest.raises(KeystoreExists):
        write_keystore(keystore, Account.from_key(b"\x07" * 32), PASSPHRASE, Kdf.LIGHT)
    assert keystore.read_bytes() == before
    assert os.listdir(keystore.parent) == ["keystore.json"]


def test_a_directory_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(KeystoreError, match=r"cannot write the keystore .*No such file"):
        write_keystore(tmp_path / "none" / "keystore.json", ACCOUNT, PASSPHRASE, Kdf.LIGHT)


def test_the_vectors_of_the_format_open(tmp_path: Path) -> None:
    """The PBKDF2 test vector of the Web3 Secret Storage definition."""
    pbkdf2 = {
        "crypto": {
            "cipher": "aes-128-ctr",
            "cipherparams": {"iv": "6087dab2f9fdbbfaddc31a909735c1e6"},
            "ciphertext": "5318b4d5bcd28de64ee5559e671353e16f075ecae9f99c7a79a38af5f869aa46",
            "kdf": "pbkdf2",
            "kdfparams": {
                "c": 262144,
                "dklen": 32,
                "prf": "hmac-sha256",
                "salt": "ae3cd4e7013836a3df6bd7241b12db061dbe2c6785853cce422d148a624ce0bd",
            },
            "mac": "517ead924a9d0dc3124507e3393d175ce3ff7c1e96529c6c555ce9e51205e9b2",
        },
        "id": "3198bc9c-6672-5ab3-d995-4942343ae5b6",
        "version": 3,
    }
    key = "7a28b5ba57c53603b0b07b56bba752f7784bf506fa95edc395f5cf6c7514fe9d"
    assert open_keystore(store(tmp_path, json.dumps(pbkdf2)), "testpassword").key_bytes.hex() == key
    # the same file as early geth wrote it
    upper = {"Crypto": pbkdf2["crypto"], "version": 3}
    assert open_keystore(store(tmp_path, json.dumps(upper)), "testpassword").key_bytes.hex() == key


@pytest.mark.parametrize(("kdf", "iterations"), [("pbkdf2", 1000), ("scrypt", 1 << 12)])
def test_a_keystore_of_another_library_opens(tmp_path: Path, kdf: Any, iterations: int) -> None:
    foreign = eth_keyfile.create_keyfile_json(ACCOUNT.key_bytes, PASSPHRASE.encode(), kdf=kdf, iterations=iterations)
    assert open_keystore(store(tmp_path, json.dumps(foreign)), PASSPHRASE).address == ACCOUNT.address


def test_another_library_opens_what_was_written(document: dict[str, Any]) -> None:
    assert eth_keyfile.decode_keyfile_json(document, PASSPHRASE.encode()) == ACCOUNT.key_bytes
    assert document["address"] == ACCOUNT.address.lower().removeprefix("0x")
    with pytest.raises(ValueError, match="MAC mismatch"):
        eth_keyfile.decode_keyfile_json(document, b"another")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passphrase", ["", "correct horse", PASSPHRASE + " ", "日本"])
def test_a_wrong_passphrase_says_so_and_does_not_repeat_it(keystore: Path, passphrase: str) -> None:
    with pytest.raises(WrongPassphrase) as caught:
        open_keystore(keystore, passphrase)
    assert str(caught.value) == f"the passphrase does not open the keystore {keystore}"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604, 0o601])
def test_a_keystore_that_others_may_touch_is_refused_and_may_be_imported(keystore: Path, mode: int) -> None:
    keystore.chmod(mode)
    with pytest.raises(KeystoreReadableByOthers, match=f"mode {mode:04o}.*chmod 600"):
        open_keystore(keystore, PASSPHRASE)
    assert open_keystore(keystore, PASSPHRASE, private=False).address == ACCOUNT.address


def test_no_keystore_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(KeystoreMissing, match="run `init` first"):
        open_keystore(tmp_path / "keystore.json", PASSPHRASE)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: os.mkfifo(path, 0o600)])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "keystore.json"
    make(path)
    with pytest.raises(KeystoreError):
        open_keystore(path, PASSPHRASE)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="list"),
        pytest.param(b'"keystore"', id="text"),
        pytest.param(b"3", id="number"),
        pytest.param(b"{}", id="nothing in it"),
        pytest.param(b"\xff\xfe", id="not UTF-8"),
        pytest.param(b"[" * 30_000, id="deep"),
        pytest.param(b'{"a":' * 700 + b"1" + b"}" * 700, id="deep tables"),
        pytest.param(b'{"a":' * 9_000 + b"1" + b"}" * 9_000, id="deeper tables"),
        pytest.param(b" " * 70_000, id="huge"),
        pytest.param(b'{"version": 3', id="cut"),
    ],
)
def test_what_is_no_keystore_is_damaged(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(KeystoreDamaged):
        open_keystore(store(tmp_path, text), PASSPHRASE)


def test_a_file_cut_short_anywhere_is_damaged(keystore: Path) -> None:
    whole = keystore.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        store(keystore.parent, whole[:length])
        with pytest.raises(KeystoreDamaged):
            open_keystore(keystore, PASSPHRASE)


_MISSING = object()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("version", _MISSING),
        ("version", 4),
        ("version", "3"),
        ("crypto", _MISSING),
        ("crypto", []),
        ("crypto.cipher", "aes-256-cbc"),
        ("crypto.ciphertext", "00"),
        ("crypto.ciphertext", 7),
        ("crypto.ciphertext", "zz" * 32),
        ("crypto.cipherparams", None),
        ("crypto.cipherparams.iv", "00"),
        ("crypto.mac", None),
        ("crypto.mac", "0x"),
        ("crypto.kdf", "argon2"),
        ("crypto.kdf", ["scrypt"]),
        ("crypto.kdf", "pbkdf2"),
        ("crypto.kdfparams", "scrypt"),
        ("crypto.kdfparams.salt", "xyz"),
        ("crypto.kdfparams.salt", _MISSING),
        ("crypto.kdfparams.dklen", 16),
        ("crypto.kdfparams.n", _MISSING),
        ("crypto.kdfparams.n", 1 << 40),
        ("crypto.kdfparams.n", 1000),
        ("crypto.kdfparams.n", 0),
        ("crypto.kdfparams.n", "4096"),
        ("crypto.kdfparams.n", True),
        ("crypto.kdfparams.n", 4096.5),
        ("crypto.kdfparams.r", 1 << 30),
        ("crypto.kdfparams.p", 1 << 30),
        ("crypto.kdfparams.p", -1),
        ("crypto.kdfparams", {"salt": "00", "dklen": 32, "n": 2, "r": 1 << 22, "p": 64}),
        ("crypto.kdfparams", {"salt": "00", "dklen": 32, "n": 1 << 20, "r": 8, "p": 64}),
        ("address", 5),
        ("address", "00" * 20),
    ],
)
def test_every_wrong_part_is_damage_found_before_work_is_done(
    tmp_path: Path, document: dict[str, Any], where: str, value: object
) -> None:
    changed = json.loads(json.dumps(document))
    *above, last = where.split(".")
    table = changed
    for key in above:
        table = table[key]
    if value is _MISSING:
        del table[last]
    else:
        table[last] = value
    with pytest.raises(KeystoreDamaged) as caught:
        open_keystore(store(tmp_path, json.dumps(changed)), PASSPHRASE)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"keystore {tmp_path / 'keystore.json'} is damaged: ")


def test_a_changed_ciphertext_cannot_be_told_from_a_wrong_passphrase(tmp_path: Path, document: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(document))
    changed["crypto"]["ciphertext"] = "00" * 32
    with pytest.raises(WrongPassphrase):
        open_keystore(store(tmp_path, json.dumps(changed)), PASSPHRASE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    where=st.sampled_from(
        ["version", "crypto", "cipher", "cipherparams", "ciphertext", "kdf", "kdfparams", "mac", "salt", "n", "r", "p"]
    ),
    value=json_values,
)
def test_no_json_value_anywhere_gets_past_the_operators_errors(
    tmp_path: Path, document: dict[str, Any], where: str, value: Any
) -> None:
    text = json.dumps(document)
    changed = json.loads(text, object_hook=lambda table: {k: value if k == where else v for k, v in table.items()})
    try:
        account = open_keystore(store(tmp_path, json.dumps(changed)), PASSPHRASE)
    except KeystoreError:
        return
    assert account.address == ACCOUNT.address


# -- the passphrase ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "passphrase"),
    [(b"secret", "secret"), (b"secret\n", "secret"), (b"secret\r\n", "secret"), (b" a b \n\n", " a b \n")],
)
def test_one_line_end_is_not_part_of_the_passphrase(tmp_path: Path, content: bytes, passphrase: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    path.chmod(0o600)
    assert read_passphrase(path, {}) == passphrase


def test_the_systemd_credential_is_used_where_no_file_is_named(tmp_path: Path) -> None:
    credentials, other = tmp_path / "credentials", tmp_path / "other"
    credentials.mkdir()
    (credentials / "passphrase").write_text("from systemd\n")  # whose mode is systemd's business
    (credentials / "passphrase").chmod(0o644)
    other.write_text("from a file\n")
    other.chmod(0o600)
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    assert read_passphrase(None, environ) == "from systemd"
    assert read_passphrase(credentials / "passphrase", environ) == "from systemd"
    assert read_passphrase(other, environ) == "from a file"


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o606, 0o601, 0o660])
def test_a_passphrase_that_all_may_read_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_text("secret\n")
    path.chmod(mode)
    with pytest.raises(PassphraseReadableByOthers, match=rf"mode {mode:04o}\): chmod 600 it$"):
        read_passphrase(path, {"CREDENTIALS_DIRECTORY": str(tmp_path / "elsewhere")})


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_a_group_may_read_a_passphrase(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_text("secret\n")
    path.chmod(mode)
    assert read_passphrase(path, {}) == "secret"


def test_a_passphrase_comes_through_a_pipe_too() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"secret\n")
        os.close(writer)
        assert read_passphrase(Path(f"/dev/fd/{reader}"), {}) == "secret"
    finally:
        os.close(reader)


def test_no_passphrase_names_both_ways_to_give_one() -> None:
    with pytest.raises(PassphraseUnavailable, match=r"--passphrase-file.*LoadCredential="):
        read_passphrase(None, {})


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty"), (b"\n", "empty"), (b"\xff", "not UTF-8"), (b"x" * 70_000, "too long")]
)
def test_a_passphrase_file_without_one_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(PassphraseUnavailable, match=message):
        read_passphrase(path, {})


def test_a_passphrase_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PassphraseUnavailable, match=r"cannot read the passphrase file .*: No such file"):
        read_passphrase(tmp_path / "none", {})
