"""Does a container still have its GPUs? What `nvidia-smi -L`, run inside it, says about that.

A container can lose its GPUs while the device is perfectly well: `systemctl daemon-reload` has the engine's control
groups written anew, without the devices the NVIDIA toolkit had added (nvidia-container-toolkit #48). Programs that have
the device open go on, whatever is opened next fails. From outside nothing shows; so the question is asked inside, where
the toolkit puts `nvidia-smi`.

Pure: the engine runs the command, here its answer is judged.
"""

from __future__ import annotations

import re
from collections.abc import Collection

#: What to run inside, without a shell: images may have none.
COMMAND = ("nvidia-smi", "-L")

#: What a shell-less engine answers with when the program is not there, or cannot be started.
_NOT_RUN = (126, 127)
_UUID = re.compile(r"UUID: ((?:GPU|MIG)-[0-9a-zA-Z/-]+)")


def lost_inside(exit_code: int, output: str, held: Collection[str]) -> str:
    """Return which GPUs the container cannot use any more and why, empty where it has all of *held* or cannot tell.

    Args:
        output: of `COMMAND`, both streams.
        held: UUIDs the container was started with.
    """
    if not held or exit_code in _NOT_RUN or (exit_code < 0):
        return ""
    seen = set(_UUID.findall(output))
    missing = sorted(uuid for uuid in held if uuid not in seen)
    if not missing:
        return ""
    if exit_code != 0:
        words = output.strip().splitlines()[-1] if output.strip() else f"exit code {exit_code}"
        return f"the container lost its GPUs: {words}; was `systemctl daemon-reload` run?"
    return f"the container does not see {', '.join(missing)} any more"
