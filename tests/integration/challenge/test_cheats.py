"""Cheats behind real nodes, each found by a real bootstrap: processes on loopback, NumPy at small size as the GPU.

The nodes show a card that the fake driver describes; the operator's table says how fast such a card is. The model
server beside each node is the prover, and each test puts another one there.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from ngpu_bootstrap.admin_socket import ask_daemon
from tests.integration.challenge import provers
from tests.integration.challenge.provers import Standin
from tests.integration.whole_path.rig import ROOT, Daemon, Network, add_workspace, free_port, prepare
from tests.support.fake_nvml import FakeNvml

pytestmark = [pytest.mark.needs_gcc, pytest.mark.timeout_s(120)]

MEMORY_BYTES = 24 << 20
# A card of 10 GFLOPS and 4 GB/s: NumPy on one busy core is several times as fast.
SETTINGS = """
[challenges]
workspaces = ["{workspace}"]
automatic = false
depth = 512
steps = 512
tolerance = 1.2

[[challenges.speeds]]
model = "Test Card"
tflops = 0.01
gbytes_per_s = 4.0
"""
SPEC = {
    "name": "challenge",
    "service": "demo/challenge",
    "ports": [8000],
    "concurrency": 8,
    "request_timeout_s": 60,
    "readiness_path": "/health",
    "apis": [],
}
# By these figures: the limits of the product and of the chains.
PRODUCT_LIMIT_S, CHAINS_LIMIT_S = 2.56, 1.53


#: What an honest prover is found to be on a machine that stood still meanwhile.
LATE = {"late", "late_chains"}


@dataclass
class Challenged:
    """A bootstrap and its nodes, each with a model server of the test's own."""

    bootstrap: Daemon
    nodes: list[Daemon]
    standins: list[Standin]

    def address(self, number: int) -> str:
        return str(self.nodes[number].where["node"])

    async def admin(self, method: str, target: str, document: Any = None) -> Any:
        socket = self.bootstrap.folder / "data" / "admin.sock"
        return await trio.to_thread.run_sync(ask_daemon, socket, method, target, document, abandon_on_cancel=True)

    async def challenge(self, *numbers: int) -> list[dict[str, Any]]:
        """Challenge nodes at the same moment; return what became of each."""
        asked = {"nodes": [self.address(number) for number in numbers]}
        runs = (await self.admin("POST", "/api/v1/challenges", asked))["runs"]
        while any(run["phase"] != "done" for run in runs):
            await trio.sleep(0.1)
            runs = [await self.admin("GET", f"/api/v1/challenges/{run['id']}") for run in runs]
        assert not any(run["problem"] for run in runs), runs
        found = [run["challenges"] for run in runs]
        assert all(len(one) == 1 for one in found), runs
        return [one[0] for one in found]

    async def honestly(self, *numbers: int) -> list[dict[str, Any]]:
        """As `challenge`; again where the first of them was late, as an honest one on a machine that stands still."""
        for _ in range(4):
            found = await self.challenge(*numbers)
            if found[0]["finding"] not in LATE:
                break
        return found

    async def standing(self, number: int) -> dict[str, Any]:
        detail = await self.admin("GET", f"/api/v1/nodes/{self.address(number)}")
        found: dict[str, Any] = detail["standing"]
        return found


@asynccontextmanager
async def challenged(tmp_path: Path, standins: list[Standin]) -> AsyncIterator[Challenged]:
    port = free_port()
    folder = tmp_path / "bootstrap"
    lines = [f'listen = ["/ip4/127.0.0.1/tcp/{port}"]', f'http_listen = "127.0.0.1:{free_port()}"', "drain_s = 1"]
    peer_id = prepare(folder, lines)
    bootstrap = Daemon("ngpu_bootstrap", folder, "bootstrap.json")
    workspace, _ = await add_workspace(bootstrap, SPEC)
    config = folder / "config.toml"
    config.write_text(config.read_text() + SETTINGS.format(workspace=workspace))
    multiaddr = f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id}"
    nodes = []
    for number in range(len(standins)):
        at = tmp_path / f"node{number}"
        prepare(
            at,
            [
                'listen = ["/ip4/127.0.0.1/tcp/0"]',
                'model_listen = "127.0.0.1:0"',
                'engine = "none"',
                "drain_s = 1",
                "[[bootstraps]]",
                f"multiaddrs = [{json.dumps(multiaddr)}]",
            ],
        )
        machine = FakeNvml(at / "nvml", gpus=0)
        machine.add_gpu(f"GPU-{number:08x}-0000-0000-0000-000000000000", name="Test Card", memory_total=MEMORY_BYTES)
        nodes.append(Daemon("ngpu_node.cli", at, "node.json", environment=machine.environment()))
    network = Network(bootstrap, nodes, 0, workspace=workspace)
    try:
        async with trio.open_nursery() as starting:
            for daemon in (bootstrap, *nodes):
                starting.start_soon(daemon.start)
        await network.connect_client()
        for node, standin in zip(nodes, standins, strict=True):
            network.workspace_port = standin.port
            await network.register(node, "challenge")
        here = Challenged(bootstrap, nodes, standins)
        with trio.fail_after(60):
            while True:
                view = await here.admin("GET", f"/api/v1/workspaces/{workspace}")
                if sum(one["state"] == "ready" for one in view["deployments"]) == len(nodes):
                    break
                await trio.sleep(0.05)
        yield here
    finally:
        with trio.CancelScope(shield=True):
            for daemon in (*nodes, bootstrap):
                if daemon.process is not None and daemon.process.poll() is None:
                    await daemon.kill()


