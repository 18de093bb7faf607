"""The paint example's pictures and jobs, as values."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "paint"))

from procedural_paint import jobs as jobs_module
from procedural_paint.jobs import Jobs, QueueFull
from procedural_paint.requests import BadRequest, Job, read_job
from procedural_paint.synthesis import Wish, motifs, paint, palette, repaint

SMALL = {"width": 48, "height": 32}


def body(**fields: Any) -> bytes:
    return json.dumps({**SMALL, **fields}).encode()


def encoded(picture: Image.Image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def test_the_same_words_seed_and_size_are_the_same_pixels() -> None:
    wish = Wish("sun over mountains at sunset", seed=7, **SMALL)
    first = paint(wish)
    assert first.shape == (32, 48, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, paint(wish))
    for other in (Wish("sun over mountains at sunset", seed=8, **SMALL), Wish("sea at night", seed=7, **SMALL)):
        assert not np.array_equal(first, paint(other))


def test_words_choose_palette_and_motifs_and_the_negative_prompt_takes_away() -> None:
    ocean = palette(Wish("a calm ocean"))
    assert ocean[2][2] > ocean[2][0]  # blue
    assert np.array_equal(palette(Wish("SEA")), ocean)
    assert not np.array_equal(palette(Wish("ocean", negative_prompt="ocean")), ocean)
    assert motifs(Wish("mountains, a moon and stars over the sea")) == ["stars", "disc", "ridges", "waves"]
    assert motifs(Wish("moon and stars", negative_prompt="stars")) == ["disc"]
    assert motifs(Wish("a portrait")) == []


def test_more_steps_show_more_detail() -> None:
    def roughness(steps: int) -> float:
        light = paint(Wish("grey", seed=1, width=128, height=128, steps=steps)).mean(axis=2)
        return float(np.abs(np.diff(light, axis=0)).mean())

    assert roughness(60) > roughness(1) * 1.1


def test_repainting_keeps_light_and_dark_and_takes_the_palette() -> None:
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:, 24:] = 255
    wish = Wish("red", seed=3, **SMALL)
    assert np.array_equal(repaint(picture, wish, 0), picture)
    drawn = repaint(picture, wish, 1.0).astype(int)
    assert drawn[:, 30:].mean() > drawn[:, :18].mean() + 100
    half = repaint(picture, wish, 0.5).astype(int)
    assert np.abs(half - picture).mean() < np.abs(drawn - picture).mean()


def test_an_answer_is_png_with_its_seeds() -> None:
    job = read_job(body(prompt="é red sun", seed=5, batch_size=2), from_image=False)
    files = job.run()
    answer = job.answer(files)
    assert json.loads(answer["info"])["all_seeds"] == [5, 6]
    assert base64.b64decode(answer["images"][0]) == files[0]
    picture = Image.open(io.BytesIO(files[1]))
    assert (picture.format, picture.size, picture.mode) == ("PNG", (48, 32), "RGB")
    assert picture.text["parameters"] == "é red sun\nSteps: 20, Seed: 6"  # type: ignore[attr-defined]


def test_no_seed_is_any_seed() -> None:
    seeds = {read_job(body(seed=-1), from_image=False).seeds[0] for _ in range(4)}
    assert len(seeds) > 1


def test_image_to_image_takes_the_source_size_unless_one_is_named() -> None:
    source = encoded(Image.new("RGB", (100, 60), "white"), "JPEG")
    job = read_job(json.dumps({"init_images": ["data:image/jpeg;base64," + source]}).encode(), from_image=True)
    assert (job.wish.width, job.wish.height, job.strength) == (100, 60, 0.75)
    assert Image.open(io.BytesIO(job.run()[0])).size == (100, 60)
    assert read_job(body(init_images=[source]), from_image=None).wish.width == 48
    assert read_job(body(), from_image=None).source is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"width": 15}, "width"),
        ({"height": 2049}, "height"),
        ({"width": "48"}, "width"),
        ({"steps": 0}, "steps"),
        ({"steps": True}, "steps"),
        ({"seed": -2}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"batch_size": 9}, "batch_size"),
        ({"batch_size": 4, "n_iter": 3}, "at most 8 pictures"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 4001}, "prompt"),
        ({"init_images": []}, "init_images"),
        ({"init_images": ["@@"]}, "init_images"),
        ({"init_images": [base64.b64encode(b"GIF89a").decode()]}, "init_images"),
        ({"init_images": [encoded(Image.new("1", (5000, 5000)))]}, "too large"),
        ({"init_images": [encoded(Image.new("1", (4, 4)))], "denoising_strength": 2}, "denoising_strength"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        read_job(body(**fields), from_image="init_images" in fields)


@pytest.mark.parametrize("text", [b"[]", b"{", b"5", b"\xff"])
def test_what_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(BadRequest):
        read_job(text, from_image=False)


@given(st.dictionaries(st.sampled_from(["prompt", "width", "seed", "steps", "n_iter"]), st.integers() | st.floats()))
def test_any_numbers_are_taken_or_refused(fields: dict[str, Any]) -> None:
    try:
        job = read_job(json.dumps(fields).encode(), from_image=False)
    except BadRequest:
        return
    assert 16 <= job.wish.width <= 2048
    assert 1 <= len(job.seeds) <= 8


def test_jobs_go_through_their_states_and_are_forgotten() -> None:
    now_s = 0.0
    jobs = Jobs(painters=1, clock=lambda: now_s)
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Job):
        def run(self, progress: Any = None) -> list[bytes]:
            progress(0.5)
            begun.set()
            assert go_on.wait(10)
            return [b"png"]

    class Broken(Job):
        def run(self, progress: Any = None) -> list[bytes]:
            raise MemoryError("no room")

    wish = Wish("red", **SMALL)
    slow, broken = jobs.submit(Slow(wish, (1,))), jobs.submit(Broken(wish, (1,)))
    assert begun.wait(10)
    assert jobs.status(slow) == {"task_id": slow, "status": "running", "progress": 50}
    assert jobs.status(broken) == {"task_id": broken, "status": "queued", "progress": 0}
    go_on.set()
    done = wait_for(jobs, slow, "done")
    assert done["images"] == [base64.b64encode(b"png").decode()]
    assert wait_for(jobs, broken, "failed")["error"] == "no room"
    now_s = jobs_module.KEPT_S + 1
    assert jobs.status(slow) is None
    assert jobs.status("nothing") is None


def test_the_queue_is_bounded() -> None:
    jobs = Jobs(painters=0)
    wish = Wish("red", **SMALL)
    for _ in range(jobs_module.MAX_QUEUED):
        jobs.submit(Job(wish, (1,)))
    with pytest.raises(QueueFull):
        jobs.submit(Job(wish, (1,)))


def wait_for(jobs: Jobs, task_id: str, status: str) -> dict[str, Any]:
    for _ in range(500):
        state = jobs.status(task_id)
        if state is not None and state["status"] == status:
            return state
        threading.Event().wait(0.02)
    raise AssertionError(f"{task_id} is not {status}")
