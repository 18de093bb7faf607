"""The metering table holds: every pattern within 5 % or one sample period."""

from __future__ import annotations

import random

import pytest

from ngpu_node.gpus.metering import Method
from tests.bench.gpu_metering import PATTERNS, Pattern, every, measure
from tests.support.metered_runs import Task, run
from tests.support.synthetic_gpu import SyntheticGpu


@pytest.mark.parametrize("make", PATTERNS, ids=lambda make: make().name.replace(" ", "_"))
def test_pattern(make: object) -> None:
    assert callable(make)
    pattern = make()
    assert isinstance(pattern, Pattern)
    line = measure(pattern)
    assert line.ok, line


@pytest.mark.parametrize("seed", range(12))
def test_tasks_together_never_pay_more_than_the_device_did(seed: int) -> None:
    chance = random.Random(seed)
    period = chance.choice([20_000, 100_000, 166_667, 200_000, 1_000_000])
    work = every(1 + chance.randrange(400_000), 1 + chance.randrange(200_000), 1_000_000, 31_000_000)
    gpu = SyntheticGpu(work, period_us=period, phase_us=chance.randrange(1, period))
    tasks = []
    for _ in range(100):
        begin = 1_000_000 + chance.randrange(28_000_000)
        tasks.append(Task(begin, begin + 1 + chance.randrange(chance.choice([20_000, 500_000, 2_000_000]))))
    outcome = run(gpu, tasks, seed=seed)
    for task, busy in zip(tasks, outcome.metered, strict=True):
        assert 0 <= busy.busy_ns <= (task.end_us - task.begin_us) * 1000
    # but for the driver's rounding to whole percent
    assert outcome.total_us <= gpu.busy_us(0, 40_000_000) + 0.01 * 30_000_000


@pytest.mark.parametrize("seed", range(8))
def test_nor_where_processes_of_workspaces_and_of_the_owner_come_and_go(seed: int) -> None:
    chance = random.Random(seed)
    work, alive, at = [], {}, 1_000_000
    used = {0: 0, 1: 0, 2: 0}  # the owner, and two workspaces
    for number in range(60):
        whose = chance.choice([0, 1, 1, 1, 2])
        length = 450_000 + chance.randrange(2_000_000)
        pid = whose * 100 + 1 + number
        alive[pid] = (at, at + length)
        used[whose] += length
        work.append((at, at + length, pid))
        at += length + chance.choice([0, 0, chance.randrange(600_000)])
    gpu = SyntheticGpu(work, alive=alive)
    tasks = [Task(1_000_000, at, 1), Task(1_000_000, at, 2)]
    outcome = run(gpu, tasks, seed=seed)
    assert outcome.total_us <= (used[1] + used[2]) + 0.01 * at
    for task, busy in zip(tasks, outcome.metered, strict=True):
        # a tick is all of whoever was last in it, so a change of processes may move a part of one
        assert busy.busy_ns / 1000 <= used[task.workspace] + 0.05 * used[task.workspace] + 200_000
        assert busy.busy_ns / 1000 >= 0.85 * used[task.workspace] - 200_000
    assert outcome.cost_us <= 0.005 * at


def test_looks_stop_with_the_tasks() -> None:
    gpu = SyntheticGpu([(0, 3_600_000_000, 100)])
    outcome = run(gpu, [Task(1_000_000, 2_000_000), Task(3_000_000_000, 3_001_000_000)])
    assert outcome.looks < 25
    assert [busy.method for busy in outcome.metered] == [Method.PROCESS, Method.PROCESS]
