"""What the person at the terminal sees: steps with their times, the stream as it arrives, tables at the end."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .tasks import TaskRun


class Screen:
    """Writes to standard output, in plain lines; tables adapt to the terminal's width."""

    def __init__(self) -> None:
        # A pipe has no width of its own; 160 columns keep addresses and ids whole in a log.
        self._console = Console(highlight=False, soft_wrap=False)
        if not self._console.is_terminal:
            self._console = Console(highlight=False, width=160)
        self._started = time.monotonic()

    def step(self, text: str) -> None:
        """Say what happens now."""
        stamp = f"{time.monotonic() - self._started:6.1f} s  "
        self._console.print(Text(stamp, style="dim") + Text(text))

    def event(self, at_ms: int, piece: str) -> None:
        """Show one server-sent event."""
        self._console.print(Text(f"          {at_ms:5d} ms  ", style="dim") + Text(repr(piece)))

    def line(self, text: str = "") -> None:
        """Print *text* as it is, however long."""
        self._console.print(Text(text), soft_wrap=True)

    def answer(self, run: TaskRun) -> None:
        """Show a task's words."""
        self._console.print(Text("          ") + Text(f"“{run.text.strip()}”", style="italic"))

    def tables(self, runs: Sequence[TaskRun], nodes: Sequence[str]) -> None:
        """Show the tasks with their receipts and verdicts, and what each node has done."""
        tasks = Table(title="Tasks", title_justify="left")
        for heading in (
            "mode",
            "task",
            "node",
            "status",
            "outcome",
            "request",
            "answer",
            "node's ms",
            "wall ms",
            "seq",
        ):
            tasks.add_column(
                heading, justify="right" if heading.endswith(("ms", "seq", "request", "answer")) else "left"
            )
        tasks.add_column("verdict")
        for run in runs:
            receipt = run.receipt
            tasks.add_row(
                run.mode,
                run.task_id,
                _short(run.node_addr),
                str(receipt["status"]),
                receipt["outcome"],
                f"{receipt['requestBytes']} B",
                f"{receipt['responseBytes']} B",
                str(receipt["durationMs"]),
                str(run.wall_ms),
                str(receipt["sequence"]),
                Text(run.verdict, style="green" if run.verified else "bold red"),
            )
        self._console.print()
        self._console.print(tasks)
        summary = Table(title="Nodes", title_justify="left")
        for heading in ("node", "tasks", "GPU ms reserved", "last receipt"):
            summary.add_column(heading, justify="right" if heading in ("tasks", "GPU ms reserved") else "left")
        for node in nodes:
            own = [run.receipt for run in runs if run.node_addr == node]
            reserved = sum(int(receipt["reservedGpuMs"]) for receipt in own)
            summary.add_row(node, str(len(own)), str(reserved), _last(own))
        self._console.print(summary)


def _short(address: str) -> str:
    return f"{address[:8]}…{address[-4:]}"


def _last(receipts: Sequence[dict[str, Any]]) -> str:
    if not receipts:
        return "none"
    newest = max(receipts, key=lambda receipt: int(receipt["sequence"]))
    return f"number {newest['sequence']} of its chain, signed {newest['signature'][:14]}…"
