"""What is wrong with a GPU while a whole node runs: what its owner sees, what bootstraps and the network are told.

The daemon, its connection to a bootstrap and NVML's library are real; the library answers from a file. Only how often
the daemon looks, and how long things may last, is cut short.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import docker
import pytest
import trio
from trio.testing import trio_test

from ngpu_node import daemon
from ngpu_node.engine import containers as containers_module
from ngpu_node.gpus import watch as watch_module
from ngpu_node.gpus.health import Phase, Policy
from ngpu_node.gpus.watch import GpuWatch, Pace
from ngpu_protocol.identity import Account, gpu_id
from ngpu_protocol.node_records import WELL
from tests.integration.node import workspace_image
from tests.integration.node.conftest import remove_all_of
from tests.integration.node.own_engine import own_engine
from tests.integration.node.places import spec
from tests.integration.node.rig import echo, eventually
from tests.integration.node.scripted_bootstrap import RunningNode, ScriptedBootstrap, a_bootstrap, a_node, settings
from tests.integration.node.test_daemon import SPEC, a_workspace
from tests.integration.node.test_process import command
from tests.support.fake_nvml import FakeNvml, load
from tests.unit.node.builders import NODE

pytestmark = [pytest.mark.needs_gcc, pytest.mark.timeout_s(110)]

PACE = Pace(survey_s=0.5, again_s=0.2, round_s=0.05)
POLICY = Policy(clean_looks=3, clean_s=0.3, throttle_s=0.3, xid_quiet_s=2.0, leftover_s=0.2)


@dataclass
class Machine:
    """A running node on a machine whose GPUs a file describes, and the bootstrap it is connected to."""

    nvml: FakeNvml
    running: RunningNode
    bootstrap: ScriptedBootstrap
    account: Account = NODE

    def uuid(self, number: int) -> str:
        return str(self.nvml.gpus[number]["uuid"])

    def state(self) -> str:
        """Return what `ngpu-node gpus` says of the machine as a whole."""
        return str(self.running.node._gpus.status()["state"])

    def name(self, number: int) -> bytes:
        return gpu_id(self.account.address, self.uuid(number))

    def advertised(self) -> set[bytes]:
        """Return what the newest heartbeat offers."""
        return {gpu.id for gpu in self.bootstrap.heartbeats[-1].gpus or ()}

    def recorded(self) -> dict[bytes, str]:
        """Return the health of each device in the record that the node gives the network now."""
        return {gpu.id: gpu.health for gpu in self.running.node._discovery.own_record().gpus}

    async def shown(self, *flags: str) -> str:
        config = self.running.data_dir.parent / "node.toml"
        config.write_text(f'data_dir = "{self.running.data_dir}"\nnetwork = "local"\n')
        found = await trio.to_thread.run_sync(lambda: command("gpus", "--config", config, *flags))
        assert found.returncode == 0, found.stderr
        return found.stdout

    def against(self, number: int) -> str:
        """Return what `ngpu-node gpus` says against a device: it is not offered, or gone from the driver's list."""
        uuid, found = self.uuid(number), self.running.node._gpus.status()
        for gpu in found["gpus"]:
            if gpu["uuid"] == uuid:
                assert not gpu["offered"]
                return str(gpu["against"])
        (gone,) = [one for one in found["gone"] if one["uuid"] == uuid]
        return "; ".join(condition["detail"] for condition in gone["health"]["conditions"])

    async def until(self, offered: set[int], within_s: float = 60) -> None:
        """Wait until the devices of these numbers, and no others, are advertised."""
        names = {self.name(number) for number in offered}
        await eventually(lambda: self.advertised() == names, timeout_s=within_s)


def as_it_is(nvml: FakeNvml) -> None:
    """Leave the devices well."""


