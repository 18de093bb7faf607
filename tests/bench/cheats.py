"""What made-up answers earn where tasks are run again: `python -m tests.bench.cheats [--runs N] [--days N]`.

One node of many serves one deterministic workspace, with the daemon's own sampling, decision and standing in virtual
time. It makes up a share of its answers, which saves it the work: an honest answer leaves `MARGIN` of its price, a
made-up one all of it. Whoever is contradicted by two others gets no tasks for two days; whoever is not trusted gets
none until he is. Others are honest but for a share that colludes: those know each other's requests and make up the
same.

`earns` is against what the same node would earn by honest work in that time. What it took to get there: how many
made-up answers were delivered in all, and before the first was found.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from ngpu_bootstrap.config import RechecksSection
from ngpu_bootstrap.rechecks.deciding import Answer, Outcome, decide
from ngpu_bootstrap.rechecks.sampling import Rates, is_drawn, rate
from ngpu_bootstrap.scheduling.standing import Standing, with_dispute, with_verified

DAY_MS = 24 * 3600 * 1000
MARGIN = 0.2
SETTINGS = RechecksSection()
RATES = Rates(SETTINGS.often, SETTINGS.rare, SETTINGS.disputed, SETTINGS.least_a_day)
RIGHT, MADE_UP = Answer(200, bytes(32)), Answer(200, bytes([1]) * 32)


@dataclass(frozen=True)
class Case:
    """A node and its world.

    Attributes:
        made_up: share of its answers.
        a_day: tasks it would get.
        past: verified receipts it begins with.
        colluding: share of the other nodes.
    """

    made_up: float
    a_day: int
    past: int = 0
    colluding: float = 0.0


@dataclass(frozen=True)
class Line:
    """What became of it, on the average of many runs."""

    made_up: float
    a_day: int
    past: int
    colluding: float
    earns: float
    delivered: float
    until_found: float
    found: float
    run_again: float


@dataclass
class Run:
    """One run of one case."""

    tasks: int = 0
    income: float = 0.0
    delivered: int = 0
    until_found: int = 0
    found: int = 0
    run_again: int = 0


def play(case: Case, days: float, chance: random.Random) -> Run:
    """Return what one run comes to."""
    standing = with_verified(Standing(), case.past, 0) if case.past else Standing()
    secret, out_until_ms = chance.randbytes(32), 0
    came, last_ms = Run(), 0
    for number in range(int(days * case.a_day)):
        now_ms = int((number + 1) * DAY_MS / case.a_day)
        if now_ms < out_until_ms or not standing.is_trusted(now_ms):
            continue
        gap_ms, last_ms = now_ms - last_ms, now_ms
        came.tasks += 1
        cheats = chance.random() < case.made_up
        came.income += 1.0 if cheats else MARGIN
        came.delivered += cheats
        standing = with_verified(standing, 1, now_ms)
        if not is_drawn(secret, f"{number}", rate(standing, RATES, now_ms, gap_ms=gap_ms)):
            continue
        came.run_again += 1
        first = MADE_UP if cheats else RIGHT
        second = _other(case, cheats, chance)
        third = _other(case, cheats, chance) if second != first else None
        if decide(first, second, third) is Outcome.FIRST_LOST:
            if not came.found:
                came.until_found = came.delivered
            came.found += 1
            standing = with_dispute(standing, rule="recheck", task_id="", now_ms=now_ms)
            out_until_ms = now_ms + int(SETTINGS.outvoted_s * 1000)
    return came


def _other(case: Case, cheats: bool, chance: random.Random) -> Answer:
    """Return what another node answers: one that colludes knows what was made up, and makes up the same."""
    return MADE_UP if cheats and chance.random() < case.colluding else RIGHT


def line(case: Case, days: float, runs: int) -> Line:
    """Return the averages of *runs*."""
    played = [play(case, days, random.Random(seed)) for seed in range(runs)]
    honest = days * case.a_day * MARGIN
    ever = [run.until_found for run in played if run.found]
    return Line(
        **asdict(case),
        earns=sum(run.income for run in played) / runs / honest,
        delivered=sum(run.delivered for run in played) / runs,
        until_found=sum(ever) / len(ever) if ever else float("inf"),
        found=sum(run.found for run in played) / runs,
        run_again=sum(run.run_again for run in played) / max(1, sum(run.tasks for run in played)),
    )


CASES = [
    *(Case(made_up, a_day, past=5000) for a_day in (1000, 100, 20) for made_up in (0.0, 0.01, 0.1, 1.0)),
    *(Case(made_up, 1000) for made_up in (0.0, 0.1, 1.0)),
    *(Case(1.0, 1000, past=5000, colluding=share) for share in (0.1, 0.3, 0.5)),
]


def table(lines: list[Line]) -> str:
    """Return the table of `docs/trust.md`."""
    rows = [
        "| makes up | tasks a day | begins | colluding | earns | found | made up before | in all | run again |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in lines:
        before = "-" if one.until_found == float("inf") else f"{one.until_found:.0f}"
        rows.append(
            f"| {one.made_up:.0%} | {one.a_day:,} | {'trusted' if one.past else 'new'} | {one.colluding:.0%} | "
            f"{one.earns:.0%} | {one.found:.1f} times | {before} | {one.delivered:,.0f} | {one.run_again:.1%} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--days", type=float, default=30.0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    lines = [line(case, arguments.days, arguments.runs) for case in CASES]
    print(table(lines))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(one) for one in lines], indent=1) + "\n")


if __name__ == "__main__":
    main()
