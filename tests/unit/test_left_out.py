"""The account of a test run: what a machine cannot run is counted with its reason, and fails where all is required."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
LEFT_OUT = 10  # the conftest's; `scripts/test` runs nothing again after it
TESTS = """\
import pytest

def test_runs(): pass

@pytest.mark.needs_node
def test_wants_node(): raise AssertionError

@pytest.mark.needs_node
def test_wants_node_too(): raise AssertionError

@pytest.mark.needs_gpu
@pytest.mark.skipif(True, reason="no card to look at")
def test_wants_a_card(): raise AssertionError

@pytest.mark.xfail
def test_is_known_to_fail(): raise AssertionError
"""


def run(folder: Path, *arguments: str, require_all: str) -> tuple[int, str]:
    """Run `TESTS` with the suite's conftest on a machine without Node.js; return the exit code and what was said."""
    shutil.copy(CONFTEST, folder / "conftest.py")
    (folder / "test_some.py").write_text(TESTS)
    environment = {**os.environ, "NGPU_REQUIRE_ALL": require_all, "NGPU_TEST_NODE": "/nowhere/node"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider",
         "-p", "no:schemathesis", "-W", "ignore", *arguments, str(folder)],
        capture_output=True, text=True, env=environment, cwd=folder, timeout=100, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    code, said = run(tmp_path, require_all="")
    assert code == pytest.ExitCode.OK, said
    assert "2 tests: /nowhere/node does not run" in said
    assert "1 test: no card to look at" in said
    assert "1 passed, 3 skipped, 1 xfailed" in said
    assert "must run" not in said


def test_where_all_is_required_a_skip_fails_the_run_and_a_missing_card_does_not(tmp_path: Path) -> None:
    code, said = run(tmp_path, require_all="1")
    assert code == LEFT_OUT, said
    assert "NGPU_REQUIRE_ALL is set: these 2 must run" in said
    code, said = run(tmp_path, "-k", "not node", require_all="1")
    assert code == pytest.ExitCode.OK, said
