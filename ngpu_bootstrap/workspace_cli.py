"""The commands about one workspace's specification and where it stands: schema, from-docker-run, update, watch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ngpu_bootstrap.cli_options import ArgumentError, ConfigOption, DataDirOption, JsonOption, management
from ngpu_daemon.entry import run_main
from ngpu_protocol.docker_run import DockerRunError, parse_docker_run

if TYPE_CHECKING:
    from ngpu_bootstrap.api.models import DeploymentsView

WorkspaceId = Annotated[str, typer.Argument(help="The number before the token's hyphen.")]


def add_commands(app: typer.Typer) -> None:
    """Add them to the `workspace` commands."""
    app.command("schema")(workspace_schema)
    app.command("from-docker-run")(workspace_from_docker_run)
    app.command("update")(workspace_update)
    app.command("watch")(workspace_watch)


def workspace_schema() -> None:
    """Print the JSON schema of a workspace, as `add --file`, `update --file` and the API take it."""
    from ngpu_bootstrap.registry.workspaces import workspace_schema as schema

    typer.echo(json.dumps(schema(), indent=2))


def workspace_from_docker_run(
    line: Annotated[str, typer.Argument(help="The whole line, quoted: 'docker run …'; - reads it from stdin.")],
    name: Annotated[str, typer.Option(help="For people.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Turn a `docker run` line into a specification for `add --file -`. Nothing is run."""

    def main() -> None:
        try:
            found = parse_docker_run(sys.stdin.read() if line == "-" else line)
        except DockerRunError as error:
            raise ArgumentError(str(error)) from None
        fields = found.fields
        document = {"name": name or fields["image"].rpartition("/")[2].partition(":")[0].partition("@")[0], **fields}
        if as_json:
            typer.echo(json.dumps(document))
            return
        if found.passed_over:
            typer.echo(f"# passed over: {' '.join(found.passed_over)}")
        if "ports" not in fields:
            typer.echo("# the line publishes no port: name the ones it listens on, as in ports = [8080]")
        typer.echo(as_toml(document), nl=False)

    run_main(main)


def workspace_update(
    workspace_id: WorkspaceId,
    file: Annotated[Path | None, typer.Option(help="TOML or JSON file with the whole specification.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE, the value as TOML or plain text; none of it brings the default back."),
    ] = None,
    repin: Annotated[
        bool, typer.Option(help="Make a new revision in any case, so that a moved tag is looked at again.")
    ] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change a workspace. Where what runs changes, that is a new revision, which nodes get one at a time."""

    def main() -> None:
        from ngpu_bootstrap.commands import read_document

        if file is not None and setting:
            raise ArgumentError("--file is the whole specification, --set a change of it: give one of them")
        if file is None and not setting and not repin:
            raise ArgumentError("say what changes: --file FILE, --set KEY=VALUE or --repin")
        changes = read_document(file) if file is not None else dict(_setting(text) for text in setting or ())
        view = management(config, data_dir).update(workspace_id, changes, whole=file is not None, repin=repin)
        if as_json:
            typer.echo(view.model_dump_json())
        elif view.rollout is not None and view.rollout.state == "rolling":
            typer.echo(
                f"revision {view.rollout.target} is on its way; revision {view.rollout.base} serves until it is "
                f"everywhere\n\nWatch it:  ngpu-bootstrap workspace watch {workspace_id}"
            )
        else:
            typer.echo(f"workspace {workspace_id} is at revision {view.spec.revision}")

    run_main(main)


def workspace_watch(
    workspace_id: WorkspaceId,
    until_ready: Annotated[
        bool, typer.Option(help="End once every replica is ready, and with exit code 1 when one has failed.")
    ] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at each change.")] = False,
) -> None:
    """Show how a workspace stands on each of its nodes, with a bar for each image on its way, until interrupted."""

    def main() -> None:
        from ngpu_bootstrap.commands import WorkspaceError
        from ngpu_bootstrap.watching import failed, is_settled, show_bars, show_lines

        views: Iterable[DeploymentsView] = management(config, data_dir).follow(workspace_id)
        if as_json:
            shown = _echoed(views)
        elif sys.stdout.isatty():
            shown = show_bars(views)
        else:
            shown = show_lines(views, typer.echo)
        try:
            for view in shown:
                if until_ready and (problem := failed(view)):
                    raise WorkspaceError(problem)
                if until_ready and is_settled(view):
                    return
        except KeyboardInterrupt:
            return

    run_main(main)


def _echoed(views: Iterable[DeploymentsView]) -> Iterable[DeploymentsView]:
    for view in views:
        typer.echo(view.model_dump_json())
        yield view


def _setting(text: str) -> tuple[str, Any]:
    import tomllib

    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ArgumentError(f"--set {key[:64]}: write KEY=VALUE")
    if not value:
        return key, None
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def as_toml(document: dict[str, Any]) -> str:
    """Return a specification as TOML: plain values first, tables after them."""
    lines: list[str] = []
    tables: list[str] = []
    for key, value in document.items():
        if isinstance(value, dict):
            tables += ["", f"[{key}]", *(f"{name} = {_toml(inner)}" for name, inner in value.items())]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for one in value:
                tables += ["", f"[[{key}]]", *(f"{name} = {_toml(inner)}" for name, inner in one.items())]
        else:
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join(lines + tables) + "\n"


def _toml(value: Any) -> str:
    # JSON's strings, numbers, booleans and lists of them are TOML's too, but for characters JSON writes as surrogates
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
