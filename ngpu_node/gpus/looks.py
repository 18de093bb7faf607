"""One look at the samples of a device: which calls it takes, and whose the processes in its answer are.

Blocks; it is called where driver calls are made (`calls`). What to ask and what an answer means is `sampling`'s.

A look takes one dear call (1.5 ms of CPU on an H200). It takes a second one, for the device's own samples of the same
ticks, where a workspace's process has ended: what that one did since the last look the driver tells of no process any
more. The list of processes is cheaper (0.3 ms) and still too dear for each look; whether one has ended is asked of the
kernel. Where processes come and go and all of them are one workspace's, the device's samples alone tell everything.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ngpu_node.gpus.driver import Driver, DriverFault, Look
from ngpu_node.gpus.metering import Method
from ngpu_node.gpus.processes import lives

#: Finds the containers of processes, outermost first; None for one that cannot be found.
Containers = Callable[[Iterable[int]], Mapping[int, Sequence[str] | None]]


@dataclass(frozen=True, slots=True)
class Ask:
    """A look to be had: by process or of the device as a whole.

    Attributes:
        known: the processes that were on the device at the last look, or ended too late for it.
        held: those of them that are a workspace's.
        may_look_twice: whether a second call can be afforded.
        wants_list: whether it is time to see again who is on the device.
        alone: the containers of the one workspace on the device, where its processes come and go; else empty.
    """

    uuid: str
    method: Method
    since_us: int
    known: frozenset[int] = frozenset()
    held: frozenset[int] = frozenset()
    may_look_twice: bool = False
    wants_list: bool = False
    alone: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Looked:
    """The answer to an `Ask`.

    Attributes:
        look: by process, or of the device where that was asked for; without samples where *whole* tells everything.
            None where the driver gave none: *fault* says why.
        whole: the device's own samples since the same time, had because processes end.
        containers: of the processes that worked, and of those that are new on the device.
        calls: dear ones.
        cost_us: processor time it took.
    """

    ask: Ask
    look: Look | None = None
    whole: Look | None = None
    fault: DriverFault | None = None
    containers: Mapping[int, Sequence[str] | None] = field(default_factory=dict)
    calls: int = 1
    cost_us: float = 0.0


def have(driver: Driver, ask: Ask, containers: Containers, lives: Callable[[int], bool] = lives) -> Looked:
    """Return what *driver* says to *ask*. Never raises its faults: the answer has them.

    Args:
        lives: tells whether a process has not ended.
    """
    began_s = time.thread_time()
    try:
        if ask.method is Method.PROCESS:
            looked = _by_process(driver, ask, containers, lives)
        else:
            looked = _device(driver, ask, containers)
    except DriverFault as fault:
        return Looked(ask, fault=fault)
    return replace(looked, cost_us=(time.thread_time() - began_s) * 1e6)


def _device(driver: Driver, ask: Ask, containers: Containers) -> Looked:
    look = driver.device_look(ask.uuid, ask.since_us)
    return Looked(ask, look, containers=containers(set(look.pids or ()) - ask.known))


def _by_process(driver: Driver, ask: Ask, containers: Containers, lives: Callable[[int], bool]) -> Looked:
    whole: Look | None = None
    calls = 1
    if ask.alone:
        whole = driver.device_look(ask.uuid, ask.since_us)
        found = containers(set(whole.pids or ()) - ask.known)
        if whole.pids is not None and all(ask.alone & set(each or ()) for each in found.values()):
            return Looked(ask, replace(whole, samples=()), whole, containers=found)
        calls += 1
    look = driver.process_look(ask.uuid, ask.since_us)
    sampled = {sample.pid for sample in look.samples if sample.pid is not None}
    ended = {pid for pid in ask.known - sampled if not lives(pid)}
    with contextlib.suppress(DriverFault):  # the first answer stands
        if whole is None and ask.may_look_twice and ask.held & ended:
            calls += 1
            whole = driver.device_look(ask.uuid, ask.since_us)
        if whole is not None:
            look = replace(look, pids=whole.pids)
        elif ended or ask.wants_list:
            look = replace(look, pids=driver.processes(ask.uuid))
    worked = {sample.pid for sample in look.samples if sample.pid is not None and sample.percent}
    new = (sampled | set(look.pids or ())) - ask.known
    return Looked(ask, look, whole, containers=containers(worked | new), calls=calls)
