"""One daemon, one data directory."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ngpu_daemon.datadir import DataDirectory, DataDirectoryError, DataDirectoryInUse

ROOT = Path(__file__).parents[3]
HOLDER = """
import sys
from pathlib import Path
from ngpu_daemon.datadir import DataDirectory

with DataDirectory(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_it_is_made_private_with_its_parents(tmp_path: Path) -> None:
    directory = DataDirectory(tmp_path / "a" / "b")
    with directory.lock():
        assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
        assert (directory.path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_second_holder_is_told_who_has_it(tmp_path: Path) -> None:
    with (
        DataDirectory(tmp_path).lock(),
        pytest.raises(DataDirectoryInUse, match=f"in use by process {os.getpid()}"),
        DataDirectory(tmp_path).lock(),
    ):
        pytest.fail("held twice")


def test_it_can_be_held_again_once_let_go(tmp_path: Path) -> None:
    for _ in range(2):
        with DataDirectory(tmp_path).lock():
            pass


def test_a_killed_holder_leaves_nothing_to_clean_up(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DataDirectoryInUse) as caught, DataDirectory(tmp_path).lock():
            pytest.fail("held twice")
        assert caught.value.pid == holder.pid
        holder.send_signal(signal.SIGKILL)
    with DataDirectory(tmp_path).lock():
        pass


def test_a_lock_file_of_nonsense_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"\xff not a pid" * 10)
    with DataDirectory(tmp_path).lock(), pytest.raises(DataDirectoryInUse), DataDirectory(tmp_path).lock():
        pytest.fail("held twice")
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_file_in_its_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataDirectoryError, match="is not a directory"):
        DataDirectory(tmp_path / "file").prepare()
    with pytest.raises(DataDirectoryError, match="cannot make the data directory"):
        DataDirectory(tmp_path / "file" / "below").prepare()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataDirectoryError, match="cannot open"), DataDirectory(tmp_path).lock():
        pytest.fail("held through a link")
    assert not (tmp_path / "elsewhere").exists()


def test_home_and_relative_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DataDirectory(Path("~/x")).path == tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    assert DataDirectory(Path("x")).keystore == tmp_path / "x" / "keystore.json"
