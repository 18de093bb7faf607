"""Both daemons refuse to start, in one line and before anything listens, when their operator must act first."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
import typer
from typer.testing import CliRunner, Result

import ngpu_bootstrap.cli
import ngpu_node.cli
from ngpu_daemon.datadir import DataDirectory

ROOT = Path(__file__).parents[3]

bound: list[object] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.bind":
        bound.append(arguments[1])


sys.addaudithook(_audit)


@dataclass(frozen=True)
class Place:
    """One daemon's command and an initialised data directory for it."""

    app: typer.Typer
    prefix: str
    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def call(self, *arguments: str) -> Result:
        return CliRunner().invoke(self.app, arguments)

    def init(self) -> Result:
        place = ("--data-dir", str(self.data), "--passphrase-file", str(self.folder / "passphrase"))
        return self.call("init", *place, "--kdf", "light", "--json")

    def run(self, *more: str, passphrase: str = "passphrase", listen: str = "/ip4/127.0.0.1/tcp/0") -> Result:
        bound.clear()
        place = ("--data-dir", str(self.data), "--passphrase-file", str(self.folder / passphrase))
        return self.call("run", *place, "--network", "local", "--listen", listen, *more)


@pytest.fixture(params=[(ngpu_node.cli.app, "NGPU_NODE_"), (ngpu_bootstrap.cli.app, "NGPU_BOOTSTRAP_")])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("NGPU_NODE_ENGINE", "none")  # with one, the node tries out its network before it listens
    root = logging.getLogger()
    handlers, level, last_resort = root.handlers[:], root.level, logging.lastResort
    for name, passphrase in (("passphrase", "secret\n"), ("other", "hunter2\n")):
        (tmp_path / name).write_text(passphrase)
        (tmp_path / name).chmod(0o600)
    place = Place(*request.param, tmp_path)
    assert place.init().exit_code == 0
    yield place
    structlog.reset_defaults()
    root.handlers[:], logging.lastResort = handlers, last_resort
    root.setLevel(level)


def refused(result: Result, message: str) -> None:
    assert (result.exit_code, result.stdout, bound) == (1, "", [])
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "hunter2" not in line


def test_a_wrong_passphrase(place: Place) -> None:
    refused(place.run(passphrase="other"), "the passphrase does not open the keystore")


def test_no_passphrase(place: Place) -> None:
    refused(place.run(passphrase="none"), "cannot read the passphrase file")


def test_a_keystore_that_others_can_read(place: Place) -> None:
    (place.data / "keystore.json").chmod(0o644)
    refused(place.run(), "can be read by other users (mode 0644): chmod 600 it")


@pytest.mark.parametrize("content", [b"", b'{"version": 3, "crypto": {', b'{"version": 3, "crypto": []}', b"\x00\xff"])
def test_a_damaged_keystore(place: Place, content: bytes) -> None:
    (place.data / "keystore.json").write_bytes(content)
    refused(place.run(), "is damaged: ")


def test_no_keystore(place: Place) -> None:
    (place.data / "keystore.json").unlink()
    refused(place.run(), "run `init` first")


def test_a_data_directory_in_use(place: Place) -> None:
    with DataDirectory(place.data).lock():
        refused(place.run(), f"data directory {place.data} is in use by process ")


def test_an_unknown_key_in_the_file(place: Place) -> None:
    config = place.folder / "config.toml"
    config.write_text("drian_s = 3\n")
    refused(place.run("--config", str(config)), f'{config}: drian_s is not a known key; did you mean "drain_s"?')


def test_an_unknown_key_in_the_environment(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{place.prefix}DRIAN_S", "3")
    refused(place.run(), f"environment variable {place.prefix}DRIAN_S is not a known key")


@pytest.mark.parametrize("address", ["127.0.0.1:4001", "/ip4/127.0.0.1/tcp/port", "", "/ip4/hunter2/tcp/1"])
def test_a_multiaddr_that_is_none(place: Place, address: str) -> None:
    result = place.run(listen=address)
    assert (result.exit_code, bound) == (1, [])
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "listen" in line
    assert "/ip4" in line  # what one looks like


@pytest.mark.parametrize("package", ["ngpu_node", "ngpu_bootstrap"])
def test_the_command_runs_as_a_module(package: str) -> None:
    command = [sys.executable, "-m", package, "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    assert f"Usage: {package.replace('_', '-')} " in found.stdout


def test_a_port_that_is_taken_is_one_line(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = place.run(listen=f"/ip4/127.0.0.1/tcp/{port}")
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert str(port) in line


def test_the_sample_configuration_is_accepted(place: Place) -> None:
    config = place.folder / "config.toml"
    config.write_text(place.call("sample-config").stdout)
    assert config.read_text().count("# ") > 20
    # accepted, and what stops it is the next thing that is wrong
    refused(place.run("--config", str(config), passphrase="other"), "the passphrase does not open the keystore")


def test_init_names_the_peer_once(place: Place) -> None:
    result = place.init()
    assert result.exit_code == 1
    assert "exists already" in result.stderr
    stored = json.loads((place.data / "keystore.json").read_text())
    assert stored["version"] == 3
