"""`ngpu-bootstrap brc20`: what a workspace asks of its callers' BTC addresses."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

import typer

from ngpu_bootstrap.brc20.policies import plain
from ngpu_bootstrap.cli_options import ArgumentError, ConfigOption, DataDirOption, JsonOption, management
from ngpu_bootstrap.workspace_cli import WorkspaceId
from ngpu_daemon.entry import run_main

brc20_app = typer.Typer(
    help="What workspaces ask of their callers' BTC addresses: nothing, a note, or an asset.", no_args_is_help=True
)


@brc20_app.command("show")
def brc20_show(
    workspace_id: WorkspaceId,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the policy of a workspace."""

    def main() -> None:
        _print(management(config, data_dir).brc20_policy(workspace_id), as_json)

    run_main(main)


@brc20_app.command("set")
def brc20_set(
    workspace_id: WorkspaceId,
    mode: Annotated[
        str,
        typer.Argument(
            help="ignore: addresses are noted and not looked up. record: the balance is noted with the task. require: "
            "a call whose address does not hold the minimum is refused."
        ),
    ],
    ticker: Annotated[str, typer.Option(help="The asset; without it the bootstrap's own default.")] = "",
    minimum: Annotated[str, typer.Option(help="Least amount under require, a decimal.")] = "",
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a workspace a policy. It counts from the next call on, at siblings on the same database within seconds."""

    def main() -> None:
        given: dict[str, Any] = {"mode": mode}
        if ticker:
            given["ticker"] = ticker
        if minimum:
            try:
                given["minimum"] = plain(Decimal(minimum))
            except (InvalidOperation, ValueError):
                raise ArgumentError(f"--minimum {minimum[:64]}: write a decimal, such as 100 or 0.5") from None
        _print(management(config, data_dir).set_brc20_policy(workspace_id, given), as_json)

    run_main(main)


def _print(policy: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(policy.model_dump_json())
        return
    asset = policy.ticker or "the bootstrap's own ticker"
    typer.echo(f"{policy.mode}: {plain(policy.minimum)} of {asset}" if policy.mode == "require" else policy.mode)