@asynccontextmanager
async def a_machine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    gpus: int,
    before: Callable[[FakeNvml], None] = as_it_is,
    account: Account = NODE,
    **chosen: Any,
) -> AsyncIterator[Machine]:
    """Run a node with a bootstrap, on a machine with *gpus* devices that are well unless *before* changes that."""
    monkeypatch.setattr(daemon, "GpuWatch", partial(GpuWatch, pace=PACE, policy=POLICY))
    nvml = FakeNvml(tmp_path / "nvml", gpus=gpus)
    before(nvml)
    with load(nvml.path):
        async with (
            a_bootstrap() as bootstrap,
            a_node(settings(tmp_path / "data", bootstrap, **chosen), account) as running,
        ):
            await eventually(lambda: bool(bootstrap.heartbeats))
            yield Machine(nvml, running, bootstrap, account)


#: What is done to a device, what undoes it, the word the network is told, and what its owner is.
CONDITIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "uncorrectable ECC": ({"ecc_uncorrected": 2}, {"ecc_uncorrected": 0}, "ecc_uncorrected", "2 uncorrectable memory"),
    "a retired page pends": (
        {"retired_pages_pending": 1}, {"retired_pages_pending": 0}, "retired_pages_pending", "waits to be retired"),
    "a row pends": ({"rows_pending": 1}, {"rows_pending": 0}, "rows_pending", "waits to be remapped"),
    "a row failed": ({"rows_failed": 1}, {"rows_failed": 0}, "rows_failed", "no spare memory row"),
    "too hot": ({"temperature": 95}, {"temperature": 40}, "thermal_throttling", "past its limit of 89"),
    "throttled by heat": (
        {"clocks_event_reasons": 0x48}, {"clocks_event_reasons": 1}, "thermal_throttling", "held down by heat"),
    "throttled by the power supply": (
        {"clocks_event_reasons": 0x88}, {"clocks_event_reasons": 1}, "power_brake", "by the power supply"),
    "slowed by hardware": (
        {"clocks_event_reasons": 0x08}, {"clocks_event_reasons": 1}, "hardware_slowdown", "by heat or power"),
    "off the bus": ({"error": 15}, {"error": None}, "gpu_lost", "fallen off the bus"),
    "needs a reset": ({"error": 16}, {"error": None}, "gpu_reset_required", "must be reset"),
    "answers nonsense": ({"error": 999}, {"error": None}, "unreadable", "Unknown Error"),
    "an Xid": ({"xid": "1 79"}, {}, "xid", "Xid 79 (fallen off the bus)"),
}  # fmt: skip


@trio_test
async def test_each_condition_takes_its_device_out_of_all_that_is_said_and_lets_it_in_after_a_clean_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(CONDITIONS)
    async with a_machine(tmp_path, monkeypatch, gpus=count + 1) as machine:
        await machine.until(set(range(count + 1)))
        for event in range(1, 13):  # an Xid again, if its time was over before the last device was out
            for number, (breaks, _, _, _) in enumerate(CONDITIONS.values()):
                machine.nvml.set(number, **breaks | ({"xid": f"{event} 79"} if "xid" in breaks else {}))
            with contextlib.suppress(trio.TooSlowError):
                await machine.until({count}, within_s=5)
                break
        record = machine.recorded()
        for number, (name, (_, _, word, words)) in enumerate(CONDITIONS.items()):
            # one that the driver cannot describe any more is in no record at all
            assert record.get(machine.name(number), word) == word, name
            assert words in machine.against(number), name
        assert record[machine.name(count)] == WELL
        for number, (_, mends, _, _) in enumerate(CONDITIONS.values()):
            machine.nvml.set(number, **mends)
        mended = time.monotonic()
        came: dict[int, float] = {}
        while len(came) < count:
            assert time.monotonic() - mended < 60, f"came back: {sorted(came)}"
            for number in range(count):
                if machine.name(number) in machine.advertised():
                    came.setdefault(number, time.monotonic() - mended)
            await trio.sleep(0.01)
        assert min(came.values()) >= POLICY.clean_s, "not before all had been quiet for long enough"
        assert set(machine.recorded().values()) == {WELL}


