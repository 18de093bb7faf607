"""The paint workspace as a process, spoken to with httpx."""

from __future__ import annotations

import base64
import io
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

PAINT = Path(__file__).resolve().parents[3] / "examples" / "paint"
SMALL = {"width": 64, "height": 48, "prompt": "sun over mountains at sunset", "seed": 7}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    process = subprocess.Popen(
        [sys.executable, "-m", "procedural_paint", "--port", "0"], cwd=PAINT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        found = re.search(r":(\d+)$", process.stdout.readline().strip())
        assert found, "the workspace did not say where it listens"
        with httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=20) as client:
            yield client
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()


def test_text_to_image_answers_as_web_uis_do_and_as_a_png(client: httpx.Client) -> None:
    answer = client.post("/sdapi/v1/txt2img", json=SMALL)
    assert answer.status_code == 200
    file = base64.b64decode(answer.json()["images"][0])
    assert Image.open(io.BytesIO(file)).size == (64, 48)
    assert answer.json()["parameters"]["seed"] == 7
    raw = client.post("/sdapi/v1/txt2img", json=SMALL, headers={"Accept": "image/png"})
    assert (raw.headers["content-type"], raw.headers["x-seed"], raw.content) == ("image/png", "7", file)


def test_image_to_image_begins_with_a_picture(client: httpx.Client) -> None:
    first = client.post("/sdapi/v1/txt2img", json=SMALL).json()["images"][0]
    asked = {**SMALL, "prompt": "ocean", "init_images": [first], "denoising_strength": 0}
    same = client.post("/sdapi/v1/img2img", json=asked).json()["images"][0]
    opened = [Image.open(io.BytesIO(base64.b64decode(one))).tobytes() for one in (first, same)]
    assert opened[0] == opened[1]
    other = client.post("/sdapi/v1/img2img", json={**asked, "denoising_strength": 0.9}).json()["images"][0]
    assert other != same
    assert client.post("/sdapi/v1/img2img", json=SMALL).status_code == 422


def test_a_job_is_submitted_and_polled(client: httpx.Client) -> None:
    task_id = client.post("/create", json={**SMALL, "batch_size": 2}).json()["task_id"]
    state: dict[str, Any] = {}
    for _ in range(500):
        state = client.get("/status", params={"task_id": task_id}).json()
        if state["status"] == "done":
            break
        assert state["status"] in ("queued", "running")
        threading.Event().wait(0.02)
    assert (state["progress"], len(state["images"])) == (100, 2)
    assert client.post("/status", json={"task_id": task_id}).json() == state
    assert client.get("/status", params={"task_id": "none"}).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/health", b"", 200),
        ("HEAD", "/health", b"", 200),
        ("GET", "/sdapi/v1/txt2img", b"", 405),
        ("POST", "/health", b"", 405),
        ("GET", "/nowhere", b"", 404),
        ("POST", "/nowhere", b"{}", 404),
        ("POST", "/sdapi/v1/txt2img", b"{", 422),
        ("POST", "/sdapi/v1/txt2img", b'{"width": 100000}', 422),
        ("POST", "/create", b'{"steps": 0}', 422),
        ("POST", "/status", b"{", 422),
        ("POST", "/status", b"[]", 404),
    ],
)
def test_what_is_wrong_gets_a_status_and_the_connection_goes_on(
    client: httpx.Client, method: str, path: str, content: bytes, status: int
) -> None:
    assert client.request(method, path, content=content).status_code == status
    assert client.get("/health").json() == {"status": "ok"}


def test_bodies_come_in_chunks_and_not_without_bound(client: httpx.Client) -> None:
    whole = b'{"width": 64, "height": 48, "prompt": "red", "seed": 1}'
    pieces = (whole[index : index + 7] for index in range(0, len(whole), 7))
    assert client.post("/sdapi/v1/txt2img", content=pieces).status_code == 200
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=10) as connection:
        connection.sendall(b"POST /create HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_the_calls_of_akashgen_submit_wait_and_fetch(client: httpx.Client) -> None:
    asked = {"prompt": "sea", "sampler": "lcm", "scheduler": "karras", "width": 64, "height": 64}
    job_id = client.post("/api/generate", json=asked).json()["job_id"]
    seen = []
    for _ in range(400):
        (state,) = client.get(f"/api/status?ids={job_id}").json()
        seen.append(state["status"])
        if state["status"] == "succeeded":
            break
        threading.Event().wait(0.02)
    assert set(seen[:-1]) <= {"pending", "processing"}
    picture = client.get(state["result"])
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(picture.content)).size == (64, 64)
    assert client.get(f"/api/status?ids={'0' * 32}").status_code == 404
    assert client.get("/api/images/../../etc/passwd").status_code == 404
    for missing in ("prompt", "sampler", "scheduler"):
        refused = client.post("/api/generate", json={key: value for key, value in asked.items() if key != missing})
        assert (refused.status_code, refused.json()["detail"]) == (422, f"{missing} is required")
