"""Opening a keystore must not leave the process open to death by nested brackets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
from pathlib import Path
from ngpu_daemon.keystore import open_keystore, write_keystore
from ngpu_protocol.identity import Account

path = Path(sys.argv[1])
write_keystore(path, Account.from_key(b"k" * 32), "secret", kdf="light")
open_keystore(path, "secret")
try:
    json.loads("[" * 100_000)
except RecursionError:
    print("refused")
"""


def test_deeply_nested_json_is_an_error_and_no_crash_after_a_keystore_was_opened(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "keystore.json")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert (result.returncode, result.stdout.strip()) == (0, "refused"), result.stderr