@trio_test
async def test_a_device_that_cannot_be_described_stays_out_though_its_vitals_are_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_machine(tmp_path, monkeypatch, gpus=2) as machine:
        await machine.until({0, 1})
        machine.nvml.set(0, error=15)
        await machine.until({1})
        machine.nvml.set(0, error=None, fail__nvmlDeviceGetName=999)
        await eventually(lambda: machine.running.node._gpus.health(machine.uuid(0)).phase is Phase.RECOVERING)  # type: ignore[union-attr]
        beats = len(machine.bootstrap.heartbeats)
        await trio.sleep(POLICY.clean_s + 3 * PACE.again_s)
        assert all(machine.name(0) not in {g.id for g in b.gpus or ()} for b in machine.bootstrap.heartbeats[beats:])
        assert machine.advertised() == {machine.name(1)}
        machine.nvml.set(0, fail__nvmlDeviceGetName=None)
        await machine.until({0, 1})


@trio_test
async def test_a_device_that_vanishes_and_returns_elsewhere_is_offered_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_machine(tmp_path, monkeypatch, gpus=2) as machine:
        await machine.until({0, 1})
        first, second = machine.name(0), machine.name(1)
        lost = machine.nvml.gpus.pop(0)
        machine.nvml.write()
        await eventually(lambda: machine.advertised() == {second})
        machine.nvml.gpus.append(lost)
        machine.nvml.write()
        await eventually(lambda: machine.advertised() == {first, second})
        (gpu,) = [gpu for gpu in machine.running.node._gpus.status()["gpus"] if gpu["uuid"] == lost["uuid"]]
        assert gpu["index"] == 1


# -- under a workspace ------------------------------------------------------------------------------------------------


@pytest.fixture
def image() -> Iterator[str]:
    own_engine()  # with a program of the toolkit's name on its path
    reference = f"ngpu-test-{secrets.token_hex(4)}:1"
    workspace_image.build(reference)
    yield reference
    client = docker.from_env()
    client.images.remove(reference, force=True)
    client.close()


@pytest.mark.needs_docker
def test_a_container_that_lost_its_gpu_starts_again_and_memory_it_left_behind_takes_the_device_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str
) -> None:
    monkeypatch.setattr(containers_module, "GPU_LOOK_INTERVAL_S", 0.3)
    account = Account.from_key(secrets.token_bytes(32))

    async def main() -> None:
        async with a_machine(tmp_path, monkeypatch, gpus=2, account=account, engine="docker") as machine:
            await machine.until({0, 1})
            await machine.bootstrap.wish(spec(image, gpu_count=1))
            await machine.bootstrap.until_ready()
            deployments = machine.running.node._deployments
            (deployment,) = deployments.of_service("acme")
            number = [machine.name(0), machine.name(1)].index(deployment.gpus[0])
            machine.nvml.set(number, memory_used=80 << 30)
            # what `systemctl daemon-reload` does: the device is well, and the container cannot open it any more
            beats = len(machine.bootstrap.heartbeats)
            order = machine.bootstrap.order(target="/write?/tmp/no-gpus")
            assert (await machine.bootstrap.send(order, node=account)).body == b"written"
            told = partial(reasons, machine.bootstrap, beats)
            await eventually(lambda: "gpu_sick" in told())
            assert "was `systemctl daemon-reload` run?" in told()["gpu_sick"]
            await eventually(lambda: deployment.is_ready)
            assert machine.advertised() == {machine.name(0), machine.name(1)}, "the devices are well"
            # it stops, and the driver does not get its memory back
            machine.nvml.add(f"gpu{number}.process 4711 {80 << 30}")
            number = [machine.name(0), machine.name(1)].index(deployment.gpus[0])

            def seen() -> dict[str, Any]:
                shown: dict[str, Any] = machine.running.node._gpus.status()["gpus"][number]
                return shown

            await eventually(lambda: seen()["held"])
            machine.nvml.set(number, memory_used=80 << 30)
            await eventually(lambda: (seen()["vitals"] or {}).get("memory_used_bytes") == 80 << 30)
            await machine.bootstrap.wish()
            await eventually(lambda: machine.name(number) not in machine.advertised())
            assert "81920 MiB were not given back" in machine.against(number)
            assert machine.recorded()[machine.name(number)] == "memory_not_returned"
            for each in range(2):
                machine.nvml.set(each, memory_used=0)
            await machine.until({0, 1})

    try:
        trio.run(main)
    finally:
        remove_all_of(account)


