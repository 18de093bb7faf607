"""What a demonstration that was told to stay (``--keep``) leaves behind, written down so that ``--stop`` can end it.

Processes are named by id and start time: an id alone may be another process's by the time it is stopped.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from . import processes
from .image import REPOSITORY_ROOT, BuiltImages

FILE = REPOSITORY_ROOT / "build" / "demo.json"


@dataclass(frozen=True, slots=True)
class Kept:
    """A demonstration left running.

    Attributes:
        processes: name, id and start time, in the order to stop them.
        folder: its keys, databases and logs.
        images: what it made on the engine, by reference.
        docker_host: the engine's address as it was, empty for the default.
    """

    processes: tuple[tuple[str, int, int], ...]
    folder: str
    images: tuple[str, ...] = ()
    docker_host: str = ""


def remember(kept: Kept) -> None:
    """Write *kept* down."""
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(asdict(kept), indent=2) + "\n")


def describe(running: Sequence[processes.Process]) -> tuple[tuple[str, int, int], ...]:
    """Return *running* as `Kept` wants them."""
    return tuple((process.name, process.pid, processes.start_time(process.pid) or 0) for process in running)


def stop(say: Callable[[str], None]) -> bool:
    """Stop what an earlier run left, and remove what it made; False when there is nothing."""
    try:
        document = json.loads(FILE.read_text())
    except FileNotFoundError:
        return False
    for name, pid, started in document["processes"]:
        if processes.stop_by_id(pid, started):
            say(f"stopped {name}")
    if document["images"]:
        BuiltImages(reference="", base="", made=document["images"], docker_host=document["docker_host"]).remove()
        say(f"removed {', '.join(document['images'])}")
    shutil.rmtree(document["folder"], ignore_errors=True)
    FILE.unlink(missing_ok=True)
    return True
