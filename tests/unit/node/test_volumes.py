"""Whose volumes take too much of the owner's disk."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from trio.testing import MockClock, trio_test

from ngpu_node.engine import volumes
from ngpu_node.engine.volumes import Scales, size_of, verdict
from ngpu_node.errors import EngineUnavailable

MB = 1_000_000


def test_all_volumes_of_a_workspace_count_together_and_nobody_elses() -> None:
    now = {"a": 6 * MB, "b": 5 * MB, "theirs": 900 * MB}
    assert verdict(now, {}, ["a"], limit=10 * MB, is_short=False) is None
    found = verdict(now, {}, ["a", "b"], limit=10 * MB, is_short=False)
    assert found is not None
    assert found.word == "volume_full"
    assert "11 MB" in found.reason
    assert "10 MB" in found.reason


def test_while_the_owners_reserve_is_touched_only_who_goes_on_filling_must_stop() -> None:
    before, now = {"still": 5 * MB, "grows": 5 * MB}, {"still": 5 * MB, "grows": 7 * MB, "new": MB}
    assert verdict(now, before, ["still"], limit=10 * MB, is_short=True) is None
    assert verdict(now, before, ["new"], limit=10 * MB, is_short=True) is None, "it was not seen growing"
    found = verdict(now, before, ["grows"], limit=10 * MB, is_short=True)
    assert found is not None
    assert (found.word, "2 MB" in found.reason) == ("disk_full", True)
    assert verdict(now, before, ["grows"], limit=10 * MB, is_short=False) is None


def test_a_file_with_two_names_counts_once_and_a_link_leads_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "volume"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_bytes(os.urandom(1 << 20))
    once = size_of(folder, time.monotonic() + 5)
    assert 1 << 20 <= once < 2 << 20
    os.link(folder / "deep" / "file", folder / "again")
    (tmp_path / "elsewhere").write_bytes(os.urandom(4 << 20))
    (folder / "out").symlink_to(tmp_path / "elsewhere")
    assert size_of(folder, time.monotonic() + 5) < once + 65_536
    with pytest.raises(TimeoutError):
        size_of(folder, time.monotonic() - 1)
    with pytest.raises(FileNotFoundError):
        size_of(tmp_path / "missing", time.monotonic() + 5)


class Engine:
    """Tells where volumes are and what they take, and counts how often it is asked for the latter."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.asked = 0
        self.answers = True

    async def volume_places(self) -> dict[str, str]:
        if not self.answers:
            raise EngineUnavailable("away")
        return {"cache": self.place}

    async def volume_sizes(self) -> dict[str, int]:
        self.asked += 1
        return {"cache": 5}


def test_the_engine_is_asked_for_sizes_only_where_they_cannot_be_seen_and_seldom(tmp_path: Path) -> None:
    clock = MockClock()
    short = [False]

    @trio_test
    async def run(clock: MockClock) -> None:
        engine = Engine(str(tmp_path))
        scales = Scales(engine, is_short=lambda: short[0])
        assert scales.is_due
        assert not await scales.look()
        assert (engine.asked, scales.now.keys()) == (0, {"cache"})
        assert not scales.is_due
        engine.place = "/nowhere"
        clock.jump(volumes.PRESSURE_INTERVAL_S)
        assert not scales.is_due
        short[0] = True
        assert scales.is_due
        assert await scales.look()
        assert (engine.asked, scales.now) == (1, {"cache": 5})
        short[0] = False
        clock.jump(volumes.LOOK_INTERVAL_S)
        assert scales.is_due
        engine.answers = False
        with pytest.raises(EngineUnavailable):
            await scales.look()
        assert not scales.is_due, "an engine that is away is not asked all the time"

    run(clock=clock)
