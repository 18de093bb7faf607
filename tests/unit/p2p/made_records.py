"""Node records for the tests of the DHT."""

from __future__ import annotations

from typing import Any

from ngpu_protocol.identity import Account
from ngpu_protocol.node_records import DEFAULT_LIFETIME_MS, NodeRecord, Role

MADE_AT_MS = 1_750_000_000_000


def record_of(account: Account, *, at_ms: int = MADE_AT_MS, **fields: Any) -> NodeRecord:
    """Return a record of *account*, unsigned."""
    known: dict[str, Any] = {
        "network": "local",
        "node": account.address,
        "peer_id": account.peer_id,
        "sequence": 1,
        "issued_at_ms": at_ms,
        "expires_at_ms": at_ms + DEFAULT_LIFETIME_MS,
        "roles": (Role.NODE,),
    }
    return NodeRecord(**(known | fields))
