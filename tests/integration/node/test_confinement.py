"""Workspaces that try to break out of their containers: what they try, and how far they get.

The attacker is `workspace_image/server.c`, a program of the client's choice. What it attacks is real: services on this
machine, a neighbour's container, an outside world in a network namespace of its own, the engine.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import docker
import pytest
import trio

from ngpu_node.engine import containers, volumes
from ngpu_node.engine.confinement import LABEL_NODE
from ngpu_node.engine.docker_engine import DockerEngine
from ngpu_protocol.control import DeploymentPhase
from ngpu_protocol.identity import Account
from tests.integration.node.places import Place, a_place, get, spec
from tests.integration.node.rig import eventually

pytestmark = [pytest.mark.needs_docker, pytest.mark.needs_gcc]

MIB = 1 << 20


@contextmanager
def a_service(family: int = socket.AF_INET, address: str = "0.0.0.0") -> Iterator[int]:
    """A service of this machine that listens on all addresses; yields its port."""
    with socket.create_server((address, 0), family=family, backlog=16) as server:
        port: int = server.getsockname()[1]
        ends = threading.Event()

        def serve() -> None:
            server.settimeout(0.1)
            while not ends.is_set():
                try:
                    server.accept()[0].close()
                except TimeoutError:
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield port
        finally:
            ends.set()
            thread.join()


async def attack(place: Place, path: str, workspace: str = "7") -> str:
    (deployment,) = place.deployments.revisions("acme", workspace).values()
    return (await get(deployment, path)).decode()


def gateway(place: Place, *, egress: bool = False) -> str:
    """Return this machine's address on the workspaces' network."""
    client = docker.from_env()
    try:
        network = client.networks.get(f"ngpu-{place.containers._mark}" + ("-out" if egress else ""))
        return str(network.attrs["IPAM"]["Config"][0]["Gateway"])
    finally:
        client.close()


def needs_root() -> None:
    if os.geteuid() != 0 or shutil.which("iptables", path="/usr/sbin:/sbin:/usr/bin") is None:
        pytest.skip("rules of the packet filter want root and iptables")


# -- resources ---------------------------------------------------------------------------------------------------------


def test_a_fork_bomb_ends_at_the_limit_and_the_machine_does_not_notice(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account, pids=64) as place:
            place.wish(spec(image))
            await place.until(DeploymentPhase.READY)
            count, _, what = (await attack(place, "/fork")).partition(" ")
            assert 1 < int(count) < 64
            assert what == "Resource temporarily unavailable"
            assert await attack(place, "/") == "ok hello"

    trio.run(main)


def test_memory_beyond_the_limit_ends_the_workspace_and_it_says_so(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec(image, memory_bytes=32 * MIB))
            deployment = await place.until(DeploymentPhase.READY)
            with pytest.raises(Exception, match=r"connection|answer"):
                await attack(place, "/grow")
            await eventually(lambda: deployment.reason == "out_of_memory")
            assert "out of memory" in deployment.detail
            await place.until(DeploymentPhase.READY)

    trio.run(main)


def test_scratch_space_is_memory_and_shared_memory_is_as_large_as_asked_for(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec(image, shm_bytes=128 * MIB))
            await place.until(DeploymentPhase.READY)
            assert await attack(place, "/shm") == str(128 * MIB)

    trio.run(main)


# -- files -------------------------------------------------------------------------------------------------------------


def test_nothing_of_the_image_or_the_machine_can_be_written(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec(image))
            await place.until(DeploymentPhase.READY)
            for path in ("/mine", "/server", "/etc/hosts", "/usr/bin/mine", "/dev/mine"):
                assert await attack(place, f"/write?{path}") in ("Read-only file system", "Permission denied"), path
            for path in ("/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/sys/kernel/profiling"):
                assert await attack(place, f"/write?{path}") in (
                    "Read-only file system", "Permission denied", "No such file or directory",
                ), path  # fmt: skip
            # memory of the machine, its disks, other processes
            for path in ("/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/sda", "/proc/kcore"):
                assert await attack(place, f"/read?{path}") in (
                    "No such file or directory", "Permission denied", "Operation not permitted", "",
                ), path  # fmt: skip

    trio.run(main)


def test_the_engine_is_out_of_reach(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec(image))
            await place.until(DeploymentPhase.READY)
            own = os.environ.get("DOCKER_HOST", "").removeprefix("unix://")
            for path in filter(None, ("/var/run/docker.sock", "/run/docker.sock", "/run/containerd", own)):
                assert await attack(place, f"/read?{path}") == "No such file or directory"
            for port in (2375, 2376):
                assert await attack(place, f"/connect?{gateway(place)}:{port}") != "connected"

    trio.run(main)


def test_volumes_are_kept_over_restarts_and_revisions_belong_to_one_workspace_and_go_with_it(
    account: Account, image: str
) -> None:
    cache = [{"name": "cache", "path": "/models/cache"}]

    async def main() -> None:
        async with a_place(account) as place:
            mine, neighbour = spec(image, volumes=cache), spec(image, id="8", volumes=cache)
            place.wish(mine, neighbour)
            await eventually(lambda: all(d.is_ready for d in place.deployments))
            assert await attack(place, "/write?/models/cache/weights") == "written"
            assert await attack(place, "/list?/models/cache", "8") == ""
            assert await attack(place, "/write?/models/other") == "Read-only file system"
            with pytest.raises(Exception, match=r"connection|answer"):
                await attack(place, "/die")
            await eventually(lambda: not place.deployments.revisions("acme", "7")[1].is_ready)
            await eventually(lambda: place.deployments.revisions("acme", "7")[1].is_ready)
            assert await attack(place, "/list?/models/cache") == "weights "
            place.wish(spec(image, volumes=cache, revision=2), neighbour)
            await eventually(lambda: list(place.deployments.revisions("acme", "7")) == [2])
            assert await attack(place, "/list?/models/cache") == "weights "
            client = docker.from_env()
            foreign = client.volumes.create()
            try:
                place.wish(neighbour)
                await eventually(lambda: len(list(place.deployments)) == 1)
                await place.containers.sweep()
                assert [name for name in await place.engine.volumes() if "-7-" in name] == []
                assert len(await place.engine.volumes()) == 1
                assert client.volumes.get(foreign.id) is not None
            finally:
                foreign.remove()
                client.close()

    trio.run(main)


@pytest.mark.parametrize("looks", ["here", "by the engine"])
def test_a_workspace_whose_volumes_hold_too_much_stops_and_begins_afresh_with_another_volume(
    account: Account, image: str, monkeypatch: pytest.MonkeyPatch, looks: str
) -> None:
    monkeypatch.setattr(containers, "WEIGH_INTERVAL_S", 0.1)
    monkeypatch.setattr(volumes, "LOOK_INTERVAL_S", 0.2)
    if looks == "by the engine":  # as for a daemon that is not root, or on another machine
        monkeypatch.setattr(volumes, "size_of", lambda folder, deadline_s: os.listdir("/nowhere"))
    elif os.geteuid() != 0:
        pytest.skip("the engine's folder is root's")

    async def main() -> None:
        async with a_place(account, volume_bytes=6 * MIB) as place:
            cache = [{"name": "cache", "path": "/cache"}, {"name": "more", "path": "/more"}]
            place.wish(spec(image, volumes=cache), spec(image, id="8", volumes=cache))
            await eventually(lambda: all(d.is_ready for d in place.deployments))
            full = place.deployments.revisions("acme", "7")[1]
            assert await attack(place, "/fill?/cache/weights") == "filled"
            await trio.sleep(1)
            assert full.is_ready, "4 MB of 6"
            assert await attack(place, "/fill?/more/weights") == "filled"
            await eventually(lambda: full.phase is DeploymentPhase.FAILED)
            assert full.reason == "volume_full"
            assert re.match(r"its volumes hold 8\.\d+ MB, more than the 6\.29 MB this node.s owner allows", full.detail)
            await eventually(lambda: len(place.containers._runs) == 2)
            assert [one.name.split("-")[-2] for one in await place.engine.containers()] == ["8"]
            neighbour = place.deployments.revisions("acme", "8")[1]
            assert neighbour.is_ready
            other = [{"name": "fresh", "path": "/cache"}]
            place.wish(spec(image, revision=2, volumes=other), spec(image, id="8", volumes=cache))
            await eventually(lambda: list(place.deployments.revisions("acme", "7")) == [2])
            assert await attack(place, "/list?/cache") == ""
            await place.containers.sweep()
            kept = sorted(name.partition("-")[2].split("-", 2)[2] for name in await place.engine.volumes())
            assert kept == ["7-fresh", "8-cache", "8-more"]

    trio.run(main)


def test_a_volume_of_somebody_elses_under_our_name_is_not_touched(account: Account, image: str) -> None:
    async def main() -> None:
        engine = await DockerEngine.connect(account.address)
        client = docker.from_env()
        foreign = client.volumes.create("ngpu-test-foreign")
        try:
            with pytest.raises(Exception, match="not this node's"):
                await engine.ensure_volume("ngpu-test-foreign", {}, image=image)
        finally:
            foreign.remove()
            client.close()
            await engine.aclose()

    trio.run(main)


def test_a_chatty_workspace_does_not_fill_the_disk_with_its_log(account: Account, image: str) -> None:
    """The engine's own files, as they lie on its disk."""
    limit = 64 * 1024

    async def main() -> None:
        async with a_place(account, log_bytes=limit) as place:
            place.wish(spec(image))
            await place.until(DeploymentPhase.READY)
            for _ in range(10):
                assert await attack(place, "/say?1000") == "said"  # 100 kB, and more as the engine writes it
            (state,) = await place.engine.containers()
            client = docker.from_env()
            log = Path(client.containers.get(state.id).attrs["LogPath"])
            client.close()

            async def whole() -> bool:
                return (await place.engine.log_tail(state.id, 1, 1000)).startswith(b"line 999 ")

            with trio.fail_after(60):
                while not await whole():  # noqa: ASYNC110
                    await trio.sleep(0.05)
            try:
                sizes = [path.stat().st_size for path in log.parent.iterdir() if path.name.startswith(log.name)]
            except OSError:
                pytest.skip("the engine's files are on another machine, or root's")
            assert len(sizes) == 2
            # a line that reaches the limit is written to its end
            assert all(size <= limit + 1024 for size in sizes)
            # the end is there to be read, as far as it was kept
            words = await place.engine.log_tail(state.id, 100, 1 << 20)
            assert len(words.splitlines()) == 100

    trio.run(main)


