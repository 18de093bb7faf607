"""What waits to be run again, and how it is kept over a restart.

A task whose request the store has anyway (asynchronous and wrapped ones) is kept as its id with what is to be compared.
What went through a bootstrap unchanged is not its to keep in the clear: its request is sealed (AES-256-GCM) under a key
that follows from this bootstrap's own secret, so that a database alone shows nobody what it was, siblings neither.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Any

import msgpack  # type: ignore[import-untyped]
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ngpu_bootstrap.dispatch.calls import Call, KeptBody, WholeBody
from ngpu_bootstrap.rechecks.deciding import Answer, Peer
from ngpu_bootstrap.store.waiting_rechecks import WaitingRow
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.http1 import Headers
from ngpu_protocol.identity import Address

_NONCE_BYTES = 12


@dataclass(frozen=True, slots=True)
class Asked:
    """What a workspace was asked, as far as it is needed to ask again."""

    method: str
    target: str
    port: int
    headers: Headers
    body: WholeBody | KeptBody
    detach: bool = False


@dataclass(frozen=True, slots=True)
class Waiting:
    """A task to be run again.

    Attributes:
        workspace: its id; the revision is the peer's.
        peer: the node that ran it, as it was then.
        size: of the request, as far as it is in memory.
        kept: whether the store has it.
        taken_up: whether another run of a bootstrap drew it.
    """

    task_id: str
    workspace: str
    asked: Asked
    peer: Peer
    answer: Answer
    at_ms: int
    size: int = 0
    kept: bool = False
    taken_up: bool = False


def waiting(call: Call, body: WholeBody | KeptBody, peer: Peer, answer: Answer, at_ms: int) -> Waiting:
    """Return what is needed of *call* to run it again."""
    asked = Asked(call.method, call.target, call.port, call.headers, body, call.detach)
    size = len(body.content) if isinstance(body, WholeBody) else 0
    return Waiting(call.task_id, call.spec.id, asked, peer, answer, at_ms, size)


class Sealer:
    """Makes rows of what waits, and opens them.

    Args:
        secret: this bootstrap's own.
    """

    def __init__(self, own: Address, secret: bytes) -> None:
        self._own = own
        self._cipher = AESGCM(hmac.digest(secret, b"waiting rechecks", hashlib.sha256))

    def row_of(self, item: Waiting, *, is_recorded: bool) -> WaitingRow:
        """Return what is stored of *item*.

        Args:
            is_recorded: whether the task's own record has its request.
        """
        peer = item.peer
        return WaitingRow(
            task_id=item.task_id,
            bootstrap=self._own,
            workspace=item.workspace,
            revision=peer.revision,
            at_ms=item.at_ms,
            node=peer.node,
            ip=peer.ip,
            wallet=peer.wallet,
            models="\n".join(sorted(peer.models)),
            status=item.answer.status,
            hash=item.answer.hash,
            request=b"" if is_recorded else self._sealed(item),
        )

    def asked_of(self, row: WaitingRow) -> Asked | None:
        """Return what a sealed row's workspace was asked; None where another bootstrap sealed it."""
        nonce, box = row.request[:_NONCE_BYTES], row.request[_NONCE_BYTES:]
        try:
            opened: dict[str, Any] = msgpack.unpackb(self._cipher.decrypt(nonce, box, row.task_id.encode()))
        except (InvalidTag, ValueError):
            return None
        return Asked(
            opened["method"],
            opened["target"],
            opened["port"],
            [(name, value) for name, value in opened["headers"]],
            WholeBody(opened["body"]),
            opened["detach"],
        )

    def _sealed(self, item: Waiting) -> bytes:
        asked = item.asked
        opened = {
            "method": asked.method,
            "target": asked.target,
            "port": asked.port,
            "headers": asked.headers,
            "body": asked.body.content if isinstance(asked.body, WholeBody) else b"",
            "detach": asked.detach,
        }
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, msgpack.packb(opened), item.task_id.encode())


def restored(row: WaitingRow, asked: Asked) -> Waiting:
    """Return what waits again."""
    peer = Peer(
        node=Address(row.node),
        ip=row.ip,
        wallet=row.wallet,
        models=frozenset(row.models.split("\n")) if row.models else frozenset(),
        revision=row.revision,
    )
    size = len(asked.body.content) if isinstance(asked.body, WholeBody) else 0
    answer = Answer(row.status, row.hash)
    return Waiting(row.task_id, row.workspace, asked, peer, answer, row.at_ms, size, kept=True, taken_up=True)
