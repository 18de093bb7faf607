"""What the management commands do: on the running daemon where there is one, else on the store itself.

Owns the choice between the two; what a workspace is belongs to `registry.workspaces` either way.
"""

from __future__ import annotations

import json
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import trio
from pydantic import ValidationError

from ngpu_bootstrap.admin_socket import ask_daemon, daemon_is_running, follow_daemon
from ngpu_bootstrap.api.models import (
    CreatedWorkspaceView,
    DeploymentsView,
    NewTokenView,
    WorkspaceView,
    workspace_view,
)
from ngpu_bootstrap.brc20.policies import Brc20Policy
from ngpu_bootstrap.config import BootstrapSettings
from ngpu_bootstrap.credentials import reveal
from ngpu_bootstrap.errors import Refusal
from ngpu_bootstrap.registry.confided import Confided
from ngpu_bootstrap.registry.workspaces import NewWorkspace, Workspaces
from ngpu_bootstrap.store import brc20_rows
from ngpu_bootstrap.store.errors import StoreError
from ngpu_bootstrap.store.store import Store, open_store
from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.errors import OperatorError
from ngpu_daemon.keystore import open_keystore, read_passphrase
from ngpu_daemon.logs import configure_logging
from ngpu_protocol.identity import Account, Address
from ngpu_protocol.workspaces import describe_errors

_NOBODY = Address("0x" + 40 * "0")


class WorkspaceError(OperatorError):
    """What was asked about workspaces cannot be done; the message says why."""


def checked(document: dict[str, Any]) -> NewWorkspace:
    """Return the workspace described by *document*.

    Raises:
        WorkspaceError: naming each key that is wrong.
    """
    try:
        return NewWorkspace.model_validate(document)
    except ValidationError as error:
        raise WorkspaceError(f"not a workspace: {describe_errors(error)}") from None


def read_document(path: Path) -> dict[str, Any]:
    """Return the object in a TOML or JSON file; `-` reads it from stdin, JSON where it begins with a brace.

    Raises:
        WorkspaceError: it cannot be read, or is neither.
    """
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        is_toml = not content.lstrip().startswith(b"{") if str(path) == "-" else path.suffix == ".toml"
        document = tomllib.loads(content.decode()) if is_toml else json.loads(content)
    except OSError as error:
        raise WorkspaceError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise WorkspaceError(f"{path}: neither valid JSON nor, by its name, TOML: {error}") from None
    if not isinstance(document, dict):
        raise WorkspaceError(f"{path}: an object is wanted")
    return document


