"""`scripts/gpu-check` without a GPU: against the library that answers from a file, and a load on a synthetic device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ngpu_node.gpus.inventory import Gpu
from tests.support.fake_nvml import FakeNvml
from tests.support.scripted_driver import reading
from tests.support.synthetic_gpu import SyntheticGpu, _union

SCRIPT = Path(__file__).parents[3] / "scripts" / "gpu-check"
QUICK = ("--skip", "metering", "challenge", "container")


def check(machine: FakeNvml, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, **machine.environment()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.needs_gcc
@pytest.mark.parametrize(
    ("code", "readings", "driver", "words"),
    [
        (0, {}, {}, "ok       health     well; 40 °C of 89"),
        (1, {"ecc_uncorrected": 3}, {}, "FAILED   health     3 uncorrectable memory errors"),
        (1, {"error": 15}, {}, "FAILED   inventory  GPU 1: the GPU has fallen off the bus"),
        (2, {}, {"init": 9}, "FAILED   inventory  the NVIDIA driver is installed but not loaded"),
        (2, {}, {"count": 2**32 - 1}, "more than any machine holds"),
    ],
    ids=["well", "memory errors", "one is lost", "no driver", "absurd"],
)
def test_its_exit_code_is_its_verdict(
    tmp_path: Path, code: int, readings: dict[str, Any], driver: dict[str, Any], words: str
) -> None:
    machine = FakeNvml(tmp_path / "nvml", gpus=2)
    machine.set(1, **readings)
    machine.set_machine(**driver)
    done = check(machine, *QUICK)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout
    assert done.stdout.splitlines()[-1].startswith("note     result")


@pytest.mark.needs_gcc
def test_its_json_says_what_it_prints_and_what_cannot_be_checked_is_left_out(tmp_path: Path) -> None:
    machine = FakeNvml(tmp_path / "nvml")
    done = check(machine, "--skip", "container", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert (done.returncode, found["exit"]) == (0, 0), done.stdout + done.stderr
    assert [f"{line['verdict']:<8} {line['check']:<10} {line['text']}" for line in found["lines"]] == (
        done.stdout.splitlines()
    )
    by_check = {line["check"]: line["verdict"] for line in found["lines"]}
    assert (by_check["metering"], by_check["challenge"]) == ("skipped", "skipped")
    assert found["machine"]["cores"] >= 1
    alone = check(machine, *QUICK, "--json", "-")
    assert json.loads(alone.stdout)["exit"] == 0


# -- the load ----------------------------------------------------------------------------------------------------------


class LiveGpu(SyntheticGpu):
    """The synthetic device on this machine's clocks, with work that is added while it runs."""

    def __init__(self) -> None:
        super().__init__([])
        self._wall_less_now_us = (time.time_ns() - time.monotonic_ns()) // 1000

    @property  # type: ignore[override]
    def now_us(self) -> int:
        return time.monotonic_ns() // 1000

    @now_us.setter
    def now_us(self, value: int) -> None: ...

    def wall_us(self, at_us: int | None = None) -> int:
        return self._wall_less_now_us + (self.now_us if at_us is None else at_us)

    def add(self, begin_us: int, end_us: int, pid: int) -> None:
        self.work = sorted([*self.work, (begin_us, end_us, pid)])
        self._busy = _union([(begin, end) for begin, end, _ in self.work])


class FakeLoad:
    """What `gpu-check --work` is to the check: a process that works as planned and says when; at most 1 s at a time."""

    gpu: LiveGpu

    def __init__(self, uuid: str) -> None:
        self._process = subprocess.Popen(["sleep", "300"])
        self.about = {"pid": self._process.pid, "library": "none", "product_s": 0.001}

    def do(self, plan: list[list[Any]]) -> list[tuple[float, float]]:
        busy, at_us = [], self.gpu.now_us
        for what, seconds in plan:
            end_us = at_us + int(1e6 * min(seconds, 1.0))
            if what == "product":
                self.gpu.add(at_us, end_us, self._process.pid)
                busy.append((at_us / 1e6, end_us / 1e6))
            if what == "end":
                self.gpu.alive[self._process.pid] = (0, at_us)
            at_us = end_us
        time.sleep(max(0.0, (at_us - self.gpu.now_us) / 1e6))
        if plan[-1][0] == "end":
            self.stop()
        return busy

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    spec = spec_from_loader("gpu_check", SourceFileLoader("gpu_check", str(SCRIPT)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "Worker", FakeLoad)
    yield module
    sys.path[:] = path


@pytest.mark.timeout_s(90)
def test_a_known_load_is_metered_also_of_processes_that_end_and_the_cost_is_said(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeLoad.gpu = LiveGpu()
    steady: Any = ("steady, 1 s", [["product", 1.0]], None)
    pairs: Any = (
        "4 tasks of 300 ms",
        [["product", 0.2], ["rest", 0.1]] * 4,
        [(n * 0.3, n * 0.3 + 0.3) for n in range(4)],
    )
    monkeypatch.setattr(script, "PLANS", [pairs, steady])
    report = script.Report(quiet=True)
    script.check_metering(report, FakeLoad.gpu, Gpu(reading(0), 1))
    said = [(line["verdict"], line["text"].partition(":")[0]) for line in report.lines]
    assert said == [
        ("ok", "4 tasks of 300 ms"),
        ("ok", "steady, 1 s"),
        ("ok", "3 processes of 3.9 s that end while busy"),
        said[3],
        ("ok", "steady, 1 s"),
        said[5],
    ], [line["text"] for line in report.lines]
    # what the driver takes is known on a real card only
    assert [words for _, words in (said[3], said[5])] == ["nvml-process", "nvml-device"]
