"""Tasks that were run again, as stored: what came of each, the last of each workspace. Blocking; in store threads."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import sqlalchemy as sa

from ngpu_bootstrap.store import tables
from ngpu_protocol.identity import Address

KEPT_OF_WORKSPACE = 1000


@dataclass(frozen=True, slots=True)
class RecheckRow:
    """What came of running one task again.

    Attributes:
        task_id: of the client's task; *second_task* and *third_task* of the runs that looked again, empty for none.
        outcome: an `Outcome`.
        loser: the node that disagreed with two others; empty where there is none.
    """

    bootstrap: str
    workspace: str
    revision: int
    task_id: str
    at_ms: int
    outcome: str
    first_node: str
    second_node: str = ""
    third_node: str = ""
    second_task: str = ""
    third_task: str = ""
    loser: str = ""


def add(connection: sa.Connection, row: RecheckRow) -> None:
    """Write *row*, and let go of what is too old of its workspace; what somebody lost is kept."""
    r = tables.rechecks
    connection.execute(sa.insert(r).values(asdict(row)))
    numbers = sa.select(r.c.number).where(r.c.workspace == row.workspace, r.c.loser == "").order_by(r.c.number.desc())
    last = connection.execute(numbers.offset(KEPT_OF_WORKSPACE).limit(1)).scalar()
    if last is not None:
        gone = (r.c.workspace == row.workspace, r.c.loser == "", r.c.number <= last)
        connection.execute(sa.delete(r).where(*gone))


def of_workspace(connection: sa.Connection, workspace: str, limit: int) -> list[RecheckRow]:
    """Return the last of a workspace, newest first."""
    return _rows(connection, tables.rechecks.c.workspace == workspace, limit)


def lost_by(connection: sa.Connection, node: Address, limit: int) -> list[RecheckRow]:
    """Return the last that *node* lost, newest first."""
    return _rows(connection, tables.rechecks.c.loser == node, limit)


def counts(connection: sa.Connection, workspace: str) -> dict[str, int]:
    """Return how many of a workspace's came to what, of those that are kept."""
    r = tables.rechecks
    found = connection.execute(
        sa.select(r.c.outcome, sa.func.count()).where(r.c.workspace == workspace).group_by(r.c.outcome)
    )
    return {outcome: int(count) for outcome, count in found}


def since(connection: sa.Connection, at_ms: int) -> list[RecheckRow]:
    """Return those that did not end in agreement since *at_ms*, oldest first."""
    r = tables.rechecks
    found = connection.execute(
        sa.select(r).where(r.c.at_ms >= at_ms, r.c.outcome.not_in(("agreed", "no_second"))).order_by(r.c.number)
    )
    return [_row(row) for row in found]


def _rows(connection: sa.Connection, where: sa.ColumnElement[bool], limit: int) -> list[RecheckRow]:
    r = tables.rechecks
    found = connection.execute(sa.select(r).where(where).order_by(r.c.number.desc()).limit(limit))
    return [_row(row) for row in found]


def _row(row: sa.Row[tuple[object, ...]]) -> RecheckRow:
    values = row._asdict()
    del values["number"]
    return RecheckRow(**values)