class Management:
    """The management commands on one data directory."""

    def __init__(self, settings: BootstrapSettings) -> None:
        self._settings = settings
        self._directory = DataDirectory(settings.data_dir)

    def add(self, new: NewWorkspace) -> CreatedWorkspaceView:
        """Make a workspace; the answer holds its token, which is shown this once."""
        if daemon_is_running(self._directory):
            return CreatedWorkspaceView.model_validate(self._ask("POST", "/api/v1/workspaces", new.document()))

        async def work(workspaces: Workspaces) -> CreatedWorkspaceView:
            workspace, token = await workspaces.add(new)
            return CreatedWorkspaceView(workspace=_view(workspaces, workspace.id), token=reveal(token))

        created: CreatedWorkspaceView = self._on_store(work)
        return created

    def all(self) -> Sequence[WorkspaceView]:
        """Return every workspace, oldest first."""
        if daemon_is_running(self._directory):
            answer = self._ask("GET", "/api/v1/workspaces")
            return [WorkspaceView.model_validate(one) for one in answer["workspaces"]]

        async def work(workspaces: Workspaces) -> list[WorkspaceView]:
            return [_view(workspaces, workspace.id) for workspace in workspaces]

        listed: list[WorkspaceView] = self._on_store(work)
        return listed

    def rotate_token(self, workspace_id: str, overlap_s: float) -> NewTokenView:
        """Give a workspace a new token, shown this once."""
        check_id(workspace_id)
        if daemon_is_running(self._directory):
            target = f"/api/v1/workspaces/{workspace_id}/tokens"
            return NewTokenView.model_validate(self._ask("POST", target, {"overlap_s": overlap_s}))

        async def work(workspaces: Workspaces) -> NewTokenView:
            token, record, ends_at_ms = await workspaces.rotate_token(workspace_id, overlap_s)
            return NewTokenView(token=reveal(token), label=record.label, others_end_at_ms=ends_at_ms)

        made: NewTokenView = self._on_store(work)
        return made

    def remove(self, workspace_id: str) -> WorkspaceView:
        """Remove a workspace and return what it was."""
        check_id(workspace_id)
        if daemon_is_running(self._directory):
            return WorkspaceView.model_validate(self._ask("DELETE", f"/api/v1/workspaces/{workspace_id}"))

        async def work(workspaces: Workspaces) -> WorkspaceView:
            view = _view(workspaces, workspaces.require(workspace_id).id)
            await workspaces.remove(workspace_id)
            return view

        removed: WorkspaceView = self._on_store(work)
        return removed

    def update(self, workspace_id: str, changes: dict[str, Any], *, whole: bool, repin: bool) -> WorkspaceView:
        """Change a workspace: by *changes* alone, or with *whole* to what they say and nothing else."""
        check_id(workspace_id)
        new = checked(changes) if whole else None
        if daemon_is_running(self._directory):
            document = new.document() if new is not None else changes
            target = f"/api/v1/workspaces/{workspace_id}?repin={'true' if repin else 'false'}"
            return WorkspaceView.model_validate(self._ask("PUT" if whole else "PATCH", target, document))

        async def work(workspaces: Workspaces) -> WorkspaceView:
            if new is not None:
                await workspaces.update(workspace_id, new, repin=repin)
            else:
                await workspaces.patch(workspace_id, changes, repin=repin)
            return _view(workspaces, workspace_id)

        updated: WorkspaceView = self._on_store(work)
        return updated

    def brc20_policy(self, workspace_id: str) -> Brc20Policy:
        """Return what a workspace asks of its callers' BTC addresses."""
        check_id(workspace_id)
        if daemon_is_running(self._directory):
            return Brc20Policy.model_validate(self._ask("GET", f"/api/v1/workspaces/{workspace_id}/brc20"))

        async def work(store: Store, workspaces: Workspaces) -> Brc20Policy:
            known = dict(await store.look_up(brc20_rows.policies)).get(workspaces.require(workspace_id).id)
            return Brc20Policy() if known is None else Brc20Policy.model_validate_json(known)

        found: Brc20Policy = self._with_store(work)
        return found

    def set_brc20_policy(self, workspace_id: str, document: dict[str, Any]) -> Brc20Policy:
        """Say what a workspace asks of its callers' BTC addresses."""
        check_id(workspace_id)
        try:
            policy = Brc20Policy.model_validate(document)
        except ValidationError as error:
            raise WorkspaceError(f"not a policy: {describe_errors(error)}") from None
        if daemon_is_running(self._directory):
            target = f"/api/v1/workspaces/{workspace_id}/brc20"
            return Brc20Policy.model_validate(self._ask("PUT", target, policy.model_dump(mode="json")))

        async def work(store: Store, workspaces: Workspaces) -> Brc20Policy:
            known, text = workspaces.require(workspace_id).id, policy.model_dump_json()
            await store.chore(lambda connection: brc20_rows.set_policy(connection, known, text))
            return policy

        made: Brc20Policy = self._with_store(work)
        return made

    def deployments(self, workspace_id: str) -> DeploymentsView:
        """Return how a workspace stands on each of its nodes, as the running daemon sees it."""
        check_id(workspace_id)
        self.status()
        return DeploymentsView.model_validate(self._ask("GET", f"/api/v1/workspaces/{workspace_id}/deployments"))

    def follow(self, workspace_id: str) -> Iterator[DeploymentsView]:
        """Return the same now and at each change, for as long as the workspace and the daemon are there."""
        check_id(workspace_id)
        self.status()
        target = f"/api/v1/workspaces/{workspace_id}/deployments"
        for event, data in follow_daemon(self._directory.admin_socket, target):
            if event == "removed":
                raise WorkspaceError(f"workspace {workspace_id} was removed")
            yield DeploymentsView.model_validate_json(data)

    def status(self) -> dict[str, Any]:
        """Return what the running daemon says of itself.

        Raises:
            WorkspaceError: none runs.
        """
        if not daemon_is_running(self._directory):
            raise WorkspaceError(f"no bootstrap runs on {self._directory.path}: start it with `ngpu-bootstrap run`")
        status: dict[str, Any] = self._ask("GET", "/status")
        return status

    def nodes(self) -> list[dict[str, Any]]:
        """Return the connected nodes as the running daemon sees them."""
        nodes: list[dict[str, Any]] = self._ask("GET", "/api/v1/nodes")["nodes"]
        return nodes

    def challenge(self, nodes: Sequence[str], gpu: int | None) -> list[dict[str, Any]]:
        """Have the running daemon challenge *nodes* now, and return the runs as they begin."""
        document = {"nodes": list(nodes), "gpu": gpu}
        runs: list[dict[str, Any]] = self._ask("POST", "/api/v1/challenges", document)["runs"]
        return runs

    def challenge_run(self, name: str) -> dict[str, Any]:
        """Return how one of them goes."""
        run: dict[str, Any] = self._ask("GET", f"/api/v1/challenges/{name}")
        return run

    def _ask(self, method: str, target: str, document: Any = None) -> Any:
        return ask_daemon(self._directory.admin_socket, method, target, document)

    def _on_store(self, work: Any) -> Any:
        """Run *work* on the workspaces of a data directory that no daemon uses."""
        return self._with_store(lambda store, workspaces: work(workspaces))

    def _with_store(self, work: Any) -> Any:
        """Run *work* on the store and the workspaces of a data directory that no daemon uses."""

        async def main() -> Any:
            location = self._settings.store or self._directory.path / "bootstrap.db"
            bodies = self._directory.path / "bodies"
            async with open_store(location, network=self._settings.network, bootstrap=_NOBODY, bodies=bodies) as store:
                confided = Confided(store, self._account, [Address(one) for one in self._settings.siblings])
                workspaces = Workspaces(store, confided=confided, now_ms=_now_ms, on_change=lambda: None)
                await workspaces.load()
                return await work(store, workspaces)

        configure_logging("error", "auto")  # to stderr: what a command prints is its answer alone
        try:
            with self._directory.lock():
                return trio.run(main)
        except (StoreError, Refusal) as error:
            raise WorkspaceError(str(error)) from None

    def _account(self) -> Account:
        return open_keystore(self._directory.keystore, read_passphrase(self._settings.passphrase_file))


def check_id(workspace_id: str) -> None:
    """Return if *workspace_id* is a number.

    Raises:
        WorkspaceError: it is not; a whole token is not repeated.
    """
    if not (workspace_id.isascii() and workspace_id.isdigit()):
        raise WorkspaceError(f"{workspace_id[:18]!r} is no workspace id: it is the number before the token's hyphen")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _view(workspaces: Workspaces, workspace_id: str) -> WorkspaceView:
    return workspace_view(workspaces.require(workspace_id), [])
