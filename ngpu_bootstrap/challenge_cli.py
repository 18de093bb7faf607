"""The command `ngpu-bootstrap challenge`: has a running bootstrap challenge nodes, and shows how that goes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ngpu_bootstrap.cli_options import ConfigOption, DataDirOption, JsonOption, management
from ngpu_daemon.entry import run_main
from ngpu_daemon.errors import OperatorError

LOOK_S = 0.3
_PHASES = {
    "waiting": "waits",
    "preparing": "its workspace comes up there",
    "idle": "its running tasks end",
    "product": "it multiplies",
    "chains": "it follows the chains",
    "opening": "it opens what was asked",
    "checking": "the answer is checked",
    "done": "done",
}


class ChallengeFailed(OperatorError):
    """A node did not show what it claims, or could not be challenged."""


def challenge(
    nodes: Annotated[list[str], typer.Argument(help="nodeAddr of each node: several at the same moment.")],
    gpu: Annotated[
        int | None, typer.Option(help="Only the GPU of this number, from 0, as the node lists them.")
    ] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Challenge nodes now: have their GPUs show that they are what they claim.

    Each gets a matrix product that fills most of the claimed memory, must commit to it and to chains of reads through
    it within the time the claimed model needs, and opens a few places of it, which this bootstrap checks without a GPU.
    The findings count for the node's standing. Exit code 1 unless all are good. docs/trust.md says more."""

    def main() -> None:
        managed = management(config, data_dir)
        managed.status()
        begun = managed.challenge(nodes, gpu)
        runs = _followed(managed.challenge_run, begun, quiet=as_json)
        if as_json:
            typer.echo(json.dumps({"runs": runs}))
        else:
            Console(width=None if sys.stdout.isatty() else 200).print(_table(runs))
        bad = [run for run in runs if run["problem"] or any(one["finding"] != "good" for one in run["challenges"])]
        if bad:
            raise ChallengeFailed(
                f"{len(bad)} of {len(runs)} nodes did not show what they claim, or were not challenged"
            )

    run_main(main)


def _followed(
    look: Callable[[str], dict[str, Any]], begun: list[dict[str, Any]], *, quiet: bool
) -> list[dict[str, Any]]:
    """Wait for the end of all, saying on stderr what each is at."""
    phases = {run["id"]: "" for run in begun}
    runs = {run["id"]: run for run in begun}
    while True:
        for name, run in runs.items():
            if run["phase"] != phases[name]:
                phases[name] = run["phase"]
                if not quiet:
                    typer.echo(f"{run['node_addr']}  {_PHASES.get(run['phase'], run['phase'])}", err=True)
        if all(run["phase"] == "done" for run in runs.values()):
            return list(runs.values())
        time.sleep(LOOK_S)
        runs = {name: look(name) if run["phase"] != "done" else run for name, run in runs.items()}


def _table(runs: list[dict[str, Any]]) -> Table:
    table = Table("node", "GPU", "verdict", "product", "chains", "", box=None)
    for run in runs:
        if run["problem"]:
            table.add_row(run["node_addr"], "", "not held", "", "", run["problem"])
        for one in run["challenges"]:
            table.add_row(
                run["node_addr"],
                f"{one['model']}, {one['memory_bytes'] / 2**30:.1f} GiB",
                one["finding"].replace("_", " "),
                _of(one["product_ms"], one["product_limit_ms"]),
                _of(one["chains_ms"], one["chains_limit_ms"]),
                one["detail"],
            )
    return table


def _of(took_ms: int, limit_ms: int) -> str:
    return f"{took_ms / 1000:.2f} of {limit_ms / 1000:.2f} s" if took_ms else "none"
