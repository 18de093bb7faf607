"""Containers and GPUs: the whole way from a wish to what the container is given, on an engine with the fake hook.

The engine takes requests for GPUs because `.ci/engine` put a program of the toolkit's name on its path; the container's
`nvidia-smi` is the workspace image's own and lists what it was given.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import docker
import pytest
import trio

from ngpu_node.engine import confinement
from ngpu_node.engine import containers as containers_module
from ngpu_node.engine.confinement import ContainerPlan
from ngpu_node.gpus.choice import UsableGpu
from ngpu_node.state import open_state
from ngpu_protocol.control import DeploymentPhase
from ngpu_protocol.identity import Account
from tests.integration.node.own_engine import own_engine
from tests.integration.node.places import Place, a_place, forget_all, get, spec
from tests.integration.node.rig import eventually

pytestmark = [pytest.mark.needs_docker, pytest.mark.needs_gcc]


def gpu(number: int, model: str = "NVIDIA GeForce RTX 4090", gib: int = 24) -> UsableGpu:
    return UsableGpu(f"GPU-0000000{number}-aaaa-bbbb-cccc-dddddddddddd", bytes([number]) * 32, model, gib << 30)


ONE, TWO, LARGE = gpu(1), gpu(2), gpu(3, "NVIDIA H100 80GB HBM3", 80)


@pytest.fixture(autouse=True)
def hook() -> None:
    """These tests want an engine with the hook."""
    own_engine()


async def given(place: Place, workspace: str = "7") -> list[str]:
    """Return the UUIDs the workspace's container was given, as the engine told it."""
    client = docker.from_env()
    try:
        names = [s.id for s in await place.engine.containers() if f"-{workspace}-" in s.name]
        (container,) = [client.containers.get(name) for name in names]
        exit_code, output = container.exec_run(["nvidia-smi", "-L"], user="65534:65534")
        assert exit_code == 0, output
        return [line.partition("UUID: ")[2].rstrip(")") for line in output.decode().splitlines()]
    finally:
        client.close()


async def until_all(place: Place, phase: DeploymentPhase) -> None:
    await eventually(lambda: all(d.phase is phase for d in place.deployments))


def test_each_gets_devices_of_its_own_by_uuid_and_who_comes_too_late_waits(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account, gpus=[ONE, TWO, LARGE]) as place:
            first = spec(image, gpu_count=2, gpu_types=["RTX4090"])
            second = spec(image, id="8", gpu_count=1, min_gpu_memory_bytes=40 << 30)
            third = spec(image, id="9", gpu_count=1)
            place.wish(first, second)
            await until_all(place, DeploymentPhase.READY)
            assert await given(place, "7") == [ONE.uuid, TWO.uuid]
            assert await given(place, "8") == [LARGE.uuid]
            assert next(d for d in place.deployments if d.spec.id == "7").gpus == (ONE.id, TWO.id)
            place.wish(first, second, third)
            (late,) = place.deployments.revisions("acme", "9").values()
            await eventually(lambda: late.reason == "no_room")
            assert late.phase is DeploymentPhase.QUEUED
            assert late.detail == "needs 1 free GPU; free on this node: none"
            place.wish(second, third)
            await eventually(lambda: late.is_ready)
            assert await given(place, "9") == [ONE.uuid]

    trio.run(main)


def test_an_owner_may_lend_one_device_to_several(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account, gpus=[ONE], shares_per_gpu=2) as place:
            place.wish(*[spec(image, id=number, gpu_count=1) for number in ("7", "8", "9")])
            await eventually(lambda: sum(d.is_ready for d in place.deployments) == 2)
            await eventually(lambda: sum(d.reason == "no_room" for d in place.deployments) == 1)
            held = [d for d in place.deployments if d.is_ready]
            assert [await given(place, d.spec.id) for d in held] == [[ONE.uuid], [ONE.uuid]]

    trio.run(main)


