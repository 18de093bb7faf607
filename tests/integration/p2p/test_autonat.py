"""A peer finds out whether others can dial it, and cannot have anybody else dialled."""

from __future__ import annotations

import pytest
import trio
from trio.testing import trio_test

from ngpu_protocol.p2p import Host, P2PError
from ngpu_protocol.p2p.autonat import AUTONAT_PROTOCOL, DialBack, ask_dialable
from ngpu_protocol.p2p.delimited import delimited
from tests.integration.p2p.peers import host, serve_tcp


def bare(running: Host) -> str:
    return running.addresses[0].partition("/p2p/")[0]


@trio_test
async def test_what_answers_is_told_and_what_does_not_is_not() -> None:
    async with host({}) as helper, host({}) as asker:
        helper.handle(AUTONAT_PROTOCOL, DialBack(helper).serve)
        await asker.connect(helper.addresses[0], timeout_s=30)
        dead = "/ip4/127.0.0.1/tcp/1"
        assert await ask_dialable(asker, helper.peer_id, [dead, bare(asker)]) == bare(asker)
        assert await ask_dialable(asker, helper.peer_id, [dead]) is None
        assert await ask_dialable(asker, helper.peer_id, []) is None


@trio_test
async def test_nobody_is_dialled_for_another_and_somebody_else_at_the_address_does_not_count() -> None:
    async with host({}) as helper, host({}) as asker, host({}) as other, trio.open_nursery() as nursery:
        dialled: list[object] = []

        async def note(stream: trio.SocketStream) -> None:
            dialled.append(stream)
            await stream.aclose()

        port = await serve_tcp(nursery, note)
        helper.handle(AUTONAT_PROTOCOL, DialBack(helper).serve)
        await asker.connect(helper.addresses[0], timeout_s=30)
        # Loopback has many addresses: this one is not where the helper sees the asker.
        assert (
            await ask_dialable(asker, helper.peer_id, [f"/ip4/127.0.0.2/tcp/{port}", "/dns4/localhost/tcp/1"]) is None
        )
        assert await ask_dialable(asker, helper.peer_id, [bare(other)]) is None
        assert dialled == []
        nursery.cancel_scope.cancel()


@trio_test
async def test_asking_is_paced_and_rubbish_ends_its_stream() -> None:
    async with host({}) as helper, host({}) as asker:
        helper.handle(AUTONAT_PROTOCOL, DialBack(helper).serve)
        await asker.connect(helper.addresses[0], timeout_s=30)
        answers = [await ask_dialable(asker, helper.peer_id, [bare(asker)]) for _ in range(12)]
        assert answers[:6] == [bare(asker)] * 6
        assert answers[-1] is None
        stream = await asker.open_stream(helper.peer_id, AUTONAT_PROTOCOL, timeout_s=30)
        await stream.send_all(delimited(b"\xff rubbish"))
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(60):
            await stream.receive_some()


@trio_test
async def test_a_peer_that_does_not_offer_it_is_an_error_and_no_answer() -> None:
    async with host({}) as helper, host({}) as asker:
        await asker.connect(helper.addresses[0], timeout_s=30)
        with pytest.raises(P2PError, match="does not speak it"):
            await ask_dialable(asker, helper.peer_id, [bare(asker)])