def reasons(bootstrap: ScriptedBootstrap, since: int) -> dict[str, str]:
    """Return what was said of deployments since that heartbeat: reason and detail."""
    return {state.reason: state.detail for beat in bootstrap.heartbeats[since:] for state in beat.deployments}


# -- the machine as a whole --------------------------------------------------------------------------------------------

STATES: dict[str, dict[str, Any]] = {
    "driver_not_loaded": {"init": 9},
    "driver_mismatch": {"init": 18},
    "no_permission": {"init": 4},
    "no_driver": {"init": 12},
    "no_device": {"count": 0},
    "absurd_count": {"count": 2**32 - 1},
    "driver_error": {"init": 999},
}


@trio_test
async def test_whatever_is_wrong_with_the_driver_the_node_serves_on_and_finds_it_when_it_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_machine(tmp_path, monkeypatch, gpus=1) as machine, a_workspace(machine.running, echo):
        await machine.until({0})
        await machine.bootstrap.wish(SPEC)
        await machine.bootstrap.until_ready()
        for generation, (state, readings) in enumerate(STATES.items(), 1):
            # as a reload does it: the library that was initialised under the old driver is told nothing any more
            machine.nvml.set_machine(**readings, generation=generation)
            await eventually(lambda state=state: machine.state() == state)  # type: ignore[misc]
            assert machine.advertised() == set(), state
            assert machine.running.node._gpus.status()["reason"], state
            answer = await machine.bootstrap.ask(b"still here")
            assert (answer.status, answer.body) == (200, b"still here"), state
            machine.nvml.set_machine(**dict.fromkeys(readings))
            await machine.until({0})
            assert machine.state() == "ok"


@pytest.mark.parametrize("state", STATES)
@trio_test
async def test_a_node_starts_whatever_is_wrong_with_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    def broken(nvml: FakeNvml) -> None:
        nvml.set_machine(**STATES[state])

    async with a_machine(tmp_path, monkeypatch, gpus=1, before=broken) as machine:
        assert machine.state() == state
        assert machine.bootstrap.heartbeats[-1].gpus in (None, ())
        if state == "absurd_count":
            assert "none of them is believed" in await machine.shown()


# -- a driver that hangs -----------------------------------------------------------------------------------------------


@trio_test
async def test_a_driver_that_blocks_for_seconds_holds_up_no_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "ROUND_TIMEOUT_S", 0.5)
    monkeypatch.setattr(watch_module, "SURVEY_TIMEOUT_S", 0.5)
    async with a_machine(tmp_path, monkeypatch, gpus=2) as machine, a_workspace(machine.running, echo):
        await machine.until({0, 1})
        await machine.bootstrap.wish(SPEC)
        await machine.bootstrap.until_ready()
        machine.nvml.set_machine(block_ms=2500)
        calls = machine.running.node._gpus._calls
        during = 0  # a loop that waited for the driver would give no answer while one of its calls hangs
        while during < 10:
            before = calls.stuck_for_s
            assert (await machine.bootstrap.ask(b"on")).status == 200
            after = calls.stuck_for_s
            during += before is not None and after is not None and after > before
        await eventually(lambda: machine.advertised() == set())  # nothing is known of the devices any more
        await eventually(lambda: "has not answered for" in machine.against(0))
        machine.nvml.set_machine(block_ms=None)
        await machine.until({0, 1})
