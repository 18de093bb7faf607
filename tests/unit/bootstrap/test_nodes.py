"""The live view of nodes: slots handed out and back, the queue, and what heartbeats and cancellation do to them."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ngpu_bootstrap.errors import NotServed
from ngpu_bootstrap.registry.nodes import Nodes, NodeSession, Slot
from ngpu_bootstrap.scheduling.history import Fared
from ngpu_protocol.control import DeploymentState, Heartbeat
from ngpu_protocol.http1 import Client
from ngpu_protocol.identity import Address
from ngpu_protocol.workspaces import WorkspaceSpec

SPEC = WorkspaceSpec(id="7", name="w", service="a/b", ports=[80], concurrency=2)


def now_ms() -> int:
    return int(trio.current_time() * 1000)


async def no_connection() -> trio.abc.Stream:
    raise OSError("not in this test")


def session(number: int = 1, *, slots: int = 8, free: int = 2, state: str = "ready", revision: int = 1) -> NodeSession:
    made = NodeSession(
        node=Address(f"0x{number:040x}"),
        peer_id=f"peer{number}",
        session=bytes(32),
        software="test",
        gpus=(),
        slots=slots,
        admitted=True,
        connected_at_ms=0,
        heard_at_ms=now_ms(),
        requests=Client(no_connection),
        slots_free=slots,
    )
    made.assign({"7": (1,)})
    made.hear(heartbeat(slots=slots, free=free, state=state, revision=revision), now_ms())
    return made


def heartbeat(*, slots: int = 8, free: int = 2, state: str = "ready", revision: int = 1) -> Heartbeat:
    return Heartbeat(
        at_ms=0, slots_free=slots, deployments=(DeploymentState("7", revision, state, slots_free=free),), services=()
    )


async def heartbeats(view: Nodes, node: NodeSession, free: int = 2) -> None:
    """Keep *node* from being taken for silent; what it says is free is what our own attempts leave."""
    while True:
        await trio.sleep(1)
        view.heard(node, heartbeat(free=max(0, free - node.total_in_flight)))


def nodes(queue_limit: int = 4) -> Nodes:
    return Nodes(now_ms=now_ms, queue_limit=queue_limit, draw=lambda: 0.0)


def virtually(test: Callable[[], Awaitable[None]]) -> None:
    trio.run(test, clock=MockClock(autojump_threshold=0))


def test_slots_are_taken_up_to_the_workspaces_concurrency() -> None:
    async def test() -> None:
        view = nodes()
        view.attach(session())
        taken = [view.take(SPEC), view.take(SPEC)]
        assert all(taken)
        assert view.take(SPEC) is None
        first = taken[0]
        assert first is not None
        first.release()
        first.release()
        assert view.take(SPEC) is not None
        assert view.take(SPEC) is None

    virtually(test)


def test_the_nodes_own_slots_bound_all_its_workspaces() -> None:
    async def test() -> None:
        view = nodes()
        view.attach(session(slots=1, free=2))
        assert view.take(SPEC) is not None
        assert view.take(SPEC) is None

    virtually(test)


def test_what_others_run_there_is_what_the_heartbeat_leaves_over() -> None:
    async def test() -> None:
        view = nodes()
        view.attach(session(free=1))
        assert view.take(SPEC) is not None
        assert view.take(SPEC) is None

    virtually(test)


def test_a_heartbeat_that_counts_our_own_attempts_does_not_count_them_twice() -> None:
    async def test() -> None:
        view = nodes()
        node = session()
        view.attach(node)
        slot = view.take(SPEC)
        view.heard(node, heartbeat(slots=8, free=1))
        assert view.take(SPEC) is not None
        assert view.take(SPEC) is None
        assert slot is not None
        # one ended since: the heartbeat still counted it
        slot.release()
        assert view.take(SPEC) is not None

    virtually(test)


def test_waiting_calls_are_served_in_order() -> None:
    async def test() -> None:
        view = nodes()
        view.attach(session())
        held = [view.take(SPEC), view.take(SPEC)]
        order: list[int] = []

        async def wait(number: int) -> None:
            slot = await view.acquire(SPEC, timeout_s=10)
            order.append(number)
            await trio.sleep(1)
            slot.release()

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(wait, number)
                await wait_all_tasks_blocked()
            assert view.waiting("7") == 4
            assert view.take(SPEC) is None  # nobody passes those who wait
            for slot in held:
                assert slot is not None
                slot.release()
        assert (set(order[:2]), set(order[2:])) == ({0, 1}, {2, 3})  # two at a time
        assert view.waiting("7") == 0

    virtually(test)


def test_the_queue_is_bounded_and_so_is_the_wait() -> None:
    async def test() -> None:
        view = nodes(queue_limit=1)
        view.attach(session())
        view.take(SPEC)
        view.take(SPEC)
        async with trio.open_nursery() as nursery:

            async def first() -> None:
                with pytest.raises(NotServed) as refused:
                    await view.acquire(SPEC, timeout_s=3)
                assert (refused.value.status, refused.value.reason) == (429, "no_free_slot")
                assert refused.value.retry_after_s is not None

            nursery.start_soon(first)
            await wait_all_tasks_blocked()
            with pytest.raises(NotServed) as refused:
                await view.acquire(SPEC, timeout_s=3)
            assert (refused.value.status, refused.value.reason) == (429, "queue_full")

    virtually(test)


def test_a_greedy_caller_of_a_shared_model_keeps_nobody_else_out() -> None:
    """Two slots, tasks of a second: one caller keeps 1,000 calls in the air, three others have one at a time."""
    waits: dict[str, list[float]] = {"greedy": [], "a": [], "b": [], "c": []}
    refusals: dict[str, list[NotServed]] = {caller: [] for caller in waits}

    async def call(view: Nodes, caller: str, spec: WorkspaceSpec) -> None:
        began_s = trio.current_time()
        try:
            slot = await view.acquire(spec, timeout_s=600, caller=caller)
        except NotServed as refusal:
            refusals[caller].append(refusal)
            await trio.sleep(refusal.retry_after_s or 0)
            return
        waits[caller].append(trio.current_time() - began_s)
        await trio.sleep(1)
        slot.release()

    async def keep_calling(view: Nodes, caller: str) -> None:
        while True:
            await call(view, caller, SPEC)

    async def test() -> None:
        view = nodes(queue_limit=256)
        node = session()
        view.attach(node)
        with trio.move_on_after(120):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(heartbeats, view, node)
                for _ in range(1000):
                    nursery.start_soon(keep_calling, view, "greedy")
                await trio.sleep(10)
                assert view.waiting("7") == 128  # half of the places
                for caller in ("a", "b", "c"):
                    nursery.start_soon(keep_calling, view, caller)

    virtually(test)
    for caller in ("a", "b", "c"):
        assert refusals[caller] == []
        # at most everybody else's one call each before its own, on two slots
        assert max(waits[caller]) <= 2.01, (caller, max(waits[caller]))
        assert len(waits[caller]) >= 36  # of 110 s: two slots in four turns and its own second
    assert len(waits["greedy"]) >= 60  # and what the others leave is used
    assert {(one.status, one.reason) for one in refusals["greedy"]} == {(429, "queue_full")}
    assert min(one.retry_after_s or 0 for one in refusals["greedy"]) >= 1


def test_naming_the_node_passes_nobody_and_takes_no_more_room() -> None:
    async def test() -> None:
        view = nodes(queue_limit=8)
        node = session(free=1)
        view.attach(node)
        held = view.take(SPEC)
        assert held is not None
        order: list[str] = []

        async def wait(caller: str, *, named: bool) -> None:
            if named:
                slot = await view.acquire_on(SPEC, node.node, timeout_s=100, caller=caller)
            else:
                slot = await view.acquire(SPEC, timeout_s=100, caller=caller)
            order.append(caller)
            await trio.sleep(2)
            slot.release()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(heartbeats, view, node, 1)
            for _ in range(4):
                nursery.start_soon(partial(wait, "greedy", named=True))
            await trio.sleep(0.1)
            with pytest.raises(NotServed) as refused:
                await view.acquire_on(SPEC, node.node, timeout_s=100, caller="greedy")
            assert (refused.value.status, refused.value.reason) == (429, "queue_full")
            for caller in ("a", "b"):
                nursery.start_soon(partial(wait, caller, named=caller == "b"))
                await wait_all_tasks_blocked()
            held.release()
            while len(order) < 6:  # noqa: ASYNC110
                await trio.sleep(1)
            nursery.cancel_scope.cancel()
        assert order == ["greedy", "a", "b", "greedy", "greedy", "greedy"]

    virtually(test)


def test_without_a_node_a_call_is_refused_and_a_promised_task_waits_for_one() -> None:
    async def test() -> None:
        view = nodes()
        with pytest.raises(NotServed) as refused:
            await view.acquire(SPEC, timeout_s=3)
        assert refused.value.status == 503
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(view.acquire, SPEC, timeout_s=100, promised=True))
            await trio.sleep(50)
            assert view.waiting("7") == 0  # it takes no place of a client's
            node = session()
            view.attach(node)
            view.heard(node, heartbeat())
        assert node.total_in_flight == 1

    virtually(test)


def test_a_cancelled_wait_gives_its_slot_back() -> None:
    async def test() -> None:
        view = nodes()
        view.attach(session())
        held = [view.take(SPEC), view.take(SPEC)]
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(view.acquire, SPEC, timeout_s=10))
                await wait_all_tasks_blocked()
                scope.cancel()
                assert held[0] is not None
                held[0].release()  # given to the one who waits, who is cancelled already and has not noticed
        assert view.waiting("7") == 0
        assert view.take(SPEC) is not None

    virtually(test)


def test_a_task_does_not_go_back_to_a_session_it_tried_but_to_the_same_node_later() -> None:
    async def test() -> None:
        view = nodes()
        before = session()
        view.attach(before)
        assert view.take(SPEC, {before}) is None
        with pytest.raises(NotServed):
            await view.acquire(SPEC, tried={before}, timeout_s=1)
        again = session()
        assert view.attach(again) is before
        view.detach(before)
        assert view.get(again.node) is again
        assert view.take(SPEC, {before}) is not None

    virtually(test)


def test_a_picky_call_does_not_hold_up_those_behind_it() -> None:
    async def test() -> None:
        view = nodes()
        one, two = session(1), session(2)
        view.attach(one)
        view.attach(two)
        held = [view.take(SPEC) for _ in range(4)]
        served: list[str] = []

        async def wait(name: str, tried: set[NodeSession]) -> None:
            slot = await view.acquire(SPEC, tried=tried, timeout_s=10)
            served.append(name)
            assert slot.session not in tried

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, "picky", {one})
            await wait_all_tasks_blocked()
            nursery.start_soon(wait, "any", set())
            await wait_all_tasks_blocked()
            for slot in held:
                assert slot is not None
                if slot.session is one:
                    slot.release()
                    break
            await wait_all_tasks_blocked()
            assert served == ["any"]
            for slot in held:
                assert slot is not None
                if slot.session is two:
                    slot.release()
                    break
        assert served == ["any", "picky"]

    virtually(test)


def test_a_node_that_was_full_after_all_is_asked_again_after_a_pause() -> None:
    async def test() -> None:
        view = nodes()
        node = session()
        view.attach(node)
        slot = view.take(SPEC)
        assert slot is not None
        view.refused_full(slot)
        slot.release()
        assert view.take(SPEC) is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(view.run)
            began = trio.current_time()
            await view.acquire(SPEC, timeout_s=5)
            assert trio.current_time() - began <= 1.0
            nursery.cancel_scope.cancel()

    virtually(test)


def test_calls_of_one_key_that_wait_all_go_where_the_first_of_them_went() -> None:
    async def test() -> None:
        view = nodes(queue_limit=8)
        hosts = [session(number) for number in range(1, 4)]
        for host in hosts:
            view.attach(host)
        held = [view.take(SPEC) for _ in range(6)]
        got: dict[int, Slot] = {}
        async with trio.open_nursery() as nursery:

            async def call(number: int, key: bytes) -> None:
                got[number] = await view.acquire(SPEC, timeout_s=60, affinity=key)

            for number in range(3):
                nursery.start_soon(call, number, b"one")
                await wait_all_tasks_blocked()
            nursery.start_soon(call, 3, b"")
            await wait_all_tasks_blocked()
            first = held[0]
            assert first is not None
            first.release()
            await wait_all_tasks_blocked()
            assert got.keys() == {0}
            others = [slot for slot in held[1:] if slot is not None and slot.session is not first.session]
            others[0].release()  # free, but not where the key sticks: it goes to the call without one
            await wait_all_tasks_blocked()
            assert got.keys() == {0, 3}
            got[0].release()
            await wait_all_tasks_blocked()
            assert got.keys() == {0, 1, 3}
            view.detach(first.session)  # gone: the last of them takes what is free
            others[1].release()
            await wait_all_tasks_blocked()
            assert got.keys() == {0, 1, 2, 3}
        assert got[0].session is got[1].session is first.session
        assert got[2].session is not first.session
        assert view.queue_length("7") == 0

    virtually(test)


def test_where_others_are_often_there_first_the_slot_our_own_attempt_left_is_taken() -> None:
    async def test() -> None:
        view = Nodes(now_ms=now_ms, queue_limit=4, draw=random.Random(5).random)
        for number in range(1, 200):
            view.attach(session(number))
        for _ in range(40):  # what seems free is not
            slot = view.take(SPEC)
            assert slot is not None
            view.refused_full(slot)
            slot.release()
        for _ in range(50):
            ours = view.take(SPEC)
            assert ours is not None
            await trio.sleep(0.01)
            ours.release()
            view.ended(ours, Fared.WELL, 0.01)
            again = view.take(SPEC)
            assert again is not None
            assert again.session is ours.session
            again.release()
            view.refused_full(again)  # it was taken after all: not asked again at once
            other = view.take(SPEC)
            assert other is not None
            assert other.session is not ours.session
            other.release()

    virtually(test)


def test_a_node_that_says_it_is_free_and_refuses_again_and_again_is_asked_ever_more_seldom() -> None:
    async def test() -> None:
        view = nodes()
        liar = session()
        view.attach(liar)
        asked = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(view.run)
            for _ in range(30):  # a minute of its heartbeats
                with trio.move_on_after(2):
                    while True:
                        slot = await view.acquire(SPEC, timeout_s=60)
                        await trio.sleep(0.02)
                        asked += 1
                        view.refused_full(slot)
                        slot.release()
                view.heard(liar, heartbeat())
            assert 20 <= asked <= 40
            view.heard(liar, heartbeat(free=0))  # a node that says that it is full is believed when it no longer does
            view.heard(liar, heartbeat())
            assert view.take(SPEC) is not None
            nursery.cancel_scope.cancel()

    virtually(test)


def test_a_node_that_says_whose_attempts_run_there_is_known_to_the_slot() -> None:
    async def test() -> None:
        view = nodes()
        node = session()
        view.attach(node)
        for _ in range(2):  # two of ours begin and end, and others take their places
            slot = view.take(SPEC)
            assert slot is not None
            slot.release()
        state = DeploymentState("7", 1, "ready", slots_free=0, yours=0)
        view.heard(node, Heartbeat(at_ms=0, slots_free=6, deployments=(state,), yours=0))
        assert view.take(SPEC) is None
        # An attempt we no longer hold takes its slot all the same.
        state = DeploymentState("7", 1, "ready", slots_free=1, yours=1)
        view.heard(node, Heartbeat(at_ms=0, slots_free=7, deployments=(state,), yours=1))
        assert view.take(SPEC) is not None
        assert view.take(SPEC) is None

    virtually(test)


def test_while_stopping_only_promised_tasks_are_held() -> None:
    async def test() -> None:
        view = nodes()
        view.attach(session())
        view.hold_promised()
        with trio.move_on_after(1) as scope:
            await view.acquire(SPEC, timeout_s=50, promised=True)
        assert scope.cancelled_caught
        slot = await view.acquire(SPEC, timeout_s=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(view.wait_idle)
            await wait_all_tasks_blocked()
            slot.release()

    virtually(test)


def test_a_node_gets_no_task_of_a_workspace_it_was_not_told_to_run() -> None:
    async def test() -> None:
        view = nodes()
        node = session()
        node.assign({})
        view.attach(node)
        assert view.take(SPEC) is None

    virtually(test)


@pytest.mark.parametrize(("state", "revision"), [("starting", 1), ("unhealthy", 1), ("ready", 2)])
def test_only_a_ready_deployment_of_the_right_revision_serves(state: str, revision: int) -> None:
    async def test() -> None:
        view = nodes()
        view.attach(session(state=state, revision=revision))
        assert view.take(SPEC) is None
        with pytest.raises(NotServed):
            view.require_served(SPEC)

    virtually(test)


def test_while_a_revision_rolls_out_the_one_that_is_ready_serves_and_the_order_names_it() -> None:
    async def test() -> None:
        view = nodes()
        node = session(revision=1, state="ready")
        view.attach(node)
        view.assign(node, {"7": (1, 2)})
        both = [DeploymentState("7", 2, "starting"), DeploymentState("7", 1, "ready", slots_free=2)]
        view.heard(node, Heartbeat(at_ms=0, slots_free=8, deployments=tuple(both)))
        old = view.take(SPEC)
        assert old is not None
        assert old.revision == 1
        both[0] = DeploymentState("7", 2, "ready", slots_free=2)
        view.heard(node, Heartbeat(at_ms=0, slots_free=8, deployments=tuple(both)))
        new = view.take(SPEC)
        assert new is not None
        assert new.revision == 2

    virtually(test)
