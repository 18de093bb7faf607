"""When a failed fetch is tried again. Pure."""

from __future__ import annotations

from ngpu_node.images.problems import CorruptLayer, DiskFull, ImageProblem, OutOfSpace, Stalled, TotalReached

WAITS_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0)
MAX_TRIES = 8

#: Damage that comes a second time is at the registry; a disk does not empty itself while somebody waits; and Docker
#: keeps a connection on which nothing comes until the other side ends it: each try at such a one costs it a socket.
_TRIES: dict[type[ImageProblem], int] = {CorruptLayer: 2, Stalled: 3, DiskFull: 1, OutOfSpace: 1, TotalReached: 1}


def wait_before_retry(problem: ImageProblem, tries: int, left_s: float) -> float | None:
    """Return how long to wait after *tries* that ended in *problem*; None when it is not worth another.

    Args:
        left_s: what is left of the time the whole may take.
    """
    if not problem.retry or tries >= _TRIES.get(type(problem), MAX_TRIES):
        return None
    wait_s = WAITS_S[min(tries, len(WAITS_S)) - 1]
    if problem.after_s is not None:
        wait_s = max(wait_s, problem.after_s)
    return wait_s if wait_s < left_s else None
