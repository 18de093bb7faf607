"""Workspaces' policies on BRC-20 assets, applied to calls.

Owns which policy a workspace has (kept in the store, held in memory), the refusal of a call that does not meet it, and
the notes of balances with tasks. A note is made after the call, by a bounded number of workers: a call under `record`
never waits for an indexer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import structlog
import trio
from pydantic import ValidationError

from ngpu_bootstrap.brc20.checker import Brc20Checker
from ngpu_bootstrap.brc20.policies import Brc20Policy, held_of, plain
from ngpu_bootstrap.errors import Forbidden, NotServed, Refusal
from ngpu_bootstrap.store import brc20_rows
from ngpu_bootstrap.store.errors import StoreError
from ngpu_bootstrap.store.store import Store

log = structlog.get_logger(__name__)

DEFAULT = Brc20Policy()
WORKERS = 4
QUEUED = 256
# Another bootstrap on the same database may have changed one.
RELOAD_S = 10.0


class Brc20Desk:
    """Applies policies.

    Attributes:
        checker: who says what addresses hold.
    """

    def __init__(self, checker: Brc20Checker, store: Store, *, now_ms: Callable[[], int]) -> None:
        self.checker = checker
        self._store = store
        self._now_ms = now_ms
        self._policies: dict[str, Brc20Policy] = {}
        # those whose policy this version does not understand: it may be one that refuses
        self._strange: set[str] = set()
        self._put, self._get = trio.open_memory_channel[tuple[str, str, str]](QUEUED)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read the policies, then note balances with tasks; for ever."""
        await self._load()
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(self._work, self._get.clone())
            task_status.started()
            while True:
                await trio.sleep(RELOAD_S)
                try:
                    await self._load()
                except StoreError as error:
                    log.warning("policies_not_read", reason=str(error))

    def policy(self, workspace: str) -> Brc20Policy:
        """Return the policy of a workspace."""
        return self._policies.get(workspace, DEFAULT)

    async def set_policy(self, workspace: str, policy: Brc20Policy) -> None:
        """Give a workspace a policy; it counts from the next call on."""
        text = policy.model_dump_json()
        await self._store.chore(lambda connection: brc20_rows.set_policy(connection, workspace, text))
        self._policies[workspace] = policy
        self._strange.discard(workspace)

    def asks(self, workspace: str) -> bool:
        """Return whether calls of a workspace may be refused for what their address holds."""
        policy = self._policies.get(workspace)
        return workspace in self._strange or (policy is not None and policy.mode == "require")

    async def admit(self, workspace: str, address: str) -> None:
        """Return if a call of *workspace* for *address* meets its policy.

        Raises:
            Forbidden: no address, or it holds too little.
            Refusal: it is no address, or nobody can say what it holds.
        """
        if workspace in self._strange:
            raise NotServed(
                503,
                "policy_not_understood",
                "this gateway does not understand the workspace's policy on BTC addresses: its operator must update it",
                retry_after_s=60,
            )
        policy = self.policy(workspace)
        if policy.mode != "require":
            return
        ticker = policy.ticker or self.checker.ticker
        if not address:
            raise Forbidden(
                "btc_address_missing", f"this workspace asks for a BTC address that holds {ticker}: send btc_address"
            )
        held = held_of(await self.checker.balances(address), ticker)
        if held < policy.minimum:
            raise Forbidden(
                "brc20_insufficient",
                f"the address holds {plain(held)} {ticker}, this workspace asks for {plain(policy.minimum)}",
            )

    def note(self, workspace: str, task_id: str, address: str) -> None:
        """Have the balance of *address* noted with a task, soon; where too many notes wait, it is left out."""
        policy = self.policy(workspace)
        if not address or policy.mode == "ignore" or not self.checker.is_configured:
            return
        try:
            self._put.send_nowait((task_id, address, policy.ticker or self.checker.ticker))
        except trio.WouldBlock:
            log.info("brc20_not_noted", task_id=task_id, reason="too many notes wait")

    async def _work(self, tasks: trio.MemoryReceiveChannel[tuple[str, str, str]]) -> None:
        async for task_id, address, ticker in tasks:
            noted: dict[str, Any] = {"ticker": ticker, "at_ms": self._now_ms()}
            try:
                noted["amount"] = plain(held_of(await self.checker.balances(address), ticker))
            except Refusal as refusal:
                noted["problem"] = refusal.reason
            text = json.dumps(noted, separators=(",", ":"))
            try:
                await self._store.chore(functools.partial(brc20_rows.note, task_id=task_id, noted=text))
            except StoreError as error:
                log.warning("brc20_not_noted", task_id=task_id, reason=str(error))

    async def _load(self) -> None:
        policies: dict[str, Brc20Policy] = {}
        strange: set[str] = set()
        for workspace, text in await self._store.look_up(brc20_rows.policies):
            try:
                policies[workspace] = Brc20Policy.model_validate_json(text)
            except ValidationError:  # as a sibling of a later version wrote it
                log.error("policy_not_understood", workspace=workspace)
                if (known := self._policies.get(workspace)) is not None:
                    policies[workspace] = known
                else:
                    strange.add(workspace)
        self._policies, self._strange = policies, strange