# -- the network -------------------------------------------------------------------------------------------------------


@dataclass
class Outside:
    """Another machine, as far as a workspace can tell: a public address of it, a private one, and one of ours there."""

    public: str = "203.0.113.2"
    private: str = "10.99.0.2"
    ours: str = "203.0.113.1"
    port: int = 80


SERVE = "import socket\ns = socket.create_server(('', 80))\nprint('up', flush=True)\nwhile True: s.accept()[0].close()"


@contextmanager
def an_outside() -> Iterator[Outside]:
    """A network namespace of its own, linked to this one: the internet, and the owner's network."""
    there = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", 'echo up; read go; exec "$0" -c "$1"', sys.executable, SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert there.stdout is not None
        assert there.stdin is not None
        assert there.stdout.readline() == "up\n"

        def run(line: str) -> None:
            subprocess.run(line.split(), check=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})

        inside = f"nsenter -t {there.pid} -n"
        run(f"ip link add ngpu-t0 type veth peer name ngpu-t1 netns {there.pid}")
        for address in ("203.0.113.1/24", "10.99.0.1/24"):
            run(f"ip address add {address} dev ngpu-t0")
        run("ip link set ngpu-t0 up")
        for address in ("203.0.113.2/24", "10.99.0.2/24"):
            run(f"{inside} ip address add {address} dev ngpu-t1")
        run(f"{inside} ip link set ngpu-t1 up")
        there.stdin.write("go\n")
        there.stdin.flush()
        assert there.stdout.readline() == "up\n"
        yield Outside()
    finally:
        there.kill()
        there.communicate()
        subprocess.run(["ip", "link", "del", "ngpu-t0"], check=False, stderr=subprocess.DEVNULL)


