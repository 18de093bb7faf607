"""What `scripts/gpu-trial` counts, what its load takes, and what it says where there is nothing to try."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.gpu_trial.__main__ import PATTERNS, _covered
from examples.gpu_trial.gpu_load.__main__ import MAX_PLAN_S, read_plan
from tests.support import stand_in_runtime

ROOT = Path(__file__).resolve().parents[3]


def trial(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "examples.gpu_trial", "--json", "-"], cwd=ROOT, capture_output=True, text=True,
        timeout=60, check=False, env={**os.environ, "DOCKER_HOST": "unix:///nowhere.sock", **environment},
    )  # fmt: skip


def test_time_that_several_tasks_worked_counts_once() -> None:
    assert _covered([(0.0, 6.0), (2.0, 4.0), (7.0, 8.0)]) == 7.0
    assert _covered([]) == 0.0


def test_every_pattern_is_one_that_the_load_takes() -> None:
    for _, calls in PATTERNS:
        for _, plan in calls:
            assert read_plan(json.dumps({"plan": plan}).encode()) == plan


@pytest.mark.parametrize(
    "body",
    [
        b"{}", b"[]", b"\xff", b'{"plan": 3}', b'{"plan": [["busy"]]}', b'{"plan": [["dance", 1]]}',
        b'{"plan": [["busy", -1]]}', b'{"plan": [["busy", NaN]]}', f'{{"plan": [["rest", {MAX_PLAN_S + 1}]]}}'.encode(),
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"plan|step"):
        read_plan(body)


def test_without_an_engine_it_says_so_and_ends_with_2() -> None:
    run = trial()
    assert run.returncode == 2, run.stderr
    said = json.loads(run.stdout)
    assert said["exit"] == 2
    assert "no container engine answers" in said["lines"][-1]["text"]


def bundle(**environment: str) -> dict[str, Any]:
    env = [f"{name}={value}" for name, value in environment.items()]
    return {"process": {"env": env}, "linux": {}, "mounts": []}


def test_the_stand_in_runtime_changes_only_containers_that_were_given_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not stand_in_runtime.wants_gpus(bundle(PATH="/bin"))
    assert not stand_in_runtime.wants_gpus(bundle(NVIDIA_VISIBLE_DEVICES="void"))
    told = bundle(NVIDIA_VISIBLE_DEVICES="GPU-1")
    assert stand_in_runtime.wants_gpus(told)
    monkeypatch.setattr(stand_in_runtime.glob, "glob", lambda pattern: ["/dev/null"])
    monkeypatch.setenv("STAND_IN_MOUNTS", "/opt/packages")
    stand_in_runtime.add_gpus(told)
    assert told["linux"]["devices"][0] == {
        "path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666, "uid": 0, "gid": 0,
    }  # fmt: skip
    assert told["linux"]["resources"]["devices"] == [
        {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rw"}
    ]
    assert "/opt/packages" in [mount["source"] for mount in told["mounts"]]
    assert "PYTHONPATH=/opt/packages" in told["process"]["env"]
