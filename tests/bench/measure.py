"""Runs the load against the systems in turns, and reduces the rounds to one line for each system and concurrency.

Rounds are interleaved (A B C, A B C, …), so that a machine that slows down or is used by others meanwhile hurts all
alike; of the rounds the median is reported, each figure for itself.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from examples.demo.processes import Process
from tests.bench import streams
from tests.bench.load import Job, Result
from tests.bench.processes import tree_cpu_seconds
from tests.bench.systems import CHAT_PATH, REPOSITORY_ROOT, System

BODY = json.dumps(
    {"model": "fixed", "messages": [{"role": "user", "content": "Say hello in five words."}], "max_tokens": 5}
)
EXPECT = "Hello from a workspace."


@dataclass(frozen=True, slots=True)
class Load:
    """How much load: every system gets *rounds* rounds of *duration_s* at each concurrency."""

    concurrencies: Sequence[int] = (1, 16, 64)
    rounds: int = 3
    duration_s: float = 4.0
    warm_up_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Line:
    """One system at one concurrency. CPU is in seconds per 1,000 requests, by process."""

    system: str
    clients: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    requests: int
    answered: int
    errors: dict[str, int]
    cpu_s_per_1000: dict[str, float]


@dataclass(frozen=True, slots=True)
class StreamLine:
    """One system's streams; *added_first_byte_ms* is against the workspace itself."""

    system: str
    first_byte_ms: float
    added_first_byte_ms: float
    download_mb_per_s: float
    upload_mb_per_s: float


Say = Callable[[str], None]
FIRST_BYTE_ROUNDS = 30
BODY_ROUNDS = 3
STREAM_REQUESTS = FIRST_BYTE_ROUNDS + 2 * BODY_ROUNDS
"""Requests that `measure_streams` makes of one system."""


def measure_requests(systems: Sequence[System], workspace: Process, load: Load, say: Say) -> list[Line]:
    """Return a line for every system and concurrency."""
    lines = []
    for clients in load.concurrencies:
        rounds: dict[str, list[tuple[Result, dict[str, float]]]] = {system.name: [] for system in systems}
        for number in range(load.rounds):
            for system in systems:
                say(f"c={clients}, round {number + 1} of {load.rounds}: {system.name}")
                rounds[system.name].append(_one_round(system, workspace, clients, load))
        lines += [_line(system.name, clients, rounds[system.name]) for system in systems]
    return lines


def measure_streams(systems: Sequence[System], size: int, say: Say) -> list[StreamLine]:
    """Return a line for every system that passes streams; the first of *systems* is the floor."""
    lines: list[StreamLine] = []
    for system in systems:
        if not system.streams:
            continue
        say(f"streams: {system.name}")
        first = streams.first_byte_ms(system.endpoint, rounds=FIRST_BYTE_ROUNDS)
        floor = lines[0].first_byte_ms if lines else first
        down = median(streams.download_mb_per_s(system.endpoint, size) for _ in range(BODY_ROUNDS))
        up = median(streams.upload_mb_per_s(system.endpoint, size) for _ in range(BODY_ROUNDS))
        lines.append(StreamLine(system.name, first, first - floor, down, up))
    return lines


def _one_round(system: System, workspace: Process, clients: int, load: Load) -> tuple[Result, dict[str, float]]:
    """Return what one round gave, and the CPU seconds per 1,000 requests of every process that took part."""
    processes = {process.name: process for process in [workspace, *system.processes]}
    job = Job(
        url=system.endpoint.base_url + CHAT_PATH,
        method="POST",
        headers={"Content-Type": "application/json", **system.endpoint.headers},
        body=BODY,
        clients=clients,
        duration_s=load.duration_s,
        warm_up_s=load.warm_up_s,
        expect=EXPECT,
    )
    before = {name: tree_cpu_seconds(process.pid) for name, process in processes.items()}
    run = subprocess.run(
        [sys.executable, "-m", "tests.bench.load"], input=json.dumps(asdict(job)), capture_output=True, text=True,
        check=True, cwd=REPOSITORY_ROOT, timeout=load.duration_s + load.warm_up_s + 60,
    )  # fmt: skip
    result = Result(**json.loads(run.stdout))
    thousands = max(result.total_requests, 1) / 1000  # CPU is counted from before the warm-up, so its requests count
    cpu = {name: (tree_cpu_seconds(process.pid) - before[name]) / thousands for name, process in processes.items()}
    cpu["load"] = result.cpu_seconds / (max(result.requests, 1) / 1000)
    return result, cpu


def _line(name: str, clients: int, rounds: Sequence[tuple[Result, dict[str, float]]]) -> Line:
    errors: dict[str, int] = {}
    for result, _ in rounds:
        for kind, count in result.errors.items():
            errors[kind] = errors.get(kind, 0) + count
    return Line(
        system=name,
        clients=clients,
        requests_per_s=median(result.requests / result.seconds for result, _ in rounds),
        p50_ms=median(_quantile_ms(result.latencies, 0.50) for result, _ in rounds),
        p99_ms=median(_quantile_ms(result.latencies, 0.99) for result, _ in rounds),
        requests=sum(result.requests for result, _ in rounds),
        answered=sum(result.total_requests for result, _ in rounds),
        errors=errors,
        cpu_s_per_1000={
            process: median(cpu[process] for _, cpu in rounds) for process in rounds[0][1]
        },
    )  # fmt: skip


def _quantile_ms(latencies: Sequence[float], quantile: float) -> float:
    if not latencies:
        return float("nan")
    ordered = sorted(latencies)
    return ordered[min(int(len(ordered) * quantile), len(ordered) - 1)] * 1000
