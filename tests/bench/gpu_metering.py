"""The metering table: what synthetic loads are metered as: `python -m tests.bench.gpu_metering [--json FILE]`.

Goal: each within 5 % or one sample period of the driver, whichever is larger; the sum over tasks never above what the
device was busy, but for the driver's rounding to whole percent; looking, with calls as dear as on an H200, under 0.5 %
of a core from the first task's beginning to the last one's end, where that is 20 s or more (up to three looks were
saved up before). Exits with 1 where any of it is missed.

A task whose receipt says `none` makes no statement of its busy time: it is counted, and what it truly had is left out
of the truth. There are such tasks at the beginning of a row of short ones, which end before the first look: together no
longer than from one look to the next and a tick.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ngpu_node.gpus.metering import Method
from tests.support.metered_runs import Run, Task, run
from tests.support.synthetic_gpu import SyntheticGpu

MS = 1000
S = 1_000_000
PERIOD_US = 200 * MS
COST_FROM_US = 20 * S
MOST_CORE_PERCENT = 0.5
ROUNDING = 0.0075  # of the time: what whole percents leave open
PID = 100
OTHER = 200


@dataclass(frozen=True)
class Pattern:
    """A load, the tasks over it, and what is compared.

    Attributes:
        per_task: judge each task by itself, else their sum (tasks far shorter than a period).
        shares: each task's true busy time in microseconds.
        expect: the method every task reports; None: not judged.
        over_too: judge also that no task is metered for more than its share (work of others is beside it).
    """

    name: str
    gpu: SyntheticGpu
    tasks: list[Task]
    shares: list[float]
    per_task: bool = True
    method: Method = Method.PROCESS
    expect: Method | None = None
    over_too: bool = False


@dataclass(frozen=True)
class Line:
    pattern: str
    tasks: int
    none: int
    true_s: float
    metered_s: float
    error_s: float
    worst_task_s: float
    allowed_s: float
    core_percent: float
    method: str
    ok: bool


def every(period: int, busy: int, begin: int, end: int, pid: int = PID) -> list[tuple[int, int, int]]:
    return [(at, min(at + busy, end), pid) for at in range(begin, end, period)]


def alone(name: str, work: Sequence[tuple[int, int, int]], begin: int, end: int, **more: object) -> Pattern:
    """One task over *work*."""
    gpu = SyntheticGpu(work, **more)  # type: ignore[arg-type]
    return Pattern(name, gpu, [Task(begin, end)], [gpu.busy_us(begin, end)])


def in_sequence(name: str, count: int, length: int, busy: int, pause: int) -> Pattern:
    """Many tasks one after the other, each busy in its middle."""
    tasks, work = [], []
    for number in range(count):
        at = S + number * (length + pause)
        tasks.append(Task(at, at + length))
        work.append((at + (length - busy) // 2, at + (length + busy) // 2, PID))
    return Pattern(name, SyntheticGpu(work), tasks, [busy] * count, per_task=length > 2 * PERIOD_US)


def overlapping() -> Pattern:
    work = [(S, 9 * S, PID), (3 * S, 6 * S, PID + 1)]
    return Pattern(
        "two overlapping tasks of one workspace, all busy", SyntheticGpu(work), [Task(S, 9 * S), Task(3 * S, 6 * S)],
        [5 * S + 1.5 * S, 1.5 * S],
    )  # fmt: skip


def crowd() -> Pattern:
    """Random tasks, four at a time on the average, over random work."""
    chance = random.Random(7)
    tasks = []
    for _ in range(400):
        begin = S + chance.randrange(60 * S)
        tasks.append(Task(begin, begin + 20 * MS + chance.randrange(1200 * MS)))
    end = max(task.end_us for task in tasks)
    work, at = [], S
    while at < end:
        length = 1 + chance.randrange(90 * MS)
        work.append((at, min(end, at + length), PID))
        at += length + chance.randrange(60 * MS)
    gpu = SyntheticGpu(work)
    covered = _covered(gpu, tasks)
    return Pattern("400 random tasks, overlapping", gpu, tasks, [covered / 400] * 400, per_task=False)


def _covered(gpu: SyntheticGpu, tasks: Sequence[Task]) -> int:
    """Return how busy the device was while any task ran."""
    total, at = 0, 0
    for task in sorted(tasks, key=lambda task: task.begin_us):
        total += gpu.busy_us(max(at, task.begin_us), max(at, task.end_us))
        at = max(at, task.end_us)
    return total


def come_and_go() -> Pattern:
    work, alive = [], {}
    for number in range(20):
        begin = S + number * 1500 * MS
        pid = PID + number
        alive[pid] = (begin - 300 * MS, begin + 1300 * MS)
        work.append((begin, begin + 900 * MS, pid))
    gpu = SyntheticGpu(work, alive=alive)
    tasks = [Task(S, S + 30 * S)]
    return Pattern("processes that come, work 0.9 s and go", gpu, tasks, [20 * 900 * MS])


def ends_at_once(length: int, pause: int, count: int) -> Pattern:
    """One task over processes that end while they work: the driver forgets what they did since the last look."""
    work, alive, at = [], {}, S
    for pid in range(PID, PID + count):
        alive[pid] = (at, at + length)
        work.append((at, at + length, pid))
        at += length + pause
    name = f"processes of {length / S:g} s that end while busy"
    return Pattern(name, SyntheticGpu(work, alive=alive), [Task(S, at)], [count * length])


def a_process_a_task() -> Pattern:
    """Each task ends with its own process, as an image that starts a program for every request has it."""
    work, alive, tasks, at = [], {}, [], S
    for pid in range(PID, PID + 20):
        alive[pid] = (at, at + 1500 * MS)
        work.append((at + 200 * MS, at + 1500 * MS, pid))
        tasks.append(Task(at, at + 1500 * MS + 5 * MS))
        at += 2237 * MS
    name = "20 tasks of 1.5 s, a process each, busy to the end"
    return Pattern(name, SyntheticGpu(work, alive=alive), tasks, [1300 * MS] * 20, per_task=False)


def ends_beside_others() -> Pattern:
    """Processes of the workspace and of the owner take turns and end: nobody gets the other's work."""
    work, alive, at = [], {}, S
    for number in range(8):
        for pid in (PID + number, 50 + number):
            alive[pid] = (at, at + 1700 * MS)
            work.append((at, at + 1700 * MS, pid))
            at += 2 * S
    name = "processes of 1.7 s end, the owner's between them"
    return Pattern(name, SyntheticGpu(work, alive=alive), [Task(S, at)], [8 * 1700 * MS], over_too=True)


