"""Challenges as stored: what became of each, the last few of each node, and whose a node's next one is. Blocking; runs
in the store's threads.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.leases import database_now_ms
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


def claim(connection: sa.Connection, own: str, nodes: Collection[Address], for_ms: int) -> frozenset[Address]:
    """Make it the business of *own*, and no other bootstrap of this database, to challenge *nodes*; return those it is.

    The others are challenged by one that lives; a dead one's claim, or one that has lasted *for_ms*, means nothing.
    """
    c, b = tables.challenge_claims, tables.bootstraps
    now_ms = database_now_ms(connection)
    make: Any = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    dead = sa.select(b.c.address).where(b.c.lease_until_ms < now_ms)
    mine = set()
    for node in sorted(nodes):  # in one order everywhere: two that claim many do not wait for each other
        row = make(c).values(node=node, bootstrap=own, until_ms=now_ms + for_ms)
        free = (c.c.bootstrap == own) | (c.c.until_ms < now_ms) | c.c.bootstrap.in_(dead)
        taken = row.on_conflict_do_update(
            index_elements=[c.c.node],
            set_={"bootstrap": row.excluded.bootstrap, "until_ms": row.excluded.until_ms},
            where=free,
        )
        connection.execute(taken)
        if connection.execute(sa.select(c.c.bootstrap).where(c.c.node == node)).scalar() == own:
            mine.add(node)
    return frozenset(mine)


def release(connection: sa.Connection, own: str, nodes: Collection[Address]) -> None:
    """Give up what *own* claimed of *nodes*."""
    c = tables.challenge_claims
    connection.execute(sa.delete(c).where(c.c.bootstrap == own, c.c.node.in_(list(nodes))))


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
