"""What a real device's driver said of known load, read again: the node's reading of it against CUDA's own events."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ngpu_node.gpus.driver import Look, Sample
from ngpu_node.gpus.metering import BusyMeter, Method
from ngpu_node.gpus.sampling import DeviceSampling, Owners

RECORDING = Path(__file__).parent / "recordings" / "h200.json"
PERIOD_S = 0.2


@cache
def recorded() -> dict[tuple[str, str], dict[str, Any]]:
    return {(run["name"], run["looks"]): run for run in json.loads(RECORDING.read_text())["runs"]}


def metered_s(run: dict[str, Any], mapped: dict[int, str]) -> dict[str, float]:
    """Return the busy time of one task a workspace, over the whole run."""
    meter = BusyMeter()
    sampling = DeviceSampling("GPU", meter, Method.PROCESS)
    rows = [row for row in run["rows"] if row[0] > run["begin_us"]]
    first_wall, first_mono, _ = rows[0]
    begin_ns = first_mono - (first_wall - run["begin_us"]) * 1000
    workspaces = sorted(set(mapped.values()))
    tasks = {workspace: meter.start(["GPU"], workspace, begin_ns) for workspace in workspaces}
    sampling.wake(run["begin_us"], begin_ns)
    owners = Owners({pid: [name] for pid, name in mapped.items()}, {name: name for name in workspaces})
    last_ns = begin_ns
    for wall_us, mono_ns, samples in rows:
        sampling.ask(wall_us)
        sampling.took(Look(tuple(Sample(*sample) for sample in samples), wall_us, mono_ns), owners)
        last_ns = mono_ns
    return {workspace: meter.stop(task, last_ns).busy_ns / 1e9 for workspace, task in tasks.items()}


def true_s(run: dict[str, Any]) -> float:
    """Return for how long any process was at work, by CUDA events."""
    edges = sorted((begin, end) for _, busy in run["busy"] for begin, end in busy)
    total = until = 0
    for begin, end in edges:
        total += max(0, end - max(begin, until))
        until = max(until, end)
    return total / 1e6


NAMES = sorted({name for name, _ in recorded()} - {"half the time, unseen for 22 s", "comes and goes"})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("looks", ["fast", "slow"])
def test_busy_time_is_right_within_one_tick_or_five_percent(name: str, looks: str) -> None:
    run = recorded()[name, looks]
    found = metered_s(run, {pid: "workspace" for pid, _ in run["busy"]})
    truth = true_s(run)
    assert abs(found["workspace"] - truth) <= max(PERIOD_S, 0.05 * truth)


@pytest.mark.parametrize("looks", ["fast", "slow"])
def test_two_workspaces_on_one_device_get_what_it_did_together(looks: str) -> None:
    run = recorded()["A and B by turns of 500 ms", looks]
    found = metered_s(run, {pid: str(pid) for pid, _ in run["busy"]})
    assert len(found) == 2
    assert abs(sum(found.values()) - true_s(run)) <= max(PERIOD_S, 0.05 * true_s(run))


def test_a_process_that_came_and_went_is_seen_by_frequent_looks() -> None:
    run = recorded()["comes and goes", "fast"]
    found = metered_s(run, {pid: "workspace" for pid, _ in run["busy"]})
    assert abs(found["workspace"] - true_s(run)) <= PERIOD_S
