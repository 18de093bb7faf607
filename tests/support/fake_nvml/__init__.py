"""A fake `libnvidia-ml.so.1` (see `fake_nvml.c`): built once a run, driven by the state file this module writes.

A daemon of its own process finds it by `environment()`; within the test's process `load()` puts it where pynvml looks.
Both read the file at every call, so changing it while the daemon runs is changing the machine under it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_nvml.c")

H200: Mapping[str, object] = {
    "name": "NVIDIA H200",
    "memory_total": 150_754_820_096,
    "memory_used": 0,
    "pci": "00000000:00:06.0",
    "compute_capability": "9.0",
    "power_limit_mw": 700_000,
    "clock": 345,
    "max_clock": 1980,
    "pcie_generation": 5,
    "pcie_width": 16,
    "mig": 0,
    "ecc": 1,
    "persistence": 1,
    "display": 0,
    "display_attached": 0,
    "temperature": 40,
    "slowdown_temperature": 89,
    "clocks_event_reasons": 1,
    "ecc_uncorrected": 0,
    "rows_pending": 0,
    "rows_failed": 0,
    "minor": 0,
}


def build() -> Path:
    """Return the folder with the library, compiled if it was not."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"ngpu-fake-nvml-{os.getuid()}-{digest}"
    library = folder / "libnvidia-ml.so.1"
    if not library.exists():
        folder.mkdir(exist_ok=True, mode=0o700)
        compiler = shutil.which("gcc") or shutil.which("cc")
        assert compiler is not None, "these tests are marked needs_gcc"
        with tempfile.TemporaryDirectory(dir=folder) as work:
            fresh = Path(work) / "fresh.so"
            options = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-Wl,-soname,{library.name}"]
            subprocess.run([compiler, *options, "-o", str(fresh), str(SOURCE)], check=True, timeout=60)
            fresh.replace(library)  # whole or not at all: another run may be at it
    return folder


class FakeNvml:
    """The machine's GPUs as the fake library shows them; every change is on disk when the call returns."""

    def __init__(self, path: Path, *, gpus: int = 1) -> None:
        """Write *gpus* healthy devices to the state file *path*."""
        self.path = path
        self.machine: dict[str, object] = {"driver": "580.159.04", "nvml": "13.580.159.04", "cuda": 13000}
        self.gpus: list[dict[str, object]] = []
        self.lines: list[str] = []
        for number in range(gpus):
            self.add_gpu(f"GPU-{number:08x}-0000-0000-0000-000000000000", minor=number, pci=f"00000000:0{number}:00.0")

    def environment(self) -> dict[str, str]:
        """Return what makes a process of its own see this machine."""
        return {"LD_LIBRARY_PATH": str(build()), "FAKE_NVML_STATE": str(self.path)}

    def add_gpu(self, uuid: str, **readings: object) -> dict[str, object]:
        """Add a device, or put it back; *readings* change or (None) remove what an H200 would say."""
        gpu: dict[str, object] = {"uuid": uuid, **H200, **readings}
        self.gpus.append(gpu)
        self.write()
        return gpu

    def set(self, index: int, **readings: object) -> None:
        """Change readings of a device, None removes one; `__` stands for the dot in `mig0.uuid`, `fail.<call>`."""
        self.gpus[index].update({name.replace("__", "."): value for name, value in readings.items()})
        self.write()

    def set_machine(self, **readings: object) -> None:
        """Change what belongs to no device: driver, cuda, init, generation, count, block_ms."""
        self.machine.update(readings)
        self.write()

    def add(self, line: str) -> None:
        """Add a line that may come more than once: `gpu0.xid 1 79`, `gpu0.process 7 100`, `gpu0.sample …`, `dead 7`."""
        self.lines.append(line)
        self.write()

    def remove(self, start: str) -> None:
        """Drop the added lines that start so."""
        self.lines = [line for line in self.lines if not line.startswith(start)]
        self.write()

    def write(self) -> None:
        lines = [f"{key} {value}" for key, value in self.machine.items() if value is not None]
        for index, gpu in enumerate(self.gpus):
            lines += [f"gpu{index}.{key} {value}" for key, value in gpu.items() if value is not None]
        fresh = self.path.with_suffix(".fresh")
        fresh.write_text("\n".join([*lines, *self.lines]) + "\n")
        fresh.replace(self.path)


@contextmanager
def load(path: Path) -> Iterator[None]:
    """Let pynvml of this process find the fake, with the state file *path*."""
    import pynvml

    before = os.environ.get("FAKE_NVML_STATE")
    os.environ["FAKE_NVML_STATE"] = str(path)  # putenv: the library's getenv sees it
    _forget(pynvml)
    # By its soname, dlopen then takes the one that is loaded already.
    library = ctypes.CDLL(str(build() / "libnvidia-ml.so.1"))
    try:
        yield
    finally:
        library.nvmlShutdown()
        _forget(pynvml)
        if before is None:
            del os.environ["FAKE_NVML_STATE"]
        else:
            os.environ["FAKE_NVML_STATE"] = before


def _forget(pynvml: object) -> None:
    vars(pynvml)["nvmlLib"] = None
    vars(pynvml)["_nvmlGetFunctionPointer_cache"].clear()
