"""What workspaces' volumes take of the owner's disk, and which workspace must stop for it.

No engine holds a volume to a size. So what they take is measured: by looking, where this process may read the engine's
folder, else by the engine's own account. A workspace whose volumes hold more than the owner allows stops, with the
numbers; so does one that went on filling the disk after the owner's reserve of it was touched. What it kept stays until
no revision names it any more. Between two looks it can write what its disk takes: the reserve is there for that.

Which must stop is pure (`verdict`); `Scales` measures.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog
import trio

from ngpu_node.errors import EngineFailed, EngineUnavailable
from ngpu_node.images.problems import in_units

log = structlog.get_logger(__name__)

LOOK_INTERVAL_S = 60.0
#: How soon after a look there may be another, while the owner's reserve is touched.
PRESSURE_INTERVAL_S = 5.0
WALK_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class TooMuch:
    """Why a workspace must stop: a sentence, and the stable word."""

    reason: str
    word: str


def verdict(
    now: Mapping[str, int], before: Mapping[str, int], own: Collection[str], *, limit: int, is_short: bool
) -> TooMuch | None:
    """Return why the workspace with the volumes *own* must stop, None where it may go on.

    Args:
        now, before: what each volume takes, and took at the look before.
        limit: what a workspace's volumes may take together.
        is_short: the owner's reserve of disk is touched.
    """
    taken = sum(now.get(name, 0) for name in own)
    if taken > limit:
        return TooMuch(
            f"its volumes hold {in_units(taken)}, more than the {in_units(limit)} this node's owner allows: a revision "
            "that names another volume begins with an empty one",
            "volume_full",
        )
    grown = sum(max(0, now.get(name, 0) - before[name]) for name in own if name in before)
    if is_short and grown:
        return TooMuch(
            f"its volumes grew by {in_units(grown)} while the disk has less left than its owner keeps free", "disk_full"
        )
    return None


class VolumeEngine(Protocol):
    """The engine, as far as volumes' sizes go."""

    async def volume_places(self) -> dict[str, str]: ...
    async def volume_sizes(self) -> dict[str, int]: ...


class Scales:
    """Measures the volumes of one node."""

    def __init__(self, engine: VolumeEngine, *, is_short: Callable[[], bool]) -> None:
        self._engine = engine
        self._is_short = is_short
        self._looked_s = -LOOK_INTERVAL_S
        self.before: Mapping[str, int] = {}
        self.now: Mapping[str, int] = {}

    @property
    def is_due(self) -> bool:
        """Whether it is time for another look."""
        since_s = trio.current_time() - self._looked_s
        return since_s >= LOOK_INTERVAL_S or (since_s >= PRESSURE_INTERVAL_S and self._is_short())

    async def look(self) -> bool:
        """Measure every volume of this node's; tell whether the owner's reserve is touched.

        Raises:
            EngineUnavailable, EngineFailed: it could not be done.
        """
        try:
            places = await self._engine.volume_places()
            sizes = await trio.to_thread.run_sync(_sizes_at, places, abandon_on_cancel=True)
            if sizes is None:
                sizes = await self._engine.volume_sizes()
        except (EngineUnavailable, EngineFailed):
            self._looked_s = trio.current_time()
            raise
        self._looked_s = trio.current_time()
        self.before, self.now = self.now, sizes
        return self._is_short()


def _sizes_at(places: Mapping[str, str]) -> dict[str, int] | None:
    """Return what lies in each folder, None where they are not for this process to read, or are too many to count."""
    deadline_s = time.monotonic() + WALK_TIMEOUT_S
    try:
        return {name: size_of(Path(place), deadline_s) for name, place in places.items()}
    except (OSError, TimeoutError):
        return None


def size_of(folder: Path, deadline_s: float) -> int:
    """Return the bytes that *folder* takes on the disk; a file with two names counts once, links lead nowhere.

    Raises:
        OSError: it cannot be read.
        TimeoutError: it took longer than until *deadline_s* (`time.monotonic`).
    """
    total, seen, waiting = 0, set(), [folder]
    while waiting:
        here = waiting.pop()
        try:
            entries = list(os.scandir(here))
        except FileNotFoundError:
            if here == folder:
                raise
            continue  # the workspace removed it meanwhile
        for entry in entries:
            if time.monotonic() > deadline_s:
                raise TimeoutError
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if found.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                if (found.st_dev, found.st_ino) in seen:
                    continue
                seen.add((found.st_dev, found.st_ino))
            total += found.st_blocks * 512
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
    return total
