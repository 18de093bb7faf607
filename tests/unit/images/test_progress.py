"""Progress of a pull: weighed, never going back, and 100 never its own to say."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ngpu_node.images.progress import Progress, PullProgress

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64
STATUSES = ["Pulling fs layer", "Waiting", "Downloading", "Verifying Checksum", "Download complete", "Extracting"]
STATUSES += ["Pull complete", "Already exists", "Retrying in 5 seconds", "Status: Downloaded newer image", ""]


def event(name: str, status: str, current: int = 0, total: int = 0) -> dict[str, Any]:
    detail = {"current": current, "total": total} if total else {}
    return {"id": name[7:19], "status": status, "progressDetail": detail}


def test_download_counts_four_fifths_and_unpacking_one() -> None:
    progress = PullProgress({A: 900, B: 100})
    assert progress.look(0).percent == 0
    progress.feed(event(A, "Downloading", 450, 900))
    assert progress.look(1) == Progress(36, 450, 1000, 2)
    progress.feed(event(A, "Download complete"))
    progress.feed(event(B, "Download complete"))
    assert progress.look(2).percent == 80
    assert progress.unpacking
    progress.feed(event(A, "Extracting", 450, 900))
    assert progress.look(3).percent == 89
    progress.feed(event(A, "Pull complete"))
    progress.feed(event(B, "Pull complete"))
    assert progress.look(4).percent == 99


def test_a_layer_begun_again_takes_nothing_back_and_is_no_movement() -> None:
    progress = PullProgress({A: 1000})
    progress.feed(event(A, "Downloading", 800, 1000))
    before, moved = progress.look(1), progress.moved
    for current in (0, 100, 800):
        progress.feed(event(A, "Downloading", current, 1000))
    progress.feed(event(A, "Retrying in 5 seconds"))
    assert (progress.look(2).percent, progress.moved) == (before.percent, moved)
    progress.feed(event(A, "Downloading", 801, 1000))
    assert progress.moved == moved + 1


def test_without_sizes_the_total_grows_as_layers_show() -> None:
    progress = PullProgress(None)
    assert progress.look(0) == Progress()
    progress.feed(event(A, "Downloading", 50, 100))
    assert progress.look(1).bytes_total == 100
    progress.feed(event(B, "Downloading", 0, 300))
    after = progress.look(2)
    assert (after.bytes_total, after.percent) == (400, 40), "what was shown is not taken back"


def test_seconds_left_follow_the_last_seconds_not_the_whole() -> None:
    progress = PullProgress({A: 1000})
    for second in range(1, 11):
        progress.feed(event(A, "Downloading", second * 10, 1000))
        progress.look(second)
    slow = progress.look(10).seconds_left
    for second in range(11, 31):
        progress.feed(event(A, "Downloading", 100 + (second - 10) * 40, 1000))
        progress.look(second)
    assert slow is not None
    assert slow > 80
    left = progress.look(30).seconds_left
    assert left is not None
    assert left < 20


def test_a_sentence_says_bytes_and_time_or_what_is_in_the_way() -> None:
    assert Progress().sentence("app:1") == "pulling app:1"
    assert Progress(10, 1_500_000, 3_000_000).sentence("app:1") == "pulling app:1: 1.5 MB of 3 MB"
    assert Progress(10, 0, 3_000, 7).sentence("app:1").endswith("about 7 s left")
    assert Progress(note="waiting").sentence("app:1") == "waiting"


numbers = st.integers(-5, 2000)
events = st.fixed_dictionaries(
    {
        "id": st.sampled_from([A[7:19], B[7:19], "latest", "cccccccccccc"]),
        "status": st.sampled_from(STATUSES),
        "progressDetail": st.one_of(
            st.just({}),
            st.none(),
            st.fixed_dictionaries({"current": numbers, "total": numbers}),
            st.just({"current": "x"}),
        ),
    }
)


@given(st.lists(events, max_size=60), st.booleans())
def test_whatever_the_engine_says_it_never_goes_back_nor_says_100(told: list[dict[str, Any]], known: bool) -> None:
    progress = PullProgress({A: 1000, B: 500} if known else None)
    before = progress.look(0)
    for number, item in enumerate(told, 1):
        progress.feed(item)
        now = progress.look(number)
        assert before.percent <= now.percent <= 99
        assert before.bytes_done <= now.bytes_done <= max(now.bytes_total, before.bytes_done)
        assert now.seconds_left is None or now.seconds_left >= 0
        before = now


@given(st.lists(st.one_of(st.none(), st.integers(), st.text(), st.lists(st.integers())), max_size=10))
def test_events_of_no_known_form_are_passed_over(values: list[Any]) -> None:
    progress = PullProgress({A: 10})
    for value in values:
        progress.feed({"id": value, "status": value, "progressDetail": value})
        progress.feed({"id": A[7:19], "status": "Downloading", "progressDetail": value})
    assert progress.look(0).percent == 0
