"""The rules that keep workspaces to themselves, in a real packet filter: set, flushed by somebody, set again, removed.

Everything runs in a network namespace of its own. The daemon's part runs as the systemd unit runs it: an ordinary user
whose one privilege is CAP_NET_ADMIN.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.namespaces import Internet, Machine

pytestmark = pytest.mark.needs_netns

ROOT = Path(__file__).parents[3]
#: A stand-in for the daemon: it prints what each call came to.
DAEMON = """
import sys, trio
from ngpu_node.engine.firewall import Firewall, FirewallUnavailable

async def main():
    firewall = Firewall("12345678")
    for line in sys.stdin:
        try:
            word, *bridges = line.split()
            closed, open_ = (*bridges, None)[:2]
            said = await getattr(firewall, word)(closed, open_)
        except FirewallUnavailable as error:
            said = f"unavailable: {error}"
        print(said or "", flush=True)

trio.run(main)
"""
AS_THE_UNIT_DOES = (
    "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs",
    "--bounding-set=-all,+net_admin", "--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin",
)  # fmt: skip
WITHOUT_PRIVILEGES = (
    "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--bounding-set=-all",
)  # fmt: skip


class Daemon:
    """The firewall of a node on *machine*."""

    def __init__(self, machine: Machine, how: tuple[str, ...]) -> None:
        self._process = subprocess.Popen(
            [*machine.inside, *how, sys.executable, "-c", DAEMON],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        )

    def do(self, word: str, *bridges: str) -> str:
        """Have one call made; return what it said."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join([word, *bridges]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the daemon's part ended"
        return answer.strip()

    def end(self) -> None:
        self._process.communicate()


