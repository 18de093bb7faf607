"""A whole network on this machine: a bootstrap and nodes, each a process with a fresh key and its own data directory.

Uses the daemons as an operator does: their commands, configuration files, passphrase files and HTTP interfaces, and
nothing of their insides. The demonstration and the benchmark both stand on it.

Whoever starts a `LocalNetwork` stops it; it stops exactly the processes it started.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx

from .processes import Process, StartError

NETWORK = "local"
SERVICE = "demo"
PROJECT, MODEL = "ngpu-examples", "chat"
COMMAND_TIMEOUT_S = 60.0
START_TIMEOUT_S = 60.0
READY_TIMEOUT_S = 120.0
SAME_TROUBLE_TIMES = 4

Say = Callable[[str], None]


class CommandFailed(Exception):
    """A command of the daemons failed; the message holds what it said."""


@dataclass(slots=True)
class Peer:
    """One daemon's identity and place."""

    name: str
    address: str
    peer_id: str
    folder: Path
    process: Process | None = None


@dataclass(slots=True)
class NodePeer(Peer):
    """A node, with the port model servers register on."""

    model_port: int = 0
    model_server: Process | None = field(default=None)


@dataclass(frozen=True, slots=True)
class Workspace:
    """A workspace that was added: its public id, and the token its clients send."""

    id: str
    token: str = field(repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """What a client sends."""
        return {"Authorization": f"Bearer {self.token}"}


PeerT = TypeVar("PeerT", bound=Peer)


class LocalNetwork:
    """A bootstrap and *nodes* nodes below *folder*.

    Args:
        folder: a directory of its own, made here; keys, databases and logs go below it.
        nodes: how many.
        docker: whether the nodes use the engine.
        say: told what happens.
        slots: tasks each node runs at once.
        node_config: TOML tables that each node's configuration has beside what is wanted for the network.
        bootstrap_config: such tables of the bootstrap's.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int,
        docker: bool,
        say: Say,
        slots: int = 16,
        node_config: str = "",
        bootstrap_config: str = "",
    ) -> None:
        self.folder = folder
        self._count = nodes
        self._docker = docker
        self._say = say
        self._slots = slots
        self._more_node_config = node_config
        self._more_bootstrap_config = bootstrap_config
        self._http_port = free_port()
        self._p2p_port = free_port()
        self.bootstrap: Peer | None = None
        self.nodes: list[NodePeer] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where clients reach the bootstrap."""
        return f"http://127.0.0.1:{self._http_port}"

    @property
    def processes_in_stopping_order(self) -> list[Process]:
        """Every process: nodes first, so that they can take leave of the bootstrap."""
        servers = [node.model_server for node in self.nodes if node.model_server]
        bootstraps = [self.bootstrap.process] if self.bootstrap and self.bootstrap.process else []
        return [node.process for node in self.nodes if node.process] + servers + bootstraps

    def start(self) -> None:
        """Make the keys and start the daemons; returns once the bootstrap is ready, with its nodes connected.

        Raises:
            CommandFailed, StartError: with what was said last.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._say(f"making {self._count + 1} account keys")
        with ThreadPoolExecutor() as pool:
            first = pool.submit(self._make_peer, "bootstrap", Peer)
            others = [pool.submit(self._make_peer, f"node-{number + 1}", NodePeer) for number in range(self._count)]
            bootstrap = self.bootstrap = first.result()
            self.nodes = [other.result() for other in others]
        self._say("starting the bootstrap")
        bootstrap.process = self._start_daemon(bootstrap, "ngpu-bootstrap", self._bootstrap_config())
        bootstrap.process.wait_until(lambda: self._answers("/health"), START_TIMEOUT_S, "did not answer /health")
        multiaddr = f"/ip4/127.0.0.1/tcp/{self._p2p_port}/p2p/{bootstrap.peer_id}"
        for node in self.nodes:
            self._say(f"starting {node.name} ({node.address})")
            node.model_port = free_port()
            node.process = self._start_daemon(node, "ngpu-node", self._node_config(node, multiaddr))
        bootstrap.process.wait_until(self._all_connected, START_TIMEOUT_S, "did not see every node connected")

    def restart_bootstrap(self, more_config: str) -> None:
        """Stop the bootstrap and start it with *more_config* besides; returns once its nodes are connected again."""
        bootstrap = self.bootstrap
        assert bootstrap is not None
        assert bootstrap.process is not None
        bootstrap.process.stop()
        self._more_bootstrap_config += more_config
        bootstrap.process = self._start_daemon(bootstrap, "ngpu-bootstrap", self._bootstrap_config())
        bootstrap.process.wait_until(self._all_connected, START_TIMEOUT_S, "did not see every node connected")

    def command(self, program: str, *arguments: str, peer: Peer, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run a command of one of the daemons, and return what it prints.

        Raises:
            CommandFailed: its exit code is not 0.
        """
        return run_command(program, [*arguments, "--config", str(peer.folder / "config.toml")], timeout_s)

    def add_workspace(self, specification: str) -> Workspace:
        """Add the workspace specified by a TOML text."""
        assert self.bootstrap is not None
        file = self.folder / "workspace.toml"
        file.write_text(specification)
        arguments = ["workspace", "add", "--file", str(file), "--json"]
        said = json.loads(self.command("ngpu-bootstrap", *arguments, peer=self.bootstrap))
        return Workspace(id=said["id"], token=said["token"])

    def start_model_servers(self, command: Callable[[int], Sequence[str]], cwd: Path, health_path: str) -> None:
        """Start one model server beside each node and register it there.

        Args:
            command: from a port to the program and its arguments.
            health_path: answers 200 once the server serves.
        """
        for node in self.nodes:
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            server = Process(f"model server of {node.name}", command(port), node.folder / "model-server.log", cwd=cwd)
            node.model_server = server
            server.wait_until(partial(answers, url + health_path), START_TIMEOUT_S, "did not answer")
            self.register_model_server(node, url)

    def register_model_server(self, node: NodePeer, url: str) -> None:
        """Register the server at *url* with *node*, as a model server does itself when it starts."""
        body = {"project": PROJECT, "model": MODEL, "api": url + "/v1/chat/completions", "type": 0, "cid": ""}
        answer = httpx.post(f"http://127.0.0.1:{node.model_port}/api/v0/ai/model/register", json=body, timeout=10)
        if answer.status_code != 200 or answer.json().get("code") != 0:
            raise CommandFailed(f"{node.name} did not take the registration: {answer.text[:300]}")

    def wait_deployed(self, workspace: Workspace) -> None:
        """Return once *workspace* is ready on every node.

        Raises:
            StartError: it is not in time, or a process ended; with what each node says.
        """
        assert self.bootstrap is not None
        assert self.bootstrap.process is not None
        before: list[str] = []
        seen: Counter[str] = Counter()

        def ready() -> bool:
            self.check()
            answer = httpx.get(f"{self.url}/api/v1/workspaces/{workspace.id}", headers=workspace.headers, timeout=10)
            deployments = answer.json()["deployments"] if answer.status_code == 200 else []
            now = [f"{entry['node']}: {entry['state']} {entry['detail']}".strip() for entry in deployments]
            for line in now:
                if line not in before:
                    seen[line] += 1
                    if seen[line] == 1:
                        self._say(line)
            before[:] = now
            states = [entry["state"] for entry in deployments]
            # A node tries again and again; what comes back unchanged will not mend itself while somebody watches.
            if "failed" in states or any(count > SAME_TROUBLE_TIMES for count in seen.values()):
                raise StartError("the workspace cannot be deployed: " + "; ".join(now))
            return states.count("ready") == len(self.nodes)

        self.bootstrap.process.wait_until(ready, READY_TIMEOUT_S, "saw no ready deployment on every node")

    def check(self) -> None:
        """Do nothing while every process runs; raise StartError with the end of its log when one has ended."""
        for process in self.processes_in_stopping_order:
            process.check()

    def stop(self) -> None:
        """Stop every process: nodes first, so that they can take leave of the bootstrap and remove their containers."""
        everything = self.processes_in_stopping_order
        nodes = sum(node.process is not None for node in self.nodes)
        for group in (everything[:nodes], everything[nodes:]):
            for process in group:
                process.ask_to_stop()
            for process in group:
                process.wait_stopped()

    # --- daemons ------------------------------------------------------------------------------------------------

    def _make_peer(self, name: str, kind: type[PeerT]) -> PeerT:
        folder = self.folder / name
        folder.mkdir()
        passphrase = folder / "passphrase"
        passphrase.touch(mode=0o600)
        passphrase.write_text(secrets.token_urlsafe(24) + "\n")
        program = "ngpu-bootstrap" if kind is Peer else "ngpu-node"
        # A light key derivation: these keys are thrown away in a minute.
        arguments = ["init", "--data-dir", str(folder / "data"), "--passphrase-file", str(passphrase), "--kdf", "light"]
        said = json.loads(run_command(program, [*arguments, "--json"]))
        return kind(name=name, address=said["nodeAddr"], peer_id=said["peerId"], folder=folder)

    def _start_daemon(self, peer: Peer, program: str, config: str) -> Process:
        file = peer.folder / "config.toml"
        file.write_text(config)
        arguments = ["run", "--config", str(file)]
        return Process(peer.name, [*installed_command(program), *arguments], peer.folder / "log", env={"NO_COLOR": "1"})

    def _bootstrap_config(self) -> str:
        assert self.bootstrap is not None
        folder = self.bootstrap.folder
        return (
            f"data_dir = {json.dumps(str(folder / 'data'))}\n"
            f"passphrase_file = {json.dumps(str(folder / 'passphrase'))}\n"
            f'network = "{NETWORK}"\n'
            f'service = "{SERVICE}"\n'
            f'listen = ["/ip4/127.0.0.1/tcp/{self._p2p_port}"]\n'
            f'http_listen = "127.0.0.1:{self._http_port}"\n'
            f"{self._more_bootstrap_config}"
        )

    def _node_config(self, node: NodePeer, multiaddr: str) -> str:
        return (
            f"data_dir = {json.dumps(str(node.folder / 'data'))}\n"
            f"passphrase_file = {json.dumps(str(node.folder / 'passphrase'))}\n"
            f'network = "{NETWORK}"\n'
            f'listen = ["/ip4/127.0.0.1/tcp/0"]\n'
            f'model_listen = "127.0.0.1:{node.model_port}"\n'
            f"slots = {self._slots}\n"
            f'engine = "{"docker" if self._docker else "none"}"\n'
            "\n"
            "[[bootstraps]]\n"
            f'multiaddrs = ["{multiaddr}"]\n'
            f'service = "{SERVICE}"\n'
            f"{self._more_node_config}"
        )

    def _answers(self, path: str) -> bool:
        return answers(self.url + path)

    def _all_connected(self) -> bool:
        self.check()
        try:
            answer = httpx.get(self.url + "/ready", timeout=5)
        except httpx.HTTPError:
            return False  # it has only just been started
        return answer.status_code == 200 and answer.json()["peers"] == len(self.nodes)


def answers(url: str) -> bool:
    """Return whether *url* answers 200."""
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def installed_command(name: str) -> list[str]:
    """Return how to run one of the daemons' commands in the running interpreter's environment."""
    script = Path(sys.executable).parent / name
    # A checkout that is only on the path has the packages and no scripts.
    return [str(script)] if script.exists() else [sys.executable, "-m", name.replace("-", "_")]


def run_command(name: str, arguments: Sequence[str], timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Run one of the daemons' commands to its end and return its standard output.

    Raises:
        CommandFailed: its exit code is not 0.
    """
    run = subprocess.run(
        [*installed_command(name), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "NO_COLOR": "1"},
        check=False,
    )
    if run.returncode != 0:
        raise CommandFailed(f"{name} {' '.join(arguments[:2])} failed: {(run.stderr or run.stdout).strip()[-1000:]}")
    return run.stdout


def free_port() -> int:
    """Return a TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


__all__ = ["CommandFailed", "LocalNetwork", "NodePeer", "Peer", "StartError", "answers", "free_port"]
