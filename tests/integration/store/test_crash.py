"""``kill -9`` of a process that uses the store, at random moments: everything it was told of is there afterwards."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import sqlalchemy as sa
import trio

from ngpu_bootstrap.store.database import open_engine
from ngpu_bootstrap.store.records import Part
from ngpu_bootstrap.tasks.states import TaskState
from tests.integration.store.crash_child import LONG
from tests.unit.store.builders import NODE, a_store, database_of, task_id

ROUNDS = 5
CHILD = Path(__file__).with_name("crash_child.py")
ROOT = Path(__file__).parents[3]


def killed_run(directory: Path, first: int, after_lines: int, after_s: float) -> list[tuple[str, ...]]:
    """Run the child, kill it *after_s* after it said so many lines, and return all that it said."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    with subprocess.Popen(
        [sys.executable, CHILD, directory, str(first)], stdout=subprocess.PIPE, env=environment
    ) as child:
        assert child.stdout is not None
        said = [child.stdout.readline()]
        assert said == [b"open 0\n"]
        said += [child.stdout.readline() for _ in range(after_lines)]
        time.sleep(after_s)
        child.kill()
        said += child.stdout.readlines()
    assert child.returncode == -9
    return [tuple(line.decode().split()) for line in said if line.endswith(b"\n")]


def test_nothing_acknowledged_is_lost_by_kill_9(directory: Path) -> None:
    moments = random.Random(20260102)
    finished: dict[int, int] = {}
    for round_number in range(ROUNDS):
        said = killed_run(directory, 1 + round_number * 1_000_000, moments.randrange(300), moments.uniform(0.0, 0.05))
        accepted = {int(words[1]) for words in said if words[0] == "accepted"}
        begun = {int(words[1]) for words in said if words[0] == "begun"}
        now_finished = {int(words[2]): int(words[1]) for words in said if words[0] == "finished"}
        trio.run(check, directory, accepted, begun, now_finished)
        finished |= now_finished
    assert len(finished) > 50
    engine = open_engine(database_of(directory))
    with engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
            assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
        attempts = connection.execute(sa.text("SELECT count(*) FROM attempts")).scalar_one()
        ended = connection.execute(sa.text("SELECT count(*) FROM attempts WHERE ended_at_ms IS NOT NULL")).scalar_one()
        receipts = connection.execute(sa.text("SELECT count(*) FROM receipts r JOIN tasks t USING (task_id)"))
        # one commit each: never an ended attempt without its receipt
        assert ended == receipts.scalar_one() <= attempts
    engine.dispose()


async def check(directory: Path, accepted: set[int], begun: set[int], finished: dict[int, int]) -> None:
    async with a_store(directory) as store:
        unfinished = {one.task.task_id: one for one in await store.unfinished()}
        for number in accepted | begun | finished.keys():
            task = await store.task(task_id(number))
            assert task is not None, f"task {number} was acknowledged and is gone"
            assert task.request is not None
            content = await store.read_body(task.task_id, Part.REQUEST, task.request)
            assert content == (LONG if number % 30 == 0 else b"small")
            if number in finished:
                assert task.state is TaskState.FINISHED
                assert task.response is not None
                answer = await store.read_body(task.task_id, Part.RESPONSE, task.response)
                assert answer == (LONG if number % 7 == 0 else b"answer")
                receipt = await store.receipt(task.task_id)
                assert receipt is not None
                assert receipt.receipt.sequence == finished[number]
            elif not task.state.is_final:
                found = unfinished[task.task_id]
                assert (found.last is not None) == (task.state is TaskState.DISPATCHED)
                assert found.last is not None or number not in begun
        head = await store.chain_head(NODE)
        missing = {n for gap in (await store.missing(NODE)).gaps for n in range(gap.from_sequence, gap.to_sequence + 1)}
        assert missing.isdisjoint(finished.values())
        assert head is not None or not finished


def test_a_disk_that_fills_up_in_earnest_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """The file size limit of a process stands in for the disk: writes fail in the middle of commits."""
    code = """
import resource, sys, trio
from pathlib import Path
from ngpu_bootstrap.store.errors import StoreUnavailable
from tests.unit.store.builders import a_store, a_task

async def main():
    async with a_store(Path(sys.argv[1])) as store:
        await store.accept(a_task(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
        accepted, refused = [1], 0
        for number in range(2, 60):
            try:
                await store.accept(a_task(number, request=bytes(30_000)))
                accepted.append(number)
            except StoreUnavailable:
                refused += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await store.accept(a_task(100, request=bytes(30_000)))
        print(refused, *accepted, 100)

trio.run(main)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    ran = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    refused, *accepted = (int(word) for word in ran.stdout.splitlines()[-1].split())
    assert refused > 10

    async def check_all() -> None:
        async with a_store(tmp_path) as store:
            for number in accepted:
                assert await store.task(task_id(number)) is not None

    trio.run(check_all)
