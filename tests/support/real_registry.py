"""The distribution project's own registry (Debian's docker-registry) on loopback, and images pushed to it over HTTP."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.fake_registry import MANIFEST, MadeImage

START_TIMEOUT_S = 20.0

_CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: {root}}}
  delete: {{enabled: true}}
http: {{addr: "127.0.0.1:{port}"}}
"""


class RealRegistry:
    """One running registry; *host* is its part of references."""

    def __init__(self, port: int) -> None:
        self.host = f"127.0.0.1:{port}"
        self._client = httpx.Client(base_url=f"http://{self.host}", timeout=60, trust_env=False)

    def push(self, image: MadeImage, name: str, tag: str) -> str:
        """Upload *image*; return its reference."""
        for digest, blob in image.blobs.items():
            begun = self._client.post(f"/v2/{name}/blobs/uploads/")
            begun.raise_for_status()
            place = httpx.URL(begun.headers["location"]).copy_merge_params({"digest": digest})
            kind = {"Content-Type": "application/octet-stream"}
            self._client.put(place, content=blob, headers=kind).raise_for_status()
        pushed = self._client.put(
            f"/v2/{name}/manifests/{tag}", content=image.manifest, headers={"Content-Type": MANIFEST}
        )
        pushed.raise_for_status()
        return f"{self.host}/{name}:{tag}"

    def close(self) -> None:
        self._client.close()


@contextmanager
def a_real_registry() -> Iterator[RealRegistry]:
    """Yield a running registry that keeps its blobs in a folder of its own."""
    program = shutil.which("docker-registry") or "/usr/bin/docker-registry"
    with tempfile.TemporaryDirectory(prefix="ngpu-registry-") as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        config = Path(folder) / "config.yml"
        config.write_text(_CONFIG.format(root=Path(folder) / "data", port=port))
        process = subprocess.Popen(
            [program, "serve", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin"},
        )
        registry = RealRegistry(port)
        try:
            _wait(registry, process)
            yield registry
        finally:
            registry.close()
            process.terminate()
            process.wait(timeout=10)


def _wait(registry: RealRegistry, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            if registry._client.get("/v2/").status_code == 200:
                return
        except httpx.TransportError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
        time.sleep(0.05)
