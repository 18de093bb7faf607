"""Accounts, sessions, products, images, groups and workspaces of the NGPU cloud as stored. Blocking.

Reads run in the store's reading threads, writes as chores of their own. Documents are JSON objects, kept as clients
sent them. A user sees their own rows only: every select here names one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.database import insert_or_ignore

MAX_STRANGERS = 1000
COUNTED_VERDICTS = ("verified", "skew")


@dataclass(frozen=True, slots=True)
class User:
    """An account. *password* is argon2id text."""

    id: int
    email: str
    password: str
    created_at_ms: int


@dataclass(frozen=True, slots=True)
class Owned:
    """A user's image, group or workspace: its id (a workspace's is text), and its document."""

    id: Any
    document: Mapping[str, Any]
    created_at_ms: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a node's good receipts come to."""

    node: str
    tasks: int
    gpu_ms: int


@dataclass(frozen=True, slots=True)
class Binding:
    """Whom a node's work pays, by its own signature."""

    node: str
    wallet: str
    org_name: str
    sequence: int
    signature: bytes
    bound_at_ms: int


def user_by_email(connection: sa.Connection, email: str) -> User | None:
    """Return an account."""
    u = tables.cloud_users
    row = connection.execute(sa.select(u).where(u.c.email == email.casefold())).one_or_none()
    return User(*row) if row is not None else None


def users(connection: sa.Connection) -> list[User]:
    """Return every account, oldest first."""
    u = tables.cloud_users
    return [User(*row) for row in connection.execute(sa.select(u).order_by(u.c.id))]


def add_user(connection: sa.Connection, email: str, password: str, at_ms: int) -> bool:
    """Make an account; False when there is one of this address."""
    if user_by_email(connection, email) is not None:
        return False
    u = tables.cloud_users
    connection.execute(sa.insert(u).values(email=email.casefold(), password=password, created_at_ms=at_ms))
    return True


def remove_user(connection: sa.Connection, email: str) -> bool:
    """Remove an account with its images, groups and sessions; False when there is none. Its workspaces stay."""
    u = tables.cloud_users
    return connection.execute(sa.delete(u).where(u.c.email == email.casefold())).rowcount > 0


def begin_session(connection: sa.Connection, hash: bytes, user: int, now_ms: int, expires_at_ms: int) -> None:
    """Write a session; those that have ended go."""
    s = tables.cloud_sessions
    connection.execute(sa.delete(s).where(s.c.expires_at_ms <= now_ms))
    connection.execute(sa.insert(s).values(hash=hash, user=user, expires_at_ms=expires_at_ms))


def session_user(connection: sa.Connection, hash: bytes, now_ms: int) -> User | None:
    """Return whose session it is, None when it is none or has ended."""
    s, u = tables.cloud_sessions, tables.cloud_users
    query = sa.select(u).select_from(s.join(u, u.c.id == s.c.user))
    row = connection.execute(query.where(s.c.hash == hash, s.c.expires_at_ms > now_ms)).one_or_none()
    return User(*row) if row is not None else None


def products(connection: sa.Connection) -> list[tuple[int, dict[str, Any]]]:
    """Return every product, oldest first."""
    p = tables.cloud_products
    return [(row.id, json.loads(row.document)) for row in connection.execute(sa.select(p).order_by(p.c.id))]


def add_product(connection: sa.Connection, document: Mapping[str, Any]) -> int:
    """Make a product; return its id."""
    return _new_id(connection, sa.insert(tables.cloud_products).values(document=json.dumps(dict(document))))


def remove_product(connection: sa.Connection, product: int) -> bool:
    """Remove a product; False when there is none. Workspaces made of it stay."""
    p = tables.cloud_products
    return connection.execute(sa.delete(p).where(p.c.id == product)).rowcount > 0


def images(connection: sa.Connection, user: int) -> list[Owned]:
    """Return a user's images, oldest first."""
    i = tables.cloud_images
    rows = connection.execute(sa.select(i).where(i.c.user == user).order_by(i.c.id))
    return [Owned(row.id, json.loads(row.document), row.created_at_ms) for row in rows]


def add_image(connection: sa.Connection, user: int, document: Mapping[str, Any], at_ms: int) -> int:
    """Make an image; return its id."""
    values = {"user": user, "document": json.dumps(dict(document)), "created_at_ms": at_ms}
    return _new_id(connection, sa.insert(tables.cloud_images).values(values))


def groups(connection: sa.Connection, user: int) -> list[Owned]:
    """Return a user's groups, oldest first."""
    g = tables.cloud_groups
    rows = connection.execute(sa.select(g).where(g.c.user == user).order_by(g.c.id))
    return [Owned(row.id, {"workspace_group_name": row.name}, row.created_at_ms) for row in rows]


