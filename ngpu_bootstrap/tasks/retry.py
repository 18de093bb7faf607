"""The retry rule of the design, as one pure function with a reason for every answer.

An order that was refused or never sent reached no workspace: the task may go elsewhere at once. Once a byte of the
order has left, the workspace may have acted, so only calls that may be repeated run again: idempotent methods (RFC 9110
section 9.2.2), or any method under the client's ``Idempotency-Key``. Once a byte of the answer has reached the client
nothing can be repeated, since the client cannot take it back. The cap and the deadline hold in every case.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ngpu_protocol.wire_errors import Reason

# RFC 9110 section 9.2.2: safe methods, PUT and DELETE
IDEMPOTENT_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})

# Refusals for want of a slot after which the next node is asked at once; later ones wait, twice as long each time.
FULL_AT_ONCE: Final = 4
FIRST_FULL_PAUSE_S: Final = 0.05
LAST_FULL_PAUSE_S: Final = 1.0


class RetryReason(StrEnum):
    """Why a task may run again, or why it may not."""

    REFUSED = "refused"
    NOT_SENT = "not_sent"
    IDEMPOTENT = "idempotent"

    DEADLINE = "deadline"
    ATTEMPT_CAP = "attempt_cap"
    ANSWER_STARTED = "answer_started"
    UPGRADED = "upgraded"
    NOT_IDEMPOTENT = "not_idempotent"


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """Whether a further attempt is allowed. Truthy when it is."""

    allowed: bool
    reason: RetryReason

    def __bool__(self) -> bool:
        return self.allowed


def is_idempotent(method: str, idempotency_key: str | None) -> bool:
    """Return whether running the call twice has the effect of running it once, by what the client said."""
    return idempotency_key is not None or method in IDEMPOTENT_METHODS


def reached_no_workspace(refused: str, *, bytes_sent: bool) -> bool:
    """Return whether an attempt certainly left no trace in a workspace.

    A refusal comes before any byte reaches the workspace, whatever its word. The exception is ``order_replayed``: it
    says that an earlier copy of this very order was admitted.
    """
    if refused:
        return refused != Reason.ORDER_REPLAYED
    return not bytes_sent


def pause_s(full: int) -> float:
    """Return how long a task waits that *full* nodes in a row had no slot for after all.

    The first refusals are old news, and the next node is asked at once. After some, all that seems free is likely not:
    asking faster would only use up the task's attempts.
    """
    late = full - FULL_AT_ONCE
    return min(LAST_FULL_PAUSE_S, FIRST_FULL_PAUSE_S * 2.0 ** min(late - 1, 16)) if late > 0 else 0.0


def may_retry(
    method: str,
    idempotency_key: str | None,
    *,
    bytes_sent: bool,
    bytes_to_client: bool,
    refused: str = "",
    upgrade: bool = False,
    attempts: int,
    cap: int,
    deadline_at_ms: int,
    now_ms: int,
) -> RetryDecision:
    """Decide whether a task whose attempt ended without an answer may run once more.

    Pure. Looks at the last attempt only: attempts follow one another, and each earlier one passed this rule.

    Args:
        method: HTTP method, upper case.
        idempotency_key: The client's, None without one.
        bytes_sent: Whether any byte of the order may have left this host.
        bytes_to_client: Whether any byte of an answer, its status line included, has gone to the client.
        refused: The node's reason when it refused the order, else empty.
        upgrade: The call asked for another protocol (WebSocket): after it was sent it is never repeated.
        attempts: Attempts made so far, this one included.
        cap: Attempts a task may have in all.
    """
    if bytes_to_client:
        return RetryDecision(False, RetryReason.ANSWER_STARTED)
    if now_ms >= deadline_at_ms:
        return RetryDecision(False, RetryReason.DEADLINE)
    if attempts >= cap:
        return RetryDecision(False, RetryReason.ATTEMPT_CAP)
    if reached_no_workspace(refused, bytes_sent=bytes_sent):
        return RetryDecision(True, RetryReason.REFUSED if refused else RetryReason.NOT_SENT)
    if upgrade:
        return RetryDecision(False, RetryReason.UPGRADED)
    if is_idempotent(method, idempotency_key):
        return RetryDecision(True, RetryReason.IDEMPOTENT)
    return RetryDecision(False, RetryReason.NOT_IDEMPOTENT)
