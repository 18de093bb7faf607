"""Measure the whole path beside the alternatives, on this machine, with bounded load (``scripts/bench``).

Exit code 0 when everything ran, whatever the figures; 1 when a system that is there did not work, or a receipt is
missing; with ``--strict`` also when a figure asked for was not reached.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from examples.demo.processes import Process, StartError
from tests.bench import report
from tests.bench.measure import STREAM_REQUESTS, Line, Load, StreamLine, measure_requests, measure_streams
from tests.bench.ours import Ours, ReceiptsMissing
from tests.bench.systems import LITELLM_VERSION, REPOSITORY_ROOT, Missing, System, Systems

STREAM_BYTES = 100_000_000
BUILD = REPOSITORY_ROOT / "build"


def main() -> int:
    """Return the exit code."""
    arguments = _arguments()
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=150)
    load = Load(
        concurrencies=tuple(arguments.clients), rounds=arguments.rounds, duration_s=arguments.seconds,
        warm_up_s=min(1.0, arguments.seconds / 2),
    )  # fmt: skip
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="ngpu-bench-") as folder, Systems(Path(folder)) as started:
        try:
            workspace, systems, ours = _start(started, arguments.only, left_out, console)
            lines = measure_requests(systems, workspace, load, lambda text: _progress(console, text))
            streams = [] if arguments.no_streams else _streams(systems, console)
            receipts = ours.receipts(_answered(lines, streams)) if ours else None
        except (StartError, ReceiptsMissing) as error:
            console.print(f"error: {error}", markup=False)
            return 1
    report.print_tables(console, lines, streams, receipts)
    for name, reason in left_out.items():
        console.print(f"not measured: {name} ({reason})", markup=False)
    report.write_json(arguments.json, lines, streams, receipts, left_out, _versions(systems))
    console.print(f"figures: {arguments.json}", markup=False, soft_wrap=True)
    return _exit_code(lines, streams, receipts, strict=arguments.strict)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64], help="concurrencies (default 1 16 64)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each, of which the median counts (default 3)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a round (default 4)")
    parser.add_argument(
        "--only", nargs="+", choices=("direct", "nginx", "litellm", "ngpu"), help="measure these systems alone"
    )
    parser.add_argument("--no-streams", action="store_true", help="leave out streams and large bodies")
    parser.add_argument("--strict", action="store_true", help="exit 1 when a figure asked for is not reached")
    parser.add_argument("--json", type=Path, default=BUILD / "bench.json", help="where the figures go")
    return parser.parse_args()


def _start(
    started: Systems, only: list[str] | None, left_out: dict[str, str], console: Console
) -> tuple[Process, list[System], Ours | None]:
    """Start what is wanted and can run; what cannot is noted in *left_out*."""
    direct = started.workspace()
    upstream = direct.endpoint.base_url
    workspace = direct.processes[0]
    systems = [System("direct", direct.endpoint)] if only is None or "direct" in only else []
    for name in ("nginx", "litellm"):
        if only is not None and name not in only:
            continue
        _progress(console, f"starting {name}")
        try:
            systems.append(started.nginx(upstream) if name == "nginx" else started.litellm(upstream, BUILD / "bench"))
        except Missing as missing:
            left_out[name] = str(missing)
    ours = None
    if only is None or "ngpu" in only:
        _progress(console, "starting ngpu: a bootstrap and a node")
        ours = started.enter(Ours(started.folder / "ngpu", upstream))
        systems.append(ours.system)
    return workspace, systems, ours


def _streams(systems: list[System], console: Console) -> list[StreamLine]:
    return measure_streams(systems, STREAM_BYTES, lambda text: _progress(console, text))


def _answered(lines: list[Line], streams: list[StreamLine]) -> int:
    """Return how many requests our own path has answered."""
    requests = sum(line.answered for line in lines if line.system == report.OURS)
    return requests + STREAM_REQUESTS * sum(line.system == report.OURS for line in streams)


def _versions(systems: list[System]) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for system in systems:
        if system.name == "litellm":
            versions["litellm"] = LITELLM_VERSION
        elif system.name == "nginx":
            run = subprocess.run(
                ["/bin/sh", "-c", "PATH=$PATH:/usr/sbin nginx -v 2>&1"], capture_output=True, text=True
            )
            versions["nginx"] = run.stdout.strip().rpartition("/")[2]
    return versions


def _exit_code(lines: list[Line], streams: list[StreamLine], receipts: report.Receipts | None, *, strict: bool) -> int:
    if receipts is not None and (receipts.verified != receipts.answered or receipts.others):
        return 1
    missed = any(goal.met is False for goal in report.goals(lines, streams, receipts))
    return 1 if strict and missed else 0


_STARTED = time.monotonic()


def _progress(console: Console, text: str) -> None:
    console.print(f"{time.monotonic() - _STARTED:6.1f} s  {text}", markup=False, style="dim")


if __name__ == "__main__":
    sys.exit(main())
