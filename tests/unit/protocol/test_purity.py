"""The modules at the top of ngpu_protocol stay pure and cheap to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ngpu_protocol

FOLDER = Path(ngpu_protocol.__file__).parent
MODULES = sorted(path for path in FOLDER.glob("*.py"))
IMPURE = {"asyncio", "os", "random", "secrets", "socket", "subprocess", "threading", "time", "trio", "uuid"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_module_has_no_clock_socket_randomness_or_async(path: Path) -> None:
    tree = ast.parse(path.read_text())
    impure = IMPURE - {"threading"} if path.stem in ("keccak", "ecdsa") else IMPURE  # their state is for each thread
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & impure
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in impure
        elif isinstance(node, ast.Attribute):
            assert node.attr not in ("now", "utcnow", "today")
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await)


def test_importing_them_all_leaves_the_interpreter_alone_and_loads_no_network_library() -> None:
    names = ", ".join(f"ngpu_protocol.{path.stem}" for path in MODULES if path.stem != "__init__")
    program = (
        f"import sys; limit = sys.getrecursionlimit(); import {names}; "
        "assert limit == sys.getrecursionlimit(); "
        "print([name for name in ('libp2p', 'eth_account', 'py_ecc', 'trio', 'h11', 'httpx') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=FOLDER.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
