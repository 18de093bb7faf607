"""Show which nodes are connected to a bootstrap, what they offer and how they fare. Started by `scripts/peers`.

Asks `GET /api/v1/nodes`, which is public. What a node itself sees, its bootstraps, is shown by `ngpu-node status`.

Exit code 0 when the bootstrap answered, 1 otherwise.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from typing import Any

import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

DEFAULT_URL = "http://127.0.0.1:8080"
WATCH_S = 2.0
STATES = (
    "serving", "pending", "draining", "silent", "set_aside", "distrusted", "version_too_old", "too_far", "challenged",
)  # fmt: skip


class Unanswered(Exception):
    """The bootstrap did not answer, or refused; the text is for people."""


def main() -> int:
    """Return the exit code."""
    arguments = _arguments()
    try:
        with httpx.Client(base_url=arguments.url.rstrip("/"), timeout=10) as client:
            if arguments.why:
                return _why(client, arguments)
            if arguments.watch:
                return _watch(client, arguments)
            nodes = _nodes(client, arguments)
    except (Unanswered, httpx.InvalidURL) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # whoever read it has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if arguments.json:
        print(json.dumps({"nodes": nodes}))
    elif not nodes:
        print("no node is connected" if not _filters(arguments) else "no connected node fits the filters")
    else:
        _console().print(_table(nodes))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/peers", description="Show which nodes are connected to a bootstrap, and how they fare."
    )
    parser.add_argument("--url", default=DEFAULT_URL, help=f"where the bootstrap listens (default {DEFAULT_URL})")
    parser.add_argument("--gpu", metavar="MODEL", help="only nodes with this GPU model, however spelled")
    parser.add_argument("--workspace", metavar="ID", help="only nodes where this workspace is deployed")
    parser.add_argument("--region", metavar="NAME", help="only nodes that say they are there")
    parser.add_argument("--state", choices=STATES, help="only nodes in this state")
    parser.add_argument("--json", action="store_true", help="print one JSON object; with --watch one a line")
    parser.add_argument("--watch", action="store_true", help=f"show it anew every {WATCH_S:g} s, until Ctrl-C")
    parser.add_argument("--why", metavar="NODEADDR", help="explain one node: its state, its standing, its workspaces")
    return parser.parse_args()


def _filters(arguments: argparse.Namespace) -> dict[str, str]:
    names = ("gpu", "workspace", "region", "state")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name)}


def _nodes(client: httpx.Client, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return every node that fits, page by page."""
    nodes: list[dict[str, Any]] = []
    after = ""
    while True:
        page = _ask(client, "/api/v1/nodes", _filters(arguments) | ({"after": after} if after else {}))
        nodes += page["nodes"]
        after = page.get("cursor", "")
        if not after:
            return nodes


def _ask(client: httpx.Client, path: str, query: dict[str, str] | None = None) -> dict[str, Any]:
    try:
        answer = client.get(path, params=query or {})
        document = answer.json()
        if answer.status_code != 200:
            raise Unanswered(document.get("message", f"the bootstrap answered {answer.status_code}"))
        if not isinstance(document, dict):
            raise ValueError("not an object")
    except (httpx.HTTPError, ValueError, AttributeError) as error:
        raise Unanswered(f"no bootstrap answers at {client.base_url}: {error or type(error).__name__}") from None
    return document


def _console() -> Console:
    # Addresses are there to be copied: a pipe gets them whole.
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=240)


def _watch(client: httpx.Client, arguments: argparse.Namespace) -> int:
    if arguments.json or not sys.stdout.isatty():
        nodes = _nodes(client, arguments)  # what is wrong from the start ends it: a mistyped URL
        while True:
            if arguments.json:
                print(json.dumps({"nodes": nodes}), flush=True)
            else:
                _console().print(_table(nodes))
            time.sleep(WATCH_S)
            nodes = _nodes_at_last(client, arguments)
    with Live(console=_console(), auto_refresh=False, screen=True) as live:
        while True:
            try:
                shown: RenderableType = _table(_nodes(client, arguments))
            except Unanswered as error:  # it may be restarting: the table comes back with it
                shown = Text(f"{error}")
            live.update(Group(Text(time.strftime("%H:%M:%S")), shown), refresh=True)
            time.sleep(WATCH_S)


def _nodes_at_last(client: httpx.Client, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """As `_nodes`, but wait for a bootstrap that does not answer, and say so: it may be restarting."""
    try:
        return _nodes(client, arguments)
    except Unanswered as error:
        print(f"{error}; looking again every {WATCH_S:g} s", file=sys.stderr, flush=True)
    while True:
        time.sleep(WATCH_S)
        with contextlib.suppress(Unanswered):
            nodes = _nodes(client, arguments)
            print("it answers again", file=sys.stderr, flush=True)
            return nodes


def _table(nodes: list[dict[str, Any]]) -> Table:
    table = Table(
        "node", "version", "state", "slots used", "round trip", "standing", "GPUs", "model servers", "workspaces"
    )
    for node in nodes:
        standing = node["standing"]
        judged = f"{standing['verified']} verified"
        if standing["disputed"]:
            judged += f"\n{standing['disputed']} disputed"
        if found := node.get("last_challenge"):  # a bootstrap of before does not say
            ago_h = (time.time() - node["last_challenged_at_ms"] / 1000) / 3600
            judged += f"\nchallenged {ago_h:.1f} h ago: {found.replace('_', ' ')}"
        table.add_row(
            Text(f"{node['node_addr']}\n{node['region'] or node['peer_id']}"),
            node["software"],
            _state(node),
            f"{node['slots'] - node['slots_free']} of {node['slots']}\n{node['running']} ours",
            f"{node['round_trip_ms']:.1f} ms" if node["round_trip_ms"] is not None else "not yet",
            f"{standing['score']:.2f}\n{judged}",
            _lines(f"{gpu['model']}, {gpu['memory_bytes'] / 2**30:.0f} GiB" for gpu in node["gpus"]),
            _lines(f"{entry['project']}/{entry['model']} x{entry['copies']}" for entry in node["services"]),
            _lines(f"{entry['workspace']}: {entry['state']}" for entry in node["deployments"]),
        )
    return table


def _state(node: dict[str, Any]) -> str:
    if node["state"] == "pending":
        return "waiting for approval"
    if node["state"] == "set_aside":
        left_s = max(0.0, node["tried_again_at_ms"] / 1000 - time.time())
        return f"set aside\nfor {left_s:.0f} s"
    return str(node["state"]).replace("_", " ")


def _why(client: httpx.Client, arguments: argparse.Namespace) -> int:
    detail = _ask(client, f"/api/v1/nodes/{arguments.why}")
    if arguments.json:
        print(json.dumps(detail))
        return 0
    print(f"{detail['node_addr']}: {detail['state'].replace('_', ' ')}")
    for sentence in detail["why"]:
        print(f"  {sentence}")
    for one in detail["workspaces"]:
        why = "takes its tasks" if not one["excluded"] else f"no task now: {one['excluded']}"
        print(
            f"  workspace {one['workspace']}: {why}; {one['in_use']} of {one['slots']} slots in use, "
            f"{one['failure_rate']:.0%} failed of late, {one['tasks']} measured, speed {one['speed']:g}"
        )
    return 0


def _lines(entries: Any) -> Text:
    return Text("\n".join(entries) or "none")


if __name__ == "__main__":
    sys.exit(main())
