"""Bodies on disk: small ones stay in memory, large ones are durable before they are named, nothing is left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest
import trio
from trio.testing import trio_test

from ngpu_bootstrap.store.bodies import BodyFiles, BodyLimits
from ngpu_bootstrap.store.errors import BodyMissing, BodyTooLarge, RecordRefused, StoreUnavailable
from ngpu_bootstrap.store.records import Part, StoredBody
from tests.unit.store.builders import task_id

TASK = task_id(1)
LARGE = os.urandom(700_000)


def files_in(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def opened(root: Path, **limits: int) -> BodyFiles:
    files = BodyFiles(root, BodyLimits(**limits))
    files.open()
    return files


async def keep(files: BodyFiles, task_id: str, *pieces: bytes) -> StoredBody:
    async with files.new(task_id, Part.REQUEST) as body:
        for piece in pieces:
            await body.write(piece)
        return await body.commit()


@trio_test
async def test_a_small_body_stays_in_its_row(tmp_path: Path) -> None:
    files = opened(tmp_path, inline_bytes=10)
    async with files.new(TASK, Part.REQUEST) as body:
        await body.write(b"12345")
        await body.write(b"67890")
        assert await body.commit() == StoredBody(10, b"1234567890")
    assert files_in(tmp_path) == []
    assert files.used_bytes == 0


@trio_test
async def test_a_large_body_comes_back_byte_for_byte(tmp_path: Path) -> None:
    files = opened(tmp_path)
    async with files.new(TASK, Part.RESPONSE) as body:
        for start in range(0, len(LARGE), 33_333):
            await body.write(LARGE[start : start + 33_333])
        stored = await body.commit()
    assert stored == StoredBody(len(LARGE), path=stored.path)
    assert stored.path.startswith(f"20260102/{TASK}.response.")
    assert await files.read(TASK, Part.RESPONSE, stored) == LARGE
    assert files.used_bytes == len(LARGE)
    assert (tmp_path / stored.path).stat().st_mode & 0o777 == 0o600
    await files.remove([stored, stored])
    assert files_in(tmp_path) == []
    assert files.used_bytes == 0


@trio_test
async def test_a_body_left_unfinished_leaves_no_file(tmp_path: Path) -> None:
    files = opened(tmp_path)
    with trio.CancelScope() as scope:
        async with files.new(TASK, Part.REQUEST) as body:
            await body.write(LARGE)
            [unfinished] = files_in(tmp_path)
            assert unfinished.startswith(f"20260102/{TASK}.request.")
            assert unfinished.endswith(".part")
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert files_in(tmp_path) == []
    assert files.used_bytes == 0


@trio_test
async def test_a_body_over_its_limit_is_refused_and_removed(tmp_path: Path) -> None:
    files = opened(tmp_path, body_bytes=500_000)
    with pytest.raises(BodyTooLarge) as caught:
        await keep(files, TASK, LARGE[:400_000], LARGE[:400_000])
    assert caught.value.limit_bytes == 500_000
    assert files_in(tmp_path) == []


@trio_test
async def test_all_bodies_together_are_bounded(tmp_path: Path) -> None:
    files = opened(tmp_path, total_bytes=1_000_000)
    kept = await keep(files, TASK, LARGE)
    with pytest.raises(StoreUnavailable, match="full"):
        await keep(files, task_id(2), LARGE)
    await files.remove([kept])
    await keep(files, task_id(2), LARGE)


@trio_test
async def test_a_full_disk_is_unavailable_and_leaves_nothing(tmp_path: Path) -> None:
    class Full(BodyFiles):
        def publish(self, relative: str, file: BinaryIO) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    files = Full(tmp_path)
    files.open()
    with pytest.raises(StoreUnavailable, match="No space left"):
        await keep(files, TASK, LARGE)
    assert files_in(tmp_path) == []
    assert files.used_bytes == 0


@trio_test
async def test_a_file_cut_short_or_gone_is_missing(tmp_path: Path) -> None:
    files = opened(tmp_path)
    stored = await keep(files, TASK, LARGE)
    (tmp_path / stored.path).write_bytes(LARGE[:-1])
    with pytest.raises(BodyMissing):
        await files.read(TASK, Part.REQUEST, stored)
    (tmp_path / stored.path).unlink()
    with pytest.raises(BodyMissing):
        await files.read(TASK, Part.REQUEST, stored)


def test_opening_counts_what_is_there_and_sweeps_what_no_row_names(tmp_path: Path) -> None:
    names = ["20260101/old.request", "20260102/a.request", "20260103/b.request", "20260103/c.response.part"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 10)
    files = opened(tmp_path)
    assert files.used_bytes == 40
    removed = files.sweep(lambda paths: {"20260103/b.request"} & set(paths))
    assert removed == 2
    # the two newest days are looked at: a crash leaves nothing older
    assert files_in(tmp_path) == ["20260101/old.request", "20260103/b.request"]
    assert files.used_bytes == 20


def test_a_task_id_that_climbs_is_refused(tmp_path: Path) -> None:
    for bad in ("../../etc/passwd", "x" * 200, "a/b", "", "20260102\0"):
        with pytest.raises(RecordRefused):
            opened(tmp_path).new(bad, Part.REQUEST)