def filter_rules() -> str:
    """Return every rule of the packet filter, IPv4 and IPv6."""
    shown = [
        subprocess.run([f"/usr/sbin/{program}", "-S"], capture_output=True, text=True, check=False).stdout
        for program in ("iptables", "ip6tables")
    ]
    return "".join(shown)


def test_without_egress_neither_the_outside_nor_this_machine_nor_a_neighbour_is_reached(
    account: Account, image: str
) -> None:
    needs_root()
    before = filter_rules()

    async def main() -> None:
        with an_outside() as outside, a_service() as port:
            async with a_place(account) as place:
                place.wish(spec(image), spec(image, id="8"))
                await eventually(lambda: all(d.is_ready for d in place.deployments))
                here = gateway(place)
                for target in (f"{here}:{port}", f"{outside.ours}:{port}", f"{outside.public}:80", "1.1.1.1:53"):
                    assert await attack(place, f"/connect?{target}") != "connected", target
                neighbour = next(d for d in place.deployments if d.spec.id == "8").upstream(8080)
                assert neighbour is not None
                assert await attack(place, f"/connect?{neighbour.host}:8080") != "connected"
                assert all(not finding.advice for finding in place.containers._networks.findings())
                # and that the node itself still reaches it shows that it was not the whole bridge that was closed
                assert await attack(place, "/") == "ok hello"
            await place.containers.finish()

    trio.run(main)
    assert filter_rules() == before, "nothing is left of our rules"


