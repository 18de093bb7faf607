"""The paint example as an image, built and run confined on a real engine."""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import time
from pathlib import Path

import docker
import httpx
import pytest

from examples.demo import packed_base

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.needs_docker


def test_the_image_builds_on_a_base_of_ones_own_and_paints_confined(tmp_path: Path) -> None:
    tag = secrets.token_hex(4)
    base, image = f"ngpu-test-paint-base:{tag}", f"ngpu-test-paint:{tag}"
    tar = tmp_path / "base.tar"
    packed_base.pack_interpreter(tar, ["numpy", "PIL"])
    client = docker.from_env()
    try:
        with tar.open("rb") as data:
            client.api.import_image_from_data(
                data, repository=base.partition(":")[0], tag=tag, changes=packed_base.IMAGE_CHANGES
            )
        client.images.build(
            path=str(ROOT / "examples" / "paint"), tag=image, buildargs={"BASE": base}, rm=True, network_mode="none"
        )
        container = client.containers.run(
            image,
            detach=True,
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            user="65534:65534",
            pids_limit=128,
            mem_limit="1g",
            tmpfs={"/tmp": "noexec,nosuid,nodev"},
            ports={"8000/tcp": ("127.0.0.1", None)},
        )
        try:
            container.reload()
            port = container.attrs["NetworkSettings"]["Ports"]["8000/tcp"][0]["HostPort"]
            answer = _until_it_answers(f"http://127.0.0.1:{port}/sdapi/v1/txt2img")
            assert base64.b64decode(json.loads(answer)["images"][0]).startswith(b"\x89PNG")
        finally:
            container.remove(force=True)
    finally:
        for name in (image, base):
            with contextlib.suppress(docker.errors.ImageNotFound):
                client.images.remove(name, force=True)
        client.close()


def _until_it_answers(url: str) -> bytes:
    deadline_s = time.monotonic() + 30
    while True:
        try:
            answer = httpx.post(url, json={"prompt": "red sun", "seed": 1, "width": 64, "height": 64}, timeout=10)
        except httpx.TransportError:  # the port is there before the server is
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
            continue
        assert answer.status_code == 200, answer.text
        return answer.content
