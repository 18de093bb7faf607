"""Records what NVML says while a GPU does work whose true times are known: `gpu_samples.py --json FILE`.

NVML's documentation leaves open what a process utilisation sample stands for: the time since the last sample, since
the caller's last look, or the driver's period. Metering rests on the answer, so it is read off a real device here. The
recording is raw; `tests/unit/gpus/recordings` keeps what was learnt from it.

Wants a GPU, nvidia-ml-py and PyTorch, and nothing of this project, so that it runs on a bare machine. The work is done
by processes of its own (`--worker`), each of which reports the intervals in which its kernels ran by CUDA events,
placed on the wall clock by the moment its synchronisation returned.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import threading
import time
from typing import Any

import pynvml as nv

# -- the worker: known load ------------------------------------------------------------------------------------------


def worker() -> None:
    """Obey one JSON plan a line: {"plan": [[kind, seconds, repeats, pause_s], ...], "at": wall seconds to begin}."""
    import torch

    torch.cuda.init()
    device = torch.device("cuda:0")
    size = 4096
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    right = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    out = torch.empty(size, size, device=device, dtype=torch.bfloat16)

    def timed(action: Any) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        action()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def products(count: int) -> None:
        for _ in range(count):
            torch.mm(left, right, out=out)

    def spin(cycles: int) -> None:
        torch.cuda._sleep(cycles)

    products(50)
    torch.cuda.synchronize()
    product_s = timed(lambda: products(200)) / 200
    spin(10_000_000)
    cycle_s = min(timed(lambda: spin(100_000_000)) for _ in range(3)) / 100_000_000
    print(json.dumps({"ready": True, "pid": os.getpid(), "product_s": product_s, "cycle_s": cycle_s}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if delay := max(0.0, order.get("at", 0) - time.time()):
            time.sleep(delay)
        busy: list[list[float]] = []
        for kind, seconds, repeats, pause_s in order["plan"]:
            for _ in range(repeats):
                began = time.monotonic()
                if kind == "idle":
                    time.sleep(seconds)
                elif seconds <= 0.25:
                    elapsed = timed(lambda k=kind, s=seconds: _load(k, s, products, spin, product_s, cycle_s))
                    now = time.time()
                    busy.append([now - elapsed, now])
                else:
                    # Long work goes in pieces, so that what is measured ends when it was asked to.
                    while (left_s := seconds - (time.monotonic() - began)) > 0:
                        piece = min(left_s, 0.2)
                        elapsed = timed(lambda k=kind, s=piece: _load(k, s, products, spin, product_s, cycle_s))
                        now = time.time()
                        busy.append([now - elapsed, now])
                if pause_s:
                    time.sleep(pause_s)
        print(json.dumps({"busy": busy, "pid": os.getpid()}), flush=True)


def _load(kind: str, seconds: float, products: Any, spin: Any, product_s: float, cycle_s: float) -> None:
    if kind == "product":
        products(max(1, round(seconds / product_s)))
    else:
        spin(max(1, int(seconds / cycle_s)))


def speeds() -> dict[str, Any]:
    """Return what the parts of the challenge cost on this device, in seconds, or why a part does not run."""
    import torch

    device = torch.device("cuda:0")
    found: dict[str, Any] = {"torch": torch.__version__, "free": torch.cuda.mem_get_info()}

    def note(name: str, action: Any) -> None:
        try:
            for round_number in range(3):
                torch.cuda.synchronize()
                began = time.monotonic()
                action()
                torch.cuda.synchronize()
                found[name] = round(time.monotonic() - began, 6)
                if round_number == 0:
                    found[name + " first"] = found[name]
        except Exception as error:
            found[name] = f"! {type(error).__name__}: {error}"

    def mix(x: Any) -> Any:
        x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
        x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
        return x ^ ((x >> 16) & 0xFFFF)

    def mix_in_place(x: Any) -> Any:
        for shift, mask, factor in ((16, 0xFFFF, 0x7FEB352D), (15, 0x1FFFF, 0x846CA68B - (1 << 32)), (16, 0xFFFF, 1)):
            x ^= (x >> shift) & mask
            if factor != 1:
                x *= factor
        return x

    size, depth = 16384, 4096
    words = torch.arange(size * depth, device=device, dtype=torch.int32)
    note("mix 64 Mi words", lambda: mix(words))
    note("mix in place 64 Mi words", lambda: mix_in_place(words))
    small = (mix(words) & 15).sub_(8)
    left8, right8 = small.view(size, depth).to(torch.int8), small.view(depth, size).to(torch.int8)
    note("int8 16384x16384x4096", lambda: torch._int_mm(left8, right8))
    left, right = left8.float(), right8.float()
    out = torch.empty(size, size, device=device)
    for allow in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allow
        note(f"float32 tf32={allow} 16384x16384x4096", lambda: torch.mm(left, right, out=out))
        found[f"tf32={allow} exact"] = said(lambda: bool((torch._int_mm(left8, right8) == out.int()).all()))
    left16, right16 = left8.half(), right8.half()
    note("float16 to float32", lambda: torch.mm(left16, right16, out_dtype=torch.float32))
    found["float16 exact"] = said(
        lambda: bool((torch._int_mm(left8, right8) == torch.mm(left16, right16, out_dtype=torch.float32).int()).all())
    )
    left = right = left16 = right16 = words = small = out = None  # the next part wants the memory
    try:
        free = torch.cuda.mem_get_info()[0]
        count = int(free * 0.85) // 4
        note("allocate and fill 85 %", lambda: torch.full((count,), 3, device=device, dtype=torch.int32))
        big = torch.arange(1 << 30, device=device, dtype=torch.int32).repeat(count >> 30)
        torch.cuda.synchronize()
        for walkers in (1 << 16, 1 << 20):
            at = torch.arange(walkers, device=device, dtype=torch.int64)

            def walk(at: Any = at) -> Any:
                state = at
                for _ in range(64):
                    index = (state & 0x7FFFFFFFFFFFFFF) % big.numel()
                    state = state * 6364136223846793005 + big[index] + 1442695040888963407
                return state

            note(f"walk 64 steps of {walkers} over {big.numel() * 4} bytes", walk)
        sums = big[: 1 << 30].view(-1, 1024)
        note("sum of 4 GiB", lambda: sums.sum(1))
        note("mix and sum of 1 GiB", lambda: mix(big[: 1 << 28]).view(-1, 1024).sum(1))
    except Exception as error:
        found["big"] = f"! {type(error).__name__}: {error}"
    return found


class Worker:
    """One process that loads the GPU."""

    def __init__(self) -> None:
        self.started = time.time()
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready: dict[str, Any] = {}

    def wait_ready(self) -> dict[str, Any]:
        self.ready = self.answer()
        self.ready["started"] = self.started
        return self.ready

    def ask(self, plan: list[list[Any]], at: float) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"plan": plan, "at": at}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


# -- the looks -------------------------------------------------------------------------------------------------------


def said(action: Any) -> Any:
    """Return what a call gives in plain values, or its error."""
    try:
        return plain(action())
    except nv.NVMLError as error:
        return f"! {type(error).__name__}: {error}"
    except Exception as error:
        return f"!! {type(error).__name__}: {error}"


def plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, ctypes.Array):
        return [plain(each) for each in value]
    if isinstance(value, ctypes.Structure):
        return {name: plain(getattr(value, name)) for name, *_ in value._fields_}
    return repr(value)


class Looks:
    """Asks NVML in several ways at once and notes every answer with its times and cost."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.rows: list[list[Any]] = []
        self.cursors: dict[str, int] = {}
        self.paused = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.gpm: list[Any] = []

    def start(self) -> None:
        try:
            if nv.nvmlGpmQueryDeviceSupport(self.handle).isSupportedDevice:
                self.gpm = [nv.nvmlGpmSampleAlloc(), nv.nvmlGpmSampleAlloc()]
                nv.nvmlGpmSampleGet(self.handle, self.gpm[0])
        except Exception as error:
            print("no GPM:", error)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        periods = {
            "fast": 0.05, "slow": 1.0, "all": 3.0, "info": 0.25, "samples": 1.0, "rates": 0.1, "pids": 0.5, "gpm": 0.1,
            "energy": 0.5,
        }  # fmt: skip
        due = dict.fromkeys(periods, 0.0)
        start = time.time_ns() // 1000
        self.cursors = {"fast": start, "slow": start, "all": 0, "info": start, "samples": start}
        while not self._stop.is_set():
            now = time.monotonic()
            for name, period in periods.items():
                if now >= due[name] and not (self.paused and name in ("fast", "slow", "info", "samples", "all")):
                    due[name] = max(due[name] + period, now)
                    self.look(name)
            time.sleep(0.005)

    def look(self, name: str) -> None:
        wall, mono, cpu = time.time(), time.monotonic(), time.thread_time_ns()
        answer: Any
        try:
            answer = getattr(self, "_" + name)(name)
        except nv.NVMLError as error:
            answer = f"! {type(error).__name__}"
        except Exception as error:
            answer = f"!! {type(error).__name__}: {error}"
        cpu_us = (time.thread_time_ns() - cpu) / 1000
        took_us = (time.monotonic() - mono) * 1e6
        self.rows.append([name, round(wall, 6), round(mono, 6), round(took_us), round(cpu_us), answer])

    def _utilisation(self, name: str) -> Any:
        found = nv.nvmlDeviceGetProcessUtilization(self.handle, self.cursors[name])
        rows = [[s.pid, s.timeStamp, s.smUtil, s.memUtil, s.encUtil, s.decUtil] for s in found]
        if rows and name != "all":
            self.cursors[name] = max(row[1] for row in rows)
        return rows

    _fast = _slow = _all = _utilisation

    def _info(self, name: str) -> Any:
        found = nv.nvmlDeviceGetProcessesUtilizationInfo(self.handle, self.cursors[name])
        rows = [[s.pid, s.timeStamp, s.smUtil, s.memUtil] for s in found]
        if rows:
            self.cursors[name] = max(row[1] for row in rows)
        return rows

    def _samples(self, name: str) -> Any:
        _, found = nv.nvmlDeviceGetSamples(self.handle, nv.NVML_GPU_UTILIZATION_SAMPLES, self.cursors[name])
        rows = [[s.timeStamp, s.sampleValue.uiVal] for s in found]
        if rows:
            self.cursors[name] = max(row[0] for row in rows)
        return rows

    def _rates(self, name: str) -> Any:
        rates = nv.nvmlDeviceGetUtilizationRates(self.handle)
        return [rates.gpu, rates.memory]

    def _pids(self, name: str) -> Any:
        return [[p.pid, p.usedGpuMemory] for p in nv.nvmlDeviceGetComputeRunningProcesses(self.handle)]

    def _energy(self, name: str) -> Any:
        return nv.nvmlDeviceGetTotalEnergyConsumption(self.handle)

    def _gpm(self, name: str) -> Any:
        if not self.gpm:
            return None
        nv.nvmlGpmSampleGet(self.handle, self.gpm[1])
        ask = nv.c_nvmlGpmMetricsGet_t()
        ask.version = nv.NVML_GPM_METRICS_GET_VERSION
        ask.numMetrics = 3
        ask.sample1, ask.sample2 = self.gpm
        for index in range(3):
            ask.metrics[index].metricId = index + 1  # graphics engine, SMs, occupancy
        nv.nvmlGpmMetricsGet(ask)
        self.gpm.reverse()
        return [[ask.metrics[index].nvmlReturn, round(ask.metrics[index].value, 3)] for index in range(3)]


