"""The owner's disk: what images may take of it, and which of them go so that another fits.

Owns the sums (what is free, what fetches under way were promised, what came to need more than was thought) and the
removal: only images on the `shelf`, which this node fetched; only under pressure (the owner's reserve of disk, or the
total for images); never one that is held, used by any container, or pinned by the owner. And never for nothing: when
all that may go would not make the room that is needed, all of it stays. Fetching, and who holds what, are `images`'.

`taking` is held by whoever removes, and by whoever looks for an image and takes it: what was found is there to be
taken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import structlog
import trio

from ngpu_node.config import ImageSettings
from ngpu_node.errors import EngineFailed, EngineUnavailable
from ngpu_node.images.disk import FreeBytes
from ngpu_node.images.engine_images import EngineImages
from ngpu_node.images.problems import DiskFull, ImageProblem, OutOfSpace, TotalReached, in_units
from ngpu_node.images.shelf import Entry, Shelf, collectable

log = structlog.get_logger(__name__)

MAX_LESSONS = 256


class Guest(Protocol):
    """A fetch under way, as far as room goes.

    Attributes:
        need: bytes it takes at its height, set once they are promised to it.
        promised: bytes of its need that it has not taken yet.
    """

    name: str
    need: int

    @property
    def promised(self) -> int: ...


class DiskRoom:
    """The room of one node's images.

    Attributes:
        taking: looking for an image and taking it, against removing it.
        free_bytes: what is free on the engine's disk; None where nobody knows.
    """

    def __init__(
        self,
        engine: EngineImages,
        settings: ImageSettings,
        shelf: Shelf,
        *,
        free_bytes: FreeBytes,
        guests: Callable[[], Collection[Guest]],
        held: Callable[[], Collection[tuple[str, str]]],
    ) -> None:
        """Put it together; nothing is removed before somebody asks for room.

        Args:
            guests: the fetches under way.
            held: names and ids of the images that deployments have, or wait for.
        """
        self.taking = trio.Lock()
        self.free_bytes = free_bytes
        self._engine = engine
        self._settings = settings
        self._shelf = shelf
        self._guests = guests
        self._held = held
        #: what images came to need beyond the estimate, by name
        self._lessons: dict[str, int] = {}

    # -- sums ----------------------------------------------------------------------------------------------------------

    def left(self) -> int | None:
        """Return the bytes that images may still take beyond the owner's reserve; None when nobody knows."""
        free = self.free_bytes()
        if free is None:
            return None
        return max(0, free - self._settings.disk_reserve_bytes - self._promised())

    def is_short(self) -> bool:
        """Whether the owner's reserve is touched."""
        return self._short_of(0) > 0

    def _promised(self) -> int:
        return sum(guest.promised for guest in self._guests())

    def _short_of(self, need: int) -> int:
        free = self.free_bytes()
        if free is None:
            return 0
        return need + self._settings.disk_reserve_bytes + self._promised() - free

    def _used_bytes(self) -> int:
        return sum(entry.size for entry in self._shelf.entries() if not entry.borrowed)

    # -- for one fetch -------------------------------------------------------------------------------------------------

    async def make(self, guest: Guest, what: str, need: int) -> None:
        """See to it that *need* bytes fit beside the owner's reserve and total, and promise them to *guest*.

        Raises:
            DiskFull, TotalReached: they do not, and nothing was removed in vain.
        """
        need = max(need, self._lessons.get(guest.name, 0))
        async with self.taking:
            total = self._settings.total_bytes
            if total is not None:
                unpacked = need * 2 // 3
                used = self._used_bytes()
                await self._remove(used + unpacked - total)
                used = self._used_bytes()
                if used + unpacked > total:
                    raise TotalReached(what, needed=unpacked, used=used, limit=total)
            short = self._short_of(need)
            if short > 0:
                await self._remove(short)
                short = self._short_of(need)
            if short > 0:
                free = self.free_bytes()
                assert free is not None
                raise DiskFull(
                    what, needed=need, free=max(0, free - self._promised()), reserve=self._settings.disk_reserve_bytes
                )
            guest.need = need

    def overrun(self, guest: Guest, what: str, free_before: int | None) -> ImageProblem | None:
        """Return why the fetch must stop: it took the disk below the owner's reserve; None where it did not.

        Args:
            free_before: what was free when it began.
        """
        free = self.free_bytes()
        if free is None or free >= self._settings.disk_reserve_bytes:
            return None
        # It took more than was thought. Next time that is known, and nothing is fetched in vain.
        taken = max(0, (free_before or free) - free)
        self._lessons[guest.name] = max(guest.need, taken + taken // 4)
        while len(self._lessons) > MAX_LESSONS:
            self._lessons.pop(next(iter(self._lessons)))
        return OutOfSpace(
            f"{what} was broken off: {in_units(free)} are left on the disk, and the owner keeps "
            f"{in_units(self._settings.disk_reserve_bytes)} free"
        )

    # -- removing ------------------------------------------------------------------------------------------------------

    async def relieve(self) -> None:
        """Remove what may go while the owner's reserve is touched."""
        try:
            async with self.taking:
                await self._remove(self._short_of(0))
        except (EngineUnavailable, EngineFailed) as error:
            log.info("images_not_collected", reason=str(error))

    async def _remove(self, short: int) -> None:
        """Remove images nothing needs until *short* bytes are free; none at all if that cannot be reached."""
        if short <= 0:
            return
        held = set(self._held())
        candidates = collectable(
            self._shelf.entries(),
            used_ids=await self._engine.used_ids() | {image_id for _, image_id in held if image_id},
            held_names={name for name, _ in held} | {guest.name for guest in self._guests()},
            keep=self._settings.keep,
        )
        candidates = [entry for entry in candidates if not await self._is_claimed(entry)]
        if sum(entry.size for entry in candidates) < short:
            return
        for entry in candidates:
            if short <= 0:
                break
            free = self.free_bytes()
            if await self._remove_one(entry):
                freed = self.free_bytes()
                # What the disk says, where it can be seen; layers shared with other images free nothing.
                gained = freed - free if freed is not None and free is not None else entry.size
                short -= max(gained, 0)
        await self._shelf.save()

    async def _is_claimed(self, entry: Entry) -> bool:
        """Tell whether somebody else has given an image of ours a tag; it is not ours to remove any more then."""
        attrs = await self._engine.inspect(entry.name)
        entry.borrowed = attrs is not None and any(tag != entry.name for tag in attrs.get("RepoTags") or [])
        return entry.borrowed

    async def _remove_one(self, entry: Entry) -> bool:
        """Remove an image of ours; tell whether it is gone. One that somebody uses meanwhile stays."""
        try:
            await self._engine.remove(entry.name)
        except EngineFailed as error:
            log.info("image_kept", image=entry.name, reason=str(error))
            return False
        self._shelf.drop(entry.name)
        log.info("image_removed", image=entry.name, bytes=entry.size, reason="its room is needed")
        return True
