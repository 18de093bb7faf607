"""What the machine's packet filter must say about workspaces' networks, how it is told, and whether it still says so.

An internal network of Docker's has no way out, but its gateway is this machine: a workspace could reach every service
here that listens on all addresses. And a network with a way out leads into the owner's own network too. So, for each
bridge of this node:

    to this machine           new connections are refused (INPUT), IPv4 and IPv6
    through this machine      for a network with egress: into private, shared, link-local and other special ranges
                              refused (FORWARD, and DOCKER-USER, which Docker asks before its own rules); all of IPv6,
                              which Docker's networks do not carry anyway

Connections the node makes to a workspace, and their answers, are not touched. The rules live in chains of this node's
own, called before whatever else the hook says, and are removed at its end; nothing of anybody else's is changed. A set
of them is made by one `iptables-restore --noflush`, which is one transaction in the kernel: there is no moment with
half of them. Other programs flush the filter (`iptables -F`, a firewall's reload), so `look` compares what is there
with what was set; who looks, and what follows, is `networks`'.

The rules want root or CAP_NET_ADMIN: where they cannot be had, `apply` says so, and what depends on them is refused.

What there is to say is pure (`wanted`, `Listing`, `instructions`, `difference`); the shell runs the programs.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

# Where a workspace with egress has no business (RFC 6890: special-purpose addresses, and multicast).
SPECIAL_RANGES = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
)
IPV4, IPV6 = "iptables", "ip6tables"
COMMAND_TIMEOUT_S = 10
#: Between a look and the change that follows from it others may change something; then it is looked at again.
TRIES = 3
_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
_ADDRESSES6 = Path("/proc/net/if_inet6")
#: What every node's chains are called by, so that two nodes of one machine let each other be first.
_OURS = "NGPU-"
_DOCKERS = "DOCKER-USER"


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of ours.

    Attributes:
        program: `iptables` or `ip6tables`.
        hooks: the chains it is called from, those of them that are there.
        bridges: the interfaces it is called for.
        rules: its content.
    """

    program: str
    name: str
    hooks: tuple[str, ...]
    bridges: tuple[str, ...]
    rules: tuple[str, ...]


_ANSWERS = "-m conntrack --ctstate ESTABLISHED,RELATED -j RETURN"
_REFUSE = "-j REJECT"
#: What Docker leaves at the end of its users' own chain.
_ENDS = {"-j RETURN"}


def wanted(mark: str, closed: str, open_: str | None) -> list[Chain]:
    """Return the chains for the node *mark*: *closed* is its internal bridge, *open_* the one with egress."""
    bridges = (closed,) if open_ is None else (closed, open_)
    here = (_ANSWERS, _REFUSE)
    chains = [
        Chain(IPV4, f"{_OURS}{mark}-HOST", ("INPUT",), bridges, here),
        Chain(IPV6, f"{_OURS}{mark}-HOST", ("INPUT",), bridges, here),
    ]
    if open_ is not None:
        through = (_ANSWERS, *(f"-d {range_} {_REFUSE}" for range_ in SPECIAL_RANGES))
        chains += [
            # From both: Docker puts rules before ours into FORWARD whenever a network is made, and what it asks first
            # of all, its users' own chain, is asked no more once somebody has flushed FORWARD.
            Chain(IPV4, f"{_OURS}{mark}-OUT", ("FORWARD", _DOCKERS), (open_,), through),
            Chain(IPV6, f"{_OURS}{mark}-OUT", ("FORWARD",), (open_,), here),
        ]
    return chains


@dataclass(frozen=True, slots=True)
class Listing:
    """The filter table as `iptables -S` shows it: for each chain the rules in it, in order."""

    chains: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, text: str) -> Listing:
        """Read what the program printed."""
        chains: dict[str, list[str]] = {}
        for line in text.splitlines():
            kind, _, rest = line.strip().partition(" ")
            name, _, rule = rest.partition(" ")
            if kind in ("-P", "-N"):
                chains.setdefault(name, [])
            elif kind == "-A":
                chains.setdefault(name, []).append(rule)
        return cls({name: tuple(rules) for name, rules in chains.items()})

    def hooks_of(self, chain: Chain) -> list[str]:
        """Return where *chain* is to be called from here."""
        return [hook for hook in chain.hooks if hook in self.chains]

    def first_in(self, hook: str) -> list[str]:
        """Return the rules of nodes' that *hook* asks before any others."""
        first: list[str] = []
        for rule in self.chains.get(hook, ()):
            if rule == f"-j {_DOCKERS}":
                ours = self.first_in(_DOCKERS)
                first += ours
                if len(ours) == len(self.chains.get(_DOCKERS, ())) or set(self.chains[_DOCKERS][len(ours) :]) == _ENDS:
                    continue  # it says no more than that
                break
            if not rule.partition("-j ")[2].startswith(_OURS):
                break
            first.append(rule)
        return first

    def calls(self, name: str) -> Iterable[tuple[str, str]]:
        """Yield each rule that goes to the chain *name*, with the chain it is in."""
        for place, rules in self.chains.items():
            for rule in rules:
                if rule.endswith(f"-j {name}"):
                    yield place, rule


def instructions(chains: Sequence[Chain], listing: Listing) -> str:
    """Return what `iptables-restore --noflush` must be told so that *chains*, all of one program, are in force.

    A chain that is declared is emptied where it exists. Calls of it, wherever they are, are taken out and put in again
    as the first rules of their hook, since others may have come before them.
    """
    lines = ["*filter", *(f":{chain.name} - [0:0]" for chain in chains)]
    for chain in chains:
        lines += [f"-A {chain.name} {rule}" for rule in chain.rules]
        lines += [f"-D {place} {rule}" for place, rule in listing.calls(chain.name)]
        lines += [f"-I {hook} 1 {_call(chain, bridge)}" for hook in listing.hooks_of(chain) for bridge in chain.bridges]
    return "\n".join([*lines, "COMMIT", ""])


