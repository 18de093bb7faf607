"""A profile whose workspace the configuration names wrongly, and one whose workspace is gone: what the start says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from ngpu_bootstrap.daemon import StartError
from tests.integration.bootstrap.rig import running, settings_for

SPEC = {"name": "paint", "service": "demo/echo", "ports": [8080]}


def profiles(workspace: str) -> dict[str, Any]:
    return {
        "enabled": ["akashgen"],
        "bind": {"akashgen": workspace},
        "public": {"akashgen": {"workspace": workspace}},
    }


def fails_to_start(words: str) -> Any:
    return pytest.RaisesGroup(pytest.RaisesExc(StartError, match=words), flatten_subgroups=True, allow_unwrapped=True)


def test_an_id_that_never_was_one_ends_the_start_and_a_removed_workspace_only_its_calls(tmp_path: Path) -> None:
    data = tmp_path / "bootstrap"

    async def main() -> None:
        with fails_to_start("workspace add"):
            async with running(settings_for(data, profiles=profiles("1"))):
                raise AssertionError("it started")
        async with running(settings_for(data), workspace=SPEC) as bootstrap:
            workspace = bootstrap.workspace
        with fails_to_start(rf'did you mean "{workspace}" \(paint\)'):
            async with running(settings_for(data, profiles=profiles(workspace[:-1]))):
                raise AssertionError("it started")
        settings = settings_for(data, profiles=profiles(workspace))
        request = json.dumps({"prompt": "a lake", "sampler": "lcm", "scheduler": "beta"}).encode()
        for again in (False, True):  # while it runs, and after a restart
            async with running(settings, known=(workspace, "")) as bootstrap:
                if not again:
                    await bootstrap.admin("DELETE", f"/api/v1/workspaces/{workspace}")
                answer = await bootstrap.call("POST", "/api/generate", request, token=None)
                document = json.loads(answer.body)
                assert (answer.status, document["reason"]) == (503, "profile_unbound")
                assert document["error"] == "service unavailable"
                assert "akashgen" in document["details"]

    trio.run(main)
