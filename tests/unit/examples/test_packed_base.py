"""The base image packed from the running interpreter: what is in the tar, judged without an engine."""

import sys
import tarfile
from pathlib import Path

from examples.demo import packed_base


def test_the_tar_holds_the_interpreter_its_library_and_its_loader(tmp_path: Path) -> None:
    size = packed_base.pack_interpreter(tmp_path / "base.tar")
    with tarfile.open(tmp_path / "base.tar") as tar:
        entries = {entry.name: entry for entry in tar}
    names = [f"/{name}" for name in entries]
    assert len(names) == len(set(names))
    link = entries[packed_base.PYTHON_LINK.lstrip("/")]
    assert link.issym()
    assert link.linkname in names
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for part in (f"/{version}/asyncio/base_events.py", f"/{version}/encodings/utf_8.py", "libc.so"):
        assert any(part in name for name in names), part
    assert not any("site-packages" in name or "/idlelib/" in name for name in names)
    assert size < 150_000_000


def test_every_folder_can_be_entered_by_any_user(tmp_path: Path) -> None:
    packed_base.pack_interpreter(tmp_path / "base.tar")
    with tarfile.open(tmp_path / "base.tar") as tar:
        for entry in tar:
            assert entry.uid == 0
            assert entry.issym() or entry.mode & 0o005, entry.name