def test_with_egress_the_outside_is_reached_and_nothing_private(account: Account, image: str) -> None:
    needs_root()
    before = filter_rules()

    async def main() -> None:
        with an_outside() as outside, a_service() as port:
            async with a_place(account) as place:
                place.wish(spec(image, egress=True), spec(image, id="8", egress=True), spec(image, id="9"))
                await eventually(lambda: all(d.is_ready for d in place.deployments))
                assert await attack(place, f"/connect?{outside.public}:80") == "connected"
                assert await attack(place, f"/connect?{outside.public}:80", "9") != "connected"
                assert await attack(place, f"/connect?{outside.private}:80") != "connected"
                for address in (gateway(place, egress=True), gateway(place), outside.ours, "10.99.0.1"):
                    assert await attack(place, f"/connect?{address}:{port}") != "connected", address
                for workspace in ("8", "9"):
                    (other,) = place.deployments.revisions("acme", workspace).values()
                    upstream = other.upstream(8080)
                    assert upstream is not None
                    assert await attack(place, f"/connect?{upstream.host}:8080") != "connected"
            await place.containers.finish()

    trio.run(main)
    assert filter_rules() == before, "nothing is left of our rules"


@contextmanager
def the_filter_afterwards() -> Iterator[None]:
    """Have the packet filter as it is now again at the end: the engine's own rules are in it."""
    saved = {
        program: subprocess.run([f"/usr/sbin/{program}-save"], capture_output=True, text=True, check=True).stdout
        for program in ("iptables", "ip6tables")
    }
    try:
        yield
    finally:
        for program, rules in saved.items():
            subprocess.run([f"/usr/sbin/{program}-restore"], input=rules, text=True, check=True)


def flush() -> None:
    subprocess.run(["/usr/sbin/iptables", "-F"], check=True)


