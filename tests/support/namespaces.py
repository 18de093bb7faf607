"""Machines on a network, for tests: network namespaces with addresses, a NAT between, cables that are pulled.

Each namespace is a process of ours that sleeps in it, so all of it is gone when the test is; nothing of the machine's
own network is touched. Its `/etc/hosts` is a file of its own, so that names can be given and changed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

__all__ = ["Internet", "Machine", "internet"]


class Machine:
    """One namespace."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.hosts = folder / f"hosts-{name}"
        self.hosts.write_text("127.0.0.1 localhost\n")
        script = 'mount --bind "$1" /etc/hosts && ip link set lo up && echo ready && exec sleep infinity'
        self._process = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", script, "sh", str(self.hosts)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def inside(self) -> tuple[str, ...]:
        """What to put before a command that runs here."""
        return ("nsenter", f"--target={self.pid}", "--net", "--mount", f"--wd={Path.cwd()}", "--")

    def run(self, *command: str, check: bool = True) -> str:
        """Run *command* here and return what it printed."""
        done = subprocess.run([*self.inside, *command], capture_output=True, text=True, check=False, timeout=60)
        assert not check or done.returncode == 0, f"{self.name}: {command}: {done.stderr}"
        return done.stdout

    def name_host(self, name: str, address: str) -> None:
        """Have *name* resolve to *address* here."""
        self.hosts.write_text(f"127.0.0.1 localhost\n{address} {name}\n")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Internet:
    """A router, and what is plugged into it: machine number *n* has the network 198.18.n.0/24."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._count = 0
        self._plugs: dict[str, str] = {}
        self.machines: dict[str, Machine] = {}
        self.router = self._machine("router")
        self.router.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def _machine(self, name: str) -> Machine:
        machine = self.machines[name] = Machine(self._folder, name)
        self._stack.callback(machine.end)
        return machine

    def machine(self, name: str) -> tuple[Machine, str]:
        """Return a machine with an address everybody reaches."""
        machine = self._machine(name)
        self._count += 1
        network = f"198.18.{self._count}"
        plug = f"to-{name}"
        self._cable(self.router, plug, f"{network}.1/24", machine, "wan", f"{network}.2/24")
        machine.run("ip", "route", "add", "default", "via", f"{network}.1")
        self._plugs[name] = plug
        return machine, f"{network}.2"

    def behind_nat(self, name: str) -> tuple[Machine, Machine]:
        """Return a machine that can only dial out, and the NAT before it, which drops what nobody inside asked for."""
        nat, _ = self.machine(f"nat-{name}")
        machine = self._machine(name)
        self._cable(nat, "lan", "10.77.0.1/24", machine, "lan", "10.77.0.2/24")
        machine.run("ip", "route", "add", "default", "via", "10.77.0.1")
        nat.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        for rule in (
            "-t nat -A POSTROUTING -o wan -j MASQUERADE",
            "-P INPUT DROP",
            "-P FORWARD DROP",
            "-A FORWARD -i lan -j ACCEPT",
            "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
        ):
            nat.run("iptables", *rule.split())
        self._plugs[name] = self._plugs[nat.name]
        return machine, nat

    def wire(self, one: str, other: str) -> tuple[Machine, Machine]:
        """Return two machines, 10.88.0.1 and 10.88.0.2, with a cable between them and to nobody else."""
        left, right = self._machine(one), self._machine(other)
        self._cable(left, "wire", "10.88.0.1/24", right, "wire", "10.88.0.2/24")
        return left, right

    def pull(self, name: str) -> None:
        """Pull the cable of *name*: packets are lost, nobody is told."""
        # As a router that lost its line does: dropped on the way, without an error to either side.
        plug = self._plugs[name]
        for direction in ("-i", "-o"):
            self.router.run("iptables", "-A", "FORWARD", direction, plug, "-j", "DROP")

    def plug(self, name: str) -> None:
        """Put the cable of *name* back."""
        plug = self._plugs[name]
        for direction in ("-i", "-o"):
            self.router.run("iptables", "-D", "FORWARD", direction, plug, "-j", "DROP")

    @staticmethod
    def _cable(
        one: Machine, one_end: str, one_address: str, other: Machine, other_end: str, other_address: str
    ) -> None:
        one.run(*_words(f"ip link add {one_end} type veth peer name {other_end} netns {other.pid}"))
        for machine, end, address in ((one, one_end, one_address), (other, other_end, other_address)):
            machine.run("ip", "address", "add", address, "dev", end)
            machine.run("ip", "link", "set", end, "up")


def _words(command: str) -> Sequence[str]:
    return command.split()


@contextmanager
def internet(folder: Path) -> Iterator[Internet]:
    """Yield a network of machines, gone afterwards with all that runs on them in the foreground of the test."""
    with ExitStack() as stack:
        yield Internet(folder, stack)