def by_turns() -> Pattern:
    """The driver gives a tick to whoever was last: of two workspaces on one device only the sum is right."""
    work = [(S + n * S, S + n * S + 500 * MS, PID) for n in range(20)]
    work += [(S + n * S + 500 * MS, S + n * S + S, OTHER) for n in range(20)]
    tasks = [Task(S, 21 * S, 1), Task(S, 21 * S, 2)]
    name = "two workspaces on one device by turns (sum)"
    return Pattern(name, SyntheticGpu(sorted(work)), tasks, [10 * S, 10 * S], per_task=False)


def beside_others() -> Pattern:
    work = [*every(2 * S, 1 * S, S, 21 * S), *every(2 * S, 1 * S, 2 * S, 21 * S, pid=50)]
    return Pattern("beside the owner's own process", SyntheticGpu(sorted(work)), [Task(S, 21 * S)], [10 * S])


PATTERNS: list[Callable[[], Pattern]] = [
    lambda: alone("steady", [(0, 30 * S, PID)], S, 21 * S),
    lambda: alone("idle", [], S, 11 * S),
    lambda: alone("step: 3 s idle, 4 s busy, 3 s idle", [(4 * S, 8 * S, PID)], S, 11 * S),
    lambda: alone("stairs: 10, 30, 50, 90 % for 3 s each", [
        *every(100 * MS, 10 * MS, S, 4 * S), *every(100 * MS, 30 * MS, 4 * S, 7 * S),
        *every(100 * MS, 50 * MS, 7 * S, 10 * S), *every(100 * MS, 90 * MS, 10 * S, 13 * S)], S, 13 * S),
    lambda: alone("on and off for 200 ms", every(400 * MS, 200 * MS, S, 21 * S), S, 21 * S),
    lambda: alone("bursts of 10 ms every 300 ms", every(300 * MS, 10 * MS, S, 21 * S), S, 21 * S),
    lambda: alone("bursts of 40 ms every 100 ms", every(100 * MS, 40 * MS, S, 21 * S), S, 21 * S),
    lambda: alone("bursts of 3 ms every 7 ms", every(7 * MS, 3 * MS, S, 21 * S), S, 21 * S),
    lambda: alone("one burst of 150 ms in 3 s", [(2 * S, 2 * S + 150 * MS, PID)], S, 4 * S),
    lambda: alone("an hour at 35 %", every(1 * S, 350 * MS, S, 3601 * S), S, 3601 * S),
    lambda: alone("driver that ticks at 6 Hz", every(400 * MS, 200 * MS, S, 21 * S), S, 21 * S, period_us=166_667),
    lambda: alone("driver that ticks at 50 Hz", every(400 * MS, 200 * MS, S, 21 * S), S, 21 * S, period_us=20_000),
    overlapping,
    crowd,
    lambda: in_sequence("400 tasks of 50 ms in a row, 80 % busy", 400, 50 * MS, 40 * MS, 0),
    lambda: in_sequence("160 tasks of 150 ms in a row, 2/3 busy", 160, 150 * MS, 100 * MS, 0),
    lambda: in_sequence("5 tasks of 150 ms in a row, 2/3 busy", 5, 150 * MS, 100 * MS, 0),
    lambda: in_sequence("100 tasks of 120 ms, 1 s between", 100, 120 * MS, 100 * MS, 1 * S),
    lambda: in_sequence("20 tasks of 2 s, 0.5 s between, half busy", 20, 2 * S, 1 * S, 500 * MS),
    come_and_go,
    lambda: ends_at_once(3900 * MS, 100 * MS, 8),
    lambda: ends_at_once(1900 * MS, 600 * MS, 12),
    lambda: ends_at_once(650 * MS, 850 * MS, 20),
    a_process_a_task,
    ends_beside_others,
    by_turns,
    beside_others,
    lambda: alone("clock set forward by 10 min", [(0, 60 * S, PID)], S, 41 * S, steps=[(20 * S, 600 * S)]),
    lambda: alone("driver stuck for 2 s of 120 s", [(0, 130 * S, PID)], S, 121 * S, stuck=[(50 * S, 52 * S)]),
    lambda: Pattern("device-wide samples, the container alone", gpu := SyntheticGpu(
        every(400 * MS, 150 * MS, S, 21 * S), processes_supported=False), [Task(S, 21 * S)], [gpu.busy_us(S, 21 * S)],
        method=Method.DEVICE, expect=Method.DEVICE),
    lambda: Pattern("device-wide samples, somebody else there", SyntheticGpu(
        [*every(400 * MS, 150 * MS, S, 21 * S), (2 * S, 3 * S, 50)], processes_supported=False),
        [Task(S, 21 * S)], [0], method=Method.DEVICE, expect=Method.NONE),
    lambda: Pattern("clock set back by 10 min: not measured", SyntheticGpu(
        [(0, 60 * S, PID)], steps=[(20 * S, -600 * S)]), [Task(S, 41 * S)], [0], expect=Method.NONE),
    lambda: Pattern("driver stuck for 30 s of 60 s: not measured", SyntheticGpu(
        [(0, 70 * S, PID)], stuck=[(20 * S, 50 * S)]), [Task(S, 61 * S)], [0], expect=Method.NONE),
]  # fmt: skip


