"""A daemon that looks for gaps every half second, with its wall clock set forward as far as the environment says.

Which daemon, its folder says. The hour after which a gap is a dispute is the real one: a test lets it pass by starting
both daemons again, an hour later.
"""

from __future__ import annotations

import importlib
import os
import sys
import time

_off_s = int(os.environ.get("NGPU_TEST_OFF_S", "0"))
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + _off_s
time.time_ns = lambda: _time_ns() + _off_s * 1_000_000_000

if __name__ == "__main__":
    name = "ngpu_bootstrap" if any("/bootstrap/" in word for word in sys.argv) else "ngpu_node"
    if name == "ngpu_bootstrap":
        gaps = importlib.import_module("ngpu_bootstrap.dispatch.gaps")
        gaps.GAP_CHECK_S, gaps.ANSWER_S = 0.5, 2.0  # type: ignore[attr-defined]
    importlib.import_module(f"{name}.cli").app()