def test_after_a_crash_a_container_keeps_its_devices_and_nobody_else_gets_them(
    tmp_path: Path, account: Account, image: str
) -> None:
    async def main() -> None:
        path = tmp_path / "workspaces.db"
        async with open_state(path) as state, a_place(account, gpus=[ONE, TWO], state=state) as place:
            place.wish(spec(image, gpu_count=1))
            await until_all(place, DeploymentPhase.READY)
            (before,) = await place.engine.containers()
            forget_all(place)
        async with open_state(path) as state:
            assert [grant.gpus for grant in (await state.holdings()).values()] == [(ONE.uuid,)]
            # without a bootstrap's word, and with the devices in another order
            async with a_place(account, gpus=[TWO, ONE], state=state) as place:
                await until_all(place, DeploymentPhase.READY)
                (after,) = await place.engine.containers()
                assert after.id == before.id
                place.wish(spec(image, gpu_count=1), spec(image, id="8", gpu_count=1))
                await until_all(place, DeploymentPhase.READY)
                assert (await given(place, "7"), await given(place, "8")) == ([ONE.uuid], [TWO.uuid])
                place.wish()
                await eventually(lambda: not list(place.deployments))
            assert await state.holdings() == {}

    trio.run(main)


def test_a_sick_device_is_left_for_a_well_one_and_without_one_the_reason_is_said(account: Account, image: str) -> None:
    sick: dict[str, str] = {}

    async def main() -> None:
        async with a_place(account, gpus=[ONE, TWO], sick=sick) as place:
            place.wish(spec(image, gpu_count=1))
            deployment = await place.until(DeploymentPhase.READY)
            assert await given(place) == [ONE.uuid]
            sick[ONE.uuid] = "Xid 79: it fell off the bus"
            place.containers.gpus_changed()
            await eventually(lambda: deployment.gpus == (TWO.id,))
            await place.until(DeploymentPhase.READY)
            assert await given(place) == [TWO.uuid]
            sick[TWO.uuid] = "Xid 79: it fell off the bus"
            place.containers.gpus_changed()
            await place.until(DeploymentPhase.FAILED)
            assert deployment.detail == "needs 1 free GPU; free on this node: none"
            assert await place.engine.containers() == []
            del sick[ONE.uuid]
            place.containers.gpus_changed()
            await place.until(DeploymentPhase.READY)

    trio.run(main)


def test_a_container_that_does_not_see_its_devices_is_not_ready(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account, gpus=[ONE]) as place:
            place.wish(spec(image, gpu_count=1, env={"NO_GPUS": "1"}))
            failed = await place.until(DeploymentPhase.FAILED)
            assert failed.detail.startswith("the container did not get its GPUs: ")
            assert "Failed to initialize NVML" in failed.detail
            assert await place.engine.containers() == []
            assert place.containers.held() == []

    trio.run(main)


def test_a_container_that_loses_its_devices_later_starts_again(
    account: Account, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers_module, "GPU_LOOK_INTERVAL_S", 0.3)

    async def main() -> None:
        async with a_place(account, gpus=[ONE]) as place:
            place.wish(spec(image, gpu_count=1))
            deployment = await place.until(DeploymentPhase.READY)
            (before,) = await place.engine.containers()
            assert await get(deployment, "/write?/tmp/no-gpus") == b"written"
            await eventually(lambda: deployment.reason == "gpu_sick")
            assert "was `systemctl daemon-reload` run?" in deployment.detail
            await place.until(DeploymentPhase.READY)
            (after,) = await place.engine.containers()
            assert after.id != before.id

    trio.run(main)


