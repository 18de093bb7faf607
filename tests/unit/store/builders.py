"""Records for tests, with every field a test does not care about filled in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ngpu_bootstrap.store.records import AttemptStart, Finish, NewReceipt, NewTask, WorkspaceRow, WorkspaceToken
from ngpu_bootstrap.store.store import Store, StoreOptions, open_store
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.identity import Address, parse_address

BOOTSTRAP = parse_address("0x" + "11" * 20)
NODE = parse_address("0x" + "22" * 20)
OTHER_NODE = parse_address("0x" + "33" * 20)
SESSION = b"s" * 32
WORKSPACE = "367614711220405248"

DATABASE_FILE = "database-url"


def task_id(number: int) -> str:
    return f"20260102_03_04_05_{number:020d}"


def a_task(number: int = 1, **changes: Any) -> NewTask:
    values: dict[str, Any] = {
        "task_id": task_id(number),
        "workspace": WORKSPACE,
        "revision": 1,
        "api": "proxy",
        "method": "POST",
        "port": 8080,
        "target": "/create?x=1",
        "accepted_at_ms": 1_700_000_000_000 + number,
        "deadline_at_ms": 1_700_000_300_000,
    }
    return NewTask(**(values | changes))


def a_start(number: int = 1, attempt: int = 1, **changes: Any) -> AttemptStart:
    values: dict[str, Any] = {
        "task_id": task_id(number),
        "attempt": attempt,
        "node": NODE,
        "session": SESSION,
        "order": f"order {number}/{attempt}".encode(),
        "at_ms": 1_700_000_000_100 + number,
    }
    return AttemptStart(**(values | changes))


def receipt_hash(sequence: int, fork: str = "") -> bytes:
    return f"{fork}{sequence}".encode().rjust(32, b"#") if sequence else bytes(32)


def a_receipt(sequence: int, number: int | None = None, *, fork: str = "", **changes: Any) -> NewReceipt:
    values: dict[str, Any] = {
        "task_id": task_id(number if number is not None else sequence),
        "attempt": 1,
        "bootstrap": BOOTSTRAP,
        "node": NODE,
        "sequence": sequence,
        "hash": receipt_hash(sequence, fork),
        "previous": receipt_hash(sequence - 1),
        "raw": f"receipt {fork}{sequence}".encode(),
        "verdict": "verified",
        "received_at_ms": 1_700_000_000_300,
        "acknowledgement": f"acknowledgement {fork}{sequence}".encode(),
        "outcome": "complete",
        "duration_ms": 100,
        "reserved_gpu_ms": 90,
        "busy_gpu_ms": 80,
    }
    return NewReceipt(**(values | changes))


def a_finish(number: int = 1, receipt: NewReceipt | None = None, **changes: Any) -> Finish:
    values: dict[str, Any] = {
        "task_id": task_id(number),
        "state": TaskState.FINISHED,
        "at_ms": 1_700_000_000_200 + number,
        "attempt": 1,
        "result_code": 200,
        "status": 200,
        "content_type": "application/json",
        "response": b'{"ok":true}',
        "outcome": "complete",
        "receipt": receipt,
    }
    return Finish(**(values | changes))


def a_workspace(id: str = WORKSPACE, **changes: Any) -> WorkspaceRow:
    values: dict[str, Any] = {
        "id": id,
        "name": "paint",
        "revision": 1,
        "spec": {"image": "paint:1", "ports": [8080]},
        "tokens": (WorkspaceToken(f"{id}.1", id.encode().rjust(32, b"h"), 1_700_000_000_000),),
        "created_at_ms": 1_700_000_000_000,
        "updated_at_ms": 1_700_000_000_000,
    }
    return WorkspaceRow(**(values | changes))


@asynccontextmanager
async def a_store(directory: Path, *, bootstrap: Address = BOOTSTRAP, **options: Any) -> AsyncIterator[Store]:
    """Open the store of *directory*: SQLite, unless a file there names a PostgreSQL database."""
    async with open_store(
        database_of(directory),
        network="local",
        bootstrap=bootstrap,
        bodies=directory / "bodies",
        options=StoreOptions(**options),
    ) as store:
        yield store


def database_of(directory: Path) -> str | Path:
    """Return where the store of *directory* is."""
    named = directory / DATABASE_FILE
    return named.read_text() if named.exists() else directory / "bootstrap.db"
