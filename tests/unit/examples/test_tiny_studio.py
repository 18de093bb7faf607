"""The studio example: styles learned and painted in, requests read, what is kept, as values."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "studio"))

from tiny_studio import library as library_module
from tiny_studio import work as work_module
from tiny_studio.__main__ import BASE_STYLE
from tiny_studio.edges import canny
from tiny_studio.library import Full, Library
from tiny_studio.painting import Wish, paint
from tiny_studio.pictures import NoPicture, pixels_of, size_of
from tiny_studio.requests import BadRequest, read_paint, read_picture, read_train, read_uploads
from tiny_studio.styles import COLOURS, Plane, Style, learn
from tiny_studio.work import Studio

SMALL = {"width": 96, "height": 64}
ANYTHING = st.integers() | st.text(st.characters(codec="ascii"), max_size=12)
NOW = "2026-01-02 03:04:05"


def stripes(colour: tuple[float, float, float], *, upright: bool = False) -> Plane:
    """Return dark stripes on *colour*, lying, or upright."""
    picture = np.full((64, 64, 3), colour, dtype=np.float32)
    picture[np.arange(64) % 8 < 3] = 0.05
    return picture.transpose(1, 0, 2) if upright else picture


def png(picture: Plane) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((picture * 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_style_has_the_colours_and_the_direction_of_what_it_was_learned_from() -> None:
    shares: list[float] = []
    red = learn([lambda: stripes((0.9, 0.1, 0.1))], progress=shares.append)
    assert red.palette.shape == (COLOURS, 3)
    lightest = red.palette[-1]
    assert lightest[0] > 0.8
    assert lightest[2] < 0.2
    assert red.shares.sum() == pytest.approx(1, abs=1e-4)
    # light changes downwards where stripes lie, across where they stand
    assert abs(red.angle) == pytest.approx(np.pi / 2, abs=0.05)
    assert red.coherence > 0.9
    assert learn([lambda: stripes((0.9, 0.1, 0.1), upright=True)]).angle == pytest.approx(0, abs=0.05)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert Style.of(json.loads(json.dumps(red.document()))).document() == red.document()


def test_fine_and_coarse_pictures_differ_in_their_bands() -> None:
    chance = np.random.default_rng(1)
    fine = np.repeat(chance.random((128, 128, 1), dtype=np.float32), 3, axis=2)
    coarse = np.kron(chance.random((8, 8), dtype=np.float32), np.ones((16, 16), np.float32))[..., None].repeat(
        3, axis=2
    )
    fine_bands, coarse_bands = (learn([lambda one=one: one]).bands for one in (fine, coarse))
    assert fine_bands[-1] > 3 * fine_bands[1]
    assert coarse_bands[-1] < coarse_bands[1]


def test_the_same_wish_in_the_same_style_is_the_same_picture_and_another_style_is_not() -> None:
    wish = Wish("one girl, beautiful", seed=7, **SMALL)
    first = paint(wish, BASE_STYLE)
    assert (first.shape, first.dtype) == ((64, 96, 3), np.uint8)
    assert np.array_equal(first, paint(wish, BASE_STYLE))
    blue = learn([lambda: stripes((0.1, 0.2, 0.9))])
    in_blue = paint(wish, blue).reshape(-1, 3).mean(axis=0)
    assert in_blue[2] > in_blue[0] + 40
    for other in (Wish("a dog", seed=7, **SMALL), Wish("one girl, beautiful", seed=8, **SMALL)):
        assert not np.array_equal(first, paint(other, BASE_STYLE))


def test_a_picture_is_painted_over_with_its_light_or_along_its_contours() -> None:
    source = np.zeros((64, 96, 3), np.float32)
    source[:, 48:] = 1
    wish = Wish("sea", seed=1, **SMALL)
    over = paint(wish, BASE_STYLE, source=source).mean(axis=2)
    assert over[:, 60:].mean() > over[:, :36].mean() + 60
    plain, along = paint(wish, BASE_STYLE), paint(wish, BASE_STYLE, source=source, contours=True)
    changed = np.abs(plain.astype(int) - along).sum(axis=2) > 0
    assert changed[:, 46:51].any(axis=1).all()
    assert not changed[:, :44].any()
    assert not changed[:, 53:].any()


def test_contours_are_found_where_light_changes_and_nowhere_on_a_plain_surface() -> None:
    square = np.zeros((40, 40), np.float32)
    square[10:30, 10:30] = 1
    found = canny(square)
    rows, columns = np.nonzero(found)
    assert found.sum() >= 60
    for row, column in zip(rows, columns, strict=True):
        assert min(abs(row - 9.5), abs(row - 29.5), abs(column - 9.5), abs(column - 29.5)) <= 1.5
    assert not canny(np.full((40, 40), 0.5, np.float32)).any()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n_images": 0}, "n_images"),
        ({"n_images": 9}, "n_images"),
        ({"scale": 21}, "scale"),
        ({"select_seed": -2}, "select_seed"),
        ({"output_size": "960"}, "output_size"),
        ({"output_size": "10x10"}, "output_size"),
        ({"output_size": "4096x4096"}, "output_size"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 4001}, "prompt"),
        ({"init_img": "https://elsewhere.example/picture.png"}, "init_img"),
        ({"init_img": "data:image/png;base64,@@"}, "init_img"),
        ({"controlnet_model": "canny"}, "init_img"),
        ({"token": []}, "token"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        read_paint(fields)


def test_no_value_is_refused_for_missing_from_a_form() -> None:
    link = "https://bootstrap.example/api/v1b/files/" + "0" * 32 + ".png?Expires=5&Signature=abc"
    asked = read_paint({"model_name": "nobody trained it", "init_img": link, "controlnet_model": "depth"})
    assert (asked.wish.width, asked.wish.height, asked.pictures) == (960, 960, 2)
    assert asked.source is not None
    assert asked.source.name == "0" * 32 + ".png"
    assert "depth" in asked.notes[0]
    assert not asked.contours
    for nsfw, chosen in ((1, [5, 7]), ("1", ["5", 7.0]), (True, ["5", "7"])):
        fields = {"name": "m", "base_model": "自动选择", "main_body": "Robots", "dataset": chosen, "nsfw": nsfw}
        trained = read_train(fields)
        assert (trained.nsfw, trained.datasets) == (True, (5, 7))
    for fields in ({"dataset": 5, "nsfw": 0}, {"dataset": "5"}):
        assert not read_train({"name": "m", **fields}).nsfw


@pytest.mark.parametrize("dataset", [None, [], ["five"], [True], [5, None], {"id": 5}, [5] * 51])
def test_a_training_wants_datasets(dataset: Any) -> None:
    with pytest.raises(BadRequest, match="dataset"):
        read_train({"name": "m", "dataset": dataset})


@given(st.dictionaries(st.sampled_from(["n_images", "scale", "select_seed", "output_size"]), ANYTHING))
def test_any_values_are_taken_or_refused(fields: dict[str, Any]) -> None:
    try:
        asked = read_paint(fields)
    except BadRequest:
        return
    assert 1 <= asked.pictures <= 8
    assert min(asked.wish.width, asked.wish.height) >= 64


def test_an_upload_is_read_with_its_token_as_a_part_and_as_a_file() -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="init_img"; filename="a.png"\r\n'
        b"Content-Type: image/png\r\n\r\n\x89PNG\r\n\x00\xff\r\n--x\r\n"
        b'Content-Disposition: form-data; name="token"; filename="token"\r\n\r\n 17\r\n--x--\r\n'
    )
    assert read_uploads("multipart/form-data; boundary=x", body) == ("17", [b"\x89PNG\r\n\x00\xff"])
    for content_type, wrong in (("application/json", b"{}"), ("multipart/form-data; boundary=y", body)):
        with pytest.raises(BadRequest):
            read_uploads(content_type, wrong)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_form_or_refused(body: bytes) -> None:
    with contextlib.suppress(BadRequest):
        read_uploads("multipart/form-data; boundary=x", b"--x\r\n" + body)


def test_pictures_are_bounded_before_they_are_unpacked() -> None:
    buffer = io.BytesIO()
    Image.new("1", (5000, 5000)).save(buffer, "PNG")
    for data in (buffer.getvalue(), b"GIF89a", b"", png(stripes((1, 1, 1)))[:-40]):
        with pytest.raises(NoPicture):
            size_of(data)
    assert pixels_of(png(stripes((1, 1, 1))), longest=16).shape == (16, 16, 3)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path, now=lambda: NOW)


def test_what_is_kept_is_there_after_a_restart_and_for_its_account_alone(library: Library, tmp_path: Path) -> None:
    name = library.add_picture(b"data", "png")
    number = library.add_dataset("1", "d", "about", [name])
    again = Library(tmp_path, now=lambda: NOW)
    assert again.picture(name) == b"data"
    assert [(entry["id"], entry["create_time"]) for entry in again.datasets("1")] == [(number, NOW)]
    assert again.datasets("2") == []
    assert again.add_dataset("2", "e", "", [name]) == number + 1


@pytest.mark.parametrize("name", ["../index.json", "..%2findex.json", "", "index.json", "0" * 32 + ".png/../../x"])
def test_no_name_leads_out_of_the_folder(library: Library, name: str) -> None:
    assert library.picture(name) is None


def test_what_is_kept_is_bounded(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_UPLOADS", "MAX_PAINTED", "MAX_DATASETS"):
        monkeypatch.setattr(library_module, name, 2)
    painted = [library.add_picture(b"p", "png", painted=True) for _ in range(3)]
    assert [library.picture(name) for name in painted] == [None, b"p", b"p"]
    for _ in range(2):
        library.add_picture(b"u", "png")
        library.add_dataset("1", "d", "", [])
    with pytest.raises(Full):
        library.add_picture(b"u", "png")
    with pytest.raises(Full):
        library.add_dataset("1", "d", "", [])


def test_an_interrupted_training_begins_again(library: Library) -> None:
    link = "/api/v1b/files/" + library.add_picture(png(stripes((0.1, 0.2, 0.9))), "png")
    number = library.add_dataset("1", "d", "", [link])
    entry = {
        "task_id": "t", "name": "sea model", "model_name": "sea_model", "description": "", "base_model": "",
        "trigger_word": "", "main_body": "Style", "nsfw": False, "datasets": [number], "create_time": NOW,
        "state": "training", "training_progress": 0.4, "style": None, "error": "",
    }  # fmt: skip
    library.add_model("1", entry)
    studio = Studio(library, BASE_STYLE, now=lambda: NOW)
    for _ in range(500):
        state = studio.progress("1", "t")
        assert state is not None
        if state["state"] == "done":
            break
        time.sleep(0.02)
    assert (state["training_progress"], studio.trained("1"), studio.trained("2")) == (1.0, ["sea model"], [])
    assert studio.progress("2", "t") is None


def test_a_model_that_is_not_trained_is_painted_in_the_studios_own_style_and_the_answer_says_so(
    library: Library,
) -> None:
    studio = Studio(library, BASE_STYLE, now=lambda: NOW)

    def notes_of(model: str) -> list[str]:
        small = {"output_size": "64x64", "n_images": 1, "select_seed": 1}
        task_id = studio.submit(read_paint({"token": "1", "model_name": model, **small}))
        while (result := studio.result("1", task_id)) is not None and result["state"] == "pending":
            time.sleep(0.005)
        assert result is not None
        assert result["state"] == "done"
        return list(result["notes"])

    assert notes_of("Artist_V0.1.3") == notes_of("") == []
    assert notes_of("sea") == ["model_name sea is none of yours; the picture is in the studio's own style"]


def test_what_failed_makes_room_and_more_trainings_than_may_wait_are_taken_up_again(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "MAX_MODELS", 3)
    monkeypatch.setattr(work_module, "MAX_WAITING", 1)
    kept = {"model_name": "", "description": "", "base_model": "", "trigger_word": "", "main_body": "", "nsfw": False,
            "datasets": [9], "create_time": NOW, "training_progress": 0.0, "style": None, "error": ""}  # fmt: skip
    for name, state in (("a", "failed"), ("b", "training"), ("c", "pending")):
        library.add_model("1", {"task_id": name, "name": name, "state": state, **kept})
    library.add_model("1", {"task_id": "d", "name": "d", "state": "pending", **kept})
    assert [entry["name"] for entry in library.models("1")] == ["b", "c", "d"]
    with pytest.raises(Full):
        library.add_model("1", {"task_id": "e", "name": "e", "state": "pending", **kept})
    studio = Studio(library, BASE_STYLE, now=lambda: NOW)
    while any(entry["state"] != "failed" for entry in library.models("1")):  # there is no dataset 9
        time.sleep(0.005)
    assert studio.trained("1") == []


def test_a_data_url_is_a_picture() -> None:
    data = png(stripes((1, 0, 0)))
    found = read_picture("data:image/png;base64," + base64.b64encode(data).decode(), "init_img")
    assert found is not None
    assert found.data == data
