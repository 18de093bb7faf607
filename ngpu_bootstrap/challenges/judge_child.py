"""The process that checks openings: one JSON object in, one out. Started by `checking`, which ends it in time.

A process and not a thread: the check is a second or two of pure arithmetic on a stranger's numbers. In a thread it
would take the interpreter from the loop hundreds of times, here it takes a core that the loop does not need, at lower
priority, with limits of the kernel's on memory and time.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys

from ngpu_protocol.challenge.puzzle import Puzzle
from ngpu_protocol.challenge.verification import (
    Commitment,
    Finding,
    Judgement,
    Spots,
    judge_openings,
    openings_from_json,
)
from ngpu_protocol.errors import MalformedError

MEMORY_BYTES = 1 << 30
CPU_S = 120


def main() -> int:
    """Judge what stdin says and print the finding."""
    # Under systemd's filter the two may be refused; then the parent's clock and the bounded input are what bounds it.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    with contextlib.suppress(OSError):
        os.nice(10)
    asked = json.load(sys.stdin)
    try:
        tiles, chains = openings_from_json(json.loads(asked["opened"]))
        judgement = judge_openings(
            Puzzle.from_json(asked["puzzle"]),
            Commitment.from_json(asked["committed"]),
            Spots.from_json(asked["spots"]),
            tiles,
            chains,
            asked["vector"],
            bytes.fromhex(asked["salt"]),
        )
    except (MalformedError, ValueError, RecursionError) as error:
        judgement = Judgement(Finding.NOT_OPENED, str(error)[:200])
    json.dump({"finding": judgement.finding.value, "detail": judgement.detail}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
