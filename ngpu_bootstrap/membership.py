"""This bootstrap among others on one database: it says that it lives, and stands in for one that does not.

Owns the rhythm. Who owns what is the store's (`store.leases`); what becomes of a task that is taken over is decided as
at a restart (`tasks.recovery`). A lease of `LEASE_MS`, renewed every `BEAT_S` and looked at as often, has the tasks of
a killed bootstrap in other hands after 4 to 6 seconds. On a SQLite file there are no others, and only the sweep of old
tasks is left to do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import structlog
import trio

from ngpu_bootstrap.dispatch.detached import DetachedTasks
from ngpu_bootstrap.store.errors import StoreError
from ngpu_bootstrap.store.leases import Sibling, Told
from ngpu_bootstrap.store.records import OpenTask
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.identity import Address

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
        here: the nodes connected to this one, and what they report of their deployments, by workspace.
        reload: reads the workspaces anew where another bootstrap has changed them.
        met: told which bootstraps there are, dead or alive, this one included.
    """

    def __init__(
        self,
        store: Store,
        detached: DetachedTasks,
        *,
        about: Callable[[], dict[str, Any]],
        adopt: Adopt,
        cancel: Callable[[str], Awaitable[object]],
        here: Callable[[], Mapping[Address, Mapping[str, Told]]],
        reload: Callable[[], Awaitable[None]],
        met: Callable[[Sequence[Sibling]], Awaitable[None]],
    ) -> None:
        self._store = store
        self._detached = detached
        self._about = about
        self._adopt = adopt
        self._cancel = cancel
        self._here = here
        self._reload = reload
        self._met = met
        # as the store has it; None when that is not known
        self._present: Mapping[Address, Mapping[str, Told]] | None = None
        self.leaving = False

    async def join(self) -> None:
        """Take the lease of this run, before anything of the run before is looked at.

        Raises:
            StoreError: the database does not take it.
        """
        if self._store.is_shared:
            await self._store.renew_lease(LEASE_MS, self._about(), anew=True)
            self._present = {}
            await self._met(await self._store.siblings())

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
            except Exception:
                # what a sibling of a later version wrote must not end this one
                log.exception("beat_failed")

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
        await self._tell_presence()
        await self._reload()
        await self._met(await self._store.siblings())

    async def _tell_presence(self) -> None:
        """Have siblings know which nodes are here and what they report: none of them gives up a node that it alone has
        lost, and each says how a workspace stands there."""
        here, before = self._here(), self._present
        if here == before:
            return
        self._present = None  # until it is known to be written
        if before is None:
            await self._store.keep_presence(None, here)
        else:
            changed = {node: told for node, told in here.items() if before.get(node) != told}
            await self._store.keep_presence((before.keys() - here.keys()) | (before.keys() & changed.keys()), changed)
        self._present = here
