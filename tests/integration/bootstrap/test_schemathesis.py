"""Whatever the OpenAPI document allows, and much that it does not, is answered without a 5xx and in the right shape."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from ngpu_bootstrap.credentials import reveal
from ngpu_bootstrap.operator_keys import OperatorKeys
from tests.integration.bootstrap.rig import running, settings_for, wait_ready
from tests.integration.bootstrap.scripted_node import ScriptedNode, connected, new_account
from tests.integration.bootstrap.test_brc20 import indexing

ROOT = Path(__file__).parents[3]
EXAMPLES = 3


@pytest.mark.parametrize("caller", ["workspace", "operator"])
def test_no_call_of_the_document_is_answered_with_5xx(tmp_path: Path, caller: str) -> None:
    async def main() -> subprocess.CompletedProcess[bytes]:
        node = ScriptedNode(new_account())
        async with indexing() as (_, url):
            settings = settings_for(
                tmp_path / "bootstrap",
                brc20={"indexer": "hiro", "url": url, "checks_per_minute": 100_000},
                limits={"queue_wait_s": 0.5},
            )
            async with running(settings) as bootstrap, connected(node, bootstrap.multiaddr):
                await wait_ready(bootstrap)
                credential = bootstrap.token
                if caller == "operator":
                    credential = reveal(OperatorKeys(bootstrap.data_dir).add("fuzz"))
                arguments = [
                    "run",
                    f"http://127.0.0.1:{bootstrap.port}/openapi.json",
                    "--header",
                    f"Authorization: Bearer {credential}",
                    "--checks",
                    "not_a_server_error,response_schema_conformance,refusals_say_what_is_wrong",
                    "--phases",
                    "examples,coverage,fuzzing",
                    "--max-examples",
                    str(EXAMPLES),
                    "--seed",
                    "20260501",
                    "--request-timeout",
                    "10",
                    "--workers",
                    "1",
                    "--suppress-health-check",
                    "all",
                    "--exclude-path-regex",
                    "/events$",  # these answers have no end; their own tests read them
                    "--no-color",
                ]
                environment = os.environ | {
                    "SCHEMATHESIS_HOOKS": "tests.support.schemathesis_checks",
                    "PYTHONPATH": str(ROOT),
                }
                command = [sys.executable, "-m", "schemathesis.cli", *arguments]
                with trio.fail_after(150):
                    return await trio.run_process(
                        command,
                        capture_stdout=True,
                        stderr=subprocess.STDOUT,
                        check=False,
                        cwd=tmp_path,
                        env=environment,
                    )

    found = trio.run(functools.partial(main))
    assert found.returncode == 0, found.stdout.decode()[:5000]
