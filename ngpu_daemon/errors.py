"""The mistakes an operator can mend: each is one clear line on stderr and exit code 1.

Owns the root class and nothing else; each module derives its own, with the fields a caller may want. A message says
what happened, to what, and what to do next. Anything that is not an `OperatorError` is our bug or the machine's
trouble, and keeps its traceback (see `entry`).
"""

from __future__ import annotations


class OperatorError(Exception):
    """The operator must act before this daemon can run: configuration, keys, files, ports, permissions."""
