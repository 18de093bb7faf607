"""How much one of many may take of a bounded number of places that all of them use.

A fixed share lies idle while few are there, and none leaves room to those who come later. So each may take as many as
it leaves: half of the places when it is alone, a third each when there are two, and so on, and one who has none always
finds one (Choudhury and Hahne, *Dynamic queue length thresholds for shared-memory packet switches*, 1998, with a factor
of one).
"""

from __future__ import annotations


def may_take(limit: int, taken: int, own: int) -> bool:
    """Return whether one that has *own* of the *taken* places may have one more of *limit*."""
    return own < limit - taken
