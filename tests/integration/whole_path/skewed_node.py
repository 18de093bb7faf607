"""A node whose wall clock is ten minutes off; its monotonic clock, as on any machine, is not.

The rig's first node is fast, its second one slow.
"""

from __future__ import annotations

import sys
import time

OFF_S = 600

_off_s = -OFF_S if any("node1" in word for word in sys.argv) else OFF_S
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + _off_s
time.time_ns = lambda: _time_ns() + _off_s * 1_000_000_000

from ngpu_node.cli import app  # noqa: E402 - what it imports must find the clock changed

if __name__ == "__main__":
    app()
