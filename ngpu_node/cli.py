"""The command `ngpu-node`: what an owner types, and what it prints.

Every command says what to do next, prints one JSON object with `--json`, and fails with one line and exit code 1. The
daemon's parts are imported only where they run: they take a second to load.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import trio
import typer
from rich.console import Console
from rich.table import Column, Table

from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.dispute_cli import dispute_commands
from ngpu_daemon.disputes import Evidence
from ngpu_daemon.entry import loading, run_main
from ngpu_daemon.init_command import ask_passphrase, init_command
from ngpu_daemon.logs import configure_logging
from ngpu_daemon.settings import load_settings, sample_toml
from ngpu_node.cli_tables import print_table, show_findings, show_images, show_lending, show_models, show_workspaces
from ngpu_node.config import DEFAULT_DATA_DIR, ENV_PREFIX, NodeSettings
from ngpu_node.errors import NodeConfigurationError

app = typer.Typer(
    help="""A node of the NGPU network: serves tasks with this machine's GPUs, for the bootstraps its owner trusts.

    First steps: `ngpu-node init` makes the account key and prints its address; `ngpu-node sample-config > node.toml`
    prints a configuration, in which `bootstraps` names whom to serve; `ngpu-node run --config node.toml` serves, and
    `ngpu-node status` shows how it goes.""",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file; `sample-config` prints one.")]
DataDirOption = Annotated[Path | None, typer.Option(help=f"Where it keeps its state (default {DEFAULT_DATA_DIR}).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

app.command("init")(init_command(DEFAULT_DATA_DIR))


@app.command()
def run(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    network: Annotated[str | None, typer.Option(help="main, test, local, or your own name.")] = None,
    listen: Annotated[list[str] | None, typer.Option(help="Multiaddr for other peers; repeat for more.")] = None,
    bootstrap: Annotated[
        list[str] | None,
        typer.Option(help="Multiaddr of a bootstrap to serve, ending in /p2p/<PeerId>; instead of `bootstraps`."),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="auto, docker or none.")] = None,
    passphrase_file: Annotated[Path | None, typer.Option(help="File with the keystore's passphrase.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve tasks until SIGTERM, which drains: no new tasks, running ones get `drain_s`."""

    async def main() -> None:
        settings = _settings(
            config,
            data_dir=data_dir,
            network=network,
            listen=listen or None,
            bootstraps=[{"multiaddrs": [multiaddr]} for multiaddr in bootstrap] if bootstrap else None,
            engine=engine,
            passphrase_file=passphrase_file,
            log_level=log_level,
        )
        configure_logging(settings.log_level, settings.log_format)
        with loading():
            from ngpu_node.daemon import run_daemon

        await run_daemon(settings, lambda: ask_passphrase(settings.passphrase_file))

    run_main(main)


