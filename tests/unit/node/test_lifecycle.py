"""The life of a deployment, told as what happens and what is done about it; no engine, no clock."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpu_node.engine.lifecycle import (
    Activity,
    Allowed,
    Answered,
    Ask,
    Clear,
    Cleared,
    Doubted,
    Due,
    Emptied,
    Empty,
    End,
    Ended,
    EngineBack,
    EngineLost,
    Event,
    Fetch,
    GpuSick,
    ImageHere,
    ImageRefused,
    Impossible,
    Life,
    NoRoom,
    Place,
    Policy,
    Pulling,
    Rest,
    RoomChanged,
    Silent,
    StartRefused,
    Unwanted,
    Up,
    Withdrawn,
)
from ngpu_protocol.control import DeploymentPhase as Phase

POLICY = Policy(restart_waits_s=(1.0, 2.0), max_deaths=3, stable_s=60.0, unhealthy_limit_s=30.0)


class Story:
    """A life and its clock; each line is an event, at a time, and what it comes to."""

    def __init__(self) -> None:
        self.life = Life(POLICY)
        self.now_s = 100.0

    def on(self, *events: Event, after_s: float = 0.0) -> Activity | None:
        self.now_s += after_s
        found: Activity | None = None
        for event in events:
            found = self.life.on(event, self.now_s)
        return found

    @property
    def stands(self) -> tuple[Phase, str]:
        return self.life.phase, self.life.detail

    def ready(self) -> Story:
        self.on(ImageHere(), Up(20.0), Answered())
        assert self.life.phase is Phase.READY
        return self


def test_it_fetches_places_asks_and_is_ready() -> None:
    story = Story()
    assert story.life.activity == Fetch()
    assert story.on(Pulling("3 of 10 MB")) is None
    assert story.stands == (Phase.PULLING, "3 of 10 MB")
    assert story.on(ImageHere()) == Place()
    assert story.on(Up(20.0)) == Ask(0.0)
    assert story.on(Silent("nothing listens")) == Ask(POLICY.readiness_wait_s)
    assert story.stands == (Phase.STARTING, "waiting for an answer: nothing listens")
    assert story.on(Answered()) == Ask(POLICY.health_interval_s)
    assert story.stands == (Phase.READY, "")
    assert story.life.served


def test_one_that_never_answers_dies_of_it_and_after_the_last_start_has_failed() -> None:
    story = Story()
    for wait_s in (1.0, 2.0):
        story.on(ImageHere(), Up(20.0))
        assert isinstance(story.on(Silent("nothing listens"), after_s=19.9), Ask)
        assert story.on(Silent("nothing listens"), after_s=0.1) == Clear()
        assert story.on(Cleared()) == Rest(wait_s)
        assert story.life.detail.endswith(f"nothing listens; starting again in {wait_s:g} s")
        assert story.on(Due(), after_s=wait_s) == Fetch()
    story.on(ImageHere(), Up(20.0))
    assert story.on(Silent("nothing listens"), after_s=20.0) == Clear()
    assert story.on(Cleared()) == Rest()
    assert story.stands == (Phase.FAILED, "given up after 3 starts: not ready within 20 s: nothing listens")
    assert story.life.word == "never_answered"
    assert story.on(Due(), RoomChanged(), EngineBack(), Doubted()) is None or story.life.phase is Phase.FAILED


def test_deaths_count_in_a_row_only_while_it_was_not_ready_for_long() -> None:
    story = Story().ready()
    for _ in range(10):
        assert story.on(Ended("exit code 1"), after_s=POLICY.stable_s) == Clear()
        assert story.on(Cleared()) == Rest(1.0)
        story.on(Due())
        story.ready()
    story.on(Ended("exit code 1"), Cleared(), Due(), after_s=1.0)
    story.ready()
    story.on(Ended("exit code 1"), Cleared(), Due(), after_s=1.0)
    story.ready()
    story.on(Ended("exit code 1"), Cleared(), after_s=1.0)
    assert story.life.phase is Phase.FAILED


def test_what_is_not_its_fault_does_not_count_and_it_starts_again_at_once() -> None:
    story = Story().ready()
    for event in [GpuSick("GPU-1: Xid 79"), Ended("the engine was away", is_fault=False)] * 5:
        assert story.on(event) == Clear()
        assert story.on(Cleared()) == Fetch()
        story.ready()


def test_one_that_stops_answering_takes_no_tasks_and_comes_back_or_dies() -> None:
    story = Story().ready()
    assert story.on(Doubted()) == Ask(0.0)
    assert story.on(Silent("answers 500"), after_s=1.0) == Ask(POLICY.doubt_interval_s)
    assert story.stands == (Phase.UNHEALTHY, "answers 500")
    story.on(Answered(), after_s=1.0)
    assert story.life.phase is Phase.READY
    assert isinstance(story.on(Silent("answers 500"), after_s=29.0), Ask)
    assert story.on(Silent("answers 500"), after_s=1.0) == Clear()


def test_an_image_that_may_come_is_tried_again_and_one_that_cannot_is_not() -> None:
    story = Story()
    assert story.on(ImageRefused("the registry is down", again_s=5.0)) == Rest(5.0)
    assert story.on(Due()) == Fetch()
    assert story.on(ImageRefused("no such image", word="image_missing")) == Rest()
    assert (*story.stands, story.life.word) == (Phase.FAILED, "no such image", "image_missing")


def test_without_room_it_waits_where_there_may_be_some_and_has_failed_where_there_cannot() -> None:
    story = Story()
    story.on(ImageHere())
    assert story.on(NoRoom("needs 2 GPUs", ever=True)) == Rest()
    assert story.stands == (Phase.QUEUED, "needs 2 GPUs")
    assert story.life.lacks_room
    assert story.on(RoomChanged()) == Fetch()
    story.on(ImageHere())
    story.on(NoRoom("needs 2 GPUs", ever=False))
    assert story.life.phase is Phase.FAILED
    assert story.on(RoomChanged()) == Fetch()  # another card was put in


def test_what_can_never_run_here_is_cleared_and_has_failed_at_once() -> None:
    story = Story()
    story.on(ImageHere())
    assert story.on(Impossible("no NVIDIA runtime")) == Clear()
    assert story.on(Cleared()) == Rest()
    assert story.stands == (Phase.FAILED, "no NVIDIA runtime")
    assert story.on(EngineBack()) is None


def test_what_a_mended_engine_could_run_is_tried_when_it_is_back() -> None:
    story = Story()
    story.on(ImageHere(), Impossible("no NVIDIA runtime", until_engine_back=True), Cleared())
    assert story.life.phase is Phase.FAILED
    assert story.on(EngineBack()) == Fetch()


def test_a_start_the_engine_refused_is_tried_again() -> None:
    story = Story()
    story.on(ImageHere())
    assert story.on(StartRefused("out of loop devices")) == Clear()
    assert story.on(Cleared()) == Rest(1.0)


@pytest.mark.parametrize(("before", "again"), [((), Fetch()), ((ImageHere(),), Place())])
def test_an_engine_that_is_away_is_waited_for(before: tuple[Event, ...], again: Activity) -> None:
    story = Story()
    story.on(*before)
    assert story.on(EngineLost("refused")) == Rest(POLICY.engine_wait_s)
    assert (story.life.phase, story.life.word) == (Phase.QUEUED, "engine_away")
    assert story.on(EngineBack()) == again


def test_a_container_that_could_not_be_removed_is_removed_when_the_engine_is_back() -> None:
    story = Story().ready()
    story.on(Ended("exit code 1"))
    assert story.on(EngineLost("refused")) == Rest(POLICY.engine_wait_s)
    assert story.on(EngineBack()) == Clear()
    assert story.on(Cleared()) == Rest(1.0)


@pytest.mark.parametrize(
    ("before", "again"),
    [((), Fetch()), ((ImageHere(),), Place()), ((ImageHere(), Up(20.0), Answered(), Ended("exit code 1")), Clear())],
)
def test_what_an_engine_that_never_was_away_did_not_do_is_tried_again(
    before: tuple[Event, ...], again: Activity
) -> None:
    story = Story()
    story.on(*before)
    for _ in range(3):
        assert story.on(EngineLost("one call took too long")) == Rest(POLICY.engine_wait_s)
        assert story.on(Due(), after_s=POLICY.engine_wait_s) == again


def test_an_unwanted_container_the_engine_would_not_remove_is_tried_again() -> None:
    story = Story().ready()
    story.on(Unwanted(), Emptied(), EngineLost("cannot kill it"))
    assert story.on(Due(), after_s=POLICY.engine_wait_s) == Clear()
    assert story.on(Cleared()) == End()


def test_one_whose_gpus_could_not_be_looked_at_is_asked_on() -> None:
    story = Story().ready()
    assert story.on(EngineLost("restarts")) == Ask(POLICY.health_interval_s)
    assert story.life.phase is Phase.READY


def test_an_unwanted_one_lets_its_tasks_end_then_clears_and_is_gone() -> None:
    story = Story().ready()
    assert story.on(Unwanted()) == Empty(POLICY.stop_grace_s)
    assert story.life.phase is Phase.STOPPING
    assert story.on(Emptied()) == Clear()
    assert story.on(Cleared()) == End()
    assert story.life.phase is Phase.GONE
    assert story.on(Answered(), Allowed(), Due()) is None


def test_an_unwanted_one_that_dies_meanwhile_is_not_started_again() -> None:
    story = Story().ready()
    story.on(Unwanted())
    assert story.on(Ended("exit code 1")) == Clear()
    assert story.on(Cleared()) == End()


def test_an_unwanted_one_that_is_only_being_fetched_is_gone_at_once() -> None:
    assert Story().on(Pulling("1 of 2"), Unwanted()) == End()


def test_an_unwanted_one_whose_engine_is_away_is_gone_when_that_is_back() -> None:
    story = Story()
    story.on(ImageHere(), EngineLost("refused"))
    assert story.on(Unwanted()) is None
    assert story.life.phase is Phase.STOPPING
    assert story.on(EngineBack()) == Clear()
    assert story.on(Cleared()) == End()


def test_a_withdrawn_one_leaves_and_comes_back_when_it_is_allowed() -> None:
    story = Story().ready()
    assert story.on(Withdrawn("the owner drains", "drained")) == Empty(POLICY.stop_grace_s)
    assert story.on(Silent("late")) is None
    story.on(Emptied())
    assert story.on(Cleared()) == Rest()
    assert (*story.stands, story.life.word) == (Phase.QUEUED, "the owner drains", "drained")
    assert story.on(RoomChanged()) is None
    assert story.on(Allowed()) == Fetch()


def test_one_that_is_allowed_back_before_its_tasks_ended_goes_on_as_it_is() -> None:
    story = Story().ready()
    story.on(Withdrawn("the owner drains"))
    assert story.on(Allowed()) == Ask(0.0)
    assert isinstance(story.on(Answered()), Ask)
    assert story.life.phase is Phase.READY


def test_one_that_is_withdrawn_while_it_clears_does_not_start_again() -> None:
    story = Story().ready()
    story.on(Ended("exit code 1"))
    assert story.on(Withdrawn("the owner drains")) is None
    assert story.on(Cleared()) == Rest()
    assert story.life.phase is Phase.QUEUED


def test_one_that_failed_has_a_new_chance_after_it_was_withdrawn() -> None:
    story = Story()
    story.on(ImageRefused("no such image"))
    story.on(Withdrawn("the owner drains"))
    assert story.on(Allowed()) == Fetch()


EVENTS: list[Event] = [
    Pulling("x"), ImageHere(), ImageRefused("x"), ImageRefused("x", 1.0), NoRoom("x", True), NoRoom("x", False),
    Up(5.0), StartRefused("x"), Impossible("x"), Answered(), Silent("x"), Ended("x"), Ended("x", False), GpuSick("x"),
    EngineLost("x"), EngineBack(), RoomChanged(), Doubted(), Due(), Emptied(), Cleared(), Withdrawn("x"), Allowed(),
]  # fmt: skip

#: What each activity may end with; whatever else may come at any time.
ENDS: dict[type[Any], list[Event]] = {
    Fetch: [ImageHere(), ImageRefused("x"), ImageRefused("x", 1.0), EngineLost("x"), Pulling("x")],
    Place: [Up(5.0), NoRoom("x", True), NoRoom("x", False), StartRefused("x"), Impossible("x"), EngineLost("x")],
    Ask: [Answered(), Silent("x"), GpuSick("x"), EngineLost("x")],
    Empty: [Emptied()],
    Clear: [Cleared(), EngineLost("x")],
    Rest: [Due()],
}
ANY_TIME: list[Event] = [
    Ended("x"), Ended("x", False), GpuSick("x"), EngineBack(), RoomChanged(), Doubted(), Withdrawn("x"), Allowed(),
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_happens_it_can_always_be_stopped_and_never_leaves_a_container(data: st.DataObject) -> None:
    life, now_s, may_exist = Life(POLICY), 0.0, False
    for _ in range(data.draw(st.integers(0, 30))):
        choices = [*ENDS[type(life.activity)], *ANY_TIME]
        event = data.draw(st.sampled_from(choices))
        if isinstance(life.activity, Rest) and life.activity.for_s is None and isinstance(event, Due):
            continue
        now_s += data.draw(st.sampled_from([0.0, 1.0, 40.0]))
        life.on(event, now_s)
        if isinstance(life.activity, Place):
            may_exist = True
        elif isinstance(event, Cleared | NoRoom):
            may_exist = False
        if life.phase is Phase.READY:
            assert may_exist
        if life.phase is Phase.FAILED:
            assert not may_exist or isinstance(life.activity, Clear)
    life.on(Unwanted(), now_s)
    for _ in range(4):
        if isinstance(life.activity, End):
            break
        event = {Empty: Emptied(), Clear: Cleared(), Rest: EngineBack()}[type(life.activity)]
        if isinstance(event, Cleared):
            may_exist = False
        life.on(event, now_s)
    assert isinstance(life.activity, End)
    assert life.phase is Phase.GONE
    assert not may_exist