def measure(pattern: Pattern) -> Line:
    """Run *pattern* and judge it."""
    outcome: Run = run(pattern.gpu, pattern.tasks, method=pattern.method)
    told = list(zip(pattern.tasks, outcome.metered, pattern.shares, strict=True))
    unknown = [task for task, busy, _ in told if busy.method is Method.NONE]
    if pattern.expect is not Method.NONE:
        told = [each for each in told if each[1].method is not Method.NONE]
    true_us = sum(share for _, _, share in told)
    errors = [busy.busy_ns / 1000 - share for _, busy, share in told]  # per task
    worst_us = max(errors, key=abs)
    allowed_us = max(0.05 * true_us, PERIOD_US)
    error_us = outcome.total_us - true_us
    ok = abs(error_us) <= allowed_us
    if pattern.per_task:
        pairs = zip(errors, told, strict=True)
        ok = all(abs(error) <= max(0.05 * share, PERIOD_US) for error, (_, _, share) in pairs)
    begin, end = min(task.begin_us for task in pattern.tasks), max(task.end_us for task in pattern.tasks)
    ok = ok and outcome.total_us <= pattern.gpu.busy_us(begin, end) + ROUNDING * (end - begin)
    if pattern.over_too:
        ok = ok and error_us <= ROUNDING * (end - begin)
    core_percent = 100 * outcome.cost_us / (end - begin)
    ok = ok and (end - begin < COST_FROM_US or core_percent < MOST_CORE_PERCENT)
    methods = {busy.method for busy in outcome.metered}
    if pattern.expect is not None:
        ok = ok and methods == {pattern.expect}
    else:
        ok = ok and sum(task.end_us - task.begin_us for task in unknown) <= outcome.interval_us + PERIOD_US
        methods -= {Method.NONE}
    return Line(
        pattern=pattern.name,
        tasks=len(pattern.tasks),
        none=len(unknown),
        true_s=round(true_us / 1e6, 3),
        metered_s=round(outcome.total_us / 1e6, 3),
        error_s=round(error_us / 1e6, 3),
        worst_task_s=round(worst_us / 1e6, 3) if pattern.per_task else 0.0,
        allowed_s=round(allowed_us / 1e6, 3),
        core_percent=round(core_percent, 3),
        method="/".join(sorted(methods)),
        ok=ok,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the table there too")
    arguments = parser.parse_args()
    lines = [measure(make()) for make in PATTERNS]
    heads = ("tasks", "none", "true s", "metered", "error", "allowed", "core %")
    print(f"{'pattern':<52}" + "".join(f"{head:>9}" for head in heads) + "  method")
    for line in lines:
        seconds = f"{line.true_s:>9.3f}{line.metered_s:>9.3f}{line.error_s:>+9.3f}{line.allowed_s:>9.3f}"
        words = f"{line.core_percent:>9.3f}  {line.method}{'' if line.ok else '  MISSED'}"
        print(f"{line.pattern:<52}{line.tasks:>9}{line.none:>9}{seconds}{words}")
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(line) for line in lines], indent=1) + "\n")
    return 0 if all(line.ok for line in lines) else 1


if __name__ == "__main__":
    raise SystemExit(main())
