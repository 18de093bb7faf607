"""What the owner's commands about workspaces and model servers print."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table


def show_workspaces(found: dict[str, Any], console: Console) -> None:
    """Print what `/workspaces` answered."""
    if found["detail"]:
        console.print(f"takes no tasks: {found['detail']}", markup=False, highlight=False)
    table = Table("workspace", "name", "image", "state", "tasks", "GPUs", "detail")
    for one in found["workspaces"]:
        number = f"{one['workspace']} r{one['revision']}" + ("" if one["wished"] else " (old)")
        tasks = f"{one['running']} of {one['concurrency']}"
        image = one["image"] or one["model_server"]
        table.add_row(number, one["name"], image, _state(one), tasks, "\n".join(one["gpus"]), one["detail"])
    print_table(console, table, "no workspaces wanted here yet")


def _state(one: dict[str, Any]) -> str:
    if one["state"] != "pulling" or not one["bytes_total"]:
        return str(one["state"])
    left = "" if one["seconds_left"] is None else f", {one['seconds_left']} s left"
    return f"pulling {one['progress']} % of {one['bytes_total'] / 1e6:.0f} MB{left}"


def show_models(found: dict[str, Any], console: Console) -> None:
    """Print what `/models` answered."""
    table = Table("project", "model", "copy", "type", "at", "state", "tasks", "detail")
    for one in found["models"]:
        state = "healthy" if one["healthy"] else "withdrawn"
        table.add_row(
            one["project"], one["model"], one["cid"], one["type"], one["api"], state, str(one["running"]), one["detail"]
        )
    print_table(console, table, "no model server has registered here (`ngpu-node models --help` shows how)")


def show_images(found: dict[str, Any], console: Console) -> None:
    """Print what `/images` answered."""
    table = Table("image", "digest", "MB", "last used", "workspaces", "stays")
    for one in found["images"]:
        used = datetime.fromtimestamp(one["used_at_ms"] / 1000).strftime("%Y-%m-%d %H:%M") if one["used_at_ms"] else ""
        size = "arriving" if one["arriving"] else f"{one['bytes'] / 1e6:,.0f}"
        digest = one["digest"].removeprefix("sha256:")[:12]
        table.add_row(one["image"], digest, size, used, "\n".join(map(_holder, one["held_by"])), _why_it_stays(one))
    print_table(console, table, "no images yet")
    mine = sum(one["bytes"] for one in found["images"] if not one["borrowed"])
    console.print(f"fetched by this node: {mine / 1e6:,.0f} MB unpacked, layers shared with others included")


def _holder(holder: str) -> str:
    service, workspace, revision = holder.rsplit("/", 2)
    return f"{workspace} r{revision} ({service})"


def _why_it_stays(one: dict[str, Any]) -> str:
    if one["in_use"]:
        return "in use"
    if one["borrowed"]:
        return "was here before this node"
    return "the owner keeps it" if one["kept"] else "until its room is needed"


def show_lending(found: dict[str, Any], console: Console) -> None:
    """Print how the machine is lent."""
    running, on_machine = found["running"], found["on_machine"]
    what = found["detail"] or "tasks are taken"
    console.print(
        f"{found['lending']}: {what}; {running} tasks running, {on_machine} workspaces on the machine",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def show_findings(found: dict[str, Any], console: Console) -> None:
    """Print what `/doctor` answered."""
    for one in found["findings"]:
        mark = "!!" if one["advice"] else "ok"
        console.print(f"{mark}  {one['subject']}: {one['text']}", markup=False, highlight=False, soft_wrap=True)
        if one["advice"]:
            console.print(f"    -> {one['advice']}", markup=False, highlight=False, soft_wrap=True)


def print_table(console: Console, table: Table, when_empty: str) -> None:
    """Print *table*, or *when_empty* where it has no rows."""
    if table.row_count:
        console.print(table)
    elif when_empty:
        console.print(when_empty, markup=False, highlight=False)
