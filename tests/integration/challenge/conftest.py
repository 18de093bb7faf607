"""The prover needs NumPy, which nothing else of this project does: without it these tests are not there."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("numpy") else ["test_*.py"]
