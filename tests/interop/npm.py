"""Node.js for the interop tests: the binary, and a folder's locked packages.

A folder under `tests/interop/` holds `package.json`, `package-lock.json` and the programs. Its `node_modules`, which
git ignores, is installed by `npm ci` whenever the lock is newer: by `scripts/test` before the tests, which may run
without a network, or here when a test is run by hand.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

INSTALL_TIMEOUT_S = 300


def node_binary() -> str:
    """Return the Node.js binary that the marker `needs_node` found."""
    binary = os.environ.get("NGPU_TEST_NODE") or shutil.which("node")
    assert binary is not None, "mark the test with needs_node"
    return binary


def install(folder: Path) -> None:
    """Install *folder*'s locked packages unless that is done; skip the test where it cannot be."""
    installed = folder / "node_modules" / ".package-lock.json"  # npm writes it last; `scripts/test` looks at it too
    if installed.is_file() and installed.stat().st_mtime > (folder / "package-lock.json").stat().st_mtime:
        return
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm to install the packages with")
    # npm runs under the first node on PATH
    path = os.pathsep.join([str(Path(node_binary()).resolve().parent), os.environ.get("PATH", "")])
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
        check=False,
    )
    if result.returncode != 0:
        pytest.skip(f"npm ci failed in {folder.name}: {result.stderr.strip().splitlines()[-1:]}")


def run(folder: Path, program: str, stdin: str, *, timeout_s: float = 60) -> str:
    """Return what *program* of *folder* printed, having read *stdin*."""
    result = subprocess.run(
        [node_binary(), program],
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
