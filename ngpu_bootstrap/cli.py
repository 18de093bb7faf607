"""The command `ngpu-bootstrap`: what an operator types, and what it prints.

Every command teaches its next step, prints one JSON object with `--json`, and fails with one line and exit code 1.
What commands do is elsewhere; the daemon's parts are imported only where it runs, since they take a second to load.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ngpu_bootstrap.account_cli import product_app, user_app
from ngpu_bootstrap.brc20_cli import brc20_app
from ngpu_bootstrap.challenge_cli import challenge
from ngpu_bootstrap.cli_options import (
    ArgumentError,
    ConfigOption,
    DataDirOption,
    JsonOption,
    again,
    management,
    settings_of,
    url_of,
)
from ngpu_bootstrap.config import DEFAULT_DATA_DIR, BootstrapSettings
from ngpu_bootstrap.credentials import reveal
from ngpu_bootstrap.db_cli import db_app
from ngpu_bootstrap.dispute_cli import dispute_app
from ngpu_bootstrap.operator_keys import Scope
from ngpu_bootstrap.profile_cli import profile_app
from ngpu_bootstrap.workspace_cli import add_commands
from ngpu_daemon.entry import loading, run_main
from ngpu_daemon.init_command import init_command
from ngpu_daemon.logs import configure_logging
from ngpu_daemon.settings import sample_toml

app = typer.Typer(
    help="A bootstrap peer of the NGPU network: takes tasks over HTTP and has nodes with GPUs run them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
workspace_app = typer.Typer(help="Workspaces: a client's image or model server, and its token.", no_args_is_help=True)
token_app = typer.Typer(help="The tokens of a workspace.", no_args_is_help=True)
key_app = typer.Typer(help="Operators' keys for managing this bootstrap over HTTP.", no_args_is_help=True)
app.add_typer(workspace_app, name="workspace")
workspace_app.add_typer(token_app, name="token")
app.add_typer(key_app, name="key")
app.add_typer(user_app, name="user")
app.add_typer(product_app, name="product")
app.add_typer(db_app, name="db")
app.add_typer(profile_app, name="profile")
app.add_typer(brc20_app, name="brc20")
app.add_typer(dispute_app, name="dispute")


_DURATION = re.compile(r"(?P<count>[0-9]{1,9})(?P<unit>[smhd]?)")
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_API = re.compile(r"(?P<name>[^:=]+)=(?P<mode>sync|async):(?P<port>[0-9]+)(?P<path>/.*)")

add_commands(workspace_app)
app.command("challenge")(challenge)
app.command("init")(init_command(DEFAULT_DATA_DIR.expanduser()))


@app.command()
def run(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    network: Annotated[str | None, typer.Option(help="main, test, local, or your own name.")] = None,
    listen: Annotated[list[str] | None, typer.Option(help="Multiaddr for nodes; repeat for more.")] = None,
    http_listen: Annotated[str | None, typer.Option(help="HOST:PORT for clients.")] = None,
    passphrase_file: Annotated[Path | None, typer.Option(help="File with the keystore's passphrase.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Run the bootstrap peer until SIGTERM, which drains it."""

    def settings() -> BootstrapSettings:
        return settings_of(
            config,
            data_dir=data_dir,
            network=network,
            listen=tuple(listen) if listen else None,
            http_listen=http_listen,
            passphrase_file=passphrase_file,
            log_level=log_level,
        )

    async def main() -> None:
        loaded = settings()
        configure_logging(loaded.log_level, loaded.log_format)
        with loading():
            from ngpu_bootstrap.daemon import run_daemon

        await run_daemon(loaded)

    run_main(main)


@app.command("sample-config")
def sample_config() -> None:
    """Print a configuration file that documents every key."""
    heading = (
        "Configuration of ngpu-bootstrap. Every key can also be given in the environment: NGPU_BOOTSTRAP_HTTP_LISTEN,\n"
        "NGPU_BOOTSTRAP_LIMITS__ATTEMPTS, and the most used ones as flags of `ngpu-bootstrap run`."
    )
    typer.echo(sample_toml(BootstrapSettings, heading), nl=False)


