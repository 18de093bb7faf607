"""What a backend of images shows of itself to the rest of the node: findings for the owner, the machine, logs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from ngpu_node.deployments import Deployment
from ngpu_protocol.receipts import Outcome

#: Ends the running attempts of a deployment, for a reason, with an outcome in their receipts.
BreakOff = Callable[[Deployment, str, Outcome], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about this machine an owner should know; *advice* is empty where all is well."""

    subject: str
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the machine has for workspaces, as the engine tells and the owner limits; 0 where that is not known.

    `image_bytes_free` is what images may still take of the disk; None where nobody knows.
    """

    runs_images: bool
    cpus: float = 0.0
    memory_bytes: int = 0
    gives_gpus: bool = False
    gives_egress: bool = False
    image_bytes_free: int | None = None


@dataclass(frozen=True, slots=True)
class Log:
    """The end of a container's log, and what it says from there on; *more* is None where it says no more."""

    end: bytes
    more: trio.MemoryReceiveChannel[bytes] | None