# -- what the device and the machine are -----------------------------------------------------------------------------

GETTERS = """
    Name UUID Serial Brand Index MinorNumber PciInfo MemoryInfo CudaComputeCapability PowerManagementLimit
    PowerManagementLimitConstraints EnforcedPowerLimit PowerUsage PerformanceState Temperature_0 ClockInfo_1
    ClockInfo_2 MaxClockInfo_1 MaxClockInfo_2 CurrPcieLinkGeneration MaxPcieLinkGeneration CurrPcieLinkWidth
    MaxPcieLinkWidth PcieReplayCounter PcieThroughput_0 MigMode MaxMigDeviceCount EccMode PersistenceMode
    DisplayActive DisplayMode ComputeMode RetiredPagesPendingStatus RemappedRows CurrentClocksEventReasons
    SupportedClocksEventReasons CurrentClocksThrottleReasons SupportedEventTypes AccountingMode
    AccountingBufferSize AccountingPids VirtualizationMode GpuFabricInfo UtilizationRates
    ComputeRunningProcesses GraphicsRunningProcesses TotalEnergyConsumption NumGpuCores Architecture
    MultiGpuBoard ViolationStatus_0 ViolationStatus_1 InforomImageVersion VbiosVersion BoardPartNumber
    ConfComputeProtectedMemoryUsage GspFirmwareVersion GspFirmwareMode ProcessUtilization_0
    ProcessesUtilizationInfo_0
""".split()  # noqa: SIM905


