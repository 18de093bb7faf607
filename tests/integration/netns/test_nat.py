"""On machines with a NAT between: who is reached how, lines that break and heal, a bootstrap that moves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import trio_test

from tests.integration.daemons.discovery_rig import (
    becomes,
    bootstrap_at,
    linked,
    node_of,
    running,
    status,
    whole_status,
)
from tests.integration.whole_path.rig import ROOT, Daemon, add_workspace
from tests.support.namespaces import Internet, Machine, internet

pytestmark = [pytest.mark.needs_netns, pytest.mark.timeout_s(240)]

PORT = 4911


def bootstrap_on(machine: Machine, address: str, folder: Path, *lines: str) -> tuple[Daemon, str]:
    daemon, multiaddr = bootstrap_at(folder, *lines, port=4910, at=address)
    daemon.within = machine.inside
    return daemon, multiaddr


def node_on(machine: Machine, folder: Path, *bootstraps: str, tables: tuple[str, ...] = ()) -> Daemon:
    daemon = node_of(folder, *bootstraps, lines=(f'listen = ["/ip4/0.0.0.0/tcp/{PORT}"]',), tables=tables)
    daemon.within = machine.inside
    return daemon


async def script(machine: Machine, name: str, *arguments: str) -> Any:
    """Return what `scripts/NAME --json` prints on *machine*."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments, "--network", "local", "--json"]
    return json.loads(await trio.to_thread.run_sync(partial(machine.run, *command, check=False)))


async def eventually(machine: Machine, holds: Callable[[Any], object], name: str, *arguments: str) -> Any:
    seen: Any = None
    with trio.move_on_after(60):
        while True:
            try:
                seen = await script(machine, name, *arguments)
            except json.JSONDecodeError:
                seen = "no answer"
            if seen and seen != "no answer" and holds(seen):
                return seen
            await trio.sleep(0.2)
    raise AssertionError(f"{name} {arguments} says {seen}")


@contextmanager
def served(machine: Machine, node: Daemon) -> Iterator[None]:
    """Run a model server on *machine*, registered with *node*."""
    command = [
        *machine.inside,
        sys.executable,
        str(Path(__file__).with_name("served.py")),
        "8099",
        node.where["models"],
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "200\n"
        yield
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def call(machine: Machine, bootstrap: Daemon, token: str, text: str) -> str:
    """Return what a client on *machine* is answered by the workspace."""
    url = f"{bootstrap.where['http'][0]}/proxy/8080/echo"
    program = (
        "import sys,urllib.request as u;"
        "print(u.urlopen(u.Request(sys.argv[1],sys.argv[3].encode(),"
        "{'Authorization':'Bearer '+sys.argv[2]}),timeout=30).read().decode(),end='')"
    )
    run = partial(machine.run, sys.executable, "-c", program, url, token, text)
    return await trio.to_thread.run_sync(run)


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Internet]:
    with internet(tmp_path) as made:
        yield made


@trio_test
async def test_a_node_behind_nat_serves_is_reached_by_relay_then_directly_and_survives_a_broken_line(
    net: Internet, tmp_path: Path
) -> None:
    boot_machine, boot_address = net.machine("boot")
    third, _ = net.machine("third")
    shut, nat_of_shut = net.behind_nat("shut")
    inside, nat = net.behind_nat("inside")
    bootstrap, multiaddr = bootstrap_on(boot_machine, boot_address, tmp_path / "b")
    node = node_on(inside, tmp_path / "n", multiaddr)
    async with running(bootstrap, node):
        _, token = await add_workspace(bootstrap)
        with served(inside, node):
            shown = await becomes(node, lambda shown: shown["dialable"] is False and shown["relayed"])
            assert not shown["server"]
            assert shown["relayed"][0].startswith(f"/ip4/{boot_address}/tcp/4910/p2p/")
            await eventually(third, lambda found: len(found) == 1, "dht", "find", "role:node", "--peer", multiaddr)

            # A client's call goes over the connection the node dialled.
            assert await eventually_call(boot_machine, bootstrap, token) == "answered"

            # A third peer comes through the relay; the hole that is punched then leads there directly.
            where = (node.where["node"], "--peer", multiaddr)
            reached = await eventually(third, lambda said: "ping_ms" in said, "ping", *where)
            assert "/p2p-circuit/" in reached["address"]
            assert reached["direct"] is True
            # From behind another NAT as well.
            reached = await eventually(shut, lambda said: "ping_ms" in said, "ping", *where)
            assert reached["direct"] is True
            # Where SYNs that nobody asked for are all that leaves, it stays relayed, and works.
            nat_of_shut.run("iptables", "-t", "nat", "-F")
            scrambled = "-t nat -A POSTROUTING -p tcp -o wan -j MASQUERADE --random-fully"
            nat_of_shut.run("iptables", *scrambled.split())
            reached = await eventually(shut, lambda said: "ping_ms" in said, "ping", *where)
            assert reached["direct"] is False
            assert (await status(bootstrap))["relay_reservations"] == 1

            # The line breaks: noticed after six seconds (the limit is for busy machines). It heals: back without
            # anybody's help, and serving.
            net.pull("inside")
            with trio.fail_after(60):
                while (await whole_status(bootstrap))["nodes"]:  # noqa: ASYNC110  another process's news
                    await trio.sleep(0.1)
            net.plug("inside")
            await linked(node, 1)
            assert await eventually_call(boot_machine, bootstrap, token) == "answered"
            await becomes(node, lambda shown: shown["relayed"])

            # The owner forwards the port: the node learns that it can be dialled, and says so.
            nat.run(*f"iptables -t nat -A PREROUTING -i wan -p tcp --dport {PORT} -j DNAT --to 10.77.0.2".split())
            nat.run(*f"iptables -A FORWARD -p tcp --dport {PORT} -j ACCEPT".split())
            await node.kill()
            await node.start()
            shown = await becomes(node, lambda shown: shown["dialable"])
            assert shown["server"]
            reached = await eventually(third, lambda said: f"/tcp/{PORT}/" in said.get("address", ""), "ping", *where)
            assert "/p2p-circuit/" not in reached["address"]
            await becomes(bootstrap, lambda shown: shown["peers_known"] == 1)


