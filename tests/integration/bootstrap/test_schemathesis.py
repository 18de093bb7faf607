"""Whatever the OpenAPI document allows, and much that it does not, is answered without a 5xx and in the right shape."""

from __future__ import annotations

import functools
import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from ngpu_bootstrap.credentials import reveal
from ngpu_bootstrap.operator_keys import OperatorKeys
from tests.integration.bootstrap.rig import running, settings_for, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, echo, new_account
from tests.integration.bootstrap.test_brc20 import indexing

ROOT = Path(__file__).parents[3]
EXAMPLES = 3


async def workspace(asked: Asked) -> None:
    """What the calls of the shipped profiles need of a workspace: jobs that are done at once; else an echo."""
    path = asked.signed.order.target.partition("?")[0]
    document: Any = None
    if path == "/api/generate":
        document = {"job_id": "1"}
    elif path == "/api/status":
        document = [{"status": "succeeded", "result": "/1.png"}]
    elif path.startswith("/api/v1b/"):
        task_id = secrets.token_hex(8)
        info = {"task_id": task_id, "task_status": "done"}
        document = {"code": 0, "info": info, "msg": "", "task_id": task_id, "state": "done"}
    if document is None:
        await echo(asked)
        return
    await asked.read()
    await asked.answer(200, json.dumps(document).encode(), [(b"content-type", b"application/json")])


@pytest.mark.timeout_s(300)  # about twenty seconds on a machine that has nothing else to do
@pytest.mark.parametrize("caller", ["workspace", "operator"])
def test_no_call_of_the_document_is_answered_with_5xx(tmp_path: Path, caller: str) -> None:
    async def main() -> subprocess.CompletedProcess[bytes]:
        node = ScriptedNode(new_account(), script=workspace)
        async with running(settings_for(tmp_path / "bootstrap")) as first:
            known = (first.workspace, first.token)
        async with indexing() as (_, url):
            settings = settings_for(
                tmp_path / "bootstrap",
                brc20={"indexer": "hiro", "url": url, "checks_per_minute": 100_000},
                limits={"queue_wait_s": 0.5},
                profiles={
                    "bind": {"akashgen": known[0]},
                    "settings": {"akashgen": {"polling_interval_s": 0.05}},
                    "public": {"akashgen": {"workspace": known[0], "calls_per_minute": 100_000}},
                },
            )
            async with running(settings, known=known) as bootstrap, connected(node, bootstrap.multiaddr):
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
                with trio.fail_after(250):
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
