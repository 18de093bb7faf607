from __future__ import annotations

import trio
from trio.testing import trio_test

from ngpu_protocol.p2p import PeerDisconnected
from ngpu_protocol.p2p.events import EventFan


def gone(number: int) -> PeerDisconnected:
    return PeerDisconnected(str(number), None, "test")


@trio_test
async def test_every_subscriber_gets_every_event_after_those_present() -> None:
    fan = EventFan()
    async with fan.subscribe([gone(0)]) as one, fan.subscribe([]) as two:
        fan.publish(gone(1))
        assert [await one.receive(), await one.receive()] == [gone(0), gone(1)]
        assert await two.receive() == gone(1)


@trio_test
async def test_a_subscriber_too_far_behind_is_told_by_an_end() -> None:
    fan = EventFan()
    async with fan.subscribe([]) as slow, fan.subscribe([]) as quick:
        for number in range(1100):
            fan.publish(gone(number))
            assert await quick.receive() == gone(number)
        seen = [event async for event in slow]
    assert seen == [gone(number) for number in range(1024)]


@trio_test
async def test_leaving_stops_the_events() -> None:
    fan = EventFan()
    async with fan.subscribe([]) as channel:
        pass
    fan.publish(gone(1))
    with trio.move_on_after(1):
        try:
            await channel.receive()
        except trio.ClosedResourceError:
            return
    raise AssertionError("a channel outlived its subscription")
