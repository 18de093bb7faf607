"""Tasks from the shell, thin over `ngpu_client`. Started by `scripts/ngpu-task`.

The token is read from a file or from $NGPU_TOKEN, never from an argument: others see arguments. Results go to stdout,
byte for byte; progress and everything else to stderr. Exit code 0 when the task succeeded, 1 when it or the call did
not, 2 when the command line is wrong.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ngpu_client import Client, NgpuError, Options, Progress, Result

app = typer.Typer(
    help="""Run tasks on a workspace of an NGPU bootstrap.

    Give the bootstrap's URL with --url or $NGPU_URL, and the workspace's token in a file (--token-file) or $NGPU_TOKEN.
    `run` submits and waits, `submit` prints a task id at once, `wait` comes back for it.""",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
notes = Console(stderr=True, highlight=False)
where: dict[str, Any] = {}

DataOption = Annotated[str, typer.Option(help="The workspace's request body; @FILE reads a file, - standard input.")]
PortOption = Annotated[int | None, typer.Option(help="One of the workspace's ports; default: its first.")]
TimeoutOption = Annotated[float | None, typer.Option(help="Seconds the task may wait and run altogether.")]
PriorityOption = Annotated[int | None, typer.Option(help="0 to 9: higher first among the workspace's waiting tasks.")]
WithinOption = Annotated[float | None, typer.Option(help="Seconds to wait here; the task goes on afterwards.")]
CheckOption = Annotated[bool, typer.Option("--check", help="Check the receipt on this machine, rule by rule.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
TaskArgument = Annotated[str, typer.Argument(help="The id that `submit` printed.")]


@app.callback()
def main(
    url: Annotated[str, typer.Option(envvar="NGPU_URL", help="Of the bootstrap.")] = "http://127.0.0.1:8080",
    token_file: Annotated[
        Path | None, typer.Option(help="File with the workspace's token; default: $NGPU_TOKEN.", dir_okay=False)
    ] = None,
) -> None:
    where["url"] = url
    try:
        where["token"] = token_file.read_text().strip() if token_file else os.environ.get("NGPU_TOKEN", "")
    except OSError as error:
        fail(f"cannot read {token_file}: {error.strerror}")
    if not where["token"]:
        fail("no token: name a file with --token-file, or set NGPU_TOKEN")


@app.command()
def run(
    path: Annotated[str, typer.Argument(help="Path in the workspace, such as sdapi/v1/txt2img.")],
    data: DataOption = "{}",
    port: PortOption = None,
    timeout: TimeoutOption = None,
    priority: PriorityOption = None,
    within: WithinOption = None,
    check: CheckOption = False,
    as_json: JsonOption = False,
) -> None:
    """Submit a task, show its progress, print its result."""
    body = read_data(data)
    with client() as ngpu:
        task_id = ngpu.submit(path, body, port=port, options=Options(timeout_s=timeout, priority=priority))
        notes.print(f"task {task_id}")
        show(ngpu, ngpu.wait(task_id, within_s=within, on_progress=progress, request=body.encode()), check, as_json)


@app.command()
def submit(
    path: Annotated[str, typer.Argument(help="Path in the workspace, such as sdapi/v1/txt2img.")],
    data: DataOption = "{}",
    port: PortOption = None,
    timeout: TimeoutOption = None,
    priority: PriorityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Submit a task and print its id; it runs on without this command."""
    with client() as ngpu:
        options = Options(timeout_s=timeout, priority=priority)
        task_id = ngpu.submit(path, read_data(data), port=port, options=options)
    print(json.dumps({"task_id": task_id}) if as_json else task_id)


@app.command()
def wait(
    task_id: TaskArgument, within: WithinOption = None, check: CheckOption = False, as_json: JsonOption = False
) -> None:
    """Wait for a task's end, show its progress, print its result."""
    with client() as ngpu:
        show(ngpu, ngpu.wait(task_id, within_s=within, on_progress=progress), check, as_json)


@app.command("show")
def show_task(task_id: TaskArgument, as_json: JsonOption = False) -> None:
    """Show a task: where it stands, its attempts, its receipts and their verdicts."""
    with client() as ngpu:
        found = ngpu.details(task_id)
    if as_json:
        print(json.dumps(found))
        return
    console = Console(highlight=False)
    for name in ("task_id", "state_name", "workspace", "method", "target", "node_addr", "verdict", "rule", "message"):
        if found.get(name):
            console.print(f"{name.replace('_', ' '):<12}{found[name]}", markup=False)
    table = Table("attempt", "node", "outcome", "status", "verdict", box=None, pad_edge=False)
    verdicts = {receipt["attempt"]: receipt["verdict"] for receipt in found["receipts"]}
    for one in found["attempts"]:
        number = one["attempt"]
        outcome = one["outcome"] or "running"
        table.add_row(str(number), one["node_addr"], outcome, str(one["status"] or ""), verdicts.get(number, ""))
    console.print(table)


@app.command("list")
def list_tasks(
    since: Annotated[str | None, typer.Option("--from", help="A date or date-time.")] = None,
    until: Annotated[str | None, typer.Option("--to", help="A date or date-time; a day is included whole.")] = None,
    node: Annotated[str | None, typer.Option(help="Only tasks of this nodeAddr.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """Print the workspace's task ids, newest first."""
    with client() as ngpu:
        found = list(ngpu.tasks(since=since, until=until, node=node, limit=limit))
    print(json.dumps({"task_ids": found}) if as_json else "\n".join(found))


@app.command()
def cancel(task_id: TaskArgument, as_json: JsonOption = False) -> None:
    """Ask for a task to end; its workspace is told."""
    with client() as ngpu:
        found = ngpu.cancel(task_id)
    print(json.dumps(found) if as_json else found.get("state_name", ""))


@app.command()
def deployments(as_json: JsonOption = False) -> None:
    """Show where the workspace is deployed, and how far."""
    with client() as ngpu:
        found = ngpu.deployments()
    if as_json:
        names = ("node_addr", "revision", "state", "progress", "reason", "detail")
        print(json.dumps({"deployments": [{name: getattr(one, name) for name in names} for one in found]}))
        return
    table = Table("node", "revision", "state", "progress", "detail", box=None, pad_edge=False)
    for one in found:
        table.add_row(one.node_addr, str(one.revision), one.state, f"{one.progress} %", one.detail)
    Console(highlight=False).print(table)


def client() -> Client:
    return Client(where["url"], where["token"])


def read_data(text: str) -> str:
    try:
        if text == "-":
            return sys.stdin.read()
        return Path(text[1:]).read_text() if text.startswith("@") else text
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {text}: {error}")
        raise AssertionError from error


def progress(now: Progress) -> None:
    notes.print(now.message, markup=False)


def show(ngpu: Client, result: Result, check: bool, as_json: bool) -> None:
    holds = True
    if check:
        checked = ngpu.check(result)
        holds = checked.holds
        broken = ", ".join(checked.broken) or "it is not acknowledged as verified"
        notes.print("receipt: every rule holds" if holds else f"receipt: broken: {broken}", markup=False)
    if as_json:
        print(json.dumps({"task_id": result.task_id, "data": result.text, "verified": holds if check else None}))
    else:
        sys.stdout.buffer.write(result.content)
        sys.stdout.buffer.flush()
    if not holds:
        sys.exit(1)


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    try:
        app()
    except NgpuError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
