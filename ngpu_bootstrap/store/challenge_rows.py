"""Challenges as stored: what became of each, the last few of each node. Blocking; runs in the store's threads."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import sqlalchemy as sa

from ngpu_bootstrap.store import tables
from ngpu_protocol.identity import Address

KEPT_OF_NODE = 64


@dataclass(frozen=True, slots=True)
class ChallengeRow:
    """What became of one challenge of one GPU.

    Attributes:
        model, memory_bytes: as claimed.
        product_ms, chains_ms: what the two parts took, 0 for one that was not reached; the limits beside them.
        task_id: of the order that began it; empty when none went out.
    """

    bootstrap: Address
    node: Address
    gpu: bytes
    at_ms: int
    model: str
    memory_bytes: int
    finding: str
    detail: str
    product_ms: int = 0
    product_limit_ms: int = 0
    chains_ms: int = 0
    chains_limit_ms: int = 0
    task_id: str = ""


def add(connection: sa.Connection, row: ChallengeRow) -> None:
    """Write *row*, and let go of what is too old of its node."""
    c = tables.challenges
    connection.execute(sa.insert(c).values(asdict(row)))
    numbers = sa.select(c.c.number).where(c.c.node == row.node).order_by(c.c.number.desc())
    last = connection.execute(numbers.offset(KEPT_OF_NODE).limit(1)).scalar()
    if last is not None:
        connection.execute(sa.delete(c).where(c.c.node == row.node, c.c.number <= last))


def of_node(connection: sa.Connection, node: Address, limit: int = KEPT_OF_NODE) -> list[ChallengeRow]:
    """Return the last challenges of *node*, newest first."""
    c = tables.challenges
    found = connection.execute(sa.select(c).where(c.c.node == node).order_by(c.c.number.desc()).limit(limit))
    return [_row(row) for row in found]


def findings(connection: sa.Connection) -> list[tuple[Address, bytes, str, int]]:
    """Return node, GPU, finding and time of every challenge that is kept, oldest first."""
    c = tables.challenges
    found = connection.execute(sa.select(c.c.node, c.c.gpu, c.c.finding, c.c.at_ms).order_by(c.c.number))
    return [(Address(row.node), bytes(row.gpu), row.finding, row.at_ms) for row in found]


def _row(row: sa.Row[tuple[object, ...]]) -> ChallengeRow:
    values = row._asdict()
    del values["number"]
    values |= {"bootstrap": Address(values["bootstrap"]), "node": Address(values["node"]), "gpu": bytes(values["gpu"])}
    return ChallengeRow(**values)
