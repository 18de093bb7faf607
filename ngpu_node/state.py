"""What the node must know again after a restart: the deployments it has, what each holds, whether its owner holds it.

One SQLite file, `workspaces.db` in the data directory, beside the ledger: what is lost with it comes again (the
wishes from the bootstraps, the holdings from the containers' labels), so it is not mixed with receipts, which do not.
Writes are few and durable before they count; each runs in a thread.

Specifications are kept in their wire form. Secrets are kept as they came, sealed to this node's key: whoever takes the
disk without the keystore's passphrase has nothing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgpack  # type: ignore[import-untyped]
import structlog
import trio

from ngpu_node.deployments import KeptDeployment
from ngpu_node.engine.room import Grant
from ngpu_node.errors import NodeConfigurationError, StateUnavailable
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

T = TypeVar("T")

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE deployments (
        service       TEXT NOT NULL,
        workspace     TEXT NOT NULL,
        revision      INTEGER NOT NULL,
        specification BLOB NOT NULL,      -- msgpack of WorkspaceSpec.to_wire
        is_wished     INTEGER NOT NULL,   -- 0: an older revision that serves until its successor is ready
        sealed        BLOB NOT NULL,      -- its secrets, as they came: sealed to this node's key
        PRIMARY KEY (service, workspace, revision)
    ) WITHOUT ROWID;

    CREATE TABLE holdings (
        holder       TEXT PRIMARY KEY,
        memory_bytes INTEGER NOT NULL,
        cpus         REAL NOT NULL,
        gpus         TEXT NOT NULL        -- UUIDs, separated by spaces
    ) WITHOUT ROWID;

    CREATE TABLE owner (
        name  TEXT PRIMARY KEY,
        value TEXT NOT NULL
    ) WITHOUT ROWID;
    """,
)


class NodeState:
    """The file; one task writes at a time.

    Every method raises `StateUnavailable` where the file cannot be read or written.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._turn = trio.StrictFIFOLock()

    @classmethod
    async def open(cls, path: Path) -> NodeState:
        """Open the state at *path*, made if it is missing.

        Raises:
            NodeConfigurationError: it is something else, or damaged.
        """
        return cls(await trio.to_thread.run_sync(_connect, path))

    async def aclose(self) -> None:
        """Close the file."""
        with trio.CancelScope(shield=True):
            async with self._turn:
                await trio.to_thread.run_sync(self._connection.close)

    async def _do(self, call: Callable[[sqlite3.Connection], T]) -> T:
        def do() -> T:
            with self._connection:  # a transaction
                return call(self._connection)

        try:
            async with self._turn:
                return await trio.to_thread.run_sync(do)
        except sqlite3.Error as error:
            raise StateUnavailable(f"workspaces.db cannot be used ({error}): is the disk full?") from error

    # -- deployments ---------------------------------------------------------------------------------------------------

    async def deployments(self) -> list[KeptDeployment]:
        """Return what was here; a specification this version cannot read is left out."""
        rows = await self._do(
            lambda connection: connection.execute(
                "SELECT service, workspace, specification, is_wished, sealed FROM deployments ORDER BY 1, 2, revision"
            ).fetchall()
        )
        found = []
        for service, workspace, specification, is_wished, sealed in rows:
            try:
                spec = WorkspaceSpec.from_wire(msgpack.unpackb(specification))
            except (ValueError, MalformedError, msgpack.UnpackException) as error:
                log.warning("deployment_forgotten", service=service, workspace=workspace, reason=str(error))
                continue
            found.append(KeptDeployment(service, spec, bool(is_wished), bytes(sealed)))
        return found

    async def keep_deployments(self, kept: Sequence[KeptDeployment]) -> None:
        """Make *kept* all there is."""
        rows = [
            (k.service, k.spec.id, k.spec.revision, msgpack.packb(k.spec.to_wire()), k.is_wished, k.sealed)
            for k in kept
        ]

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM deployments")
            connection.executemany("INSERT INTO deployments VALUES (?, ?, ?, ?, ?, ?)", rows)

        await self._do(write)

    # -- what they hold ------------------------------------------------------------------------------------------------

    async def holdings(self) -> dict[str, Grant]:
        """Return what each holder has."""
        rows = await self._do(lambda connection: connection.execute("SELECT * FROM holdings").fetchall())
        return {holder: Grant(memory, cpus, tuple(gpus.split())) for holder, memory, cpus, gpus in rows}

    async def keep_holding(self, holder: str, grant: Grant | None) -> None:
        """Write down what *holder* has from now on; None for nothing."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM holdings WHERE holder = ?", (holder,))
            if grant is not None:
                values = (holder, grant.memory_bytes, grant.cpus, " ".join(grant.gpus))
                connection.execute("INSERT INTO holdings VALUES (?, ?, ?, ?)", values)

        await self._do(write)

    # -- the owner's word ----------------------------------------------------------------------------------------------

    async def owners_word(self, name: str) -> str:
        """Return what the owner last said under *name*, empty where he did not."""
        row = await self._do(
            lambda connection: connection.execute("SELECT value FROM owner WHERE name = ?", (name,)).fetchone()
        )
        return row[0] if row else ""

    async def keep_owners_word(self, name: str, value: str) -> None:
        """Remember *value*; it holds over restarts."""
        await self._do(
            lambda connection: connection.execute("INSERT OR REPLACE INTO owner VALUES (?, ?)", (name, value))
        )


@asynccontextmanager
async def open_state(path: Path) -> AsyncIterator[NodeState]:
    """Yield the state at *path*; see `NodeState.open`."""
    state = await NodeState.open(path)
    try:
        yield state
    finally:
        await state.aclose()


def _connect(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise NodeConfigurationError(f"{path} was written by a later version of ngpu-node: update ngpu-node")
        for number in range(version, len(MIGRATIONS)):
            connection.executescript(f"BEGIN;\n{MIGRATIONS[number]}\nPRAGMA user_version = {number + 1};\nCOMMIT;")
    except sqlite3.Error as error:
        raise NodeConfigurationError(
            f"{path} cannot be used ({error}): move it away; what it held comes again from the bootstraps"
        ) from error
    path.chmod(0o600)
    return connection