def removal(chains: Sequence[Chain], listing: Listing) -> str:
    """Return what it must be told so that nothing of *chains* is left; empty where nothing is."""
    there = [chain for chain in chains if chain.name in listing.chains]
    if not there:
        return ""
    lines = ["*filter"]
    for chain in there:
        lines += [f"-D {place} {rule}" for place, rule in listing.calls(chain.name)]
    for chain in there:
        lines += [f"-F {chain.name}", f"-X {chain.name}"]
    return "\n".join([*lines, "COMMIT", ""])


def difference(chains: Sequence[Chain], listing: Listing, set_: Mapping[str, tuple[str, ...]]) -> str:
    """Return what keeps *chains* from being in force, in words; empty when they are.

    Args:
        set_: the content of each chain as it was listed once it had been set: programs spell rules their own way.
    """
    for chain in chains:
        if chain.name not in listing.chains:
            return f"the chain {chain.name} is gone"
        if listing.chains[chain.name] != set_.get(chain.name):
            return f"the rules in {chain.name} are others"
        for hook in listing.hooks_of(chain):
            first = listing.first_in(hook)
            for bridge in chain.bridges:
                if _call(chain, bridge) not in first:
                    return f"{chain.name} is not called first in {hook} for {bridge}"
    return ""


def _call(chain: Chain, bridge: str) -> str:
    return f"-i {bridge} -j {chain.name}"


class FirewallUnavailable(Exception):
    """The packet filter cannot be told; the message says why, and what would help."""


class Firewall:
    """The chains of one node; `apply` and `remove` are idempotent."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._is_set = False
        self._set: dict[str, dict[str, tuple[str, ...]]] = {}
        self._turn = trio.Lock()

    async def apply(self, closed: str, open_: str | None) -> None:
        """Put the rules in force.

        Raises:
            FirewallUnavailable: they are not in force.
        """
        async with self._turn:
            self._set = await trio.to_thread.run_sync(_apply, wanted(self._mark, closed, open_))
            self._is_set = True

    async def look(self, closed: str, open_: str | None) -> str:
        """Return what keeps the rules from being in force, in words; empty when they are.

        Raises:
            FirewallUnavailable: the packet filter cannot be read.
        """
        async with self._turn:
            return await trio.to_thread.run_sync(_look, wanted(self._mark, closed, open_), self._set)

    async def remove(self, closed: str, open_: str) -> None:
        """Take the rules away again, as far as that is possible, with those an earlier run left for *open_*."""
        async with self._turn:
            if self._is_set:
                self._is_set = False
                await trio.to_thread.run_sync(_remove, wanted(self._mark, closed, open_))


# -- the shell ---------------------------------------------------------------------------------------------------------


def _by_program(chains: Sequence[Chain]) -> dict[str, list[Chain]]:
    found: dict[str, list[Chain]] = {}
    for chain in chains:
        # a machine without IPv6 has nothing to refuse there
        if chain.program == IPV4 or _has_ipv6():
            found.setdefault(chain.program, []).append(chain)
    return found


def _has_ipv6() -> bool:
    try:
        return bool(_ADDRESSES6.read_text().strip())
    except OSError:
        return False


def _apply(chains: Sequence[Chain]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Set *chains* and return how each came to be listed, by program."""
    return {program: _set_all(program, some) for program, some in _by_program(chains).items()}


def _set_all(program: str, chains: Sequence[Chain]) -> dict[str, tuple[str, ...]]:
    for number in range(TRIES):
        try:
            _run(f"{program}-restore", "--noflush", "-w", "5", say=instructions(chains, _list(program)))
            break
        except FirewallUnavailable:
            if number == TRIES - 1:
                raise
    now = _list(program).chains
    found = {chain.name: now.get(chain.name, ()) for chain in chains}
    for chain in chains:
        if len(found[chain.name]) != len(chain.rules):
            raise FirewallUnavailable(f"{program} did not keep the rules of {chain.name}")
    return found


def _look(chains: Sequence[Chain], set_: Mapping[str, Mapping[str, tuple[str, ...]]]) -> str:
    for program, some in _by_program(chains).items():
        if found := difference(some, _list(program), dict(set_.get(program, {}))):
            return f"{program}: {found}"
    return ""


def _remove(chains: Sequence[Chain]) -> None:
    for program, some in _by_program(chains).items():
        for _ in range(TRIES):
            try:
                if text := removal(some, _list(program)):
                    _run(f"{program}-restore", "--noflush", "-w", "5", say=text)
                break
            except FirewallUnavailable:
                continue


def _list(program: str) -> Listing:
    return Listing.of(_run(program, "-w", "5", "-S"))


def _run(program: str, *arguments: str, say: str | None = None) -> str:
    """Return what the command printed.

    Raises:
        FirewallUnavailable: it failed, with its first words.
    """
    path = shutil.which(program, path=_PATH)
    if path is None:
        raise FirewallUnavailable(f"{program} is not installed")
    try:
        done = subprocess.run(
            [path, *arguments],
            # nothing to say: /dev/null, since the daemon's own standard input is nobody's business
            input=say or "",
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FirewallUnavailable(f"{program}: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise FirewallUnavailable(lines[0][:300] if lines else f"{program} ended with {done.returncode}")
    return done.stdout