@app.command()
def status(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show the running node: bootstraps, deployments, model servers, GPUs, receipts."""

    async def main() -> None:
        settings = _settings(config, data_dir=data_dir)
        from ngpu_node.admin import ask_status

        found = await ask_status(DataDirectory(settings.data_dir).admin_socket)
        if as_json:
            typer.echo(json.dumps(found))
        else:
            _show(found, Console())

    run_main(main)


@app.command()
def gpus(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show this machine's GPUs: what is offered, what is not and why, their health, how they are metered."""

    async def main() -> None:
        settings = _settings(config, data_dir=data_dir)
        from ngpu_node.admin import ask
        from ngpu_node.gpus.show import print_gpus

        found = json.loads(await ask(DataDirectory(settings.data_dir).admin_socket, "/gpus"))
        if as_json:
            typer.echo(json.dumps(found))
        else:
            print_gpus(found, Console())

    run_main(main)


@app.command()
def earnings(
    bootstrap: Annotated[
        str | None, typer.Option(help="Only from this bootstrap's account address; default: from each.")
    ] = None,
    since: Annotated[
        str | None, typer.Option("--from", help="Receipts that ended then or later: a date or date-time, UTC.")
    ] = None,
    until: Annotated[str | None, typer.Option("--to", help="And before then; a day is included whole.")] = None,
    price: Annotated[
        list[str] | None, typer.Option(help="MODEL=AMOUNT for a second of a GPU; repeat. Only used to total.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="A bootstrap's statement file: hold it against this node's own receipts.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print a line for each receipt.")] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what this node's acknowledged receipts come to, from its own ledger.

    The bootstrap comes to the same with `ngpu-bootstrap statement`; `--check` compares its file with the ledger."""

    def main() -> int:
        from ngpu_node.earnings import show_earnings

        return show_earnings(
            _settings(config, data_dir=data_dir),
            bootstrap=bootstrap,
            since=since,
            until=until,
            prices=price or [],
            check=check,
            as_csv=csv,
            as_json=as_json,
        )

    run_main(main)


@app.command()
def receipt(
    name: Annotated[str, typer.Argument(help="A task's id (and /attempt), or a receipt's hash or number.")],
    file: Annotated[Path | None, typer.Option(help="Where to; default: receipt-<hash>.json here.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write one receipt of the ledger, with its order and acknowledgement, as a file that anyone checks offline.

    A statement that leaves it out is shown to with it: `scripts/verify-statement STATEMENT --receipt FILE`."""

    def main() -> None:
        from ngpu_node.receipt_files import write_receipt

        write_receipt(_settings(config, data_dir=data_dir), name, file, as_json=as_json)

    run_main(main)


@contextmanager
def _evidence(config: Path | None, data_dir: Path | None) -> Iterator[Evidence]:
    from ngpu_node.disputes import open_evidence

    with open_evidence(_settings(config, data_dir=data_dir)) as evidence:
        yield evidence


app.add_typer(
    dispute_commands(
        "Receipts of this node that a bootstrap did not accept, or says it was not given, with both sides' evidence.",
        "bootstrap",
        str(DEFAULT_DATA_DIR),
        _evidence,
    ),
    name="disputes",
)


@app.command()
def workspaces(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show the workspaces on this node: state, progress, what they hold, why one is not ready."""
    _asked(config, data_dir, "/workspaces", as_json, show_workspaces)


@app.command()
def models(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show the model servers that registered here: where they listen, whether they answer, what they list.

    A model server registers itself:

    curl -d '{"project": "Demo", "model": "Llama3-8B", "api": "http://127.0.0.1:1088/v1/chat/completions"}'
    http://127.0.0.1:4912/api/v0/ai/model/register

    Workspaces reach the calls of the model interface there, and those it declares: "paths": ["/health", "/api/"]."""
    _asked(config, data_dir, "/models", as_json, show_models)


@app.command()
def images(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show the images this node keeps: their size, when each was last used, who has it, which may go for others."""
    _asked(config, data_dir, "/images", as_json, show_images)


@app.command()
def logs(
    workspace: Annotated[str, typer.Argument(help="Its id, as `workspaces` shows it.")],
    tail: Annotated[int, typer.Option(min=0, max=10_000, help="Lines from the end.")] = 200,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    revision: Annotated[int, typer.Option(min=0, help="0: the one that serves, else the newest.")] = 0,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Print what a workspace's container says."""

    async def main() -> None:
        settings = _settings(config, data_dir=data_dir)
        from ngpu_node.admin import follow as read

        if not workspace.isascii() or not workspace.isdigit():
            raise NodeConfigurationError(f"{workspace!r} is not a workspace's id: `ngpu-node workspaces` shows them")
        target = f"/workspaces/{workspace}/logs?tail={tail}&follow={int(follow)}&revision={revision}"
        async for piece in read(DataDirectory(settings.data_dir).admin_socket, target):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()

    run_main(main)


@app.command()
def pause(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Take no new tasks; running ones end, workspaces stay ready. Until `resume`, over restarts."""
    _asked(config, data_dir, "/pause", as_json, show_lending, method="POST")


@app.command()
def resume(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Take tasks again, after `pause` or `drain`."""
    _asked(config, data_dir, "/resume", as_json, show_lending, method="POST")


@app.command()
def drain(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when nothing is left on the machine.")] = False,
) -> None:
    """Take no new tasks, let running ones end, then take the workspaces off the machine. Until `resume`."""

    async def main() -> None:
        settings = _settings(config, data_dir=data_dir)
        from ngpu_node.admin import ask

        socket = DataDirectory(settings.data_dir).admin_socket
        found = json.loads(await ask(socket, "/drain", "POST"))
        while wait and (found["running"] or found["on_machine"]) and found["lending"] == "drained":
            await trio.sleep(0.5)
            found = json.loads(await ask(socket, "/workspaces"))
        found = {name: found[name] for name in ("lending", "detail", "running", "on_machine")}
        if as_json:
            typer.echo(json.dumps(found))
        else:
            show_lending(found, Console())

    run_main(main)


@app.command()
def doctor(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Say what of this machine keeps workspaces apart from it, and what to do where it could be better."""
    _asked(config, data_dir, "/doctor", as_json, show_findings)


def _asked(
    config: Path | None,
    data_dir: Path | None,
    target: str,
    as_json: bool,
    show: Callable[[dict[str, Any], Console], None],
    *,
    method: str = "GET",
) -> None:
    async def main() -> None:
        settings = _settings(config, data_dir=data_dir)
        from ngpu_node.admin import ask

        found = json.loads(await ask(DataDirectory(settings.data_dir).admin_socket, target, method))
        if as_json:
            typer.echo(json.dumps(found))
        else:
            show(found, Console())

    run_main(main)


@app.command("sign-binding")
def sign_binding(
    wallet: Annotated[str, typer.Option(help="The account that is paid for this node's work: 0x and 40 digits.")],
    org: Annotated[str, typer.Option(help="Who the owner is, for people.")] = "",
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Print, signed with this node's key, who is paid for its work: the body of `POST /user/nodeRegister`."""

    def main() -> None:
        from ngpu_node.binding import signed_binding

        typer.echo(json.dumps(signed_binding(_settings(config, data_dir=data_dir), wallet, org)))

    run_main(main)


@app.command("sample-config")
def sample_config() -> None:
    """Print a configuration file that documents every key."""
    heading = (
        "Configuration of ngpu-node. Every key can also be given in the environment: NGPU_NODE_SLOTS,\n"
        "NGPU_NODE_LIMITS__BODY_BYTES, and the most used ones as flags of `ngpu-node run`."
    )
    typer.echo(sample_toml(NodeSettings, heading), nl=False)


def _settings(config: Path | None, **overrides: Any) -> NodeSettings:
    return load_settings(NodeSettings, config, ENV_PREFIX, overrides)


# -- what people see ---------------------------------------------------------------------------------------------------


def _show(found: dict[str, Any], console: Console) -> None:
    draining = ", draining" if found["draining"] else ""
    if found["lending_detail"]:
        draining += f", takes no tasks: {found['lending_detail']}"
    console.print(f"[bold]{found['node']}[/] on network {found['network']}, up {_span(found['uptime_s'])}{draining}")
    console.print(f"PeerId {found['peer_id']}, version {found['version']}, process {found['pid']}", highlight=False)
    console.print(f"tasks {found['running']} of {found['slots']}, receipts {found['receipts']}", end="")
    console.print(f" ({found['receipts_owed']} waiting for their acknowledgement)")

    bootstraps = Table("bootstrap", "service", "state", "for", title_justify="left")
    for one in found["bootstraps"]:
        state = "connected" if one["admitted"] else "connected, waiting for approval"
        bootstraps.add_row(
            one["address"], one["service"], state if one["connected"] else one["problem"], _span(one["for_s"])
        )
    print_table(console, bootstraps, "no bootstraps: add a [[bootstraps]] table to the configuration")

    deployments = Table("workspace", "name", "state", "tasks", "detail")
    for one in found["deployments"]:
        tasks = f"{one['running']} of {one['concurrency']}"
        number = f"{one['workspace']} r{one['revision']}"
        deployments.add_row(number, one["name"], one["state"], tasks, one["detail"])
    print_table(console, deployments, "no workspaces wanted here yet")

    models = Table("model", "at", "state")
    for one in found["models"]:
        name = f"{one['project']}/{one['model']}" + (f" ({one['cid']})" if one["cid"] else "")
        models.add_row(name, one["api"], "healthy" if one["healthy"] else one["detail"])
    print_table(console, models, "")

    gpus = Table("GPU", "memory", "state", Column("UUID", overflow="fold"))
    for one in found["gpus"]:
        gpus.add_row(one["model"], f"{one['memory_bytes'] / 2**30:.0f} GiB", one["against"] or "offered", one["uuid"])
    print_table(console, gpus, f"no GPUs: {found['gpu_problem']}")

    engine = found["engine"]
    console.print(
        f"container engine: {engine['name']} {engine['version']} {engine['problem']}".rstrip(), highlight=False
    )
    for line in found["advice"]:
        console.print(f"could be better: {line} (`ngpu-node doctor`)", markup=False, highlight=False, soft_wrap=True)


def _span(seconds: float) -> str:
    whole = int(seconds)
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if whole >= size:
            return f"{whole // size} {unit}"
    return f"{whole} s"


if __name__ == "__main__":
    app()
