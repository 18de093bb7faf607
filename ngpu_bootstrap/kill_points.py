"""Named points at which a test lets this process die, as `kill -9` or a power cut would end it there.

Armed by the environment of the process alone (`NGPU_TEST_KILL_POINT=name` or `name:3` for the third passage), read once
at import: nothing that arrives over a network can arm or reach it otherwise. Unarmed, a passage costs one call.
"""

from __future__ import annotations

import os
import signal
from typing import Final

ENVIRONMENT: Final = "NGPU_TEST_KILL_POINT"

# every point there is, in the order in which a task meets them
POINTS: Final = (
    "accept.before_commit",  # the client's call is read, nothing is stored
    "commit.inside",  # a transaction is written and not committed
    "commit.after",  # COMMIT returned, nobody was told
    "accept.after_commit",  # the task is stored, its client was not answered
    "begin.before_commit",  # an order is signed, its attempt is not stored
    "begin.after_commit",  # the attempt is stored, its order did not leave
    "order.answering",  # the node's answer has begun
    "order.answered",  # the answer is here, nothing of it is stored
    "finish.before_commit",  # the receipt is judged, the end is not stored
    "finish.after_commit",  # the end is stored, the node has no acknowledgement
    "collect.answered",  # the answer of a detached attempt was fetched after a restart, nothing of it is stored
    "recover.decided",  # a restart has decided about a task and done nothing about it
    "cancel.after_commit",  # the wish to cancel is stored, nobody was told
)


def _armed() -> tuple[str, int]:
    name, _, passage = os.environ.get(ENVIRONMENT, "").partition(":")
    return name, int(passage or 1)


_name, _left = _armed()


def reached(name: str) -> None:
    """Die here if this point was armed and is passed for the last time."""
    if name != _name:
        return
    global _left
    _left -= 1
    if _left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