def test_rules_that_somebody_flushes_are_set_again_and_where_they_cannot_be_egress_ends(
    account: Account, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_root()
    monkeypatch.setattr("ngpu_node.engine.networks.LOOK_INTERVAL_S", 0.2)

    async def main() -> None:
        with an_outside() as outside, a_service() as port:
            async with a_place(account) as place:
                place.wish(spec(image), spec(image, id="8", egress=True))
                await eventually(lambda: all(d.is_ready for d in place.deployments))
                (closed,) = place.deployments.revisions("acme", "7").values()
                (open_,) = place.deployments.revisions("acme", "8").values()
                here, bridge = f"{gateway(place)}:{port}", f"ngpu{place.containers._mark}"
                assert await attack(place, f"/connect?{here}") != "connected"
                with the_filter_afterwards():
                    flush()
                    await eventually(lambda: filter_rules().count(f"-A INPUT -i {bridge}") == 4)
                    assert await attack(place, f"/connect?{here}") != "connected"
                    assert await attack(place, f"/connect?{outside.private}:80", "8") != "connected"
                await eventually(lambda: place.containers._networks.offers_egress)
                assert await attack(place, f"/connect?{outside.public}:80", "8") == "connected"
                before = {state.name: state.id for state in await place.engine.containers()}
                # from here on the filter cannot be told, nor read
                with monkeypatch.context() as without, the_filter_afterwards():
                    without.setattr("ngpu_node.engine.firewall._PATH", "/nowhere")
                    flush()
                    await eventually(lambda: open_.phase is DeploymentPhase.FAILED)
                    assert open_.reason == "egress_unguarded"
                    assert "iptables is not installed" in open_.detail
                    assert closed.is_ready
                    assert [state.id for state in await place.engine.containers()] == [
                        one for name, one in before.items() if "-7-" in name
                    ]
                    assert not place.containers.machine().gives_egress
                    (advice,) = [f for f in place.containers.findings() if f.subject == "firewall"]
                    assert advice.advice
                await eventually(lambda: open_.is_ready)
                assert place.containers.machine().gives_egress
                assert await attack(place, f"/connect?{outside.private}:80", "8") != "connected"
                assert await attack(place, f"/connect?{here}") != "connected"
            await place.containers.finish()

    trio.run(main)


def test_where_ports_are_published_nothing_outside_answers_without_egress_and_nobody_reaches_a_neighbour(
    account: Account, image: str
) -> None:
    needs_root()

    async def main() -> None:
        with an_outside() as outside:
            async with a_place(account, network="published") as place:
                place.wish(spec(image), spec(image, id="8", egress=True), spec(image, id="9", egress=True))
                await eventually(lambda: all(d.is_ready for d in place.deployments))
                assert await attack(place, f"/connect?{outside.public}:80") != "connected"
                assert await attack(place, f"/connect?{outside.public}:80", "8") == "connected"
                for state in await place.engine.containers():
                    if "-8-" not in state.name:
                        assert state.address is not None
                        assert await attack(place, f"/connect?{state.address}:8080", "8") != "connected", state.name
                (finding,) = place.containers._networks.findings()
                assert "nothing outside answers" in finding.text
            await place.containers.finish()
        client = docker.from_env()
        left = client.networks.list(filters={"label": f"{LABEL_NODE}={account.address}"})
        client.close()
        assert left == []

    trio.run(main)


def test_an_owner_may_allow_no_egress(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account, egress=False) as place:
            place.wish(spec(image, egress=True))
            failed = await place.until(DeploymentPhase.FAILED)
            assert failed.detail == "the workspace wants egress, which this node's owner does not allow"
            assert await place.engine.containers() == []

    trio.run(main)


def test_where_the_packet_filter_is_not_ours_it_is_said_and_egress_is_refused(
    account: Account, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ngpu_node.engine.firewall._PATH", "/nowhere")

    async def main() -> None:
        with a_service() as port:
            async with a_place(account) as place:
                await without_rules(place, port)

    async def without_rules(place: Place, port: int) -> None:
        place.wish(spec(image), spec(image, id="8", egress=True))
        await eventually(lambda: place.deployments.revisions("acme", "7")[1].is_ready)
        # the one thing the rules are for
        assert await attack(place, f"/connect?{gateway(place)}:{port}") == "connected"
        refused = place.deployments.revisions("acme", "8")[1]
        await eventually(lambda: refused.phase is DeploymentPhase.FAILED)
        assert "cannot keep it out of its owner's network: iptables is not installed" in refused.detail
        (finding,) = [one for one in place.containers.findings() if one.subject == "firewall"]
        assert finding.text == "workspaces may reach services of this machine: iptables is not installed"
        assert "CAP_NET_ADMIN" in finding.advice

    trio.run(main)
