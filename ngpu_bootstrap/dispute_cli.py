"""The commands about receipts that were not accepted: `ngpu-bootstrap dispute`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ngpu_bootstrap.cli_options import ConfigOption, DataDirOption, JsonOption, settings_of
from ngpu_daemon.entry import run_main

dispute_app = typer.Typer(
    help="Receipts that were not accepted, and chains that do not add up, with the evidence.", no_args_is_help=True
)

DisputeArgument = Annotated[str, typer.Argument(help="A task's id, or a receipt's hash or number, as `list` shows it.")]


@dispute_app.command("list")
def dispute_list(
    node: Annotated[str | None, typer.Option(help="Only this node's; default: of each.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The newest so many.")] = 100,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show disputes, newest first. The daemon may run meanwhile."""

    def main() -> None:
        from ngpu_bootstrap.disputes import list_disputes

        list_disputes(settings_of(config, data_dir=data_dir), node, limit, as_json=as_json)

    run_main(main)


@dispute_app.command("show")
def dispute_show(
    dispute: DisputeArgument, config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """Show one dispute in full, and what its evidence shows."""

    def main() -> None:
        from ngpu_bootstrap.disputes import show_dispute

        show_dispute(settings_of(config, data_dir=data_dir), dispute, as_json=as_json)

    run_main(main)


@dispute_app.command("export")
def dispute_export(
    dispute: DisputeArgument,
    file: Annotated[Path | None, typer.Option(help="Where to; default: dispute-<hash>.json here.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write one dispute as a file that anyone judges offline with `scripts/verify-dispute`."""

    def main() -> None:
        from ngpu_bootstrap.disputes import export_dispute

        export_dispute(settings_of(config, data_dir=data_dir), dispute, file, as_json=as_json)

    run_main(main)
