"""The units say what systemd understands, keep the daemons in a sandbox, and explain every line of it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[3] / "systemd"
NAMES = ["ngpu-node", "ngpu-bootstrap"]
MAX_EXPOSURE = 30  # tenths: systemd's own scale, 0 is best


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False)


def directives(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (UNITS / f"{name}.service").read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_systemd_has_no_complaint(name: str, tmp_path: Path) -> None:
    # verify wants the program to be there; an unknown directive only warns, so the words count and not the exit code
    program = tmp_path / name
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / f"{name}.service"
    text = (UNITS / unit.name).read_text()
    assert f"/opt/ngpu/bin/{name}" in text
    unit.write_text(text.replace(f"/opt/ngpu/bin/{name}", str(program)))
    result = analyze("verify", str(unit))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_the_sandbox_is_tight(name: str) -> None:
    result = analyze("security", "--offline=true", f"--threshold={MAX_EXPOSURE}", str(UNITS / f"{name}.service"))
    assert result.returncode == 0, result.stdout[-500:]
    exposure = re.search(r"exposure level for \S+: (\d+\.\d+)", result.stdout)
    assert exposure is not None
    assert float(exposure[1]) < MAX_EXPOSURE / 10


@pytest.mark.parametrize("name", NAMES)
def test_systemd_is_told_about_start_health_and_secrets(name: str) -> None:
    unit = directives(name)
    role = name.removeprefix("ngpu-")
    assert unit["Type"] == ["notify"]
    assert int(unit["WatchdogSec"][0]) > 0
    assert unit["LoadCredential"] == [f"passphrase:/etc/ngpu/{role}.passphrase"]
    assert unit["StateDirectory"] == [name]
    assert unit["Environment"] == [f"NGPU_{role.upper()}_DATA_DIR=/var/lib/{name}"]
    assert not any("passphrase" in value for value in unit["Environment"] + unit["ExecStart"])


def test_the_node_reaches_the_gpus_and_the_engine() -> None:
    unit = directives("ngpu-node")
    assert "PrivateDevices" not in unit
    assert unit["DeviceAllow"] == ["char-nvidia* rw"]
    assert unit["SupplementaryGroups"] == ["docker"]
    assert "PrivateUsers" not in unit
    assert "ProcSubset" not in unit
    assert "AF_UNIX" in unit["RestrictAddressFamilies"][0]


def test_the_node_may_tell_the_packet_filter_and_has_no_other_privilege() -> None:
    # that this is enough, and needed: tests/integration/netns/test_firewall.py
    unit = directives("ngpu-node")
    assert unit["AmbientCapabilities"] == unit["CapabilityBoundingSet"] == ["CAP_NET_ADMIN"]
    assert "AF_NETLINK" in unit["RestrictAddressFamilies"][0]
    assert "PrivateNetwork" not in unit
    other = directives("ngpu-bootstrap")
    assert other["AmbientCapabilities"] == other["CapabilityBoundingSet"] == [""]


@pytest.mark.parametrize("name", NAMES)
def test_a_stopping_daemon_gets_longer_than_its_grace(name: str) -> None:
    assert int(directives(name)["TimeoutStopSec"][0]) > 120
    assert directives(name)["KillMode"] == ["mixed"]


@pytest.mark.parametrize("name", NAMES)
def test_every_line_of_the_service_has_its_reason(name: str) -> None:
    lines = (UNITS / f"{name}.service").read_text().split("[Service]\n")[1].split("[Install]")[0].splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line and not line.startswith("#"):
            assert before, f"{line} stands alone: say why above it"
