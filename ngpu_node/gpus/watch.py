"""Keeps everything about this machine's GPUs current while the node runs: inventory, health, busy time.

The shell around the pure modules of this package: it owns the one way to the driver (`calls`), the clocks, and what
was known last. Three tasks share the driver: a survey now and then, which also finds devices that came back; a round of
vitals every few seconds; looks at the samples of devices on which tasks run, at the pace of the driver's ticks.

Whatever the driver does, the node runs on. A device that is sick, or cannot be asked, is not offered from that moment
(`offers`), and whoever holds it is told through *changes*.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import trio

from ngpu_node.changes import Changes
from ngpu_node.gpus.calls import DriverCalls
from ngpu_node.gpus.choice import UsableGpu
from ngpu_node.gpus.driver import DeviceState, Driver, DriverFault, FaultKind, Round, Vitals
from ngpu_node.gpus.health import ConditionKind, DeviceHealth, Phase, Policy, believable
from ngpu_node.gpus.inventory import NOT_LOOKED, Gpu, Inventory, InventoryState, Withheld, moves, of_fault, of_survey
from ngpu_node.gpus.looks import Ask, Looked, have
from ngpu_node.gpus.machine import Machine, look_around
from ngpu_node.gpus.metering import Busy, BusyMeter, Metered, Method
from ngpu_node.gpus.presence import Owners
from ngpu_node.gpus.processes import ProcessTable
from ngpu_node.gpus.sampling import DeviceSampling
from ngpu_protocol.control import GpuOffer
from ngpu_protocol.gpu_models import canonical_gpu_model
from ngpu_protocol.identity import Address, gpu_id

log = structlog.get_logger(__name__)

SURVEY_TIMEOUT_S = 20.0
ROUND_TIMEOUT_S = 8.0
LOOK_TIMEOUT_S = 3.0
#: How long the end of a task may wait for a last look.
LAST_LOOK_S = 0.02
STUCK_WAIT_S = 1.0
#: How often the machine around the GPUs is looked at: its disk fills, its toolkit is installed.
MACHINE_S = 600.0
#: Trouble that is as it was for so long is looked at as seldom as if all were well: the library is closed each time.
SETTLED_S = 600.0
#: So many devices that are gone are remembered.
MAX_GONE = 64


@dataclass(frozen=True, slots=True)
class Pace:
    """How often the driver is asked.

    Attributes:
        survey_s: when all is well; *again_s* while a device is missing, sick or waits for its clean check, for
            `SETTLED_S`.
        round_s: between rounds of vitals. The time a sick device goes unnoticed, and 2 ms of CPU each.
    """

    survey_s: float = 60.0
    again_s: float = 10.0
    round_s: float = 3.0


@dataclass(slots=True)
class Surroundings:
    """What the rest of the node knows and this module asks.

    Attributes:
        held: UUIDs of the devices that workspaces have now.
        holders: whose each container is, by its full id; a holder is what `BusyMeter` tasks were started for.
    """

    held: Callable[[], Collection[str]] = tuple
    holders: Callable[[], Mapping[str, Hashable]] = dict


@dataclass(slots=True)
class Clocks:
    """Where this module gets the time; tests bring their own."""

    wall_us: Callable[[], int] = lambda: time.time_ns() // 1000
    monotonic_ns: Callable[[], int] = time.monotonic_ns


class GpuWatch:
    """The GPUs of one node.

    Attributes:
        inventory: the newest survey.
        machine: what it runs on; None before the first survey.
    """

    def __init__(
        self,
        driver: Driver,
        node: Address,
        changes: Changes,
        *,
        withheld: Withheld | None = None,
        shares: int = 1,
        surroundings: Surroundings | None = None,
        data_dir: Path = Path("/"),
        pace: Pace | None = None,
        policy: Policy | None = None,
        clocks: Clocks | None = None,
        processes: ProcessTable | None = None,
    ) -> None:
        """Put the parts together; nothing is asked before `look`.

        Args:
            changes: told when what may be offered is different.
            shares: deployments that may hold a device at once.
            surroundings: may be given later, before `run`.
        """
        self.inventory: Inventory = NOT_LOOKED
        self.machine: Machine | None = None
        self.surroundings = surroundings or Surroundings()
        self._calls = DriverCalls(driver)
        self._node = node
        self._changes = changes
        self._withheld = withheld or Withheld()
        self._shares = shares
        self._data_dir = data_dir
        self._pace = pace or Pace()
        self._policy = policy or Policy()
        self._clocks = clocks or Clocks()
        self._processes = processes or ProcessTable()
        self._contained: frozenset[int] = frozenset()
        self._health: dict[str, DeviceHealth] = {}
        self._vitals: dict[str, Vitals] = {}
        self._gone_s: dict[str, float] = {}
        self._troubles: tuple[InventoryState, frozenset[str]] | None = None
        self._troubled_s = 0.0
        self._machine_s = 0.0
        self._uuids: dict[bytes, str] = {}
        self._samplings: dict[str, DeviceSampling] = {}
        self._meter = BusyMeter()
        self._awoken = Changes()
        self._wanted: set[str] = set()
        self._looked = Changes()
        self._survey_now = Changes()

    # -- what others ask -----------------------------------------------------------------------------------------------

    def usable(self) -> tuple[UsableGpu, ...]:
        """Return the devices a workspace may be given now."""
        return tuple(
            UsableGpu(gpu.uuid, self.id_of(gpu.uuid), gpu.told_model, gpu.offered_bytes, gpu.reading.minor)
            for gpu in self.inventory.gpus
            if not gpu.withheld and self.reason_against(gpu.uuid) == ""
        )

    def offers(self) -> tuple[GpuOffer, ...]:
        """Return what bootstraps are told of this node's devices."""
        return tuple(GpuOffer(gpu.id, gpu.model, gpu.memory_bytes, self._shares) for gpu in self.usable())

    def models(self) -> dict[bytes, str]:
        """Return the canonical model of each device the driver lists, by how it is called outside."""
        return {
            self.id_of(gpu.uuid): canonical_gpu_model(gpu.reading.model, gpu.reading.memory_total_bytes)
            for gpu in self.inventory.gpus
        }

    def id_of(self, uuid: str) -> bytes:
        """Return how the device *uuid* is called outside."""
        name = gpu_id(self._node, uuid)
        self._uuids[name] = uuid
        return name

    def reason_against(self, uuid: str) -> str:
        """Return why the device *uuid* must not be used now, empty where it may."""
        gpu = self.inventory.gpu(uuid)
        if gpu is None:
            health = self._health.get(uuid)
            return (health.reason if health is not None else "") or "the driver does not list it"
        for name in filter(None, [uuid, gpu.reading.mig.parent_uuid if gpu.reading.mig else ""]):
            health = self._health.get(name)
            if health is not None and not health.serves:
                return health.reason
        return ""

    def word_against(self, uuid: str) -> str:
        """Return the same as one stable word (`health.ConditionKind`, or a phase), empty where it may be used."""
        gpu = self.inventory.gpu(uuid)
        parent = gpu.reading.mig.parent_uuid if gpu is not None and gpu.reading.mig else ""
        for name in filter(None, [uuid, parent]):
            health = self._health.get(name)
            if health is not None and not health.serves:
                return next((str(c.kind) for c in health.conditions if c.sick), str(health.phase))
        return "" if gpu is not None else str(ConditionKind.GONE)

    def health(self, uuid: str) -> DeviceHealth | None:
        """Return what is known of the health of *uuid*."""
        return self._health.get(uuid)

    # -- busy time (what `execution.meter` calls) ----------------------------------------------------------------------

    def start(self, gpus: Sequence[bytes], holder: Hashable, now_ns: int) -> Metered:
        """Begin to meter a task of *holder* on *gpus*, as they are called outside."""
        uuids = [self._uuids.get(name, "") for name in gpus]
        metered = self._meter.start(uuids, holder, now_ns)
        asleep = [uuid for uuid in uuids if uuid in self._samplings and self._samplings[uuid].is_resting]
        for uuid in asleep:
            self._samplings[uuid].wake(self._clocks.wall_us(), self._clocks.monotonic_ns())
        if asleep:
            self._awoken.announce()
        return metered

    async def look_before_stop(self, gpus: Sequence[bytes]) -> None:
        """Have the newest samples of *gpus*, where that is worth it; takes some milliseconds at most.

        A task that is about to end is known up to the driver's last tick then, not up to the last look.
        """
        wall_us = self._clocks.wall_us()
        samplings = [self._samplings[uuid] for name in gpus if (uuid := self._uuids.get(name, "")) in self._samplings]
        worth = [sampling for sampling in samplings if sampling.is_worth_a_look(wall_us)]
        if not worth or self._calls.stuck_for_s is not None:
            return
        self._wanted.update(sampling.uuid for sampling in worth)
        self._awoken.announce()
        # A receipt is owed whatever happens to the task: nothing may be raised here. Only the waiting ends; a look that
        # takes longer is not given up, since a driver that is slow for a moment would seem to hang.
        with trio.move_on_after(LAST_LOOK_S, shield=True):
            while not self._wanted.isdisjoint(sampling.uuid for sampling in worth):
                await self._looked.beyond(self._looked.count)

    def stop(self, metered: Metered, now_ns: int) -> Busy:
        """End the metering of a task."""
        return self._meter.stop(metered, now_ns)

    def forget(self, holder: Hashable) -> None:
        """Drop what was kept for *holder*: its last task has ended."""
        self._meter.forget(holder)

    # -- surveys -------------------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """Survey once; never raises for what drivers and cards do. Before the node says what it offers."""
        await self._look_around()
        await self._survey(afresh=False)
        await self._round()

    async def _look_around(self) -> None:
        self.machine = await trio.to_thread.run_sync(look_around, self._data_dir, abandon_on_cancel=True)
        self._machine_s = trio.current_time()

    def _is_settled(self) -> bool:
        """Return whether what is not well has been just so for long: that card is gone, or waits for somebody."""
        now_s = self._clocks.monotonic_ns() / 1e9
        troubles = self.inventory.state, frozenset(uuid for uuid, health in self._health.items() if not health.serves)
        if troubles != self._troubles:
            self._troubles, self._troubled_s = troubles, now_s
        return now_s - self._troubled_s >= SETTLED_S

    def _note_gone(self) -> None:
        """Keep in mind since when devices are missing, and forget old ones: an owner may split a card ever anew."""
        if self.inventory.state not in (InventoryState.OK, InventoryState.PARTIAL, InventoryState.NO_DEVICE):
            return
        now_s = self._clocks.monotonic_ns() / 1e9
        there = {gpu.uuid for gpu in self.inventory.gpus}
        self._gone_s = {uuid: self._gone_s.get(uuid, now_s) for uuid in self._health if uuid not in there}
        by_age = sorted(self._gone_s, key=self._gone_s.__getitem__)
        instances = [uuid for uuid in by_age if uuid.startswith("MIG-") and now_s - self._gone_s[uuid] >= SETTLED_S]
        for uuid in {*instances, *by_age[: max(0, len(by_age) - MAX_GONE)]}:
            del self._gone_s[uuid], self._health[uuid]
            self._vitals.pop(uuid, None)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep all of it current until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_surveying)
            nursery.start_soon(self._keep_rounds)
            nursery.start_soon(self._keep_looking)
            task_status.started()

    async def _keep_surveying(self) -> None:
        while True:
            seen = self._survey_now.count
            well = self.inventory.state is InventoryState.OK and all(h.serves for h in self._health.values())
            with trio.move_on_after(self._pace.survey_s if self._is_settled() or well else self._pace.again_s):
                await self._survey_now.beyond(seen)
            # Devices that came back are seen after the library was opened anew.
            await self._survey(afresh=not well)
            if trio.current_time() - self._machine_s >= MACHINE_S:
                await self._look_around()

    async def _survey(self, *, afresh: bool) -> None:
        def survey(driver: Driver) -> Inventory:
            if afresh:
                driver.close()
                driver.open()
            return of_survey(driver.survey(), self._withheld)

        wanted = [uuid for uuid, health in self._health.items() if health.wants_check]
        try:
            found = await self._calls.run("survey", survey, timeout_s=SURVEY_TIMEOUT_S)
        except DriverFault as fault:
            found = replace(of_fault(fault), unmatched=self.inventory.unmatched)
            if fault.kind is FaultKind.STUCK:
                # The devices are still there, for all we know; they are not offered while their health is unknown.
                found = replace(self.inventory, state=InventoryState.STUCK, reason=fault.text)
        self._take(found)
        await self._choose_methods()
        for uuid in wanted:
            problem = "" if found.gpu(uuid) is not None else f"not in the survey: {found.reason}"
            if uuid in self._health and self._health[uuid].checked(problem):
                log.info("gpu_serves_again", gpu=uuid)
                self._changes.announce()

    def _take(self, found: Inventory) -> None:
        before, self.inventory = self.inventory, found
        changes = moves(before, found)
        for gpu in found.gpus:
            self.id_of(gpu.uuid)
            self._health.setdefault(gpu.uuid, DeviceHealth(gpu.uuid, self._policy))
        self._note_gone()
        for uuid in changes.renumbered:
            log.info("gpu_renumbered", gpu=uuid)
        if found.unmatched != before.unmatched and found.unmatched:
            log.warning("withheld_gpu_not_here", names=found.unmatched)
        if (before.state, before.reason) != (found.state, found.reason) or changes.appeared or changes.vanished:
            log.info(
                "inventory_changed",
                state=str(found.state),
                reason=found.reason,
                gpus=len(found.gpus),
                appeared=changes.appeared,
                vanished=changes.vanished,
            )
            self._changes.announce()

    # -- health --------------------------------------------------------------------------------------------------------

    async def _keep_rounds(self) -> None:
        while True:
            await trio.sleep(self._pace.round_s)
            await self._round()

    async def _round(self) -> None:
        uuids = list(self._health)
        if not uuids:
            return
        free: set[int] = set()
        try:
            found, free = await self._calls.run("vitals", partial(self._round_of, uuids), timeout_s=ROUND_TIMEOUT_S)
        except DriverFault as fault:
            found = Round(tuple(DeviceState(uuid, fault=fault) for uuid in uuids))
        held = set(self.surroundings.held())
        now_s = self._clocks.monotonic_ns() / 1e9
        changed = False
        for state in found.states:
            if state.uuid in self._health:
                xids = [event.xid for event in found.events if event.uuid == state.uuid]
                changed |= self._observe(state, xids, now_s, is_held=state.uuid in held, free=free)
        if changed:
            self._changes.announce()
        if any(health.wants_check for health in self._health.values()):
            self._survey_now.announce()

    def _round_of(self, uuids: Sequence[str], driver: Driver) -> tuple[Round, set[int]]:
        """Return a round of *driver*, and which of the processes in it live in no container: they are the owner's.

        Of one that is about to end, version 1 of control groups no longer says where it ran. What was in a container
        stays a workspace's for as long as the driver lists it; another process by its number is no ending one.
        """
        found = driver.round(uuids)
        pids = {each.pid for state in found.states if state.vitals for each in state.vitals.processes or ()}
        containers = self._processes.containers(pids, time.monotonic())
        self._contained = frozenset(
            pid for pid, its in containers.items() if its or (pid in self._contained and self._processes.ends(pid))
        )
        free = {pid for pid, its in containers.items() if its == () and pid not in self._contained}
        return found, {pid for pid in free if self._processes.lives(pid)}

    def _observe(
        self, state: DeviceState, xids: Sequence[int], now_s: float, *, is_held: bool, free: Collection[int]
    ) -> bool:
        health = self._health[state.uuid]
        before = health.phase
        reading = state.vitals if state.vitals is not None else state.fault
        if reading is None:
            return False
        if state.vitals is not None:
            self._vitals[state.uuid] = believable(state.vitals)
        processes = state.vitals.processes or () if state.vitals is not None else ()
        owners_bytes = sum(each.memory_bytes or 0 for each in processes if each.pid in free)
        changed = health.observe(reading, now_s, xids=xids, held=is_held, owners_bytes=owners_bytes)
        if xids:
            log.info("gpu_xid", gpu=state.uuid, xids=list(xids))
        if health.phase is not before:
            say = log.error if health.phase is Phase.SICK else log.info
            say("gpu_health", gpu=state.uuid, phase=str(health.phase), reason=health.reason)
        return changed

    # -- busy time -----------------------------------------------------------------------------------------------------

    async def _choose_methods(self) -> None:
        """Decide for each device how it is metered, by trying."""
        fresh = [gpu for gpu in self.inventory.gpus if not gpu.withheld and gpu.uuid not in self._samplings]
        for gpu in fresh:
            try:
                self._samplings[gpu.uuid] = await self._calls.run(
                    "samples", partial(_sampling_of, gpu, self._meter, self._clocks), timeout_s=LOOK_TIMEOUT_S
                )
            except DriverFault as fault:
                log.info("gpu_not_metered", gpu=gpu.uuid, reason=fault.text)
                continue
            log.info("gpu_metered", gpu=gpu.uuid, method=str(self._samplings[gpu.uuid].method))

    async def _keep_looking(self) -> None:
        while True:
            seen = self._awoken.count
            wall_us = self._clocks.wall_us()
            delays = [d for s in self._samplings.values() if (d := s.delay_s(wall_us)) is not None]
            with trio.move_on_after(0 if self._wanted else min(delays, default=float("inf"))):
                await self._awoken.beyond(seen)
            wall_us = self._clocks.wall_us()
            due = [s for s in self._samplings.values() if s.uuid in self._wanted or s.delay_s(wall_us) == 0.0]
            if due and await self._look_at_samples(due):
                await trio.sleep(STUCK_WAIT_S)  # one is told at once that it hangs: do not ask in a circle

    async def _look_at_samples(self, samplings: Sequence[DeviceSampling]) -> bool:
        """Look at the samples of devices; return whether the driver hangs."""
        asks = [ask for s in samplings if (ask := s.ask(self._clocks.wall_us())) is not None]
        answers: list[Looked] = []
        try:
            if asks:
                answers = await self._calls.run("samples", partial(self._look_at, asks), timeout_s=LOOK_TIMEOUT_S)
        except DriverFault as fault:
            answers = [Looked(ask, fault=fault) for ask in asks]
        holders = self.surroundings.holders()
        for answer in answers:
            sampling = self._samplings[answer.ask.uuid]
            if answer.look is not None:
                owners = Owners(answer.containers, holders)
                sampling.took(answer.look, owners, whole=answer.whole, calls=answer.calls, cost_us=answer.cost_us)
            elif answer.fault is not None:
                sampling.failed(answer.fault, self._clocks.wall_us(), self._clocks.monotonic_ns())
        self._wanted.difference_update(sampling.uuid for sampling in samplings)
        self._looked.announce()
        busy = set(self._meter.wanted())
        for sampling in samplings:
            if sampling.uuid not in busy:
                sampling.rest()
        return any(answer.fault is not None and answer.fault.kind is FaultKind.STUCK for answer in answers)

    def _look_at(self, asks: Sequence[Ask], driver: Driver) -> list[Looked]:
        containers = partial(self._processes.containers, now_s=time.monotonic())
        return [have(driver, ask, containers, self._processes.lives) for ask in asks]

    # -- what is shown -------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return everything for the owner, in plain values (`show` prints it)."""
        from ngpu_node.gpus.show import describe

        return describe(
            self.inventory,
            self._health,
            self._vitals,
            {uuid: (str(s.method), s.looks, s.gaps, s.last_gap) for uuid, s in self._samplings.items()},
            self.machine,
            held=set(self.surroundings.held()),
            stuck_for_s=self._calls.stuck_for_s,
            reason_against=self.reason_against,
        )


def _sampling_of(gpu: Gpu, meter: BusyMeter, clocks: Clocks, driver: Driver) -> DeviceSampling:
    """Return how *gpu* can be metered; the driver says by answering or not."""
    method, continuous = Method.NONE, False
    for wanted, look in ((Method.PROCESS, driver.process_look), (Method.DEVICE, driver.device_look)):
        if wanted is Method.PROCESS and gpu.reading.mig is not None:
            continue  # the driver has samples of processes for whole devices only
        try:
            continuous = look(gpu.uuid, clocks.wall_us()).continuous
        except DriverFault as fault:
            if fault.kind not in (FaultKind.UNSUPPORTED, FaultKind.NO_PERMISSION):
                raise
            continue
        method = wanted
        break
    sampling = DeviceSampling(gpu.uuid, meter, method, continuous=continuous)
    if method is not Method.NONE and gpu.reading.mig is None:
        with contextlib.suppress(DriverFault):  # else the usual period will do
            sampling.learn(driver.device_look(gpu.uuid, 0))
    return sampling
