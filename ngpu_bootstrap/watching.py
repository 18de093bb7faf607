"""How a workspace stands, on a terminal: one live bar for each node, or a line for each change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ngpu_bootstrap.api.models import DeploymentsView, DeploymentView

_COLOUR = {"ready": "green", "failed": "red", "unhealthy": "red", "pulling": "cyan", "starting": "yellow"}
_MIB = 1024 * 1024


def show_bars(views: Iterable[DeploymentsView], console: Console | None = None) -> Iterator[DeploymentsView]:
    """Yield each of *views* after its bars are shown; deployments that are gone lose theirs."""
    columns = (
        TextColumn("{task.fields[node]}"),
        TextColumn("{task.fields[state]}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[about]}"),
    )
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        bars: dict[tuple[str, int], TaskID] = {}
        said = ""
        for view in views:
            there = {(one.node, one.revision): one for one in view.deployments}
            for key in bars.keys() - there.keys():
                progress.remove_task(bars.pop(key))
            for key, one in there.items():
                if key not in bars:
                    bars[key] = progress.add_task("", total=100, node="", state="", about="")
                colour = _COLOUR.get(one.state, "default")
                progress.update(
                    bars[key],
                    completed=one.progress,
                    node=f"{one.node} r{one.revision}",
                    state=f"[{colour}]{one.state:<9}[/{colour}]",
                    about=about(one),
                )
            now = summary(view)
            if now != said:
                said = now
                progress.console.print(now, highlight=False, markup=False)
            progress.refresh()
            yield view


def show_lines(views: Iterable[DeploymentsView], say: Callable[[str], None]) -> Iterator[DeploymentsView]:
    """Yield each of *views* after what is new in it was said, a line for each deployment that changed."""
    before: dict[tuple[str, int], str] = {}
    said = ""
    for view in views:
        now = {
            (one.node, one.revision): f"{one.node} r{one.revision} {one.state} {one.progress} % {about(one)}".rstrip()
            for one in view.deployments
        }
        if summary(view) != said:
            said = summary(view)
            say(said)
        for key, line in now.items():
            if before.get(key) != line:
                say(line)
        before = now
        yield view


def about(one: DeploymentView) -> str:
    """Return bytes, time left and what is wrong, as far as known."""
    parts = []
    if one.state == "pulling" and one.bytes_total:
        parts.append(f"{one.bytes_done / _MIB:.1f} of {one.bytes_total / _MIB:.1f} MiB")
    if one.state == "pulling" and one.seconds_left is not None:
        parts.append(f"{one.seconds_left} s left")
    if one.reason:
        parts.append(one.reason)
    if one.detail and one.state != "pulling":
        parts.append(one.detail)
    return ", ".join(parts)


def summary(view: DeploymentsView) -> str:
    """Return how the workspace stands altogether, in one line."""
    wanted = view.replicas if view.replicas is not None else len({one.node for one in view.deployments})
    parts = [f"revision {view.revision}: ready on {view.ready} of {wanted}"]
    if view.rollout is not None and view.rollout.state == "rolling":
        parts.append(f"revision {view.rollout.target} is on its way")
    elif view.rollout is not None:
        why = f"{view.rollout.reason}: {view.rollout.detail}".rstrip(": ")
        parts.append(f"revision {view.rollout.target} failed on {view.rollout.node} ({why})")
    if view.shortage is not None:
        parts.append(view.shortage.detail)
    return "; ".join(parts)


def is_settled(view: DeploymentsView) -> bool:
    """Return whether every replica is ready and nothing is on its way."""
    wanted = view.replicas if view.replicas is not None else max(1, len({one.node for one in view.deployments}))
    return view.ready >= wanted and (view.rollout is None or view.rollout.state != "rolling")


def failed(view: DeploymentsView) -> str:
    """Return why it will not be ready as it is; empty while it may."""
    if view.rollout is not None and view.rollout.state == "failed":
        return summary(view)
    lost = [one for one in view.deployments if one.state == "failed"]
    return f"failed on {lost[0].node}: {about(lost[0])}" if lost else ""
