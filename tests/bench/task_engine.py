"""How fast the task engine is: submits, queries, pages, recovery, on SQLite and on a PostgreSQL server.

    python -m tests.bench.task_engine [--seconds 4] [--tasks 1000000] [--postgres URL] [--only submit,page,recover]

Submits and queries go over HTTP to a whole bootstrap in this process, from a load generator in its own; every submit
is committed before it is answered, and dispatch is paused: the one node has no slot free. Pages are asked for as
clients do, `queryTaskList` with a range of dates over HTTP, one at a time, of a bootstrap that holds *tasks* tasks of
ten workspaces; and read from its open store. Recovery is what a start does with 10,000 unfinished tasks before
it says that it is ready: claiming, reading, deciding, taking each in hand.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import trio

from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.database import open_engine
from ngpu_bootstrap.store.records import TaskFilter
from ngpu_bootstrap.store.schema import prepare_schema
from ngpu_bootstrap.store.store import open_store
from ngpu_daemon.logs import configure_logging
from tests.bench.load import Job
from tests.integration.bootstrap.rig import running, settings_for, wait_ready
from tests.integration.bootstrap.scripted_node import ScriptedNode, connected, new_account
from tests.support.postgres import new_database
from tests.unit.store.builders import BOOTSTRAP

CLIENTS = 64
WORKSPACES = 10
UNFINISHED = 10_000
PAGE = 1000
PAGES = 300
BODY = json.dumps({"data": '{"prompt": "hello", "steps": 20}'})
DAY_MS = 24 * 3600 * 1000
FIRST_MS = 1_700_000_000_000


def say(store: str, what: str, **figures: Any) -> None:
    print(json.dumps({"store": store, "what": what, **figures}), flush=True)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)]


async def load(job: Job) -> dict[str, Any]:
    done = await trio.run_process(
        [sys.executable, "-m", "tests.bench.load"], stdin=json.dumps(asdict(job)).encode(), capture_stdout=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


async def submits_and_queries(store: str, folder: Path, url: str, seconds: float) -> None:
    """Measure what clients see of submitting and of asking."""
    limits = {"async_tasks": 10_000_000}
    settings = settings_for(folder / "bootstrap", store=url, limits=limits, log_level="error")
    async with running(settings) as bootstrap:
        node = Full(new_account())
        async with connected(node, bootstrap.multiaddr):
            await wait_ready(bootstrap)
            headers = {"Authorization": f"Bearer {bootstrap.token}", "Content-Type": "application/json"}
            target = f"http://127.0.0.1:{bootstrap.port}/user/"
            result = await load(Job(target + "train", "POST", headers, BODY, CLIENTS, seconds, 1.0, "taskID"))
            report(store, "asynchronous submits, c=64, dispatch paused", result)
            answer = await bootstrap.call("POST", "/user/train", BODY.encode())
            task_id = json.loads(answer.body)["taskId"]
            asked = Job(target + f"queryTask?taskID={task_id}", "GET", {}, "", CLIENTS, seconds, 1.0, task_id)
            report(store, "queries by id, c=64", await load(asked))
            assert node.orders == []


class Full(ScriptedNode):
    """A node that serves the workspace and never has a slot free."""

    def heartbeat(self) -> Any:
        self.desired = tuple(replace(state, slots_free=0) for state in self.desired)
        return super().heartbeat()


def report(store: str, what: str, result: dict[str, Any]) -> None:
    took = result["latencies"]
    say(
        store,
        what,
        per_s=round(result["requests"] / result["seconds"]),
        p50_ms=round(percentile(took, 0.5) * 1000, 2),
        p99_ms=round(percentile(took, 0.99) * 1000, 2),
        errors=result["errors"],
    )


def fill(location: str | Path, count: int, state: int, *, owner: str = "", first: str = "0") -> None:
    """Write *count* tasks straight into their table, spread over a year and ten workspaces, one of them *first*."""
    engine = open_engine(location)
    with engine.connect() as connection:
        prepare_schema(connection, network="local", migrate=True)
    step_ms = 365 * DAY_MS // count
    chance = random.Random(1)
    with engine.begin() as connection:
        for start in range(0, count, 5000):
            rows = [
                {
                    "task_id": f"20231115_06_13_20_{number:020d}",
                    "workspace": (str(chance.randrange(WORKSPACES)) if state >= 3 else "1").replace("0", first),
                    "revision": 1,
                    "api": "schedulingTask",
                    "method": "POST",
                    "port": 8080,
                    "target": "/create",
                    "headers": '[["content-type","application/json"]]',
                    "request_url": "/user/schedulingTask?paramUrl=create",
                    "token_label": "1.1",
                    "detach": 1,
                    "wrapped": 1,
                    "priority": 0,
                    "accepted_at_ms": FIRST_MS + number * step_ms if state >= 3 else time.time_ns() // 1_000_000,
                    "deadline_at_ms": time.time_ns() // 1_000_000 + 3_600_000,
                    "state": state,
                    "attempts": 0,
                    "bootstrap": owner,
                }
                for number in range(start, min(start + 5000, count))
            ]
            connection.execute(sa.insert(tables.tasks), rows)
            if state < 3:
                bodies = [{"task_id": r["task_id"], "part": "request", "size": 2, "content": b"{}"} for r in rows]
                connection.execute(sa.insert(tables.bodies), bodies)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
    engine.dispose()


async def pages(store: str, folder: Path, url: str, count: int) -> None:
    """Measure pages of 1,000 in random ranges of time."""
    settings = settings_for(folder / "pages", store=url, log_level="error")
    async with running(settings) as bootstrap:  # makes the schema and the workspace
        known = (bootstrap.workspace, bootstrap.token)
    location = url or settings.data_dir / "bootstrap.db"
    started = time.perf_counter()
    await trio.to_thread.run_sync(functools.partial(fill, location, count, 3, first=known[0]))
    say(store, "rows written for the pages", rows=count, seconds=round(time.perf_counter() - started, 1))
    chance = random.Random(2)
    async with running(settings, known=known) as bootstrap:
        took = []
        size = 0
        for _ in range(PAGES):
            since = datetime.fromtimestamp(FIRST_MS / 1000, UTC) + timedelta(days=chance.randrange(300))
            dates = f"startTime={since:%Y-%m-%d}&endTime={since + timedelta(days=60):%Y-%m-%d}"
            before = time.perf_counter()
            answer = await bootstrap.call("GET", f"/user/queryTaskList?{dates}&limit={PAGE}")
            took.append(time.perf_counter() - before)
            size = json.loads(answer.body)["result_size"]
        say(
            store,
            f"queryTaskList over HTTP: a page of {size} out of {count}, a range of dates",
            p50_ms=round(percentile(took, 0.5) * 1000, 2),
            p99_ms=round(percentile(took, 0.99) * 1000, 2),
        )
    async with open_store(location, network="local", bootstrap=BOOTSTRAP, bodies=folder / "bodies") as opened:
        for what, read in (("whole records", opened.tasks), ("ids", opened.task_ids)):
            took = []
            for _ in range(PAGES):
                since_ms = FIRST_MS + chance.randrange(300) * DAY_MS
                wanted = TaskFilter(
                    workspace=str(chance.randrange(1, WORKSPACES)),
                    since_ms=since_ms,
                    before_ms=since_ms + 60 * DAY_MS,
                    limit=PAGE,
                )
                before = time.perf_counter()
                page = await read(wanted)
                took.append(time.perf_counter() - before)
            size = len(getattr(page, "task_ids", None) or page.tasks)
            say(
                store,
                f"in the store: a page of {size} {what} out of {count}, a range of dates",
                p50_ms=round(percentile(took, 0.5) * 1000, 2),
                p99_ms=round(percentile(took, 0.99) * 1000, 2),
            )


async def recovery(store: str, folder: Path, url: str) -> None:
    """Measure a start with 10,000 unfinished tasks, against one with none."""
    settings = settings_for(folder / "recover", store=url, log_level="error")
    async with running(settings) as bootstrap:
        known = (bootstrap.workspace, bootstrap.token)
    took = []
    for unfinished in (0, UNFINISHED):
        if unfinished:
            location = url or settings.data_dir / "bootstrap.db"
            await trio.to_thread.run_sync(fill, location, unfinished, 0)
            engine = open_engine(location)
            with engine.begin() as connection:
                connection.execute(sa.update(tables.tasks).values(workspace=known[0]))
            engine.dispose()
        before = time.perf_counter()
        async with running(settings, known=known) as bootstrap:
            took.append(time.perf_counter() - before)
            status = await bootstrap.admin("GET", "/status")
            assert status["async_tasks"] == unfinished, status
    say(store, f"start with {UNFINISHED} unfinished tasks", seconds=round(took[1], 2), with_none_s=round(took[0], 2))


async def measure(store: str, folder: Path, make_url: Any, arguments: argparse.Namespace) -> None:
    only = arguments.only.split(",")
    if "submit" in only:
        with make_url() as url:
            await submits_and_queries(store, folder, url, arguments.seconds)
    if "page" in only:
        with make_url() as url:
            await pages(store, folder, url, arguments.tasks)
    if "recover" in only:
        with make_url() as url:
            await recovery(store, folder, url)


def main() -> int:
    """Measure and print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--postgres", default=os.environ.get("NGPU_TEST_POSTGRES", ""), help="a server's URL")
    parser.add_argument("--only", default="submit,page,recover")
    parser.add_argument("--stores", default="sqlite,postgresql")
    arguments = parser.parse_args()
    if arguments.postgres:
        os.environ["NGPU_TEST_POSTGRES"] = arguments.postgres
    configure_logging("error", "json")
    for store in arguments.stores.split(","):
        if store == "postgresql" and not arguments.postgres:
            continue
        with tempfile.TemporaryDirectory() as folder:
            make_url = new_database if store == "postgresql" else lambda: nullcontext("")
            trio.run(measure, store, Path(folder), make_url, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