def describe(handle: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def note(name: str, action: Any) -> None:
        began = time.monotonic()
        value = said(action)
        found[name] = [value, round((time.monotonic() - began) * 1e6)]

    for getter in GETTERS:
        name, _, argument = getter.partition("_")
        call = getattr(nv, "nvmlDeviceGet" + name, None)
        arguments = [int(argument)] if argument else []
        if call is None:
            found[getter] = ["not in this pynvml", 0]
        else:
            note(getter, lambda c=call, a=arguments: c(handle, *a))
    note("MemoryInfo_v2", lambda: nv.nvmlDeviceGetMemoryInfo(handle, version=nv.nvmlMemory_v2))
    for kind in (0, 1):
        for counter in (0, 1):
            note(f"EccErrors_{kind}_{counter}", lambda k=kind, c=counter: nv.nvmlDeviceGetTotalEccErrors(handle, k, c))
    for cause in (0, 1):
        note(f"RetiredPages_{cause}", lambda c=cause: nv.nvmlDeviceGetRetiredPages(handle, c))
    for link in range(2):
        note(f"NvLink_{link}", lambda n=link: nv.nvmlDeviceGetNvLinkState(handle, n))
    for threshold in range(4):
        note(f"TemperatureThreshold_{threshold}", lambda t=threshold: nv.nvmlDeviceGetTemperatureThreshold(handle, t))
    note("GpmSupport", lambda: nv.nvmlGpmQueryDeviceSupport(handle))
    note(
        "Samples",
        lambda: [
            [s.timeStamp, s.sampleValue.uiVal]
            for s in nv.nvmlDeviceGetSamples(handle, nv.NVML_GPU_UTILIZATION_SAMPLES, 0)[1]
        ],
    )

    def events() -> Any:
        events = nv.nvmlEventSetCreate()
        try:
            nv.nvmlDeviceRegisterEvents(handle, nv.nvmlDeviceGetSupportedEventTypes(handle), events)
            return plain(nv.nvmlEventSetWait_v2(events, 100))
        finally:
            nv.nvmlEventSetFree(events)

    note("EventSet", events)
    note("field RESET_STATUS..", lambda: nv.nvmlDeviceGetFieldValues(handle, [170, 171, 172, 194, 230, 231, 274]))
    return found


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "uname": list(platform.uname()),
        "python": sys.version,
        "pid": os.getpid(),
        "uid": os.getuid(),
        "driver": said(nv.nvmlSystemGetDriverVersion),
        "nvml": said(nv.nvmlSystemGetNVMLVersion),
        "cuda": said(nv.nvmlSystemGetCudaDriverVersion_v2),
        "count": said(nv.nvmlDeviceGetCount),
        "pynvml": nv.__file__,
    }
    for path in (
        "/proc/self/cgroup",
        "/proc/1/cgroup",
        "/proc/self/status",
        "/proc/driver/nvidia/version",
        "/etc/os-release",
    ):
        try:
            with open(path) as file:
                found[path] = file.read()
        except OSError as error:
            found[path] = str(error)
    for folder in ("/dev", "/proc/driver/nvidia", "/sys/fs/cgroup"):
        try:
            found[folder] = [name for name in sorted(os.listdir(folder)) if folder != "/dev" or "nvidia" in name]
        except OSError as error:
            found[folder] = str(error)
    return found


