"""The benchmark's table, its JSON file, and whether the figures asked for were reached."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.measure import Line, StreamLine

OURS, OTHER = "ngpu", "litellm"


@dataclass(frozen=True, slots=True)
class Receipts:
    """What the bootstrap's store holds after the run, against what its clients were answered.

    Attributes:
        answered: requests the load generator had answered through our path, warm-ups included.
        stored: tasks in the store.
        verified: tasks whose receipt is stored with the verdict ``verified``.
        others: tasks with any other verdict, or none.
    """

    answered: int
    stored: int
    verified: int
    others: dict[str, int]


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure asked for; *met* None where it could not be measured."""

    what: str
    wanted: str
    got: str
    met: bool | None


def goals(lines: Sequence[Line], streams: Sequence[StreamLine], receipts: Receipts | None) -> list[Goal]:
    """Return what was asked for and what came out."""
    at = {(line.system, line.clients): line for line in lines}
    found = []
    ours, other = at.get((OURS, 16)), at.get((OTHER, 16))
    ratio = ours.requests_per_s / other.requests_per_s if ours and other and other.requests_per_s else None
    found.append(
        Goal(
            "requests/s against LiteLLM, c=16", "4 times (stretch 5)", _shown(ratio, "{:.2f} times"), _reached(ratio, 4)
        )
    )
    ours, other = at.get((OURS, 1)), at.get((OTHER, 1))
    share = ours.p50_ms / other.p50_ms if ours and other else None
    found.append(Goal("p50 against LiteLLM's, c=1", "under 0.5", _shown(share, "{:.2f}"), _below(share, 0.5)))
    mine = next((line for line in streams if line.system == OURS), None)
    first = mine.added_first_byte_ms if mine else None
    found.append(Goal("added time to first byte", "under 10 ms", _shown(first, "{:.2f} ms"), _below(first, 10)))
    slower = min(mine.download_mb_per_s, mine.upload_mb_per_s) if mine else None
    found.append(Goal("100 MB body, slower way", "40 MB/s", _shown(slower, "{:.0f} MB/s"), _reached(slower, 40)))
    failed = sum(sum(line.errors.values()) for line in lines if line.system == OURS) if mine else None
    found.append(Goal("errors of ours", "0", _shown(failed, "{}"), None if failed is None else failed == 0))
    if receipts is not None:
        whole = receipts.verified == receipts.answered and not receipts.others
        got = f"{receipts.verified} verified of {receipts.answered} answered"
        found.append(Goal("receipts verified and stored", "one for each request", got, whole))
    return found


def write_json(
    path: Path,
    lines: Sequence[Line],
    streams: Sequence[StreamLine],
    receipts: Receipts | None,
    left_out: dict[str, str],
    versions: dict[str, str],
) -> None:
    """Write everything measured to *path*."""
    document = {
        "machine": {"python": platform.python_version(), "cpus": os.cpu_count(), "system": platform.platform()},
        "versions": versions,
        "left_out": left_out,
        "requests": [asdict(line) for line in lines],
        "streams": [asdict(line) for line in streams],
        "receipts": asdict(receipts) if receipts else None,
        "goals": [asdict(goal) for goal in goals(lines, streams, receipts)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def print_tables(
    console: Console, lines: Sequence[Line], streams: Sequence[StreamLine], receipts: Receipts | None
) -> None:
    """Print everything measured."""
    table = Table(title="Requests: a short chat completion, not streamed", title_justify="left")
    for heading in ("c", "system", "requests/s", "p50 ms", "p99 ms", "errors", "CPU s per 1,000 requests"):
        table.add_column(heading, justify="left" if heading in ("system", "CPU s per 1,000 requests") else "right")
    previous = None
    for line in lines:
        if previous not in (None, line.clients):
            table.add_section()
        previous = line.clients
        cpu = ", ".join(f"{name} {value:.2f}" for name, value in line.cpu_s_per_1000.items())
        table.add_row(
            str(line.clients), line.system, f"{line.requests_per_s:,.0f}", f"{line.p50_ms:.2f}", f"{line.p99_ms:.2f}",
            str(sum(line.errors.values())), cpu,
        )  # fmt: skip
    console.print(table)
    if streams:
        table = Table(title="Streams", title_justify="left")
        for heading in ("system", "first byte ms", "added ms", "100 MB down MB/s", "100 MB up MB/s"):
            table.add_column(heading, justify="left" if heading == "system" else "right")
        for row in streams:
            table.add_row(
                row.system, f"{row.first_byte_ms:.2f}", f"{row.added_first_byte_ms:.2f}",
                f"{row.download_mb_per_s:,.0f}", f"{row.upload_mb_per_s:,.0f}",
            )  # fmt: skip
        console.print(table)
    table = Table(title="Asked for", title_justify="left")
    for heading in ("figure", "wanted", "got", "met"):
        table.add_column(heading)
    for goal in goals(lines, streams, receipts):
        table.add_row(goal.what, goal.wanted, goal.got, {True: "yes", False: "NO", None: "not measured"}[goal.met])
    console.print(table)


def _shown(value: float | None, form: str) -> str:
    return "not measured" if value is None else form.format(value)


def _reached(value: float | None, least: float) -> bool | None:
    return None if value is None else value >= least


def _below(value: float | None, most: float) -> bool | None:
    return None if value is None else value < most