class Scene:
    """An owner's machine with a service, a container on its bridge `br-closed`, another on `br-open`, and a network."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._stack = stack
        self.network = Internet(folder, stack)
        self.owner, _ = self.network.machine("owner")
        # refusals are answered at once, however many there are
        self.owner.run("sh", "-c", "cd /proc/sys/net/ipv4 && echo 1 > ip_forward && echo 0 > icmp_ratelimit")
        self.closed = self._on_bridge("closed", "br-closed", "172.29.1")
        self.open = self._on_bridge("open", "br-open", "172.29.2")
        # a machine of the owner's network, and one of the outside: 10.9.0.2 and 203.0.113.2
        self.other = Machine(folder, "other")
        stack.callback(self.other.end)
        self.network._cable(self.owner, "lan", "10.9.0.1/24", self.other, "lan", "10.9.0.2/24")
        self.owner.run("ip", "address", "add", "203.0.113.1/24", "dev", "lan")
        self.other.run("ip", "address", "add", "203.0.113.2/24", "dev", "lan")
        for network in ("172.29.1.0/24", "172.29.2.0/24"):
            self.other.run("ip", "route", "add", network, "via", "10.9.0.1")
        for machine in (self.owner, self.other):
            serve = "import socket\ns = socket.create_server(('', 80))\nprint('up', flush=True)\n"
            serve += "while True: s.accept()[0].close()"
            process = subprocess.Popen(
                [*machine.inside, sys.executable, "-c", serve], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
        # as Docker has it
        for rule in ("-N DOCKER-USER", "-A DOCKER-USER -j RETURN", "-I FORWARD -j DOCKER-USER"):
            self.owner.run("iptables", *rule.split())

    def _on_bridge(self, name: str, bridge: str, network: str) -> Machine:
        container = Machine(self.network._folder, name)
        self._stack.callback(container.end)
        self.owner.run("ip", "link", "add", bridge, "type", "bridge")
        self.network._cable(self.owner, f"to-{name}", "169.254.77.1/32", container, "eth0", f"{network}.2/24")
        self.owner.run("ip", "link", "set", f"to-{name}", "master", bridge)
        self.owner.run("ip", "address", "add", f"{network}.1/24", "dev", bridge)
        self.owner.run("ip", "link", "set", bridge, "up")
        container.run("ip", "route", "add", "default", "via", f"{network}.1")
        return container

    def daemon(self, how: tuple[str, ...] = AS_THE_UNIT_DOES) -> Daemon:
        daemon = Daemon(self.owner, how)
        self._stack.callback(daemon.end)
        return daemon

    def rules(self) -> str:
        return "".join(self.owner.run(program, "-S") for program in ("iptables", "ip6tables"))


def reaches(machine: Machine, address: str) -> bool:
    """Whether a connection from *machine* to a service at *address* comes about."""
    dial = f"import socket; socket.create_connection(('{address}', 80), timeout=3)"
    done = subprocess.run([*machine.inside, sys.executable, "-c", dial], capture_output=True, check=False, timeout=30)
    return done.returncode == 0


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(tmp_path, stack)


def test_with_cap_net_admin_alone_they_are_set_seen_gone_after_a_flush_and_set_again(scene: Scene) -> None:
    before = scene.rules()
    daemon = scene.daemon()
    bridges = ("br-closed", "br-open")
    assert reaches(scene.closed, "172.29.1.1"), "without rules a workspace reaches this machine"
    assert reaches(scene.open, "10.9.0.2"), "and its owner's network"

    def all_is_as_it_should() -> None:
        assert daemon.do("look", *bridges) == ""
        assert not reaches(scene.closed, "172.29.1.1")
        assert not reaches(scene.closed, "10.9.0.1")
        assert not reaches(scene.open, "172.29.2.1")
        assert not reaches(scene.open, "10.9.0.2")
        assert reaches(scene.open, "203.0.113.2"), "the outside"

    assert daemon.do("apply", *bridges) == ""
    all_is_as_it_should()
    for flush in ("iptables -F", "iptables -F INPUT", "iptables -F DOCKER-USER", "ip6tables -F"):
        scene.owner.run(*flush.split())
        assert daemon.do("look", *bridges) != "", flush
        assert daemon.do("apply", *bridges) == ""
        all_is_as_it_should()
    # an owner's own rule before ours, that lets everything in
    scene.owner.run("iptables", "-I", "INPUT", "-j", "ACCEPT")
    assert reaches(scene.closed, "172.29.1.1")
    assert "not called first in INPUT" in daemon.do("look", *bridges)
    assert daemon.do("apply", *bridges) == ""
    all_is_as_it_should()
    scene.owner.run("iptables", "-D", "INPUT", "-j", "ACCEPT")
    # all of it, chains and all
    scene.owner.run("iptables", "-F")
    scene.owner.run("iptables", "-X")
    assert "is gone" in daemon.do("look", *bridges)
    assert daemon.do("apply", *bridges) == ""
    all_is_as_it_should()
    for rule in ("-N DOCKER-USER", "-A DOCKER-USER -j RETURN", "-I FORWARD -j DOCKER-USER"):
        scene.owner.run("iptables", *rule.split())
    assert daemon.do("look", *bridges) != ""
    assert daemon.do("apply", *bridges) == ""
    all_is_as_it_should()
    daemon.do("remove", *bridges)
    assert scene.rules() == before


def test_at_no_moment_is_there_half_of_them(scene: Scene) -> None:
    daemon = scene.daemon()
    assert daemon.do("apply", "br-closed", "br-open") == ""
    # one that dials again and again while the rules are made anew and anew
    dial = (
        "import socket, sys\nprint('up', flush=True)\nwon = tries = 0\n"
        "import select\n"
        "while not select.select([sys.stdin], [], [], 0)[0]:\n"
        "    tries += 1\n"
        "    try: socket.create_connection(('172.29.1.1', 80), timeout=0.05); won += 1\n"
        "    except OSError: pass\n"
        "print(won, tries)"
    )
    with subprocess.Popen(
        [*scene.closed.inside, sys.executable, "-c", dial], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as dialler:
        assert dialler.stdout is not None
        assert dialler.stdout.readline() == "up\n"
        for number in range(60):
            assert daemon.do("apply", "br-closed", *(["br-open"] if number % 2 else [])) == ""
        said, _ = dialler.communicate("\n")
    won, tries = (int(word) for word in said.split())
    assert tries > 60
    assert won == 0


def test_without_the_privilege_it_says_so_and_sets_nothing(scene: Scene) -> None:
    before = scene.rules()
    daemon = scene.daemon(WITHOUT_PRIVILEGES)
    assert daemon.do("apply", "br-closed").startswith("unavailable: ")
    assert daemon.do("look", "br-closed").startswith("unavailable: ")
    daemon.do("remove", "br-closed", "br-open")
    assert scene.rules() == before