class Shared:
    """One network for all tests here, in a thread of its own: starting it costs more than most of them."""

    def __init__(self, tmp_path: Path, standins: list[Standin]) -> None:
        self._tmp_path, self._standins = tmp_path, standins
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)

    def run(self, part: Callable[[Challenged], Awaitable[None]], within_s: float = 90.0) -> None:
        async def bounded() -> None:
            with trio.fail_after(within_s):
                await part(self._here)

        trio.from_thread.run(bounded, trio_token=self._token)

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()
        if self._failed is not None:
            raise self._failed

    def stop(self) -> None:
        trio.from_thread.run_sync(self._done.set, trio_token=self._token)
        self._thread.join()

    def _main(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:
            self._failed = error
            self._ready.set()

    async def _serve(self) -> None:
        async with challenged(self._tmp_path, self._standins) as self._here:
            self._done = trio.Event()
            self._token = trio.lowlevel.current_trio_token()
            self._ready.set()
            await self._done.wait()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with provers.standins(2) as standins:
        network = Shared(tmp_path_factory.mktemp("challenged"), standins)
        network.start()
        yield network
        network.stop()


@pytest.fixture
def net(shared: Shared) -> Shared:
    for standin in shared._standins:
        standin.provers = provers.honest()
    return shared


def test_honest_nodes_are_believed_and_it_shows(net: Shared) -> None:
    async def part(here: Challenged) -> None:
        for _ in range(4):  # again, where the machine stood still for a time
            before = await here.standing(0)
            one, other = await here.challenge(0, 1)
            if LATE.isdisjoint((one["finding"], other["finding"])):
                break
        assert (one["finding"], other["finding"]) == ("good", "good"), (one, other)
        assert 0 < one["product_ms"] < one["product_limit_ms"] == pytest.approx(PRODUCT_LIMIT_S * 1000, rel=0.1)
        assert 0 < one["chains_ms"] < one["chains_limit_ms"] == pytest.approx(CHAINS_LIMIT_S * 1000, rel=0.1)
        detail = await here.admin("GET", f"/api/v1/nodes/{here.address(0)}")
        assert detail["challenges"][0] == one
        assert detail["node"]["last_challenge"] == "good"
        assert any("challenged 0.0 h ago: good" in sentence for sentence in detail["why"]), detail["why"]
        assert detail["standing"]["disputed"] == before["disputed"]
        # a task like any other: an order, and a receipt that was verified
        task = await here.admin("GET", f"/api/v1/tasks/{one['task_id']}")
        assert (task["api"], task["state_name"], task["receipts"][0]["verdict"]) == (
            "challenge",
            "finished",
            "verified",
        )

    net.run(part)


CHEATS = {
    "a slower card": (lambda: provers.a_card(PRODUCT_LIMIT_S + 0.4), {"late"}, 1),
    "less memory than claimed": (lambda: provers.less_memory(CHAINS_LIMIT_S + 0.4), {"late_chains"}, 1),
    # one time in 16 the four tiles that are opened all lie in the half that was computed: then the chains tell
    "half of the product": (provers.half_the_work, {"wrong_product", "wrong_chain"}, 2),
    "chains followed before they are asked for": (provers.walked_before, {"wrong_chain"}, 2),
}


@pytest.mark.parametrize("cheat", list(CHEATS))
def test_a_cheat_is_found_beside_an_honest_node(net: Shared, cheat: str) -> None:
    async def part(here: Challenged) -> None:
        make, findings, weight = CHEATS[cheat]
        here.standins[1].provers = make()
        for _ in range(4):  # again, where the machine stood still for a time
            before = await here.standing(1)
            honest, found = await here.challenge(0, 1)
            if honest["finding"] not in LATE and (found["finding"] in findings or found["finding"] not in LATE):
                break
        assert honest["finding"] == "good", honest
        assert found["finding"] in findings, found
        after = await here.standing(1)
        assert after["disputed"] == before["disputed"] + weight
        assert after["rules"]["challenge"] == before["rules"].get("challenge", 0) + weight
        assert after["last_task"] == found["task_id"]
        assert after["score"] < before["score"]

    net.run(part)


def test_a_replayed_answer_is_found(net: Shared) -> None:
    async def part(here: Challenged) -> None:
        here.standins[1].provers = provers.replay()
        (first,) = await here.honestly(1)
        assert first["finding"] == "good", "what is replayed later was right once"
        (again,) = await here.challenge(1)
        assert again["finding"] in ("wrong_digest", "wrong_product", "wrong_chain"), again

    net.run(part)


def test_two_claims_on_one_card_are_found_when_both_are_asked_at_once(net: Shared) -> None:
    async def part(here: Challenged) -> None:
        here.standins[0].provers = here.standins[1].provers = provers.a_card(PRODUCT_LIMIT_S * 0.7)
        (alone,) = await here.honestly(0)
        assert alone["finding"] == "good", alone
        both = await here.challenge(0, 1)
        assert sorted(one["finding"] for one in both) == ["good", "late"], both

    net.run(part)


def test_a_challenge_relayed_to_a_card_that_is_asked_itself_is_found(net: Shared) -> None:
    async def part(here: Challenged) -> None:
        here.standins[0].provers = provers.a_card(PRODUCT_LIMIT_S * 0.7)
        here.standins[1].provers = provers.relay(here.standins[0].url)
        both = await here.challenge(0, 1)
        assert "late" in [one["finding"] for one in both], both

    net.run(part)


def test_a_challenge_relayed_over_a_distance_is_late(net: Shared) -> None:
    async def part(here: Challenged) -> None:
        here.standins[1].provers = provers.relay(here.standins[0].url, away_s=PRODUCT_LIMIT_S / 2 + 0.2)
        (found,) = await here.challenge(1)
        assert found["finding"] == "late", found

    net.run(part)


def test_an_honest_prover_answers_for_its_own_node_alone(net: Shared) -> None:
    async def part(here: Challenged) -> None:
        here.standins[0].provers = provers.honest(here.address(0))
        here.standins[1].provers = provers.relay(here.standins[0].url)
        own, relayed = await here.honestly(0, 1)
        assert own["finding"] == "good", own
        assert relayed["finding"] == "unanswered", relayed
        assert "this puzzle is for another node" in relayed["detail"]

    net.run(part)


def test_no_answer_is_forgiven_twice_and_then_counts(net: Shared) -> None:
    async def part(here: Challenged) -> None:
        for _ in range(3):  # whatever was before is taken back by good answers in a row
            await here.challenge(1)
        before = await here.standing(1)
        here.standins[1].provers = provers.out_of_memory()
        for expected in (0, 0, 1):
            (found,) = await here.challenge(1)
            assert found["finding"] == "unanswered", found
            assert (await here.standing(1))["disputed"] == before["disputed"] + expected
        assert "out of memory" in found["detail"]

    net.run(part)


def test_the_command_waits_for_the_verdict_and_says_it_in_its_exit_code(net: Shared) -> None:
    async def part(here: Challenged) -> None:
        here.standins[1].provers = provers.half_the_work()
        config = str(here.bootstrap.folder / "config.toml")
        line = [sys.executable, "-m", "ngpu_bootstrap", "challenge", here.address(0), here.address(1)]
        line += ["--gpu", "0", "--json", "--config", config]
        for _ in range(4):  # again, where the machine stood still for a time
            told = await trio.run_process(line, cwd=ROOT, capture_stdout=True, capture_stderr=True, check=False)
            assert told.returncode == 1
            runs = json.loads(told.stdout)["runs"]
            honest, cheat = (run["challenges"][0]["finding"] for run in runs)
            if LATE.isdisjoint((honest, cheat)):
                break
        assert "1 of 2 nodes did not show what they claim" in told.stderr.decode()
        assert honest == "good"
        assert cheat in ("wrong_product", "wrong_chain")

    net.run(part)
