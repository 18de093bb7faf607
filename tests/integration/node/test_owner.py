"""What an owner does with his machine: pauses it, drains it, has hours, looks at workspaces and what they say."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import docker
import pytest
import trio

from ngpu_node import owner as owner_module
from ngpu_node.admin import ask
from ngpu_node.engine.confinement import LABEL_NODE
from ngpu_node.errors import NodeConfigurationError
from ngpu_protocol.control import DeploymentState
from ngpu_protocol.http1 import Client
from ngpu_protocol.identity import Account
from ngpu_protocol.receipts import Outcome
from tests.integration.node import test_process as cli
from tests.integration.node.places import spec
from tests.integration.node.rig import eventually
from tests.integration.node.scripted_bootstrap import ScriptedBootstrap, a_bootstrap, a_node, settings
from tests.unit.node.builders import BOOTSTRAP, STRANGER

pytestmark = [pytest.mark.needs_docker, pytest.mark.needs_gcc]


async def command(tmp_path: Path, *arguments: str) -> str:
    """Run an owner's command against the node in this process; return what it printed."""

    done = await trio.to_thread.run_sync(cli.command, *arguments, "--data-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    return done.stdout


def containers_of(account: Account) -> list[str]:
    client = docker.from_env()
    try:
        found = client.api.containers(filters={"label": f"{LABEL_NODE}={account.address}"})
        return [one["Id"] for one in found]
    finally:
        client.close()


def state(bootstrap: ScriptedBootstrap) -> DeploymentState:
    return bootstrap.heartbeats[-1].deployments[0]


async def asked(bootstrap: ScriptedBootstrap, account: Account, **order: Any) -> str | None:
    answer = await bootstrap.send(bootstrap.order(**order), b"x", node=account)
    return answer.field("ngpu-refused")


def test_a_paused_node_takes_nothing_and_keeps_its_workspaces_a_drained_one_empties_itself(
    tmp_path: Path, account: Account, image: str
) -> None:
    async def main() -> None:
        async with a_bootstrap() as bootstrap:
            chosen = settings(tmp_path, bootstrap, engine="docker")
            async with a_node(chosen, account):
                await bootstrap.wish(spec(image))
                await bootstrap.until_ready()
                assert await asked(bootstrap, account) is None
                before = containers_of(account)

                shown = await command(tmp_path, "pause")
                assert "paused: this node's owner paused it" in shown
                assert await asked(bootstrap, account) == "draining"
                await eventually(lambda: bootstrap.heartbeats[-1].draining)
                assert containers_of(account) == before
                assert state(bootstrap).state == "ready"
                await ask(tmp_path / "admin.sock", "/resume", "POST")
                assert await asked(bootstrap, account) is None

                slow: list[Any] = []

                async def run_slow() -> None:
                    slow.append(await bootstrap.send(bootstrap.order(target="/slow"), node=account))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(run_slow)
                    await trio.sleep(0.2)
                    found = json.loads(await command(tmp_path, "drain", "--wait", "--json"))
                    assert found == {
                        "lending": "drained", "detail": "this node's owner drained it", "running": 0, "on_machine": 0,
                    }  # fmt: skip
                assert slow[0].receipt.receipt.outcome == Outcome.COMPLETE, "what ran was let to its end"
                await eventually(lambda: containers_of(account) == [])
                await eventually(lambda: (state(bootstrap).state, state(bootstrap).reason) == ("queued", "drained"))
            # the owner's word holds over a restart, and so does what the bootstrap wants
            bootstrap.heartbeats.clear()
            async with a_node(chosen, account):
                await eventually(lambda: bool(bootstrap.heartbeats and bootstrap.heartbeats[-1].deployments))
                assert bootstrap.heartbeats[-1].draining
                assert (state(bootstrap).state, state(bootstrap).reason) == ("queued", "drained")
                assert await asked(bootstrap, account) == "draining"
                await ask(tmp_path / "admin.sock", "/resume", "POST")
                await bootstrap.until_ready()
                assert await asked(bootstrap, account) is None

    trio.run(main)


def test_outside_its_hours_a_node_is_empty_and_within_them_it_comes_back(
    tmp_path: Path, account: Account, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        shows = datetime(2026, 11, 26, 23, 0)

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.shows

    monkeypatch.setattr(owner_module, "LOOK_INTERVAL_S", 0.05)
    monkeypatch.setattr(owner_module.Owner.__init__, "__kwdefaults__", {"hours": (), "local_time": Clock.now})

    async def main() -> None:
        async with a_bootstrap() as bootstrap:
            chosen = settings(tmp_path, bootstrap, engine="docker", serve=["22:00-08:00"])
            async with a_node(chosen, account):
                await bootstrap.wish(spec(image))
                await bootstrap.until_ready()
                Clock.shows = datetime(2026, 11, 27, 8, 0)
                await eventually(lambda: containers_of(account) == [])
                await eventually(lambda: state(bootstrap).reason == "closed")
                assert state(bootstrap).detail == "outside the hours of this node, 22:00-08:00"
                assert await asked(bootstrap, account) == "draining"
                Clock.shows = datetime(2026, 11, 27, 22, 0)
                await bootstrap.until_ready()
                assert await asked(bootstrap, account) is None

    trio.run(main)


def test_logs_are_read_by_the_workspaces_bootstrap_and_the_owner_and_nobody_else(
    tmp_path: Path, account: Account, image: str
) -> None:
    async def read(bootstrap: ScriptedBootstrap, target: str) -> tuple[int, str]:
        async with bootstrap.client(account).request("GET", target) as response:
            return response.status, (await response.read(100_000)).decode()

    async def main() -> None:
        async with a_bootstrap() as bootstrap, a_bootstrap(STRANGER) as stranger:
            chosen = settings(tmp_path, bootstrap, engine="docker")
            async with a_node(chosen, account) as node:
                await bootstrap.wish(spec(image), spec(image, id="8", command=["exit"]))
                await bootstrap.until_ready()
                at = "/ngpu/v1/workspaces/7/logs"
                assert await read(bootstrap, at) == (200, "hello from the workspace\n")
                assert await read(bootstrap, f"{at}?tail=0") == (200, "")
                assert (await read(bootstrap, f"{at}?tail=many"))[0] == 400
                assert (await read(bootstrap, "/ngpu/v1/workspaces/9/logs"))[0] == 404
                # one that is not running any more: the end of what it said is kept
                last = "/ngpu/v1/workspaces/8/logs"
                await eventually(lambda: bootstrap.heartbeats[-1].deployments[1].reason == "exited")
                assert await read(bootstrap, last) == (200, "hello from the workspace\nI would rather not\n")
                # followed, it goes on until the container ends
                async with bootstrap.client(account).request("GET", f"{at}?follow=1&tail=10") as response:
                    pieces = response.body()
                    assert await anext(pieces) == b"hello from the workspace\n"
                    await bootstrap.send(bootstrap.order(target="/die"), node=account)
                    assert [piece async for piece in pieces] == []

                # a bootstrap this owner does not trust, over a connection of its own
                address = node_address(node)
                peer = await stranger.host.connect(address, timeout_s=30)

                async def open_one() -> trio.abc.Stream:
                    return await stranger.host.open_stream(peer, "/http/1.1", timeout_s=30)

                client = Client(open_one, authority="node", max_connections=2)
                async with client.request("GET", at) as response:
                    assert response.status == 403
                    assert b"unknown_bootstrap" in await response.read(1000)
                await client.aclose()

                await bootstrap.until_ready()
                assert await command(tmp_path, "logs", "7") == "hello from the workspace\n"
                table = await command(tmp_path, "workspaces")
                assert "7 r1" in table
                assert "ready" in table
                (first, second) = json.loads(await ask(tmp_path / "admin.sock", "/workspaces"))["workspaces"]
                assert (first["state"], second["workspace"]) == ("ready", "8")
                (kept,) = json.loads(await command(tmp_path, "images", "--json"))["images"]
                assert kept["image"].endswith(image)
                assert kept["bytes"] > 0
                assert kept["used_at_ms"] > 0
                assert [holder.rpartition("/")[0].rpartition("/")[2] for holder in kept["held_by"]] == ["7", "8"]
                assert (kept["borrowed"], kept["kept"], kept["arriving"]) == (True, False, False)
                table = await command(tmp_path, "images")
                assert kept["digest"].removeprefix("sha256:")[:12] in table
                assert "in use" in table
                doctor = await command(tmp_path, "doctor")
                assert "engine: Docker" in doctor
                with pytest.raises(NodeConfigurationError, match=r"^workspace 99 is not deployed here$"):
                    await ask(tmp_path / "admin.sock", "/workspaces/99/logs")

    def node_address(node: Any) -> str:
        found = json.loads((node.data_dir / "node.json").read_text())["multiaddrs"]
        return next(a for a in found if a.startswith("/ip4/127.0.0.1/"))

    assert BOOTSTRAP.address != STRANGER.address
    trio.run(main)
