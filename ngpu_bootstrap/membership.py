"""This bootstrap among others on one database: it says that it lives, and stands in for one that does not.

Owns the rhythm. Who owns what is the store's (`store.leases`); what becomes of a task that is taken over is decided as
at a restart (`tasks.recovery`). A lease of `LEASE_MS`, renewed every `BEAT_S` and looked at as often, has the tasks of
a killed bootstrap in other hands after 4 to 6 seconds. On a SQLite file there are no others, and only the sweep of old
tasks is left to do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import structlog
import trio

from ngpu_bootstrap.dispatch.detached import DetachedTasks
from ngpu_bootstrap.store.errors import StoreError
from ngpu_bootstrap.store.records import OpenTask
from ngpu_bootstrap.store.store import Store

log = structlog.get_logger(__name__)

LEASE_MS = 4_000
BEAT_S = 1.0
FAREWELL_S = 2.0

Adopt = Callable[[Sequence[OpenTask]], Awaitable[None]]


class Membership:
    """Keeps the lease of this bootstrap, and looks at those of others.

    Args:
        about: what others may know of this one.
        adopt: takes unfinished tasks in hand.
        cancel: ends a task in hand whose end was asked for at another bootstrap.
        reload: reads the workspaces anew, another bootstrap having changed them.
        met: told who else there is, dead or alive.
    """

    def __init__(
        self,
        store: Store,
        own: str,
        detached: DetachedTasks,
        *,
        about: Callable[[], dict[str, Any]],
        adopt: Adopt,
        cancel: Callable[[str], Awaitable[object]],
        reload: Callable[[], Awaitable[None]],
        met: Callable[[frozenset[str]], None],
    ) -> None:
        self._store = store
        self._own = own
        self._detached = detached
        self._about = about
        self._adopt = adopt
        self._cancel = cancel
        self._reload = reload
        self._met = met
        self._mark: tuple[Any, ...] = ()
        self.leaving = False

    async def join(self) -> None:
        """Take the lease of this run, before anything of the run before is looked at.

        Raises:
            StoreError: the database does not take it.
        """
        if self._store.is_shared:
            await self._store.renew_lease(LEASE_MS, self._about(), anew=True)
            self._mark = await self._store.workspaces_mark()
            await self._meet()

    async def leave(self) -> None:
        """Have others take over at once what is left undone here."""
        self.leaving = True
        if self._store.is_shared:
            with trio.move_on_after(FAREWELL_S, shield=True):
                try:
                    await self._store.end_lease()
                except StoreError as error:
                    log.info("lease_not_ended", reason=str(error))

    async def run(self) -> None:
        """Renew the lease and stand in for the dead, for ever."""
        if not self._store.is_shared:
            return
        while not self.leaving:
            await trio.sleep(BEAT_S)
            try:
                await self._beat()
            except StoreError as error:
                # others take over when it lasts; what is in hand here is let go once the database says so
                log.error("lease_not_renewed", reason=str(error))

    async def _beat(self) -> None:
        before = self._detached.in_hand()
        if not await self._store.renew_lease(LEASE_MS, self._about()):
            # Between the two looks new tasks may have come in hand: only what was there before can have been lost.
            owned = await self._store.owned()
            kept = owned | (set(self._detached.in_hand()) - set(before))
            log.error("lease_was_lost", let_go=self._detached.keep_only(kept))
        if self.leaving:
            return
        while taken := await self._store.take_over():
            log.warning("tasks_taken_over", tasks=len(taken))
            await self._adopt(taken)
        for task_id in await self._store.cancels_asked():
            await self._cancel(task_id)
        mark = await self._store.workspaces_mark()
        if mark != self._mark:
            await self._reload()
            self._mark = mark
        await self._meet()

    async def _meet(self) -> None:
        others = await self._store.siblings()
        self._met(frozenset(one.address for one in others if one.address != self._own))