def test_an_image_without_nvidia_smi_is_looked_at_from_outside(
    account: Account, bare_image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine told the container's first process is in its environment: root may read that."""
    if os.geteuid() != 0:
        pytest.skip("another user's environment is shown to root alone")

    async def main() -> None:
        async with a_place(account, gpus=[ONE]) as place:
            place.wish(spec(bare_image, gpu_count=1))
            await place.until(DeploymentPhase.READY)
            place.wish()
            await eventually(lambda: not list(place.deployments))
            # an engine that takes the request and gives nothing, as Podman 4.3 does
            asked = confinement.options

            def ignored(plan: ContainerPlan) -> dict[str, Any]:
                return {name: value for name, value in asked(plan).items() if name != "device_requests"}

            monkeypatch.setattr("ngpu_node.engine.docker_engine.options", ignored)
            place.wish(spec(bare_image, gpu_count=1))
            failed = await place.until(DeploymentPhase.FAILED)
            assert failed.reason == "gpus_not_given"
            assert f"the engine did not tell the container of {ONE.uuid}" in failed.detail
            assert await place.engine.containers() == []
            assert place.containers.held() == []

    trio.run(main)


def processes(container_id: str) -> int:
    """Return how many `nvidia-smi` there are in a container."""
    client = docker.from_env()
    try:
        found = client.containers.get(container_id).top()["Processes"]
        return sum("nvidia-smi" in " ".join(words) for words in found)
    finally:
        client.close()


def test_a_program_that_hangs_in_the_container_holds_up_nothing_and_is_never_two(
    account: Account, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers_module, "GPU_LOOK_INTERVAL_S", 0.1)
    monkeypatch.setattr(containers_module, "GPU_LOOK_TIMEOUT_S", 0.3)

    async def main() -> None:
        async with a_place(account, gpus=[ONE]) as place:
            programs = place.engine._programs
            assert programs is not None
            if os.geteuid() == 0:
                # on another machine, or as another user: it cannot be killed
                programs._proc = Path("/nowhere")
            place.wish(spec(image, gpu_count=1, env={"SMI_HANGS": "1"}))
            deployment = await place.until(DeploymentPhase.READY)
            (state,) = await place.engine.containers()
            for _ in range(4):
                looked = next(run for run in place.containers._runs.values()).looked_at_gpus_s
                run = place.containers._runs[deployment]
                await eventually(lambda run=run, looked=looked: run.looked_at_gpus_s > looked)  # type: ignore[misc]
            assert deployment.is_ready
            assert processes(state.id) == 1
            exit_code, words = await place.engine.execute(state.id, ["/usr/bin/nvidia-smi"], timeout_s=5)
            assert (exit_code, words) == (-1, "an earlier program hangs in the container")
            if os.geteuid() == 0:
                place.wish()
                await eventually(lambda: not list(place.deployments))
                programs._proc = Path("/proc")
                place.wish(spec(image, gpu_count=1, env={"SMI_HANGS": "1"}))
                await place.until(DeploymentPhase.READY)
                (state,) = await place.engine.containers()
                await eventually(lambda: state.id in programs._hanging)
                monkeypatch.setattr(containers_module, "GPU_LOOK_INTERVAL_S", 1000.0)
                await eventually(lambda: processes(state.id) == 0)
                exit_code, words = await place.engine.execute(state.id, ["/nothing"], timeout_s=5)
                assert exit_code in (-1, 126, 127)

    trio.run(main)


def test_what_a_program_says_is_taken_to_a_bound_and_its_end_is_told(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account, gpus=[ONE]) as place:
            place.wish(spec(image, gpu_count=1))
            await place.until(DeploymentPhase.READY)
            (state,) = await place.engine.containers()
            exit_code, words = await place.engine.execute(state.id, ["nvidia-smi", "-L"], timeout_s=5)
            assert (exit_code, words) == (0, f"GPU 0: NVIDIA Fake (UUID: {ONE.uuid})\n")
            assert (await place.engine.execute(state.id, ["/nothing"], timeout_s=5))[0] in (126, 127)
            assert (await place.engine.execute("0" * 64, ["nvidia-smi"], timeout_s=5))[0] == -1
            await place.engine.remove(state.id)
            assert (await place.engine.execute(state.id, ["nvidia-smi"], timeout_s=5))[0] == -1

    trio.run(main)


@pytest.mark.timeout_s(180)
def test_without_the_toolkit_it_fails_with_the_fix_in_its_reason(account: Account, image: str) -> None:
    engine = own_engine()
    aside = engine.hook.with_suffix(".aside")
    engine.hook.rename(aside)
    try:
        engine.kill()
        engine.start()

        async def main() -> None:
            async with a_place(account, gpus=[ONE]) as place:
                assert place.containers.machine().gives_gpus
                place.wish(spec(image, gpu_count=1))
                failed = await place.until(DeploymentPhase.FAILED)
                assert "install nvidia-container-toolkit" in failed.detail
                assert "nvidia-ctk runtime configure" in failed.detail
                assert await place.engine.containers() == []
                assert place.containers.held() == []
                assert not place.containers.machine().gives_gpus
                (finding,) = [f for f in place.containers.findings() if f.subject == "GPUs in containers"]
                assert "nvidia-ctk runtime configure" in finding.advice
                # its owner does as he was told
                aside.rename(engine.hook)
                await trio.to_thread.run_sync(engine.kill)
                await trio.to_thread.run_sync(engine.start)
                await place.until(DeploymentPhase.READY)
                assert await given(place) == [ONE.uuid]

        trio.run(main)
    finally:
        if aside.exists():
            aside.rename(engine.hook)
        engine.ensure()


def test_docker_lists_no_runtime_of_nvidias_where_only_the_hook_is(account: Account) -> None:
    """Why the list of runtimes alone decides nothing: this engine gives GPUs, and does not list one."""
    client = docker.from_env()
    try:
        assert "nvidia" not in json.dumps(list(client.info()["Runtimes"]))
    finally:
        client.close()
