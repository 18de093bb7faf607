"""The garbage collector's settings once a daemon is up."""

from __future__ import annotations

import gc

# A request makes some hundred objects that die with it by themselves; looking for cycles among the living after every
# second request would find next to none.
THRESHOLD = 20_000


def settle() -> None:
    """Leave what is here now out of every collection, since it stays, and look at what comes less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(THRESHOLD, 20, 20)