async def eventually_call(machine: Machine, bootstrap: Daemon, token: str) -> str:
    with trio.fail_after(60):
        while True:
            try:
                return await call(machine, bootstrap, token, "answered")
            except AssertionError:  # not ready there yet
                await trio.sleep(0.3)


@trio_test
async def test_a_bootstrap_that_changes_its_address_is_found_again_by_its_record_and_by_its_name(
    net: Internet, tmp_path: Path
) -> None:
    steady_machine, steady_address = net.machine("steady")
    moving_machine, moving_address = net.machine("moving")
    inside, _ = net.behind_nat("inside")
    named, _ = net.behind_nat("named")
    steady, steady_at = bootstrap_on(steady_machine, steady_address, tmp_path / "steady")
    moving, moving_at = bootstrap_on(
        moving_machine, "0.0.0.0", tmp_path / "moving", f"[discovery]\npeers = [{json.dumps(steady_at)}]"
    )
    peer_id = moving_at.rpartition("/")[2]
    node = node_on(inside, tmp_path / "n", steady_at, f"/ip4/{moving_address}/tcp/4910/p2p/{peer_id}")
    named.name_host("moving.test", moving_address)
    by_name = node_on(named, tmp_path / "named", f"/dns4/moving.test/tcp/4910/p2p/{peer_id}")
    async with running(steady, moving, node, by_name):
        await linked(node, 2)
        await linked(by_name, 1)
        # Several bootstraps: a connection to each, and a place at each.
        await becomes(node, lambda shown: len(shown["relayed"]) >= 2)

        new_address = moving_address[:-1] + "77"
        moving_machine.run("ip", "address", "del", f"{moving_address}/24", "dev", "wan")
        moving_machine.run("ip", "address", "add", f"{new_address}/24", "dev", "wan")
        moving_machine.run("ip", "route", "replace", "default", "via", moving_address[:-1] + "1")
        await moving.kill()
        await moving.start()
        await linked(node, 2, at=new_address)
        named.name_host("moving.test", new_address)
        await linked(by_name, 1)
        with trio.fail_after(60):
            while (await whole_status(moving))["nodes"] != 2:  # noqa: ASYNC110  another process's news
                await trio.sleep(0.1)


@trio_test
async def test_two_nodes_on_one_wire_find_each_other_by_mdns_and_one_that_did_not_ask_for_it_binds_nothing(
    net: Internet, tmp_path: Path
) -> None:
    left, right = net.wire("left", "right")
    one = node_on(left, tmp_path / "one", tables=("[discovery]", "mdns = true"))
    two = node_on(right, tmp_path / "two", tables=("[discovery]", "mdns = true"))
    quiet = node_on(net.machine("quiet")[0], tmp_path / "quiet")
    async with running(one, two, quiet):
        # Neither knows a bootstrap: each tells the other that it can be dialled, so both keep the DHT.
        for node in (one, two):
            await becomes(node, lambda shown: shown["server"] and shown["peers_known"] == 1)
        where = f"/ip4/10.88.0.2/tcp/{PORT}/p2p/{two.where['peer_id']}"
        await eventually(left, lambda seen: len(seen) == 2, "dht", "find", "role:node", "--peer", where)
        mdns_port = ":14E9 "
        for machine, binds in ((left, True), (net.machines["quiet"], False)):
            assert (mdns_port in machine.run("cat", "/proc/net/udp")) is binds
