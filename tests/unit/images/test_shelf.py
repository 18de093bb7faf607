"""What is on the list, what may go, and that a crash never leaves half of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from ngpu_node.images.shelf import MAX_PROVEN, Entry, Shelf, collectable, is_pinned, prove


def entry(name: str, **changes: object) -> Entry:
    values: dict[str, object] = {"reference": f"{name}:1", "id": f"id-{name}", "digest": "ab" * 32, "size": 10}
    return Entry(name=name, **{**values, **changes})  # type: ignore[arg-type]


def test_least_recently_used_first_and_nothing_that_anybody_needs() -> None:
    entries = [
        entry("old", used_ms=1),
        entry("newer", used_ms=3),
        entry("between", used_ms=2),
        entry("held"),
        entry("used"),
        entry("borrowed", borrowed=True),
        entry("coming", id=""),
        entry("pinned"),
    ]
    found = collectable(entries, used_ids={"id-used"}, held_names={"held"}, keep=["pinned"])
    assert [item.name for item in found] == ["old", "between", "newer"]


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans(), st.integers(0, 9)), max_size=12),
    st.sets(st.sampled_from("abcdef")),
    st.sets(st.sampled_from("abcdef")),
)
def test_what_is_used_held_or_borrowed_is_never_chosen(
    rows: list[tuple[str, bool, int]], used: set[str], held: set[str]
) -> None:
    entries = [entry(name, borrowed=borrowed, used_ms=at) for name, borrowed, at in rows]
    found = collectable(entries, used_ids={f"id-{name}" for name in used}, held_names=held, keep=[])
    assert not {item.name for item in found} & (used | held)
    assert not any(item.borrowed for item in found)
    assert [item.used_ms for item in found] == sorted(item.used_ms for item in found)


@pytest.mark.parametrize(
    ("reference", "pin", "is_meant"),
    [
        ("vllm/vllm:1", "vllm/vllm", True),
        ("vllm/vllm:1", "docker.io/vllm/vllm:1", True),
        ("vllm/vllm:1", "vllm/vllm:2", False),
        ("vllm/vllm:1", "other/vllm", False),
        ("vllm/vllm:1", "vllm/vllm@sha256:" + "ab" * 32, True),
        ("vllm/vllm:1", "vllm/vllm@sha256:" + "cd" * 32, False),
        ("http://x/a.tar", "http://x/a.tar", True),
        ("http://x/a.tar", "vllm/vllm", False),
    ],
)
def test_an_owners_pin_means_a_repository_a_tag_or_a_digest(reference: str, pin: str, is_meant: bool) -> None:
    assert is_pinned(entry("x", reference=reference), pin) is is_meant


def test_the_list_survives_a_restart_whole(tmp_path: Path) -> None:
    path = tmp_path / "images.json"

    async def main() -> None:
        shelf = Shelf(path)
        one = entry("a@sha256:1", restricted=True, proven=["acme/7"])
        shelf.put(one)
        shelf.put(entry("b@sha256:2", borrowed=True))
        shelf.remember(one, "acme/7/1", 5)
        await shelf.save()
        again = Shelf(path)
        assert again.entries() == shelf.entries()
        assert again.resolved("acme/7/1") == one
        assert again.with_id("id-b@sha256:2") == [shelf.get("b@sha256:2")]
        again.drop("a@sha256:1")
        await again.save()
        assert [item.name for item in Shelf(path).entries()] == ["b@sha256:2"]

    trio.run(main)
    assert [item.name for item in tmp_path.iterdir()] == ["images.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"images": [1]}', '{"images": [{"name": 1, "reference": "a"}]}', '{"images": [{"name": "a"}]}',
     '{"images": [{"name": "a", "reference": "a", "proven": "acme/7"}]}'],
)  # fmt: skip
def test_a_list_that_cannot_be_read_means_that_nothing_is_ours(tmp_path: Path, text: str) -> None:
    path = tmp_path / "images.json"
    path.write_text(text)
    assert Shelf(path).entries() == []


def test_a_later_versions_fields_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "images.json"
    path.write_text(json.dumps({"images": [{"name": "a", "reference": "a", "colour": "red"}], "version": 9}))
    assert [item.name for item in Shelf(path).entries()] == ["a"]


def test_a_disk_that_refuses_does_not_end_the_node(tmp_path: Path) -> None:
    async def main() -> None:
        shelf = Shelf(tmp_path / "missing" / "images.json")
        shelf.put(entry("a"))
        await shelf.save()
        assert shelf.get("a") is not None

    trio.run(main)


def test_a_holder_is_of_one_image_at_a_time() -> None:
    shelf = Shelf(None)
    first, second = entry("a"), entry("b")
    shelf.put(first)
    shelf.put(second)
    shelf.remember(first, "acme/7/1", 5)
    shelf.remember(second, "acme/7/1", 6)
    assert shelf.resolved("acme/7/1") is second
    shelf.forget("acme/7/1")
    assert shelf.resolved("acme/7/1") is None


def test_proofs_are_bounded_and_the_newest_stay() -> None:
    one = entry("a", restricted=True)
    for number in range(MAX_PROVEN + 10):
        prove(one, f"acme/{number}")
    prove(one, "acme/20")
    assert len(one.proven) == MAX_PROVEN
    assert one.may_be_used_by("acme/20")
    assert not one.may_be_used_by("acme/0")
    assert entry("b").may_be_used_by("anybody")


def test_a_urls_query_is_not_kept_and_a_pin_means_its_file_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "images.json"
    path.write_text(json.dumps({"images": [{"name": "a", "reference": "https://example.org/i.tar?signature=s3cret"}]}))
    (kept,) = Shelf(path).entries()
    assert kept.reference == "https://example.org/i.tar"
    assert is_pinned(kept, "https://example.org/i.tar?signature=another")
    assert not is_pinned(kept, "https://example.org/j.tar")
