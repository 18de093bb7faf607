"""Show which nodes are connected to a bootstrap and what they offer. Started by `scripts/peers`.

Asks `GET /api/v1/nodes`, which is public. What a node itself sees, its bootstraps, is shown by `ngpu-node status`.

Exit code 0 when the bootstrap answered, 1 otherwise.
"""

import argparse
import json
import sys
import time
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

DEFAULT_URL = "http://127.0.0.1:8080"


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/peers", description="Show which nodes are connected to a bootstrap and what they offer."
    )
    parser.add_argument("--url", default=DEFAULT_URL, help=f"where the bootstrap listens (default {DEFAULT_URL})")
    parser.add_argument("--json", action="store_true", help="print one JSON object, as the bootstrap answered it")
    arguments = parser.parse_args()
    try:
        answer = httpx.get(arguments.url.rstrip("/") + "/api/v1/nodes", timeout=10)
        answer.raise_for_status()
        nodes = answer.json()["nodes"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
        print(f"error: no bootstrap answers at {arguments.url}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps({"nodes": nodes}))
    elif not nodes:
        print("no node is connected")
    else:
        _show(nodes)
    return 0


def _show(nodes: list[dict[str, Any]]) -> None:
    table = Table("node", "software", "state", "slots free", "heard", "GPUs", "model servers", "workspaces")
    now_ms = time.time() * 1000
    for node in nodes:
        table.add_row(
            Text(f"{node['node_addr']}\n{node['peer_id']}"),
            node["software"],
            _state(node),
            f"{node['slots_free']} of {node['slots']}",
            f"{max(0.0, now_ms - node['heard_at_ms']) / 1000:.1f} s ago",
            _lines(f"{gpu['model']}, {gpu['memory_bytes'] / 2**30:.0f} GiB" for gpu in node["gpus"]),
            _lines(f"{entry['project']}/{entry['model']} x{entry['copies']}" for entry in node["services"]),
            _lines(f"{entry['workspace']}: {entry['state']}" for entry in node["deployments"]),
        )
    # Addresses are there to be copied: a pipe gets them whole.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=220)
    console.print(table)


def _state(node: dict[str, Any]) -> str:
    if not node["admitted"]:
        return "waiting for approval"
    return "draining" if node["draining"] else "serving"


def _lines(entries: Any) -> Text:
    return Text("\n".join(entries) or "none")


if __name__ == "__main__":
    sys.exit(main())
