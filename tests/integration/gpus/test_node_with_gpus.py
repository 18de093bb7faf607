"""A node as its owner runs it, on a machine whose GPUs a file describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import trio_test

from ngpu_protocol.identity import gpu_id
from tests.integration.node.rig import eventually
from tests.integration.node.scripted_bootstrap import a_bootstrap
from tests.integration.node.test_process import a_process, command, prepared
from tests.support.fake_nvml import FakeNvml
from tests.unit.node.builders import NODE

pytestmark = [pytest.mark.needs_gcc, pytest.mark.timeout_s(60)]


def shown(config: Path) -> dict[str, Any]:
    found = command("gpus", "--config", config, "--json")
    assert found.returncode == 0, found.stderr
    answer: dict[str, Any] = json.loads(found.stdout)
    return answer


@trio_test
async def test_a_lost_gpu_is_withdrawn_while_the_node_runs(tmp_path: Path) -> None:
    machine = FakeNvml(tmp_path / "nvml", gpus=3)
    config = prepared(tmp_path)
    config.write_text(config.read_text() + '[gpus]\nwithhold = ["0000:02:00.0"]\nwithhold_memory_bytes = 1073741824\n')
    async with a_process(config, **machine.environment()):
        found = await trio.to_thread.run_sync(shown, config)
        assert found["state"] == "ok"
        assert [gpu["offered"] for gpu in found["gpus"]] == [True, True, False]
        assert found["gpus"][2]["against"] == "withheld by the owner"
        assert found["gpus"][0]["offered_bytes"] == 150_754_820_096 - (1 << 30)
        assert found["gpus"][0]["metering"]["method"] == "nvml-process"
        table = await trio.to_thread.run_sync(lambda: command("gpus", "--config", config))
        assert "NVIDIA H200" in table.stdout
        machine.set(0, error=15)
        with trio.fail_after(60):
            while (found := await trio.to_thread.run_sync(shown, config))["gpus"][0]["offered"]:  # noqa: ASYNC110
                await trio.sleep(0.2)
        assert "fallen off the bus" in found["gpus"][0]["against"]
        assert found["gpus"][1]["offered"]


@trio_test
async def test_a_node_without_a_driver_runs_and_says_so(tmp_path: Path) -> None:
    machine = FakeNvml(tmp_path / "nvml")
    machine.set_machine(init=9)
    config = prepared(tmp_path)
    async with a_process(config, **machine.environment()):
        found = await trio.to_thread.run_sync(shown, config)
        assert (found["state"], found["gpus"]) == ("driver_not_loaded", [])


SICK = {
    "fallen off the bus": {"error": 15},
    "uncorrectable memory errors": {"ecc_uncorrected": 2},
    "row": {"rows_pending": 1},
    "95": {"temperature": 95},
    "reset": {"error": 16},
}


@trio_test
async def test_whatever_is_wrong_with_a_gpu_takes_it_out_of_the_advertisement_while_the_node_runs(
    tmp_path: Path,
) -> None:
    machine = FakeNvml(tmp_path / "nvml", gpus=len(SICK) + 2)
    names = [gpu_id(NODE.address, str(gpu["uuid"])) for gpu in machine.gpus]
    async with a_bootstrap() as bootstrap:
        config = prepared(tmp_path, bootstrap.multiaddr)
        async with a_process(config, **machine.environment()):
            await eventually(lambda: bool(bootstrap.heartbeats))

            def advertised() -> set[bytes]:
                return {gpu.id for gpu in bootstrap.heartbeats[-1].gpus or ()}

            await eventually(lambda: advertised() == set(names))
            for number, readings in enumerate(SICK.values()):
                machine.set(number, **readings)
            machine.add(f"gpu{len(SICK)}.xid 1 79")
            await eventually(lambda: advertised() == {names[-1]})
            found = (await trio.to_thread.run_sync(shown, config))["gpus"]
            for word, gpu in zip((*SICK, "Xid 79"), found, strict=False):
                assert not gpu["offered"]
                assert word in gpu["against"], gpu["against"]
            assert [gpu["offered"] for gpu in found] == [False] * (len(SICK) + 1) + [True]