# -- the experiments -------------------------------------------------------------------------------------------------

# name, first worker's plan, second worker's plan; a step is [kind, seconds, repeats, pause_s]
EXPERIMENTS: list[tuple[str, list[list[Any]], list[list[Any]]]] = [
    ("idle", [["idle", 3, 1, 0]], []),
    ("one small kernel, 5 s", [["spin", 5, 1, 0]], []),
    ("products, 5 s", [["product", 5, 1, 0]], []),
    ("half the time, 200 ms on and off", [["product", 0.2, 15, 0.2]], []),
    ("bursts of 10 ms every 300 ms", [["product", 0.01, 20, 0.29]], []),
    ("bursts of 40 ms every 100 ms", [["spin", 0.04, 60, 0.06]], []),
    ("A 8 s, B from 2 s to 5 s", [["product", 8, 1, 0]], [["idle", 2, 1, 0], ["product", 3, 1, 0]]),
    ("A and B by turns of 500 ms", [["product", 0.5, 6, 0.5]], [["idle", 0.5, 1, 0], ["product", 0.5, 6, 0.5]]),
    ("A 30 %, B 20 %", [["product", 0.06, 30, 0.14]], [["idle", 0.1, 1, 0], ["product", 0.04, 30, 0.16]]),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--speeds", action="store_true", help="only time the parts of the challenge")
    parser.add_argument("--json", default="gpu-samples.json", help="where the recording goes")
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return 0
    if arguments.speeds:
        print(json.dumps(speeds()), flush=True)
        return 0
    nv.nvmlInit()
    handle = nv.nvmlDeviceGetHandleByIndex(0)
    record: dict[str, Any] = {"machine": machine(), "device": describe(handle), "experiments": []}
    print(json.dumps(record, indent=1)[:9000], flush=True)
    looks = Looks(handle)
    looks.start()
    workers = [Worker(), Worker()]
    record["workers"] = [each.wait_ready() for each in workers]
    print(record["workers"], flush=True)
    time.sleep(2)
    for name, first, second in EXPERIMENTS:
        print(name, flush=True)
        at = time.time() + 0.3
        workers[0].ask(first, at)
        workers[1].ask(second, at)
        answers = [each.answer() for each in workers]
        record["experiments"].append({"name": name, "at": at, "end": time.time(), "workers": answers})
        time.sleep(2.5)  # so that late samples belong to the experiment they came from
    # nobody looks for longer than the driver's buffer lasts
    looks.paused = True
    at = time.time() + 0.3
    workers[0].ask([["product", 0.2, 55, 0.2]], at)
    answers = [workers[0].answer()]
    looks.paused = False
    time.sleep(3)
    record["experiments"].append(
        {"name": "half the time, unseen for 22 s", "at": at, "end": time.time(), "workers": answers}
    )
    # a process that comes, works for half a second and goes
    short = Worker()
    ready = short.wait_ready()
    at = time.time() + 0.5
    short.ask([["product", 0.5, 1, 0]], at)
    answers = [short.answer()]
    short.stop()
    time.sleep(3)
    record["experiments"].append(
        {"name": "comes and goes", "at": at, "end": time.time(), "workers": answers, "ready": ready}
    )
    for each in workers:
        each.stop()
    time.sleep(1)
    looks.stop()
    timed = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--speeds"],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    print(timed.stdout, timed.stderr[-2000:], flush=True)
    record["speeds"] = [timed.stdout, timed.stderr[-4000:]]
    record["looks"] = looks.rows
    record["device_after"] = describe(handle)
    with open(arguments.json, "w") as file:
        json.dump(record, file, separators=(",", ":"))
    costs: dict[str, list[float]] = {}
    for name, _, _, _, cpu_us, _ in looks.rows:
        costs.setdefault(name, []).append(cpu_us)
    for name, values in costs.items():
        values.sort()
        print(f"{name:8} {len(values):5} looks, cpu us median {values[len(values) // 2]}, max {values[-1]}")
    print("wrote", arguments.json, os.path.getsize(arguments.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
