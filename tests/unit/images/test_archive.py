"""Tars of images from strangers: written anew while they stream, with one image, one tag, and nothing else."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpu_node.images.archive import for_engine, gunzipped
from ngpu_node.images.problems import BadArchive, WrongChecksum

TAG = "archive.ngpu.invalid/image:" + "0" * 64
CONFIG, LAYER = b'{"rootfs": {}}', bytes(range(256)) * 40


def manifest(**changes: Any) -> bytes:
    image = {"Config": "abc.json", "RepoTags": ["owner/app:latest"], "Layers": ["l/layer.tar"], "Parent": "x"}
    return json.dumps([{**image, **changes}]).encode()


def tar_of(
    *members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.GNU_FORMAT, pax: dict[str, str] | None = None
) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=form, pax_headers=pax) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            entry = tarfile.TarInfo(member[0])
            entry.size = len(member[1])
            tar.addfile(entry, io.BytesIO(member[1]))
    return packed.getvalue()


def a_saved_image(**options: Any) -> bytes:
    folder = tarfile.TarInfo("l/")
    folder.type = tarfile.DIRTYPE
    return tar_of(
        folder,
        ("l/layer.tar", LAYER),
        ("abc.json", CONFIG),
        ("repositories", b'{"owner/app": {}}'),
        ("index.json", b"{}"),
        ("manifest.json", manifest()),
        **options,
    )


async def in_pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def fine() -> None:
    pass


def rewrite(data: bytes, size: int = 1000, confirm: Callable[[], Any] = fine) -> bytes:
    async def main() -> bytes:
        source = for_engine(gunzipped(in_pieces(data, size)), tag=TAG, confirm=confirm)
        return b"".join([part async for part in source])

    return trio.run(main)


def read(data: bytes) -> dict[str, bytes | None]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {
            member.name: file.read() if member.isreg() and (file := tar.extractfile(member)) else None for member in tar
        }


def test_the_image_keeps_its_files_and_gets_our_tag_for_its_own() -> None:
    found = read(rewrite(a_saved_image()))
    assert list(found) == ["l", "l/layer.tar", "abc.json", "manifest.json"]
    assert (found["l/layer.tar"], found["abc.json"]) == (LAYER, CONFIG)
    (image,) = json.loads(found["manifest.json"] or b"")
    assert image == {"Config": "abc.json", "RepoTags": [TAG], "Layers": ["l/layer.tar"]}


@settings(max_examples=30)
@given(st.integers(1, 3000), st.booleans(), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_how_it_is_cut_into_pieces_does_not_matter(size: int, packed: bool, form: int) -> None:
    data = a_saved_image(form=form)
    assert rewrite(gzip.compress(data) if packed else data, max(size, 40)) == rewrite(a_saved_image())


def test_names_longer_than_a_header_holds_are_kept() -> None:
    path = "/".join(["x" * 60] * 4) + "/layer.tar"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = tar_of((path, LAYER), ("abc.json", CONFIG), ("manifest.json", manifest(Layers=[path])), form=form)
        assert read(rewrite(data))[path] == LAYER


def test_an_extended_header_cannot_smuggle_a_second_manifest() -> None:
    entry = tarfile.TarInfo("innocent")
    entry.pax_headers = {"path": "./manifest.json"}
    entry.size = 0
    data = tar_of(("abc.json", CONFIG), ("manifest.json", manifest(Layers=[])), entry, form=tarfile.PAX_FORMAT)
    with pytest.raises(BadArchive, match=r"manifest\.json"):
        rewrite(data)


def test_links_between_layers_are_kept() -> None:
    link = tarfile.TarInfo("m/layer.tar")
    link.type, link.linkname = tarfile.SYMTYPE, "../l/layer.tar"
    data = tar_of(("l/layer.tar", LAYER), link, ("abc.json", CONFIG), ("manifest.json", manifest()))
    with tarfile.open(fileobj=io.BytesIO(rewrite(data))) as tar:
        assert tar.getmember("m/layer.tar").linkname == "../l/layer.tar"


def special(kind: bytes, name: str = "x", link: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return entry


GOOD = [("l/layer.tar", LAYER), ("abc.json", CONFIG)]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "ends in the middle"),
        (a_saved_image()[:-9000], "ends in the middle"),
        (gzip.compress(a_saved_image())[:-30], "ends in the middle"),
        (b"\x1f\x8bnot gzip at all" * 100, "damaged"),
        (b"<html>" * 200, "not a tar"),
        (tar_of(*GOOD), "no manifest.json"),
        (tar_of(*GOOD, ("manifest.json", b"{")), "exactly one image"),
        (tar_of(*GOOD, ("manifest.json", b"[]")), "exactly one image"),
        (tar_of(*GOOD, ("manifest.json", b"[" + manifest()[1:-1] + b"," + manifest()[1:-1] + b"]")), "exactly one"),
        (tar_of(*GOOD, ("manifest.json", manifest(Layers="l/layer.tar"))), "list of layers"),
        (tar_of(*GOOD, ("manifest.json", manifest(Layers=["other.tar"]))), "lacks a file"),
        (tar_of(*GOOD, ("manifest.json", manifest(Config=None))), "lacks a file"),
        (tar_of(*GOOD, ("manifest.json", manifest()), ("manifest.json", manifest())), "not one small file"),
        (tar_of(*GOOD, ("manifest.json", b"x" * 2_000_000)), "not one small file"),
        (tar_of(special(tarfile.SYMTYPE, "manifest.json", "abc.json")), "not one small file"),
        (tar_of(special(tarfile.CHRTYPE)), "kind that no image needs"),
        (tar_of(special(tarfile.FIFOTYPE)), "kind that no image needs"),
        (tar_of(("/etc/passwd", b"x")), "outside itself"),
        (tar_of(("a/../../etc", b"x")), "outside itself"),
        (tar_of(special(tarfile.SYMTYPE, "a", "/etc")), "link to somewhere else"),
        (tar_of(special(tarfile.LNKTYPE, "a", "../etc")), "link to somewhere else"),
    ],
)
def test_what_is_no_saved_image_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(BadArchive, match=says):
        rewrite(data)


def test_the_manifest_comes_only_after_the_whole_was_confirmed() -> None:
    passed = bytearray()

    async def refuse() -> None:
        raise WrongChecksum("another file")

    async def main() -> None:
        async for part in for_engine(in_pieces(a_saved_image() + bytes(5000), 100), tag=TAG, confirm=refuse):
            passed.extend(part)

    with pytest.raises(WrongChecksum):
        trio.run(main)
    assert b"l/layer.tar" in passed
    assert b"manifest.json" not in passed


def test_what_follows_the_tars_end_is_read_too_so_that_the_checksum_is_of_the_whole_file() -> None:
    seen = []

    async def counted(data: bytes) -> AsyncIterator[bytes]:
        async for part in in_pieces(data, 512):
            seen.append(len(part))
            yield part

    async def main() -> None:
        data = a_saved_image() + b"more" * 3000
        async for _ in for_engine(counted(data), tag=TAG, confirm=fine):
            pass
        assert sum(seen) == len(data)

    trio.run(main)


def test_a_bomb_unpacks_in_small_pieces() -> None:
    async def main() -> int:
        largest = 0
        async for part in gunzipped(in_pieces(gzip.compress(bytes(50_000_000)), 4096)):
            largest = max(largest, len(part))
        return largest

    assert trio.run(main) <= 256 * 1024


@given(st.binary(max_size=2000))
def test_no_bytes_do_worse_than_a_bad_archive(data: bytes) -> None:
    with pytest.raises(BadArchive):
        rewrite(data)


@settings(max_examples=60)
@given(st.integers(0, len(a_saved_image()) - 1), st.integers(1, 255))
def test_a_changed_byte_gives_an_archive_or_a_problem(place: int, change: int) -> None:
    data = bytearray(a_saved_image())
    data[place] ^= change
    try:
        found = read(rewrite(bytes(data)))
    except BadArchive:
        return
    (image,) = json.loads(found["manifest.json"] or b"")
    assert image["RepoTags"] == [TAG]
