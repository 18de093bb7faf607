"""Runs tasks over a synthetic GPU with the node's own sampling and metering, and compares with the truth.

What `ngpu_node.gpus.watch` does with a thread and trio is done here on the synthetic device's clock, so that an hour
takes no time.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ngpu_node.gpus.driver import DriverFault, FaultKind
from ngpu_node.gpus.looks import have
from ngpu_node.gpus.metering import Busy, BusyMeter, Metered, Method
from ngpu_node.gpus.presence import Owners
from ngpu_node.gpus.sampling import DeviceSampling
from tests.support.synthetic_gpu import SyntheticGpu

UUID = "GPU-synthetic"
LOOK_TIMEOUT_US = 2_000_000
HOLDERS = {f"container {number}": f"workspace {number}" for number in range(1, 10)}


@dataclass(frozen=True)
class Task:
    """A task of *workspace* (whose container has the process numbers from 100 x its number on)."""

    begin_us: int
    end_us: int
    workspace: int = 1


@dataclass
class Run:
    """What came of it, task by task.

    Attributes:
        interval_us: how far apart looks were at the end.
    """

    tasks: list[Task]
    metered: list[Busy]
    looks: int
    gaps: int
    cost_us: float
    interval_us: int

    @property
    def total_us(self) -> float:
        return sum(busy.busy_ns for busy in self.metered) / 1000


def run(gpu: SyntheticGpu, tasks: Sequence[Task], *, method: Method = Method.PROCESS, seed: int = 1) -> Run:
    """Run *tasks*; looks come up to 20 ms later than they are due."""
    chance = random.Random(seed)
    meter = BusyMeter()
    sampling = DeviceSampling(UUID, meter, method)
    gpu.now_us = 1_000
    if gpu.phase_us:  # the daemon has looked at the device before
        sampling.learn(gpu.device_look(UUID, 0))
    gpu.spent_us = 0
    events = sorted(
        [(task.begin_us, 1, number) for number, task in enumerate(tasks)]
        + [(task.end_us, 0, number) for number, task in enumerate(tasks)]
    )
    running: dict[int, Metered] = {}
    metered: dict[int, Busy] = {}
    look_at: int | None = None
    while events or look_at is not None:
        if look_at is None or (events and events[0][0] <= look_at):
            at, begins, number = events.pop(0)
            gpu.now_us = max(gpu.now_us, at)
            if begins:
                running[number] = meter.start([UUID], f"workspace {tasks[number].workspace}", at * 1000)
                sampling.wake(gpu.wall_us(), gpu.now_us * 1000)
            else:
                if sampling.is_worth_a_look(gpu.wall_us()):
                    _look(gpu, sampling)
                metered[number] = meter.stop(running.pop(number), at * 1000)
            if look_at is None:
                look_at = _next(sampling, gpu, chance)
            continue
        gpu.now_us = max(gpu.now_us, look_at)
        _look(gpu, sampling)
        if not meter.wanted():
            sampling.rest()
        look_at = _next(sampling, gpu, chance)
    in_order = [metered[number] for number in range(len(tasks))]
    return Run(list(tasks), in_order, sampling.looks, sampling.gaps, gpu.spent_us, sampling.interval_us or 0)


def _look(gpu: SyntheticGpu, sampling: DeviceSampling) -> None:
    ask = sampling.ask(gpu.wall_us())
    if ask is None:
        return
    for begin, end in gpu.stuck:
        if begin <= gpu.now_us < end:
            # The call hangs and is given up after a while; until it returns there is no other.
            gpu.now_us = min(end, gpu.now_us + LOOK_TIMEOUT_US)
            fault = DriverFault(FaultKind.STUCK, "look", "the driver does not answer")
            sampling.failed(fault, gpu.wall_us(), gpu.now_us * 1000)
            return
    before_us = gpu.spent_us
    looked = have(gpu, ask, _containers, gpu.is_alive)
    if looked.look is None:
        assert looked.fault is not None
        sampling.failed(looked.fault, gpu.wall_us(), gpu.now_us * 1000)
        return
    owners = Owners(looked.containers, HOLDERS)
    cost_us = gpu.spent_us - before_us
    sampling.took(looked.look, owners, whole=looked.whole, calls=looked.calls, cost_us=cost_us)


def _containers(pids: Iterable[int]) -> dict[int, list[str]]:
    return {pid: [f"container {pid // 100}"] if pid >= 100 else [] for pid in pids}


def _next(sampling: DeviceSampling, gpu: SyntheticGpu, chance: random.Random) -> int | None:
    delay_s = sampling.delay_s(gpu.wall_us())
    return None if delay_s is None else gpu.now_us + max(1, int(delay_s * 1e6)) + chance.randrange(20_000)
