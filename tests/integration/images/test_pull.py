"""Pulls on a real engine from a registry that goes wrong: each fault ends as it should, and nothing is left behind."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from ngpu_node.images import images as images_module
from ngpu_node.images import retrying
from ngpu_node.images.problems import (
    AddressNotAllowed,
    BadCredentials,
    CorruptLayer,
    ImageMissing,
    ImageProblem,
    PinConflict,
    RegistryDown,
    RegistryNotAllowed,
    Stalled,
    TookTooLong,
    TooLarge,
    WrongPlatform,
)
from tests.integration.images.rig import Engine, Heard, a_node_of_images, a_wish, fresh
from tests.support.fake_registry import FakeRegistry, a_registry, digest_of, list_of, make_image

pytestmark = pytest.mark.needs_docker

MB = 1000 * 1000


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with a_registry() as running:
        yield running


@pytest.fixture
def engine() -> Iterator[Engine]:
    """The engine, without whatever a test brought when it is over."""
    running = Engine()
    before = running.ids()
    yield running
    running.clear(before)
    running.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "WAITS_S", (0.05, 0.1))
    monkeypatch.setattr(images_module, "TELL_INTERVAL_S", 0.05)


def digest(reference_digest: str) -> bytes:
    return bytes.fromhex(reference_digest.removeprefix("sha256:"))


def test_an_image_comes_with_honest_progress_and_the_digest_that_was_confirmed(
    registry: FakeRegistry, engine: Engine
) -> None:
    made = make_image([3 * MB, MB, 100], "progress")
    reference = registry.push(made, fresh("app"), "1")
    registry.bytes_per_s = 1.5 * MB
    heard = Heard()

    async def main() -> None:
        async with a_node_of_images(registry) as images:
            image = await images.ensure(a_wish(reference), heard)
            assert image.digest == digest(made.digest)
            assert image.id == made.config
            # a second wish finds it and asks for no byte
            asked = registry.count("/blobs/" + made.layers[0])
            again = await images.ensure(a_wish(reference, digest=image.digest))
            assert again == image
            assert registry.count("/blobs/" + made.layers[0]) == asked

    trio.run(main)
    heard.check()
    assert heard.all[-1].bytes_total == heard.all[-1].bytes_done == made.size
    between = [progress for progress in heard.all if 0 < progress.percent < 100]
    assert len({progress.percent for progress in between}) > 4
    assert all(progress.bytes_total == made.size for progress in between)
    assert any(progress.seconds_left is not None for progress in between)
    assert engine.has(f"{reference.rpartition(':')[0]}@{made.digest}")
    assert not engine.has(reference), "no tag is made or moved"


def test_layers_that_are_here_already_are_not_counted(registry: FakeRegistry, engine: Engine) -> None:
    below = [bytes([7]) * MB]
    first, second = make_image([10], "first", base=below), make_image([2 * MB], "second", base=below)
    names = registry.push(first, fresh("a"), "1"), registry.push(second, fresh("b"), "1")
    heard = Heard()

    async def main() -> None:
        async with a_node_of_images(registry) as images:
            await images.ensure(a_wish(names[0]))
            await images.ensure(a_wish(names[1]), heard)

    trio.run(main)
    assert heard.all[-1].bytes_total == len(second.blobs[second.layers[1]])


def test_a_list_is_pinned_by_its_own_digest_and_the_platforms_image_comes(
    registry: FakeRegistry, engine: Engine
) -> None:
    name = fresh("many")
    ours, other = make_image([1000], "ours"), make_image([1000], "other", architecture="s390x")
    registry.push(ours, name)
    registry.push(other, name)
    listing = list_of(("s390x", other), ("amd64", ours))
    registry.push_list(listing, name, "1")
    registry.push_list(list_of(("s390x", other)), name, "foreign")
    registry.push(other, name, "plain")

    async def main() -> None:
        async with a_node_of_images(registry) as images:
            image = await images.ensure(a_wish(f"{registry.host}/{name}:1"))
            assert (image.id, image.digest) == (ours.config, digest(digest_of(listing)))
            for tag in ("foreign", "plain"):
                with pytest.raises(WrongPlatform, match="s390x"):
                    await images.ensure(a_wish(f"{registry.host}/{name}:{tag}"))

    trio.run(main)


def test_a_pinned_wish_gets_that_image_whatever_the_tag_says_now(registry: FakeRegistry, engine: Engine) -> None:
    name = fresh("moving")
    old, new = make_image([1000], "old"), make_image([1000], "new")
    reference = registry.push(old, name, "latest")
    registry.push(new, name, "latest")

    async def main() -> None:
        async with a_node_of_images(registry) as images:
            assert (await images.ensure(a_wish(reference, digest=digest(old.digest)))).id == old.config
            assert (await images.ensure(a_wish(reference))).id == new.config

    trio.run(main)


def test_a_pin_the_registry_does_not_have_is_told_from_an_image_that_is_missing(
    registry: FakeRegistry, engine: Engine
) -> None:
    made = make_image([1000], "pinned by a liar")
    reference = registry.push(made, fresh("lied"), "1")
    bogus = bytes(range(32))

    async def main() -> None:
        async with a_node_of_images(registry) as images:
            with pytest.raises(PinConflict) as raised:
                await images.ensure(a_wish(reference, digest=bogus))
            assert f"pinned to sha256:{bogus.hex()}, which the registry has not" in str(raised.value)
            assert f"{reference} is {made.digest} there" in str(raised.value)
            assert (raised.value.reason, raised.value.retry) == ("image_pin_conflict", False)
            # where the reference says it itself, and where there is nothing at all, it is just missing
            for missing in (f"{registry.host}/{fresh('none')}:1", f"{reference}@sha256:{bogus.hex()}"):
                with pytest.raises(ImageMissing):
                    await images.ensure(a_wish(missing, digest=bogus))

    trio.run(main)
    assert made.config not in engine.ids()


def test_a_holder_keeps_the_image_its_tag_meant_also_over_a_restart_without_a_registry(
    registry: FakeRegistry, engine: Engine, tmp_path: Path
) -> None:
    name = fresh("kept")
    old, new = make_image([1000], "kept old"), make_image([1000], "kept new")
    reference = registry.push(old, name, "latest")
    wish = a_wish(reference)

    async def main() -> None:
        async with a_node_of_images(registry, tmp_path / "images.json") as images:
            assert (await images.ensure(wish)).id == old.config
        registry.push(new, name, "latest")
        asked = len(registry.requests)
        async with a_node_of_images(registry, tmp_path / "images.json") as images:
            assert (await images.ensure(wish)).id == old.config
        assert len(registry.requests) == asked

    trio.run(main)


# -- faults ------------------------------------------------------------------------------------------------------------


def fails(
    registry: FakeRegistry, engine: Engine, reference: str, problem: type[ImageProblem], **chosen: object
) -> ImageProblem:
    """Return how a wish for *reference* ends, having seen that nothing is left of it."""
    before = engine.ids()
    login = chosen.pop("login", None)
    caught: list[ImageProblem] = []

    async def main() -> None:
        async with a_node_of_images(registry, **chosen) as images:  # type: ignore[arg-type]
            with pytest.raises(problem) as raised:
                await images.ensure(a_wish(reference, login=login))  # type: ignore[arg-type]
            caught.append(raised.value)
            assert images.listed() == []

    trio.run(main)
    assert engine.ids() == before
    return caught[0]


@pytest.mark.parametrize("exists", [True, False])
def test_a_missing_image_fails_at_once(registry: FakeRegistry, engine: Engine, exists: bool) -> None:
    name = fresh("missing")
    if exists:
        registry.push(make_image([10], "there"), name, "1")
    error = fails(registry, engine, f"{registry.host}/{name}:2", ImageMissing)
    assert not error.retry
    assert f"{name}:2" in str(error)
    assert registry.count("/manifests/") == 1


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("login", [None, ("acme", "wrong")])
def test_wrong_credentials_fail_at_once_and_say_whose(
    registry: FakeRegistry, engine: Engine, tokens: bool, login: tuple[str, str] | None
) -> None:
    registry.login, registry.tokens = ("acme", "right"), tokens
    reference = registry.push(make_image([10], "private"), fresh("private"), "1")
    error = fails(registry, engine, reference, BadCredentials, login=login)
    assert ("credentials given" if login else "wants a login") in str(error)
    assert "wrong" not in str(error).replace("wrong-", "")
    assert registry.count("/manifests/") <= 2


@pytest.mark.parametrize("tokens", [False, True])
def test_right_credentials_pull_and_are_written_nowhere(
    registry: FakeRegistry, engine: Engine, tmp_path: Path, tokens: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    registry.login, registry.tokens = ("acme", "s3cr3t-word"), tokens
    reference = registry.push(make_image([10], f"private {tokens}"), fresh("private"), "1")

    async def main() -> None:
        async with a_node_of_images(registry, tmp_path / "images.json") as images:
            await images.ensure(a_wish(reference, login=("acme", "s3cr3t-word")))

    trio.run(main)
    out, err = capfd.readouterr()
    assert "s3cr3t-word" not in out + err + (tmp_path / "images.json").read_text()


def test_an_image_pulled_with_credentials_is_for_those_who_have_some(registry: FakeRegistry, engine: Engine) -> None:
    registry.login = ("acme", "right")
    reference = registry.push(make_image([10], "guarded"), fresh("guarded"), "1")

    async def main() -> None:
        async with a_node_of_images(registry) as images:
            image = await images.ensure(a_wish(reference, login=registry.login))
            pin = image.digest
            for wish in (
                a_wish(reference, workspace="acme/8"),
                a_wish(reference, workspace="acme/8", digest=pin),
                a_wish(reference, workspace="other/7", digest=pin, login=("acme", "wrong")),
            ):
                with pytest.raises(BadCredentials):
                    await images.ensure(wish)
            assert await images.ensure(a_wish(reference, digest=pin)) == image
            blobs = registry.count("/blobs/")
            assert await images.ensure(a_wish(reference, workspace="other/7", login=registry.login)) == image
            assert registry.count("/blobs/") <= blobs + 1  # its configuration, no layer

    trio.run(main)


def test_a_registry_that_is_down_is_asked_again_and_named(registry: FakeRegistry, engine: Engine) -> None:
    registry.stop()
    error = fails(registry, engine, f"{registry.host}/app:1", RegistryDown)
    assert error.retry
    assert registry.host in str(error)


def test_a_pull_that_takes_longer_than_the_owner_allows_is_given_up(registry: FakeRegistry, engine: Engine) -> None:
    made = make_image([MB], "slow")
    reference = registry.push(made, fresh("slow"), "1")
    registry.bytes_per_s = MB / 20
    error = fails(registry, engine, reference, TookTooLong, timeout_s=1.0)
    assert not error.retry
    registry.wait_for_downloads(0)


@pytest.mark.parametrize("statuses", [[500, 503, 0], [429, 0], [408, 0]])
def test_what_passes_is_waited_for(registry: FakeRegistry, engine: Engine, statuses: list[int]) -> None:
    made = make_image([1000], f"passes {statuses}")
    reference = registry.push(made, fresh("passes"), "1")
    registry.answers["/manifests/"] = list(statuses)
    registry.retry_after = 1
    heard = Heard()

    async def main() -> None:
        async with a_node_of_images(registry) as images:
            began_s = trio.current_time()
            assert (await images.ensure(a_wish(reference), heard)).id == made.config
            if 429 in statuses:
                assert trio.current_time() - began_s >= 1.0, "asked before the registry wanted to be"

    trio.run(main)
    heard.check()
    words = {429: "registry_rate_limited"}
    assert heard.reasons() == {words.get(statuses[0], "registry_unavailable")}


def test_a_connection_cut_twice_in_a_layer_is_taken_up_again(registry: FakeRegistry, engine: Engine) -> None:
    made = make_image([MB], "cut")
    reference = registry.push(made, fresh("cut"), "1")
    registry.cuts[made.layers[0]] = 2
    heard = Heard()

    async def main() -> None:
        async with a_node_of_images(registry, stall_timeout_s=2.0) as images:
            assert (await images.ensure(a_wish(reference), heard)).id == made.config

    trio.run(main)
    heard.check()
    assert registry.count(made.layers[0]) >= 3


def test_a_layer_that_is_damaged_once_is_fetched_again_and_one_that_stays_so_fails(
    registry: FakeRegistry, engine: Engine
) -> None:
    made = make_image([1000, 200_000], "damaged")
    reference = registry.push(made, fresh("damaged"), "1")
    registry.corrupt.add(made.layers[1])
    error = fails(registry, engine, reference, CorruptLayer)
    assert "damaged" in str(error)
    assert registry.count(made.layers[1]) == 2

    async def main() -> None:
        async with a_node_of_images(registry) as images, trio.open_nursery() as nursery:

            def mend(progress: object) -> None:
                if getattr(progress, "reason", "") == "image_corrupt":
                    registry.corrupt.clear()

            assert (await images.ensure(a_wish(reference), mend)).id == made.config
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_stalled_pull_is_broken_off_and_tried_again(registry: FakeRegistry, engine: Engine) -> None:
    made = make_image([MB], "stalled")
    reference = registry.push(made, fresh("stalled"), "1")
    registry.stalls.add(made.layers[0])
    heard = Heard()

    async def main() -> None:
        async with a_node_of_images(registry, stall_timeout_s=0.5) as images:

            def release(progress: object) -> None:
                heard(progress)  # type: ignore[arg-type]
                if getattr(progress, "reason", "") == "pull_stalled":
                    registry.stalls.clear()

            assert (await images.ensure(a_wish(reference), release)).id == made.config

    trio.run(main)
    heard.check()
    assert heard.reasons() == {"pull_stalled"}


def test_one_that_stalls_every_time_is_given_up(
    registry: FakeRegistry, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(retrying._TRIES, Stalled, 2)
    made = make_image([MB], "stalled for good")
    reference = registry.push(made, fresh("stalled"), "1")
    registry.stalls.add(made.layers[0])
    error = fails(registry, engine, reference, Stalled, stall_timeout_s=0.3)
    assert error.retry
    assert error.reason == "pull_stalled"
    assert registry.count(made.layers[0]) == 2


def test_cancelling_the_only_wish_stops_the_download_and_leaves_nothing(registry: FakeRegistry, engine: Engine) -> None:
    made = make_image([4 * MB, 4 * MB], "cancelled")
    reference = registry.push(made, fresh("cancelled"), "1")
    registry.bytes_per_s = MB
    before = engine.ids()

    async def main() -> None:
        async with a_node_of_images(registry) as images:
            with trio.move_on_after(30) as scope:

                def stop(progress: object) -> None:
                    if getattr(progress, "bytes_done", 0):
                        scope.cancel()

                await images.ensure(a_wish(reference), stop)
            assert scope.cancelled_caught
            assert images.listed() == []
            await trio.to_thread.run_sync(registry.wait_for_downloads, 0)

    trio.run(main)
    assert engine.ids() == before


def test_wishes_for_one_image_share_a_download_and_one_may_leave(registry: FakeRegistry, engine: Engine) -> None:
    made = make_image([2 * MB], "shared")
    reference = registry.push(made, fresh("shared"), "1")
    registry.bytes_per_s = 3 * MB

    async def main() -> None:
        async with a_node_of_images(registry) as images, trio.open_nursery() as nursery:
            got = []

            async def want() -> None:
                got.append(await images.ensure(a_wish(reference)))

            leaving = trio.CancelScope()

            async def leave() -> None:
                def stop(progress: object) -> None:
                    if getattr(progress, "bytes_done", 0):
                        leaving.cancel()

                with leaving:
                    await images.ensure(a_wish(reference), stop)

            nursery.start_soon(leave)
            for _ in range(3):
                nursery.start_soon(want)
        assert leaving.cancelled_caught
        assert len(got) == 3

    trio.run(main)
    assert registry.count("/blobs/" + made.layers[0]) == 1


# -- the owner's limits ------------------------------------------------------------------------------------------------


def test_an_image_larger_than_the_owner_takes_is_refused_before_a_layer_moves(
    registry: FakeRegistry, engine: Engine
) -> None:
    made = make_image([300_000], "large")
    reference = registry.push(made, fresh("large"), "1")
    error = fails(registry, engine, reference, TooLarge, max_image_bytes=200_000)
    assert "300 kB" in str(error)
    assert "200 kB" in str(error)
    assert registry.count(made.layers[0]) == 0


def test_a_registry_the_owner_does_not_name_is_not_asked(registry: FakeRegistry, engine: Engine) -> None:
    reference = registry.push(make_image([10], "elsewhere"), fresh("elsewhere"), "1")
    fails(registry, engine, reference, RegistryNotAllowed, registries=["registry.example"])
    error = fails(registry, engine, reference, AddressNotAllowed, registries=[])
    assert "127.0.0.1" in str(error)
    assert registry.requests == []


def test_what_the_list_on_disk_says_is_written_before_the_pull(
    registry: FakeRegistry, engine: Engine, tmp_path: Path
) -> None:
    made = make_image([MB], "written")
    reference = registry.push(made, fresh("written"), "1")
    registry.stalls.add(made.layers[0])
    path = tmp_path / "images.json"

    async def main() -> None:
        async with a_node_of_images(registry, path) as images, trio.open_nursery() as nursery:
            nursery.start_soon(images.ensure, a_wish(reference))
            await trio.to_thread.run_sync(registry.wait_for_downloads, 1)
            (entry,) = json.loads(path.read_text())["images"]
            assert entry["name"].endswith(made.digest)
            assert entry["id"] == ""
            nursery.cancel_scope.cancel()
        assert json.loads(path.read_text())["images"] == []

    trio.run(main)
    assert threading.active_count() < 50
