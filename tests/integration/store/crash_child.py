"""A bootstrap's store under load, to be killed: says on stdout what was acknowledged, one line each, at once.

Run as ``python crash_child.py DIRECTORY FIRST_NUMBER``.
"""

from __future__ import annotations

import os
import sys
from itertools import count
from pathlib import Path

import structlog
import trio

from ngpu_bootstrap.store.store import Store
from tests.unit.store.builders import a_finish, a_receipt, a_start, a_store, a_task

LANES = 12
LONG = bytes(range(256)) * 300


def say(what: str, number: int) -> None:
    # one write, straight to the pipe: what is said is said, whenever the kill comes
    os.write(1, f"{what} {number}\n".encode())


async def lane(store: Store, numbers: count[int], sequences: count[int]) -> None:
    for number in numbers:
        if number % 3 == 0:
            await store.accept(a_task(number, detach=True, request=LONG if number % 30 == 0 else b"small"))
            say("accepted", number)
            await store.begin_attempt(a_start(number))
        else:
            await store.accept_and_begin(a_task(number, request=b"small"), a_start(number))
        say("begun", number)
        sequence = next(sequences)
        await store.finish(
            a_finish(number, a_receipt(sequence, number), response=LONG if number % 7 == 0 else b"answer")
        )
        say(f"finished {sequence}", number)


async def main(directory: Path, first: int) -> None:
    async with a_store(directory) as store:
        head = await store.chain_head(a_start(1).node)
        gaps = (await store.missing(a_start(1).node)).gaps
        # a node offers again what was not acknowledged, so the chain is filled before it goes on
        after = head.sequence if head else 0
        for gap in gaps:
            for sequence in range(gap.from_sequence, gap.to_sequence + 1):
                await store.late_receipt(a_receipt(sequence, 900_000_000 + sequence))
            head = await store.chain_head(a_start(1).node)
            after = head.sequence if head else 0
        say("open", 0)
        numbers, sequences = count(first), count(after + 1)
        async with trio.open_nursery() as nursery:
            for _ in range(LANES):
                nursery.start_soon(lane, store, numbers, sequences)


if __name__ == "__main__":
    # what a test reads here is promises; a line of the log, such as that the disk is slow, is none
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    trio.run(main, Path(sys.argv[1]), int(sys.argv[2]))
