"""What a workspace's container may do: the floor, as options of the engine. Pure.

A workspace is a stranger's program on an owner's machine. Each line below takes something away that a normal HTTP
server does not need:

    cap_drop ALL, no-new-privileges   no rights beyond an ordinary user's, none to be gained
    user 65534                        nobody's files, also where user namespaces are off
    read_only, tmpfs /tmp             the image stays as it was pulled; scratch space is memory, and not executable
    pids, memory = swap limit, CPUs   a fork bomb or a leak ends the workspace, not the machine
    init                              zombies are reaped, and SIGTERM reaches the program
    private IPC, ulimits              no shared memory with others, no core files, a bounded number of files
    log size                          a chatty program does not fill the disk
    restart no                        healing is this daemon's: it counts restarts and says why
    an internal network, no icc       no way out, and none to other containers (`networks`, `firewall`)
    names asked of nobody             an internal network's queries would else leave through the engine (CVE-2024-29018)
    volumes of the workspace's own    the only thing that outlives it; never a folder of the machine
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from docker.types import DeviceRequest, LogConfig, Mount, Ulimit

LABEL = "org.ngpu."
LABEL_NODE = LABEL + "node"
LABEL_SERVICE = LABEL + "service"
LABEL_WORKSPACE = LABEL + "workspace"
LABEL_REVISION = LABEL + "revision"
LABEL_SPECIFICATION = LABEL + "specification"
LABEL_GPUS = LABEL + "gpus"
LABEL_VOLUME = LABEL + "volume"

WORKSPACE_UID = 65534
WORKSPACE_USER = f"{WORKSPACE_UID}:{WORKSPACE_UID}"
#: Reserved for documentation (RFC 5737): nobody answers there, and from an internal network nobody is asked.
NO_NAME_SERVER = "192.0.2.53"

# More than a server's connections need, and below what engines in containers and small machines may grant: asking for
# more than the engine's own limit fails the start.
_OPEN_FILES = 16_384
_TMP = "rw,noexec,nosuid,nodev,size=256m,mode=1777"


@dataclass(frozen=True, slots=True)
class ContainerPlan:
    """One container, before it exists.

    Attributes:
        image: the engine's id of the image, so that a moved tag cannot change what runs.
        network: None for the engine's own.
        publish: ports are published on loopback.
        name_servers: whom the container asks for names, where it may reach the outside; none for nobody.
        gpu_uuids: devices by NVML's UUID.
        shm_bytes: size of /dev/shm, None for the engine's default.
        volumes: names of volumes by where the container finds them.
    """

    name: str
    image: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    ports: tuple[int, ...]
    labels: Mapping[str, str]
    memory_bytes: int
    cpus: float
    pids: int
    network: str | None
    name_servers: tuple[str, ...] = ()
    gpu_uuids: tuple[str, ...] = ()
    shm_bytes: int | None = None
    volumes: Mapping[str, str] = field(default_factory=dict)
    log_bytes: int = 10 << 20
    log_files: int = 2
    publish: bool = False


def options(plan: ContainerPlan) -> dict[str, Any]:
    """Return what `docker.DockerClient.containers.create` is called with."""
    chosen: dict[str, Any] = {
        "image": plan.image,
        "name": plan.name,
        "command": list(plan.command) or None,
        "environment": dict(plan.env),
        "labels": dict(plan.labels),
        "user": WORKSPACE_USER,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "read_only": True,
        "tmpfs": {"/tmp": _TMP},
        "pids_limit": plan.pids,
        "mem_limit": plan.memory_bytes,
        "memswap_limit": plan.memory_bytes,
        "nano_cpus": int(plan.cpus * 1_000_000_000),
        "init": True,
        "ipc_mode": "private",
        "ulimits": [Ulimit(name="nofile", soft=_OPEN_FILES, hard=_OPEN_FILES), Ulimit(name="core", soft=0, hard=0)],
        "log_config": LogConfig(
            type=LogConfig.types.JSON, config={"max-size": f"{plan.log_bytes}", "max-file": f"{plan.log_files}"}
        ),
        "restart_policy": {"Name": "no"},
    }
    if plan.publish:
        chosen["ports"] = {f"{port}/tcp": ("127.0.0.1", None) for port in plan.ports}
    if plan.network is not None:
        chosen["network"] = plan.network
        chosen["dns"] = list(plan.name_servers) or [NO_NAME_SERVER]
    if plan.shm_bytes is not None:
        chosen["shm_size"] = plan.shm_bytes
    if plan.volumes:
        # no_copy: what the image has at that place would else be copied into it, with its owner
        chosen["mounts"] = [Mount(path, name, type="volume", no_copy=True) for path, name in plan.volumes.items()]
    if plan.gpu_uuids:
        # UUIDs and no count: the two together are refused
        chosen["device_requests"] = [
            DeviceRequest(
                driver="nvidia", device_ids=list(plan.gpu_uuids), capabilities=[["gpu", "compute", "utility"]]
            )
        ]
    return chosen