@app.command()
def status(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Say where the running bootstrap listens and what it is at."""

    def main() -> None:
        found = management(config, data_dir).status()
        if as_json:
            typer.echo(json.dumps(found))
            return
        for key, value in found.items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            for part, one in parts:
                shown = (", ".join(map(str, one)) or "none") if isinstance(one, list) else one
                typer.echo(f"{f'{key} {part}'.replace('_', ' ').strip():<30}{shown}")

    run_main(main)


@app.command()
def statement(
    node: Annotated[str, typer.Argument(help="The node's nodeAddr, with or without 0x.")],
    since: Annotated[
        str | None, typer.Option("--from", help="Receipts that ended then or later: a date or date-time, UTC.")
    ] = None,
    until: Annotated[str | None, typer.Option("--to", help="And before then; a day is included whole.")] = None,
    price: Annotated[
        list[str] | None, typer.Option(help="MODEL=AMOUNT for a second of a GPU; repeat. Only used to total.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="Write the signed statement with all its lines, for the node or an auditor."),
    ] = None,
    proof: Annotated[
        int | None, typer.Option(help="With --file: only the proof that the receipt of this number is in it.")
    ] = None,
    bootstrap: Annotated[
        str | None,
        typer.Option(help="What another bootstrap of this database ordered, in place of this one: totals, unsigned."),
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print a line for each receipt.")] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a node's receipts come to, signed by this bootstrap.

    It covers what this bootstrap ordered, and names the others of its database that the node works for.

    The node's owner comes to the same with `ngpu-node earnings`; anyone checks the file with
    `scripts/verify-statement`, offline."""

    def main() -> None:
        from ngpu_bootstrap.accounting import state_account

        state_account(
            settings_of(config, data_dir=data_dir),
            node=node,
            since=since,
            until=until,
            prices=price or [],
            file=file,
            proof=proof,
            bootstrap=bootstrap,
            as_csv=csv,
            as_json=as_json,
        )

    run_main(main)


@workspace_app.command("add")
def workspace_add(
    file: Annotated[Path | None, typer.Option(help="TOML or JSON file with any of the keys; options win.")] = None,
    name: Annotated[str | None, typer.Option(help="For people.")] = None,
    image: Annotated[str | None, typer.Option(help="Container image.")] = None,
    service: Annotated[
        str | None, typer.Option(help="Registered model server, PROJECT/MODEL, instead of an image.")
    ] = None,
    port: Annotated[list[int] | None, typer.Option(help="Port it listens on; the first is the default.")] = None,
    api: Annotated[
        list[str] | None, typer.Option(help="A call under /user/: NAME=sync:PORT/PATH or NAME=async:PORT/PATH.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the container.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Tasks at once on one node.")] = None,
    timeout_s: Annotated[float | None, typer.Option(help="Time limit of one task.")] = None,
    gpu_count: Annotated[int | None, typer.Option(help="GPUs it holds on a node.")] = None,
    gpu_type: Annotated[list[str] | None, typer.Option(help="GPU model it runs on; repeat, preferred first.")] = None,
    readiness_path: Annotated[str | None, typer.Option(help="Path that answers once it serves.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Nodes to run an image on; default: every suitable one.")] = None,
    command: Annotated[
        list[str] | None, typer.Argument(help="After --: arguments in place of the image's own.")
    ] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a workspace and print its token, which is shown this once."""

    def main() -> None:
        from ngpu_bootstrap.commands import checked, read_document

        document = read_document(file) if file is not None else {}
        document |= _given(
            name=name,
            image=image,
            service=service,
            ports=port or None,
            apis=[_api(text) for text in api] if api else None,
            env=dict(_pair(text) for text in env) if env else None,
            concurrency=concurrency,
            request_timeout_s=timeout_s,
            gpu_count=gpu_count,
            gpu_types=gpu_type or None,
            readiness_path=readiness_path,
            replicas=replicas,
            command=command or None,
        )
        created = management(config, data_dir).add(checked(document))
        if as_json:
            typer.echo(json.dumps({"id": created.workspace.spec.id, "token": created.token}))
            return
        typer.echo(f"workspace  {created.workspace.spec.id}\ntoken      {created.token}\n")
        watch = f"ngpu-bootstrap workspace watch{again(config, data_dir)} {created.workspace.spec.id}"
        typer.echo(f"Watch it come up:  {watch}")
        typer.echo("The token is shown this once. Call the workspace with it:")
        port_shown = created.workspace.spec.ports[0]
        settings = settings_of(config, data_dir=data_dir)
        url = url_of(settings, settings.data_dir)
        typer.echo(f'  curl -H "Authorization: Bearer <token>" {url}/proxy/{port_shown}/')

    run_main(main)


@workspace_app.command("list")
def workspace_list(
    group: Annotated[str | None, typer.Option(help="Only those of this group.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every workspace, or those of one group."""

    def main() -> None:
        found = [one for one in management(config, data_dir).all() if group is None or one.spec.group == group]
        if as_json:
            typer.echo(json.dumps({"workspaces": [one.model_dump(mode="json") for one in found]}))
            return
        if not found:
            typer.echo("There is no workspace yet: `ngpu-bootstrap workspace add --help` says how to make one.")
            return
        table = Table("id", "name", "group", "runs", "ports", "APIs", "ready on", box=None)
        for one in found:
            ready = sum(deployment.state == "ready" for deployment in one.deployments)
            table.add_row(
                one.spec.id,
                one.spec.name,
                one.spec.group,
                one.spec.image or one.spec.image_url or f"service {one.spec.service}",
                ", ".join(map(str, one.spec.ports)),
                ", ".join(api.name for api in one.spec.apis),
                f"{ready} of {len(one.deployments)}",
            )
        Console().print(table)

    run_main(main)


@workspace_app.command("remove")
def workspace_remove(
    workspace_id: Annotated[str, typer.Argument(help="The number before the token's hyphen.")],
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a workspace: its token opens nothing any more, its deployments stop. Tasks and receipts stay."""

    def main() -> None:
        removed = management(config, data_dir).remove(workspace_id)
        if as_json:
            typer.echo(json.dumps({"removed": removed.spec.id}))
        else:
            typer.echo(f"removed workspace {removed.spec.id} ({removed.spec.name})")

    run_main(main)


@token_app.command("rotate")
def workspace_token_rotate(
    workspace_id: Annotated[str, typer.Argument(help="The number before the token's hyphen.")],
    overlap: Annotated[
        str, typer.Option(help="How long the tokens before go on: 90s, 30m, 24h, 7d; 0 ends them at once.")
    ] = "24h",
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a workspace a new token, which is shown this once. Those before go on for a while, so that no call fails."""

    def main() -> None:
        made = management(config, data_dir).rotate_token(workspace_id, duration_s("--overlap", overlap))
        if as_json:
            typer.echo(made.model_dump_json())
            return
        typer.echo(
            f"token  {made.token}\n\n"
            f"It is shown this once. The tokens before it end at {_moment(made.others_end_at_ms)}."
        )

    run_main(main)


@key_app.command("add")
def key_add(
    name: Annotated[str, typer.Argument(help="Who or what uses it.")],
    scope: Annotated[
        list[str] | None, typer.Option(help=f"What it may do: {', '.join(Scope)}; repeat for more. Default: all.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="How long it lives: 12h, 90d. Default: until removed.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an operator key and print it, which is shown this once. It counts at once, also in a running daemon."""

    def main() -> None:
        unknown = [one for one in scope or () if one not in set(Scope)]
        if unknown:
            raise ArgumentError(f"--scope {unknown[0]}: there are {', '.join(Scope)}")
        lives_s = None if expires is None else duration_s("--expires", expires)
        made = _operator_keys(config, data_dir).add(
            name, scopes=[Scope(one) for one in scope] if scope else [Scope.ALL], expires_in_s=lives_s
        )
        key = reveal(made)
        if as_json:
            typer.echo(json.dumps({"name": name, "key": key}))
        else:
            typer.echo(f"key  {key}\n\nIt is shown this once. Use it so:")
            settings = settings_of(config, data_dir=data_dir)
            url = url_of(settings, settings.data_dir)
            typer.echo(f'  curl -H "Authorization: Bearer <key>" {url}/api/v1/workspaces')

    run_main(main)


@key_app.command("list")
def key_list(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show the operator keys: what each may do, and until when."""

    def main() -> None:
        keys = _operator_keys(config, data_dir).all()
        if as_json:
            shown = [
                {
                    "name": key.name,
                    "scopes": sorted(key.scopes),
                    "created_at_ms": key.created_at_ms,
                    "expires_at_ms": key.expires_at_ms,
                }
                for key in keys
            ]
            typer.echo(json.dumps({"keys": shown}))
        elif not keys:
            typer.echo("There is no operator key yet: `ngpu-bootstrap key add NAME` makes one.")
        for key in () if as_json else keys:
            until = "" if key.expires_at_ms is None else f"  until {_moment(key.expires_at_ms)}"
            typer.echo(f"{key.name}  {','.join(sorted(key.scopes))}{until}")

    run_main(main)


@key_app.command("remove")
def key_remove(
    name: Annotated[str, typer.Argument(help="As `key list` shows it.")],
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove an operator key: it opens nothing any more."""

    def main() -> None:
        _operator_keys(config, data_dir).remove(name)
        typer.echo(json.dumps({"removed": name}) if as_json else f"removed {name}")

    run_main(main)


def duration_s(option: str, text: str) -> float:
    """Return the seconds in `90s`, `30m`, `24h`, `7d` or a bare number of seconds.

    Raises:
        ArgumentError: it is none of these.
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ArgumentError(f"{option} {text[:32]}: write 90s, 30m, 24h or 7d")
    return int(found["count"]) * _UNITS[found["unit"]]


def _moment(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _operator_keys(config: Path | None, data_dir: Path | None) -> Any:
    from ngpu_bootstrap.operator_keys import OperatorKeys
    from ngpu_daemon.datadir import DataDirectory

    directory = DataDirectory(settings_of(config, data_dir=data_dir).data_dir)
    directory.prepare()
    return OperatorKeys(directory.path)


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _api(text: str) -> dict[str, Any]:
    found = _API.fullmatch(text)
    if found is None:
        raise ArgumentError(f"--api {text}: write NAME=sync:PORT/PATH or NAME=async:PORT/PATH")
    return {"name": found["name"], "mode": found["mode"], "port": int(found["port"]), "path": found["path"]}


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ArgumentError(f"--env {name}: write NAME=VALUE")
    return name, value


if __name__ == "__main__":
    app()
