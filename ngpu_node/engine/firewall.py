"""What the machine's packet filter must say about workspaces' networks, and how it is told.

An internal network of Docker's has no way out, but its gateway is this machine: a workspace could reach every service
here that listens on all addresses. And a network with a way out leads into the owner's own network too. So, for each
bridge of this node:

    to this machine           new connections are refused (INPUT), IPv4 and IPv6
    through this machine      for a network with egress: into private, shared, link-local and other special ranges
                              refused (DOCKER-USER, which Docker asks before its own rules); all of IPv6, which
                              Docker's networks do not carry anyway

Connections the node makes to a workspace, and their answers, are not touched. The rules live in chains of this node's
own, made anew at each start and removed at its end; nothing of anybody else's is changed. They want root or
CAP_NET_ADMIN: where they cannot be had, `apply` says so, and what depends on them is refused (`networks`).

The rules are pure (`wanted`), the shell runs `iptables`.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
import trio

log = structlog.get_logger(__name__)

#: Where a workspace with egress has no business (RFC 6890: special-purpose addresses, and multicast).
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
COMMAND_TIMEOUT_S = 10
_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of ours.

    Attributes:
        program: `iptables` or `ip6tables`.
        hook: the chain it is called from; *bridges* are the interfaces it is called for.
        rules: its content.
    """

    program: str
    name: str
    hook: str
    bridges: tuple[str, ...]
    rules: tuple[tuple[str, ...], ...]


_ANSWERS = ("-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "RETURN")
_REFUSE = ("-j", "REJECT")


def wanted(mark: str, closed: str, open_: str | None) -> list[Chain]:
    """Return the chains for the node *mark*: *closed* is its internal bridge, *open_* the one with egress."""
    bridges = (closed,) if open_ is None else (closed, open_)
    here = (_ANSWERS, _REFUSE)
    chains = [
        Chain("iptables", f"NGPU-{mark}-HOST", "INPUT", bridges, here),
        Chain("ip6tables", f"NGPU-{mark}-HOST", "INPUT", bridges, here),
    ]
    if open_ is not None:
        through = (_ANSWERS, *(("-d", range_, *_REFUSE) for range_ in SPECIAL_RANGES))
        chains += [
            Chain("iptables", f"NGPU-{mark}-OUT", "DOCKER-USER", (open_,), through),
            Chain("ip6tables", f"NGPU-{mark}-OUT", "FORWARD", (open_,), here),
        ]
    return chains


class FirewallUnavailable(Exception):
    """The packet filter cannot be told; the message says why, and what would help."""


class Firewall:
    """The chains of one node, as they are in force; `apply` and `remove` are idempotent."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._is_set = False
        self._turn = trio.Lock()

    async def apply(self, closed: str, open_: str | None) -> None:
        """Put the rules in force.

        Raises:
            FirewallUnavailable: they are not in force.
        """
        async with self._turn:
            chains = wanted(self._mark, closed, open_)
            await trio.to_thread.run_sync(_apply, chains)
            self._is_set = True

    async def remove(self, closed: str, open_: str) -> None:
        """Take the rules away again, as far as that is possible, with those an earlier run left for *open_*."""
        async with self._turn:
            if self._is_set:
                self._is_set = False
                await trio.to_thread.run_sync(_remove, wanted(self._mark, closed, open_))


def _apply(chains: Sequence[Chain]) -> None:
    for chain in chains:
        # a machine without IPv6 has nothing to refuse there
        if chain.program == "ip6tables" and not _answers("ip6tables"):
            continue
        if _run(chain.program, "-n", "-L", chain.name) is not None:
            _must(chain.program, "-N", chain.name)
        else:
            _must(chain.program, "-F", chain.name)
        for rule in chain.rules:
            _must(chain.program, "-A", chain.name, *rule)
        for bridge in chain.bridges:
            jump = (chain.hook, "-i", bridge, "-j", chain.name)
            # first, before whatever accepts: taken out and put in again, since others may have come before it
            while _run(chain.program, "-D", *jump) is None:
                pass
            _must(chain.program, "-I", *jump)


def _remove(chains: Sequence[Chain]) -> None:
    for chain in chains:
        for bridge in chain.bridges:
            while _run(chain.program, "-D", chain.hook, "-i", bridge, "-j", chain.name) is None:
                pass
        _run(chain.program, "-F", chain.name)
        _run(chain.program, "-X", chain.name)


def _answers(program: str) -> bool:
    return _run(program, "-n", "-L", "INPUT") is None


def _must(program: str, *arguments: str) -> None:
    problem = _run(program, *arguments)
    if problem is not None:
        raise FirewallUnavailable(problem)


def _run(program: str, *arguments: str) -> str | None:
    """Return why the command failed, None if it did not."""
    path = shutil.which(program, path=_PATH)
    if path is None:
        return f"{program} is not installed"
    try:
        done = subprocess.run(
            [path, "-w", "5", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program}: {error}"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[0] if lines else f"{program} ended with {done.returncode}"
