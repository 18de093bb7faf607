"""The studio workspace as a process, spoken to with httpx: upload, dataset, training, painting in what was learned."""

from __future__ import annotations

import io
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

STUDIO = Path(__file__).resolve().parents[3] / "examples" / "studio"
TOKEN = {"token": "100000000000000001"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    data = tmp_path_factory.mktemp("studio")
    process = subprocess.Popen(
        [sys.executable, "-m", "tiny_studio", "--port", "0", "--data", str(data)],
        cwd=STUDIO, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = re.search(r":(\d+)$", process.stdout.readline().strip())
        assert found, "the workspace did not say where it listens"
        with httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=30) as client:
            yield client
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()


def picture(colour: tuple[int, int, int]) -> bytes:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:] = colour
    pixels[::9] = 20
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def polled(client: httpx.Client, path: str, task_id: str) -> dict[str, Any]:
    """Return the final answer of a task that is polled; every answer on the way is judged."""
    before = -1.0
    for _ in range(600):
        state: dict[str, Any] = client.post(path, json={**TOKEN, "task_id": task_id}).json()
        assert state["state"] in ("pending", "training", "done"), state
        assert state.get("training_progress", 1.0) >= before, "progress went back"
        before = state.get("training_progress", 1.0) if "training_progress" in state else before
        if state["state"] == "done":
            return state
        time.sleep(0.02)
    raise AssertionError(f"{task_id} is not done")


def painted(client: httpx.Client, **fields: Any) -> list[Image.Image]:
    asked = {
        **TOKEN,
        "prompt": "one girl, beautiful",
        "select_seed": 3,
        "output_size": "128x96",
        "n_images": 1,
        **fields,
    }
    answer = client.post("/api/v1b/task_submit", json=asked)
    assert answer.status_code == 200, answer.text
    result = polled(client, "/api/v1b/task_result", answer.json()["task_id"])
    return [Image.open(io.BytesIO(client.get(one["large"]).content)) for one in result["images"]]


def test_a_style_is_learned_from_uploaded_pictures_and_painted_in(client: httpx.Client) -> None:
    files: list[tuple[str, Any]] = [("init_img", (f"{at}.png", picture((20, 40 + at, 220)))) for at in range(3)]
    uploaded = client.post("/api/v1b/upload_imgs", files=[*files, ("token", TOKEN["token"].encode())]).json()
    assert (uploaded["code"], uploaded["msg"], len(uploaded["info"])) == (0, "", 3)
    made = client.post("/api/v1b/dataset", json={**TOKEN, "name": "blue", "images": uploaded["info"]}).json()
    listed = client.post("/api/v1b/dataset_all", json=TOKEN).json()
    assert (listed["page"], listed["per_page"], listed["has_next"], listed["has_prev"]) == (1, 20, False, False)
    entry = next(one for one in listed["items"] if one["id"] == made["info"]["dataset_id"])
    assert (entry["images_num"], entry["demo_picture"], entry["images"]) == (3, uploaded["info"][0], uploaded["info"])
    assert client.get(entry["demo_picture"]).content == picture((20, 40, 220))

    asked = {**TOKEN, "name": "train model1", "description": "d", "trigger_word": "one girl", "dataset": [entry["id"]]}
    started = client.post("/api/v1b/train_submit", json=asked).json()
    state = polled(client, "/api/v1b/train_progress", started["info"]["task_id"])
    assert (state["model_name"], state["training_progress"], state["trigger_word"]) == ("train_model1", 1.0, "one girl")
    assert "already" in client.post("/api/v1b/train_submit", json=asked).json()["msg"]

    own, trained = painted(client)[0], painted(client, model_name="train model1")[0]
    assert own.size == trained.size == (128, 96)
    mean = [np.asarray(one).reshape(-1, 3).mean(axis=0) for one in (own, trained)]
    assert mean[1][2] - mean[1][0] > mean[0][2] - mean[0][0] + 80, "the trained style is blue, the studio's own is not"
    assert painted(client, model_name="train_model1")[0].tobytes() == trained.tobytes()
    stranger = {"token": "2", "model_name": "train model1"}
    asked_by_stranger = {**stranger, "output_size": "128x96", "select_seed": 3, "n_images": 1}
    task_id = client.post("/api/v1b/task_submit", json=asked_by_stranger).json()["task_id"]
    assert client.post("/api/v1b/task_result", json={**TOKEN, "task_id": task_id}).status_code == 404


def test_pictures_are_painted_from_a_picture_and_along_its_contours(client: httpx.Client) -> None:
    link = client.post("/api/v1b/upload_imgs", files={"init_img": picture((250, 250, 250)), "token": b"x"}).json()[
        "info"
    ][0]
    first = painted(client)[0]
    assert painted(client)[0].tobytes() == first.tobytes()
    for fields in ({"init_img": link}, {"init_img": link, "controlnet_model": "canny"}):
        assert painted(client, **fields)[0].tobytes() != first.tobytes()
    assert len(painted(client, n_images=3)) == 3


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/health", None, 200),
        ("GET", "/api/v1b/get_train_form", None, 200),
        ("GET", "/api/v1b/get_generation_form", None, 200),
        ("GET", "/api/v1b/files/../index.json", None, 404),
        ("GET", "/nowhere", None, 404),
        ("POST", "/api/v1b/task_submit", b"{", 400),
        ("POST", "/api/v1b/task_submit", b'{"n_images": 100}', 400),
        ("POST", "/api/v1b/task_result", b'{"task_id": "none"}', 404),
        ("POST", "/api/v1b/train_progress", b'{"task_id": "none"}', 404),
        ("POST", "/api/v1b/dataset", b'{"name": "d", "images": ["/api/v1b/files/none"]}', 400),
        ("POST", "/api/v1b/train_submit", b'{"name": "m", "dataset": [999]}', 400),
        ("POST", "/api/v1b/upload_imgs", b"no form", 400),
    ],
)
def test_what_is_wrong_gets_a_status_and_the_connection_goes_on(
    client: httpx.Client, method: str, path: str, body: bytes | None, status: int
) -> None:
    answer = client.request(method, path, content=body)
    assert answer.status_code == status
    if status != 200:
        assert set(answer.json()) == {"code", "info", "msg"}
    assert client.get("/health").json() == {"status": "ok"}


def test_a_body_is_not_taken_without_bound(client: httpx.Client) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=10) as connection:
        connection.sendall(b"POST /api/v1b/upload_imgs HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
