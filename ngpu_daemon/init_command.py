"""The `init` command of both daemons: an account key, made or imported, put into the data directory's keystore.

Prints the nodeAddr and the PeerId, which is all that anyone else needs to know. Never prints the key, never takes it
or a passphrase as an argument, never overwrites one.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.entry import run_main
from ngpu_daemon.errors import OperatorError
from ngpu_daemon.keystore import (
    Kdf,
    KeystoreExists,
    PassphraseUnavailable,
    open_keystore,
    read_passphrase,
    write_keystore,
)
from ngpu_protocol.identity import Account

_HEX_KEY = re.compile(r"(?:0[xX])?([0-9a-fA-F]{64})")
_MAX_KEY_FILE_BYTES = 1024


class KeyImportError(OperatorError):
    """The file to import does not hold an account key."""


@dataclass(frozen=True, slots=True)
class Initialised:
    """What `init` made. Shown to people and scripts alike."""

    address: str
    peer_id: str
    keystore: Path


def init_identity(
    directory: DataDirectory,
    passphrase: str,
    *,
    kdf: Kdf = Kdf.STANDARD,
    import_key: Path | None = None,
    import_keystore: Path | None = None,
    import_passphrase: str | None = None,
) -> Initialised:
    """Write the keystore of *directory*: a new key, or the one in a hex file or in another keystore.

    Args:
        passphrase: what opens the new keystore.
        import_passphrase: what opens *import_keystore*, where it is not *passphrase*.

    Raises:
        DataDirectoryInUse, KeystoreExists: nothing was changed.
        KeyImportError, KeystoreError: the file to import cannot be used; nothing was written.
    """
    with directory.lock():
        if directory.keystore.exists():  # said before a second of scrypt; the write itself refuses too
            raise KeystoreExists(
                directory.keystore, f"{directory.keystore} exists already: an account key is never overwritten"
            )
        if import_key is not None:
            account = _account_in_hex_file(import_key)
        elif import_keystore is not None:
            account = open_keystore(import_keystore, import_passphrase or passphrase, private=False)
        else:
            account = _new_account()
        write_keystore(directory.keystore, account, passphrase, kdf)
    return Initialised(account.address, account.peer_id, directory.keystore)


def _new_account() -> Account:
    while True:
        try:
            return Account.from_key(secrets.token_bytes(32))
        except ValueError:  # zero or above the curve's order: once in 2**128
            continue


def _account_in_hex_file(path: Path) -> Account:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_KEY_FILE_BYTES).decode("ascii", "replace").strip()
    except OSError as error:
        raise KeyImportError(f"cannot read the key file {path}: {error.strerror}") from None
    found = _HEX_KEY.fullmatch(text)
    if found is None:
        raise KeyImportError(f"{path} does not hold a key: 64 hexadecimal digits are wanted, with or without 0x")
    try:
        return Account.from_key(bytes.fromhex(found[1]))
    except ValueError:
        raise KeyImportError(f"{path} does not hold a secp256k1 key: zero or too large") from None


def ask_passphrase(file: Path | None, *, confirm: bool = False) -> str:
    """Return the passphrase from *file* or the systemd credential, else ask for it on the terminal if there is one.

    Raises:
        PassphraseUnavailable: as `read_passphrase`, when nobody is there to be asked.
    """
    try:
        return read_passphrase(file)
    except PassphraseUnavailable:
        if file is not None or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
    answer: str = typer.prompt("passphrase", hide_input=True, confirmation_prompt=confirm, err=True)
    return answer


def init_command(default_data_dir: Path) -> Callable[..., None]:
    """Return the `init` command for one daemon's typer app: `app.command("init")(init_command(default))`."""

    def init(
        data_dir: Annotated[Path, typer.Option(help="Where this daemon keeps its state.")] = default_data_dir,
        passphrase_file: Annotated[
            Path | None, typer.Option(help="File with the passphrase; else the systemd credential, else asked for.")
        ] = None,
        import_key: Annotated[
            Path | None, typer.Option(help="Take the key from this file (64 hexadecimal digits) instead of making one.")
        ] = None,
        import_keystore: Annotated[
            Path | None, typer.Option(help="Take the key from this Web3 Secret Storage file instead of making one.")
        ] = None,
        import_passphrase_file: Annotated[
            Path | None, typer.Option(help="What opens --import-keystore, where the passphrase differs.")
        ] = None,
        kdf: Annotated[
            Kdf, typer.Option(help="Work to try a passphrase: standard (1 s), or light for keys of no value.")
        ] = Kdf.STANDARD,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    ) -> None:
        """Make or import this peer's account key and print its nodeAddr and PeerId."""

        def main() -> None:
            if import_key is not None and import_keystore is not None:
                raise KeyImportError("give --import-key or --import-keystore, not both")
            made = init_identity(
                DataDirectory(data_dir),
                ask_passphrase(passphrase_file, confirm=True),
                kdf=kdf,
                import_key=import_key,
                import_keystore=import_keystore,
                import_passphrase=None if import_passphrase_file is None else read_passphrase(import_passphrase_file),
            )
            if as_json:
                shown = {"nodeAddr": made.address, "peerId": made.peer_id, "keystore": str(made.keystore)}
                print(json.dumps(shown))
            else:
                print(f"nodeAddr  {made.address}\nPeerId    {made.peer_id}\nkeystore  {made.keystore}")

        run_main(main)

    return init
