"""`scripts/gpu-check` without a GPU: against the library that answers from a file, and a load on a synthetic device."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
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
from tests.support.synthetic_gpu import SyntheticGpu

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
        (0, {}, {}, "ok       health     GPU 1: well; 40 °C of 89"),
        (1, {"ecc_uncorrected": 3}, {}, "FAILED   health     GPU 1: 3 uncorrectable memory errors"),
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


class VirtualHost:
    """The machine as the check has it, on the synthetic device's clock: nothing waits, nothing is late but as told.

    Attributes:
        late_s: how much longer than asked for every wait takes: for so long there was no core.
        skipped: of the work that a load is given, this part is not done, though the load says it was.
    """

    def __init__(self, gpu: SyntheticGpu, late_s: float = 0.0, skipped: float = 0.0) -> None:
        self.gpu = gpu
        self.late_s = late_s
        self.skipped = skipped
        self.loads = 0
        self._waited_s = 0.0

    def monotonic_ns(self) -> int:
        return self.gpu.now_us * 1000

    def wall_us(self) -> int:
        return self.gpu.wall_us()

    def cpu_s(self) -> float:
        return self.gpu.spent_us / 1e6

    def waited_for_a_core_s(self) -> float:
        return self._waited_s

    def lives(self, pid: int) -> bool:
        return self.gpu.is_alive(pid)

    def sleep(self, seconds: float) -> None:
        self.gpu.now_us += math.ceil(1e6 * (seconds + self.late_s))
        self._waited_s += self.late_s

    def load(self, uuid: str) -> VirtualLoad:
        self.loads += 1
        return VirtualLoad(self, 100 + self.loads)


class VirtualLoad:
    """What `gpu-check --work` is to the check: a process that works as planned and says when."""

    def __init__(self, host: VirtualHost, pid: int) -> None:
        self.about = {"pid": pid, "library": "none", "product_s": 0.001}
        self._host = host
        self._ends_us = 0
        self._busy: list[tuple[float, float]] = []

    def begin(self, plan: list[tuple[str, float]]) -> None:
        gpu, pid = self._host.gpu, self.about["pid"]
        self._busy, at_us = [], gpu.now_us
        for what, seconds in plan:
            end_us = at_us + int(1e6 * seconds)
            if what == "product":
                gpu.add(at_us, at_us + int((end_us - at_us) * (1 - self._host.skipped)), pid)
                self._busy.append((at_us / 1e6, end_us / 1e6))
            if what == "end":
                gpu.alive[pid] = (0, at_us)
            at_us = end_us
        self._ends_us = at_us

    def done(self, within_s: float) -> dict[str, Any] | None:
        gpu = self._host.gpu
        left_s = (self._ends_us - gpu.now_us) / 1e6
        self._host.sleep(min(within_s, max(0.0, left_s)))
        return {"busy": self._busy, "waited_s": 0.0} if gpu.now_us >= self._ends_us else None

    def stop(self) -> None: ...


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = spec_from_loader("gpu_check", SourceFileLoader("gpu_check", str(SCRIPT)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


def meter(script: ModuleType, host: VirtualHost) -> list[dict[str, Any]]:
    report = script.Report(quiet=True)
    script.check_metering(report, host.gpu, Gpu(reading(0), 1), host)
    lines: list[dict[str, Any]] = report.lines
    return lines


def test_a_known_load_is_metered_also_of_processes_that_end_and_the_cost_is_said(script: ModuleType) -> None:
    lines = meter(script, VirtualHost(SyntheticGpu([])))
    said = [(line["verdict"], line["text"].partition(": ")[0]) for line in lines]
    names = [name for name, _, _ in script.PLANS]
    names[2] = "step"
    assert said == [
        *(("ok", name) for name in names),
        ("ok", "3 processes of 3.9 s that end while busy"),
        ("ok", "nvml-process"),
        *(("ok", name) for name in names[1:4]),
        ("ok", "nvml-device"),
    ], [line["text"] for line in lines]
    assert all(line["true_s"] > 0.5 for line in lines[1:9])
    assert "sampling takes 0.3" in lines[9]["text"]


def test_a_metering_that_is_wrong_fails_and_one_on_a_machine_too_busy_to_look_is_not_judged(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "PLANS", script.PLANS[1:2] * 4)  # steady
    wrong = meter(script, VirtualHost(SyntheticGpu([]), skipped=0.2, late_s=0.001))
    assert [line["verdict"] for line in wrong[:4]] == ["FAILED"] * 4
    assert "this machine was" not in wrong[0]["text"]
    # the driver keeps 72 ticks of 200 ms: looks that come half a minute late find a part of them only
    late = meter(script, VirtualHost(SyntheticGpu([]), late_s=30.0))
    assert late[0]["verdict"] == "skipped", late[0]
    assert "this machine was too busy, the load and the looks waited 30.000 s for a core" in late[0]["text"]