def add_group(connection: sa.Connection, user: int, name: str, at_ms: int) -> int:
    """Make a group; return its id."""
    values = {"user": user, "name": name, "created_at_ms": at_ms}
    return _new_id(connection, sa.insert(tables.cloud_groups).values(values))


def workspaces(connection: sa.Connection, user: int | None = None) -> list[Owned]:
    """Return a user's workspaces, oldest first; everybody's when *user* is None."""
    w = tables.cloud_workspaces
    query = sa.select(w).order_by(w.c.created_at_ms, w.c.workspace)
    if user is not None:
        query = query.where(w.c.user == user)
    return [Owned(row.workspace, json.loads(row.document), row.created_at_ms) for row in connection.execute(query)]


def published(connection: sa.Connection, workspace: str) -> dict[str, int]:
    """Return the ports a workspace's `docker run` line published, with its own port for each; empty for any other."""
    w = tables.cloud_workspaces
    text = connection.execute(sa.select(w.c.document).where(w.c.workspace == workspace)).scalar()
    found: dict[str, int] = json.loads(text).get("published", {}) if text is not None else {}
    return found


def add_workspace(
    connection: sa.Connection, user: int, workspace: str, document: Mapping[str, Any], at_ms: int
) -> None:
    """Write whose a workspace is."""
    values = {"workspace": workspace, "user": user, "document": json.dumps(dict(document)), "created_at_ms": at_ms}
    connection.execute(sa.insert(tables.cloud_workspaces).values(values))


def forget_workspace(connection: sa.Connection, workspace: str) -> None:
    """Forget whose a workspace was."""
    w = tables.cloud_workspaces
    connection.execute(sa.delete(w).where(w.c.workspace == workspace))


def work_done(connection: sa.Connection, nodes: list[str] | None = None) -> list[Work]:
    """Return what the good receipts of each node come to: busy GPU time where it was metered, else reserved."""
    r = tables.receipts
    gpu_ms = sa.case((r.c.meter == "none", r.c.reserved_gpu_ms), else_=r.c.busy_gpu_ms)
    query = (
        sa.select(r.c.node, sa.func.count(sa.distinct(r.c.task_id)), sa.func.coalesce(sa.func.sum(gpu_ms), 0))
        .where(r.c.verdict.in_(COUNTED_VERDICTS))
        .group_by(r.c.node)
        .order_by(r.c.node)
    )
    if nodes is not None:
        query = query.where(r.c.node.in_(nodes))
    return [Work(row[0], int(row[1]), int(row[2])) for row in connection.execute(query)]


def bindings(connection: sa.Connection, nodes: Collection[str] | None = None) -> dict[str, Binding]:
    """Return the bindings of *nodes*, by node; those of every node that was ever here where None."""
    b = tables.node_bindings
    query = sa.select(b).where(_was_here(b)) if nodes is None else sa.select(b).where(b.c.node.in_(list(nodes)))
    return {row.node: Binding(*row) for row in connection.execute(query)}


def _was_here(b: sa.Table) -> sa.ColumnElement[bool]:
    return sa.exists(sa.select(tables.nodes.c.address).where(tables.nodes.c.address == b.c.node))


def bind(connection: sa.Connection, binding: Binding) -> bool:
    """Write a binding unless a newer one is there; return whether it is the one that holds now.

    A node may be bound before it first comes, and anybody can make keys: of nodes that never came the newest
    `MAX_STRANGERS` bindings are kept.
    """
    b = tables.node_bindings
    known = connection.execute(sa.select(b).where(b.c.node == binding.node)).one_or_none()
    if known is not None and known.sequence >= binding.sequence:
        same = (known.wallet, known.org_name, known.sequence) == (binding.wallet, binding.org_name, binding.sequence)
        return bool(same)
    values = {name: getattr(binding, name) for name in (column.name for column in b.columns)}
    if known is not None:
        connection.execute(sa.update(b).where(b.c.node == binding.node).values(values))
    else:
        connection.execute(insert_or_ignore(connection.dialect.name, b, values), values)
        strangers = sa.select(b.c.node).where(~_was_here(b), b.c.node != binding.node)
        oldest = strangers.order_by(b.c.bound_at_ms.desc(), b.c.node).offset(MAX_STRANGERS - 1)
        gone = list(connection.execute(oldest).scalars())
        if gone:
            connection.execute(sa.delete(b).where(b.c.node.in_(gone)))
    return True


def _new_id(connection: sa.Connection, statement: sa.Insert) -> int:
    key = connection.execute(statement).inserted_primary_key
    assert key is not None
    return int(key[0])
