"""The owner's disk: what does not fit is refused with numbers, what nobody needs goes, what is not ours stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from ngpu_node.images import retrying
from ngpu_node.images.images import Images
from ngpu_node.images.problems import DiskFull, OutOfSpace, TotalReached
from tests.integration.images.rig import Engine, a_node_of_images, a_wish, fresh
from tests.support.fake_registry import FakeRegistry, a_registry, make_image

pytestmark = pytest.mark.needs_docker

MB = 1000 * 1000


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with a_registry() as running:
        yield running


@pytest.fixture
def engine() -> Iterator[Engine]:
    running = Engine()
    before = running.ids()
    yield running
    running.clear(before)
    running.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "WAITS_S", (0.05,))


class Disk:
    """A disk of a given size, of which the images of a test take what the engine says they do."""

    def __init__(self, engine: Engine, size: int) -> None:
        self._engine = engine
        self._before = engine.ids()
        self.size = size

    def free(self) -> int:
        images = self._engine._client.images.list(all=True)
        return self.size - sum(image.attrs["Size"] for image in images if image.id not in self._before)


async def have(images: Images, *references: str) -> None:
    """Have each, one after the other, and let go of it."""
    for reference in references:
        wish = a_wish(reference)
        await images.ensure(wish)
        images.release(wish.holder)
        await trio.sleep(0.01)


def test_what_does_not_fit_beside_the_reserve_is_refused_with_the_numbers(
    registry: FakeRegistry, engine: Engine
) -> None:
    made = make_image([MB], "does not fit")
    reference = registry.push(made, fresh("big"), "1")

    async def main() -> None:
        async with a_node_of_images(registry, free_bytes=lambda: 12 * MB, disk_reserve_bytes=10 * MB) as images:
            assert images.room() == 2 * MB
            with pytest.raises(DiskFull) as raised:
                await images.ensure(a_wish(reference))
            assert (raised.value.free, raised.value.reserve) == (12 * MB, 10 * MB)
            assert raised.value.needed >= 2 * made.size
            for number in ("3 MB", "12 MB", "10 MB"):
                assert number in str(raised.value)

    trio.run(main)
    assert registry.count(made.layers[0]) == 0


def test_the_least_recently_used_go_and_only_as_many_as_it_takes(registry: FakeRegistry, engine: Engine) -> None:
    names = [registry.push(make_image([MB], f"lru {n}"), fresh(f"lru{n}"), "1") for n in range(4)]

    async def main() -> None:
        disk = Disk(engine, 7 * MB)
        async with a_node_of_images(registry, free_bytes=disk.free, disk_reserve_bytes=MB) as images:
            await have(images, names[0], names[1], names[2], names[0])
            # 4 MB are free, 3 of them beyond the reserve; the fourth wants about 3: one byte more than there is
            disk.size -= 10_000
            await have(images, names[3])
            left = {entry["image"] for entry in images.listed()}
            assert left == {names[0], names[2], names[3]}

    trio.run(main)


def test_what_is_in_use_pinned_tagged_by_somebody_or_not_ours_stays_whatever_the_pressure(
    registry: FakeRegistry, engine: Engine
) -> None:
    made = {word: make_image([MB], f"stays {word}") for word in ("held", "run", "kept", "tagged", "foreign", "idle")}
    names = {word: registry.push(image, fresh(word), "1") for word, image in made.items()}
    engine.pull(names["foreign"])

    async def main() -> None:
        disk = Disk(engine, 100 * MB)
        keep = [names["kept"]]
        async with a_node_of_images(registry, free_bytes=disk.free, disk_reserve_bytes=MB, keep=keep) as images:
            held = a_wish(names["held"])
            await images.ensure(held)
            await have(images, names["run"], names["kept"], names["tagged"], names["foreign"], names["idle"])
            container = engine.container_of(made["run"].config)
            engine._client.images.get(made["tagged"].config).tag(fresh("mine"), "1")
            disk.size -= disk.free() + MB // 2  # the reserve, and half an image more, is missing
            await images.disk.relieve()
            there = engine.ids()
            assert made["idle"].config in there, "all of what may go would not make the reserve: nothing is removed"
            disk.size += MB
            await images.disk.relieve()
            there = engine.ids()
            assert made["idle"].config not in there
            disk.size -= MB
            await images.disk.relieve()
            there = engine.ids()
            for word in ("held", "run", "kept", "tagged", "foreign"):
                assert made[word].config in there, word
            container.remove()
            await images.disk.relieve()
            assert made["run"].config not in engine.ids()

    trio.run(main)


def test_an_image_that_was_here_first_is_never_collected_though_we_pulled_it_too(
    registry: FakeRegistry, engine: Engine, tmp_path: Path
) -> None:
    made = make_image([MB], "first")
    reference = registry.push(made, fresh("first"), "1")
    engine.pull(reference)

    async def main() -> None:
        disk = Disk(engine, 0)
        async with a_node_of_images(
            registry, tmp_path / "images.json", free_bytes=disk.free, disk_reserve_bytes=0, local_images=False
        ) as images:
            disk.size = 100 * MB
            await have(images, reference)
            disk.size = -MB // 2
            await images.disk.relieve()

    trio.run(main)
    assert engine.has(reference)


def test_the_total_the_owner_gives_to_images_is_kept(registry: FakeRegistry, engine: Engine) -> None:
    first, second, third = (registry.push(make_image([MB], f"total {n}"), fresh(f"total{n}"), "1") for n in range(3))

    async def main() -> None:
        async with a_node_of_images(registry, total_bytes=3_500_000) as images:
            await have(images, first)
            wish = a_wish(second)
            await images.ensure(wish)  # about 2 MB are thought of for it: the first, of 1 MB, may stay
            assert len(images.listed()) == 2
            await have(images, third)
            assert {entry["image"] for entry in images.listed()} == {second, third}
            await images.ensure(a_wish(third))
            with pytest.raises(TotalReached) as raised:
                await images.ensure(a_wish(registry.push(make_image([MB], "total 4"), fresh("total4"), "1")))
            assert "3.5 MB" in str(raised.value)

    trio.run(main)


def test_a_pull_that_outgrows_the_estimate_is_broken_off_and_not_begun_again(
    registry: FakeRegistry, engine: Engine
) -> None:
    made = make_image([4 * MB], "grows")
    reference = registry.push(made, fresh("grows"), "1")
    registry.bytes_per_s = 4 * MB
    before = engine.ids()
    free: list[int] = [50 * MB]

    def shrinking() -> int:
        if registry.open_blobs:
            free[0] -= 30 * MB
        return free[0]

    async def main() -> None:
        async with a_node_of_images(registry, free_bytes=shrinking, disk_reserve_bytes=10 * MB) as images:
            with pytest.raises(OutOfSpace, match="broken off"):
                await images.ensure(a_wish(reference))
            registry.wait_for_downloads(0)
            free[0] = 40 * MB
            asked = registry.count(made.layers[0])
            with pytest.raises(DiskFull):
                await images.ensure(a_wish(reference))
            assert registry.count(made.layers[0]) == asked

    trio.run(main)
    assert engine.ids() == before


def test_two_pulls_at_once_are_not_promised_the_same_room(registry: FakeRegistry, engine: Engine) -> None:
    names = [registry.push(make_image([2 * MB], f"both {n}"), fresh(f"both{n}"), "1") for n in range(2)]
    registry.bytes_per_s = 2 * MB

    async def main() -> None:
        async with (
            a_node_of_images(registry, free_bytes=lambda: 10 * MB, disk_reserve_bytes=0) as images,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(images.ensure, a_wish(names[0]))
            await trio.to_thread.run_sync(registry.wait_for_downloads, 1)
            with pytest.raises(DiskFull):
                await images.ensure(a_wish(names[1]))
            nursery.cancel_scope.cancel()

    trio.run(main)
