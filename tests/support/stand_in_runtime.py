#!/usr/bin/env python3
"""Stands in for NVIDIA's container runtime, where a machine has a GPU and an engine but not NVIDIA's toolkit.

An OCI runtime for dockerd: on `create` it adds to the bundle what the toolkit would (the driver's device nodes, its
libraries and `nvidia-smi`), then hands over to runc. Nothing of the node or the engine is replaced. To use it:

    {"runtimes": {"nvidia": {"path": "/…/stand_in_runtime.py"}}, "default-runtime": "nvidia"}    dockerd's --config-file

and an executable `nvidia-container-runtime-hook` that only ends with 0 on dockerd's PATH, which makes it take requests
for GPUs (`.ci/engine`). STAND_IN_MOUNTS names further folders to mount, such as site-packages with PyTorch, which also
come first on PYTHONPATH. docs/gpu-check.md has the run that was made with it.
"""

import glob
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

LIBRARIES = ("libcuda.so.1", "libnvidia-ml.so.1")
SYSTEM_LIBRARIES = "/usr/lib/x86_64-linux-gnu"


def wants_gpus(config: dict[str, Any]) -> bool:
    """Return whether the engine told this container of GPUs."""
    told = [
        line.partition("=")[2] for line in config["process"].get("env") or [] if line.startswith("NVIDIA_VISIBLE_D")
    ]
    return bool(told) and told[-1] not in {"", "void", "none"}


def add_gpus(config: dict[str, Any]) -> None:
    """Add every device of the driver's and what programs need of it. All GPUs: the machine is thought to have one."""
    devices = [name for name in glob.glob("/dev/nvidia*") if not os.path.isdir(name)]
    for name in sorted(devices):
        number = os.stat(name).st_rdev
        place = {"type": "c", "major": os.major(number), "minor": os.minor(number)}
        config["linux"].setdefault("devices", []).append({"path": name, "fileMode": 0o666, "uid": 0, "gid": 0, **place})
        rules = config["linux"].setdefault("resources", {}).setdefault("devices", [])
        rules.append({"allow": True, "access": "rw", **place})
    more = [name for name in os.environ.get("STAND_IN_MOUNTS", "").split(":") if name]
    libraries = sorted({str(Path(name).parent) for name in driver_libraries()} | {SYSTEM_LIBRARIES})
    programs = [os.path.realpath(found)] if (found := shutil.which("nvidia-smi")) else []
    for name in [*libraries, *more, *programs]:
        config["mounts"].append(
            {"destination": name, "type": "bind", "source": name, "options": ["rbind", "ro", "nosuid", "nodev"]}
        )
    folders = ["/usr/local/bin", "/usr/bin", "/bin", *(str(Path(name).parent) for name in programs)]
    config["process"]["env"] += [
        f"LD_LIBRARY_PATH={':'.join(libraries)}",
        f"PATH={':'.join(folders)}",
        *([f"PYTHONPATH={':'.join(more)}"] if more else []),
    ]


def driver_libraries() -> list[str]:
    """Return where the loader finds the driver's libraries."""
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout.splitlines()
    return [line.partition("=> ")[2].strip() for line in listed if line.strip().startswith(LIBRARIES)]


def main() -> None:
    """Change the bundle where it is being created, and become runc."""
    arguments = sys.argv[1:]
    if "create" in arguments:
        file = Path(arguments[arguments.index("--bundle") + 1]) / "config.json"
        config = json.loads(file.read_text())
        if wants_gpus(config):
            add_gpus(config)
            file.write_text(json.dumps(config))
    os.execvp("runc", ["runc", *arguments])


if __name__ == "__main__":
    main()
