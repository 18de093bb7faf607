"""How fast the bootstrap's store makes things durable: commits/s, latency, and what waiting for company is worth.

    python tests/bench/store_commits.py [--seconds 2] [--directory DIR] [--json FILE]

Measures, at 1, 16 and 64 concurrent callers in one trio run: accepting a task, a whole task (accepted and begun, then
finished with a receipt: two commits, eight rows), and looking one up. Beside them the floor: a bare `sqlite3`
transaction of one row with the same settings, whose time is the disk's. `linger` is how long a batch that
has company lately waits for more; the store by itself is fastest with 0, a whole bootstrap with 2 ms (`GroupCommit`).
`cpu` is processor time of the whole process per operation, which other load on the machine disturbs less than
wall time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sqlite3
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

from ngpu_bootstrap.store.store import Store, StoreOptions, open_store
from tests.unit.store.builders import BOOTSTRAP, a_finish, a_receipt, a_start, a_task, task_id

CALLERS = (1, 16, 64)
LINGERS_S = (0.0, 0.002)
BODY = b'{"prompt": "hello", "max_tokens": 16}'
SIGNED = bytes(700)  # about what an order or a receipt takes with its signature


@dataclass(frozen=True)
class Line:
    """One measurement; times in milliseconds, *cpu_ms* per operation, *batch* operations per commit."""

    what: str
    callers: int
    linger_ms: float
    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    batch: float


def floor(directory: Path, seconds: float) -> Line:
    """Measure bare transactions of one row."""
    connection = sqlite3.connect(directory / "floor.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE t (id TEXT PRIMARY KEY, content BLOB)")
    took: list[float] = []
    started, cpu_started = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO t VALUES (?, ?)", (task_id(len(took)), SIGNED))
        connection.execute("COMMIT")
        took.append(time.perf_counter() - before)
    cpu_s = time.process_time() - cpu_started
    connection.close()
    return line("bare sqlite3 commit", 1, 0.0, took, time.perf_counter() - started, cpu_s, len(took))


def line(
    what: str, callers: int, linger_s: float, took: list[float], wall_s: float, cpu_s: float, batches: int
) -> Line:
    """Return the summary of operations that took *took* seconds each."""
    took = sorted(took)
    return Line(
        what,
        callers,
        linger_s * 1000,
        len(took) / wall_s,
        took[len(took) // 2] * 1000,
        took[len(took) * 99 // 100] * 1000,
        cpu_s / len(took) * 1000,
        len(took) / batches if batches else 0.0,
    )


async def measure(
    store: Store,
    what: str,
    callers: int,
    linger_s: float,
    seconds: float,
    one: Callable[[int], Awaitable[object]],
    numbers: itertools.count[int],
) -> Line:
    """Let *callers* do *one* operation after the other, each with a number of its own."""
    took: list[float] = []
    until = time.perf_counter() + seconds

    async def caller() -> None:
        while (before := time.perf_counter()) < until:
            await one(next(numbers))
            took.append(time.perf_counter() - before)

    batches, started, cpu_started = store.counts.batches, time.perf_counter(), time.process_time()
    async with trio.open_nursery() as nursery:
        for _ in range(callers):
            nursery.start_soon(caller)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    return line(what, callers, linger_s, took, wall_s, cpu_s, store.counts.batches - batches)


async def measure_all(path: Path, linger_s: float, seconds: float, say: Callable[[Line], None]) -> None:
    """Measure everything, saying each line as it is known."""
    options = StoreOptions(linger_s=linger_s)
    async with open_store(path, network="local", bootstrap=BOOTSTRAP, options=options) as store:
        numbers, sequences = itertools.count(1), itertools.count(1)

        async def accept(number: int) -> None:
            await store.accept(a_task(number, request=BODY))

        async def whole(number: int) -> None:
            await store.accept_and_begin(a_task(number, request=BODY), a_start(number, order=SIGNED))
            receipt = a_receipt(next(sequences), number, raw=SIGNED, acknowledgement=SIGNED[:300])
            await store.finish(a_finish(number, receipt, response=BODY))

        async def look_up(number: int) -> None:
            await store.task(task_id(number % 1000 + 1))

        for callers in CALLERS:
            say(await measure(store, "accept", callers, linger_s, seconds, accept, numbers))
            say(await measure(store, "whole task", callers, linger_s, seconds, whole, numbers))
        if linger_s == 0:
            for callers in CALLERS:
                say(await measure(store, "look up", callers, 0.0, seconds, look_up, itertools.count()))


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    parser.add_argument("--directory", type=Path, help="where the databases go (default: a temporary directory)")
    parser.add_argument("--json", type=Path, help="also write the lines here")
    arguments = parser.parse_args()
    lines: list[Line] = []

    def say(done: Line) -> None:
        lines.append(done)
        print(
            f"{done.what:20} c={done.callers:<3} linger {done.linger_ms:.0f} ms  {done.per_s:8.0f}/s"
            f"  p50 {done.p50_ms:6.2f} ms  p99 {done.p99_ms:6.2f} ms"
            f"  cpu {done.cpu_ms:.3f} ms  batch {done.batch:5.1f}",
            flush=True,
        )

    with tempfile.TemporaryDirectory(dir=arguments.directory) as made:
        say(floor(Path(made), arguments.seconds))
        for linger_s in LINGERS_S:
            trio.run(measure_all, Path(made) / f"linger-{linger_s}.db", linger_s, arguments.seconds, say)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(one) for one in lines], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
