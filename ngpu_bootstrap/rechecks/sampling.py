"""How often a node's tasks are run again, and which of them. Pure.

    rate = rare + (often - rare) * HALF_AT / (HALF_AT + good)            while nothing speaks against the node
    rate = max(that, disputed * min(1, bad))                             with disputes, which fade by half each day
    rate = max(that, disputed)                                           after a difference that nobody could decide
    rate = max(that, least * gap / day)                                  whatever else

*good* and *bad* are its standing's faded counts, *gap* is the time since its task before. The last line is for nodes
that have few tasks: of such a one about *least* a day are run again. What it costs to be found out is what would have
been earned until there are tasks again, and what is gained until then is one made-up answer for each `1 / rate` of
them: with a rate that did not grow as tasks become few, making up answers would pay where they are few enough.

Which tasks it is follows from a secret of this bootstrap's and the task's id, so that a node that has the order knows
no more than before, and a restart draws the same.
"""

from __future__ import annotations

import hashlib
import hmac

from ngpu_bootstrap.scheduling.standing import Standing
from ngpu_protocol.frozen import dataclass

HALF_AT = 32.0
DAY_MS = 24 * 3600 * 1000
_RESOLUTION = 1 << 56


@dataclass(frozen=True, slots=True)
class Rates:
    """Shares of a node's tasks, each from 0 to 1: of a new node, of a trusted one, of a disputed one.

    Attributes:
        least_a_day: of each node, where it has so many.
    """

    often: float
    rare: float
    disputed: float
    least_a_day: float = 0.0


def rate(standing: Standing, rates: Rates, now_ms: int, *, gap_ms: int = 0, suspected: bool = False) -> float:
    """Return which share of a node's tasks is run again.

    Args:
        gap_ms: since its task before; 0 where that is not known.
        suspected: it differed from another lately, and nobody could say who was right.
    """
    share = rates.rare + (rates.often - rates.rare) * HALF_AT / (HALF_AT + standing.good)
    share = max(share, min(1.0, rates.least_a_day * gap_ms / DAY_MS))
    if suspected:
        return max(share, rates.disputed)
    bad = standing.bad_at(now_ms)
    return max(share, rates.disputed * min(1.0, bad)) if bad else share


def is_drawn(secret: bytes, task_id: str, share: float) -> bool:
    """Return whether the task is among the *share* that is run again."""
    drawn = hmac.digest(secret, b"recheck" + task_id.encode(), hashlib.sha256)
    return int.from_bytes(drawn[:7], "big") < share * _RESOLUTION
