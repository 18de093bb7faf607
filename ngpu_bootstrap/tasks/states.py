"""The states of a task, one line of meaning each (wire numbers of the NGPU API, field ``state``).

Owned here: the numbers and which are final. Numbers are on the wire and in every database: never renumber. What leads
where, a task having at most one attempt under way:

    ============  ====================================================================  ==================
    state         what happens                                                          new state
    ============  ====================================================================  ==================
    ACCEPTED      an attempt is committed; its order leaves after that                  DISPATCHED
    DISPATCHED    the node says that it runs (asked for what lasts; a hint for people)  RUNNING
    ACCEPTED      no node takes it and it may not wait longer                           FAILED
    DISPATCHED +  the answer is whole and its receipt stands                            FINISHED
    DISPATCHED +  the attempt ended otherwise, and ``retry`` allows another             ACCEPTED or DISPATCHED
    DISPATCHED +  it did, and ``retry`` does not                                        FAILED
    unfinished    the client cancels it, or leaves and the task is attached             CANCELLED
    unfinished    its deadline is past                                                  EXPIRED
    ============  ====================================================================  ==================

(DISPATCHED + means DISPATCHED or RUNNING.) A final state never changes, which the store holds: of two ends the first
one counts. What a restart makes of an unfinished task is ``recovery``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class TaskState(IntEnum):
    """Where a task stands; below 3 it is unfinished, from 3 on it is final and never changes again."""

    ACCEPTED = 0
    DISPATCHED = 1
    RUNNING = 2
    FINISHED = 3
    FAILED = 4
    CANCELLED = 5
    EXPIRED = 6

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen to the task (late receipts still are filed)."""
        return self >= TaskState.FINISHED

    @property
    def meaning(self) -> str:
        """One line for people: documentation, dashboards, command output."""
        return _MEANINGS[self]


_MEANINGS: Final = {
    TaskState.ACCEPTED: "committed to the store; no order is out",
    TaskState.DISPATCHED: "an order is signed and may have reached a node; the node has not been heard on it",
    TaskState.RUNNING: "the node admitted the order and the workspace may be acting on it",
    TaskState.FINISHED: "the workspace answered; the answer is stored, its status is the result",
    TaskState.FAILED: "no answer, and the retry rule allows no further attempt; the reason says why",
    TaskState.CANCELLED: "the client withdrew it before there was an answer",
    TaskState.EXPIRED: "its deadline passed before there was an answer",
}
