"""How long a node takes to have an image, beside `docker pull` of the same image from the same registry.

`scripts/bench images` (with DOCKER_HOST naming an engine, and docker and docker-registry on PATH). Rounds are paired:
each has one pull by `Images.ensure` and one by the docker command, in turning order, the image removed from the engine
before each. What counts is the median of the rounds' ratios, so that what slows the machine slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import docker
import trio
from docker.errors import ImageNotFound
from rich.console import Console
from rich.table import Table

from ngpu_daemon.logs import configure_logging
from ngpu_node.config import ImageSettings
from ngpu_node.images.images import Images, ImageWish
from ngpu_protocol.image_references import parse_image_reference
from tests.support.fake_registry import make_image
from tests.support.real_registry import a_real_registry

MOST = 1.20
LAYERS = 4


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds each took for the same image."""

    ours_s: float
    docker_s: float

    @property
    def ratio(self) -> float:
        return self.ours_s / self.docker_s


def measure(size: int, rounds: int) -> list[Round]:
    """Return *rounds* paired pulls of an image of *size* bytes, compressed, that nothing can compress."""
    image = make_image([size // LAYERS] * LAYERS, "bench")
    client = docker.from_env()
    found = []
    try:
        with a_real_registry() as registry:
            reference = registry.push(image, "bench/image", "1")
            _remove(client, image.config)
            _docker_pull(reference)  # warms the page cache for both
            for number in range(rounds):
                times = {}
                for who in ("ours", "docker") if number % 2 else ("docker", "ours"):
                    _remove(client, image.config)
                    times[who] = _our_pull(reference, registry.host) if who == "ours" else _docker_pull(reference)
                found.append(Round(times["ours"], times["docker"]))
    finally:
        _remove(client, image.config)
        client.close()
    return found


def _docker_pull(reference: str) -> float:
    began = time.perf_counter()
    subprocess.run(["docker", "pull", "--quiet", reference], check=True, stdout=subprocess.DEVNULL, timeout=300)
    return time.perf_counter() - began


def _our_pull(reference: str, host: str) -> float:
    async def main() -> float:
        with tempfile.TemporaryDirectory() as folder:
            settings = ImageSettings(registries=[host], disk_reserve_bytes=0)
            images = await Images.open(settings, Path(folder) / "images.json")
            async with trio.open_nursery() as nursery:
                await nursery.start(images.run)
                began = time.perf_counter()
                await images.ensure(ImageWish("bench/1/1", "bench/1", reference=parse_image_reference(reference)))
                took = time.perf_counter() - began
                nursery.cancel_scope.cancel()
            await images.aclose()
            return took

    return trio.run(main)


def _remove(client: docker.DockerClient, image_id: str) -> None:
    try:
        client.images.remove(image_id, force=True)
    except ImageNotFound:
        return


def main() -> int:
    """Print the table; 1 with ``--strict`` when ours is more than `MOST` times docker's."""
    parser = argparse.ArgumentParser(prog="scripts/bench images", description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=200, help="of the image, compressed (default 200)")
    parser.add_argument("--rounds", type=int, default=6, help="paired pulls (default 6)")
    parser.add_argument("--strict", action="store_true", help="exit 1 when the figure asked for is not reached")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    configure_logging("warning")
    rounds = measure(arguments.megabytes * 1_000_000, arguments.rounds)
    ratio = statistics.median(one.ratio for one in rounds)
    table = Table(title=f"An image of {arguments.megabytes} MB from a local registry, seconds")
    for column in ("", "median", "each round"):
        table.add_column(column)
    for name, times in (("ngpu", [r.ours_s for r in rounds]), ("docker pull", [r.docker_s for r in rounds])):
        table.add_row(name, f"{statistics.median(times):.2f}", "  ".join(f"{one:.2f}" for one in times))
    table.add_row("ratio", f"{ratio:.2f}", "  ".join(f"{one.ratio:.2f}" for one in rounds))
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    console.print(f"asked for: at most {MOST:.2f}; got {ratio:.2f}: {'met' if ratio <= MOST else 'NOT met'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rounds": [asdict(one) for one in rounds], "ratio": ratio}, indent=2))
    return 1 if arguments.strict and ratio > MOST else 0


if __name__ == "__main__":
    sys.exit(main())
