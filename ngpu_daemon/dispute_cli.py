"""The commands about disputes, alike on both sides: `ngpu-bootstrap dispute` and `ngpu-node disputes`.

A side gives the name of the other (`--node`, `--bootstrap`) and the way to its evidence; what is then printed and
written is `ngpu_daemon.disputes`. Without postponed annotations: an option's name is a value here.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from ngpu_daemon.disputes import DEFAULT_LIMIT, Evidence, export, list_disputes, show_dispute
from ngpu_daemon.entry import run_main

OpenEvidence = Callable[[Path | None, Path | None], AbstractContextManager[Evidence]]


def dispute_commands(help: str, other: str, data_dir: str, open_evidence: OpenEvidence) -> typer.Typer:
    """Return the commands `list`, `show` and `export`.

    Args:
        help: what is disputed, in this side's words.
        other: who is at the other end of a dispute: `node` or `bootstrap`.
        data_dir: the default one, for the help.
        open_evidence: opens what this side has on file, given a configuration file and a data directory, if any.
    """
    app = typer.Typer(help=help, no_args_is_help=True)
    Dispute = Annotated[str, typer.Argument(help="A task's id, or a receipt's hash or number, as `list` shows it.")]
    Config = Annotated[Path | None, typer.Option("--config", help="TOML file; `sample-config` prints one.")]
    DataDir = Annotated[Path | None, typer.Option(help=f"Where it keeps its state (default {data_dir}).")]
    Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

    @app.command("list")
    def dispute_list(
        whose: Annotated[str | None, typer.Option(f"--{other}", help=f"Only with this {other}; default: all.")] = None,
        limit: Annotated[int, typer.Option(min=1, max=100_000, help="The newest so many.")] = DEFAULT_LIMIT,
        config: Config = None,
        data_dir: DataDir = None,
        as_json: Json = False,
    ) -> None:
        """Show disputes, newest first; what is disputed is not paid. The daemon may run meanwhile."""

        def main() -> None:
            with open_evidence(config, data_dir) as evidence:
                list_disputes(evidence, whose, limit, option=f"--{other}", as_json=as_json)

        run_main(main)

    @app.command("show")
    def dispute_show(dispute: Dispute, config: Config = None, data_dir: DataDir = None, as_json: Json = False) -> None:
        """Show one dispute in full, and what its evidence shows."""

        def main() -> None:
            with open_evidence(config, data_dir) as evidence:
                show_dispute(evidence, dispute, as_json=as_json)

        run_main(main)

    @app.command("export")
    def dispute_export(
        dispute: Dispute,
        file: Annotated[Path | None, typer.Option(help="Where to; default: dispute-<hash>.json here.")] = None,
        config: Config = None,
        data_dir: DataDir = None,
        as_json: Json = False,
    ) -> None:
        """Write one dispute as a file that anyone judges offline with `scripts/verify-dispute`."""

        def main() -> None:
            with open_evidence(config, data_dir) as evidence:
                export(evidence, dispute, file, as_json=as_json)

        run_main(main)

    return app
