"""Requests over pooled connections: what is kept, what is cut, and what each failure says about trying again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from ngpu_protocol.http1 import (
    Client,
    Exchange,
    Headers,
    IncompleteError,
    LimitError,
    MalformedError,
    MaybeSentError,
    MisuseError,
    NotSentError,
    PoolTimeoutError,
    serve_stream,
)
from tests.support.streams import FakeStream, receive_until, stream_pair
from tests.support.virtual_clock import virtual_clock

Peer = Callable[[FakeStream], Awaitable[None]]


class Place:
    """Somewhere to connect to: each connection is answered by *peer* in a task of its own."""

    def __init__(self, nursery: trio.Nursery, peer: Peer) -> None:
        self._nursery = nursery
        self.peer = peer
        self.ours: list[FakeStream] = []
        self.theirs: list[FakeStream] = []

    async def open(self) -> FakeStream:
        await trio.sleep(0.01)
        ours, theirs = stream_pair()
        self.ours.append(ours)
        self.theirs.append(theirs)
        self._nursery.start_soon(self.peer, theirs)
        return ours


@asynccontextmanager
async def connected(peer: Peer, **options: float) -> AsyncIterator[tuple[Client, Place]]:
    async with trio.open_nursery() as nursery:
        place = Place(nursery, peer)
        yield Client(place.open, **options), place  # type: ignore[arg-type]
        nursery.cancel_scope.cancel()


def served(handler: Callable[[Exchange], Awaitable[None]]) -> Peer:
    async def peer(stream: FakeStream) -> None:
        await serve_stream(stream, handler)

    return peer


def saying(*answers: bytes, then: str = "stay") -> Peer:
    """A peer that reads one head before each of *answers*, and stays, closes or resets after the last."""

    async def peer(stream: FakeStream) -> None:
        for answer in answers:
            await receive_until(stream, b"\r\n\r\n")
            await stream.send_all(answer)
        if then == "close":
            await stream.aclose()
        elif then == "reset":
            await stream.reset()
        else:
            await trio.sleep_forever()

    return peer


async def echo(exchange: Exchange) -> None:
    request = exchange.request
    body = await exchange.receive_all(100_000_000)
    fields: Headers = [(b"x-method", request.method.encode()), (b"x-target", request.target.encode())]
    trailers = exchange.trailers or None
    await exchange.respond(200, fields, body, trailers=trailers)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def get(client: Client, target: str = "/") -> bytes:
    async with client.request("GET", target) as response:
        return await response.read(1000)


async def pieces(*parts: bytes, delay_s: float = 0.0) -> AsyncIterator[bytes]:
    for part in parts:
        await trio.sleep(delay_s)
        yield part


# -- requests and answers ----------------------------------------------------------------------------------------------


@virtual_clock
async def test_small_request_is_one_write_and_the_connection_is_kept() -> None:
    async with connected(served(echo)) as (client, place):
        for _ in range(3):
            async with client.request("POST", "/a?b", [(b"x", b"y")], b"abc") as response:
                assert (response.status, response.reason) == (200, b"OK")
                assert await response.read(100) == b"abc"
                assert response.ended
                assert response.body_sent
        assert len(place.ours) == 1
        assert place.ours[0].writes == 3 * [
            b"POST /a?b HTTP/1.1\r\nhost: localhost\r\nx: y\r\ncontent-length: 3\r\n\r\nabc"
        ]


@virtual_clock
async def test_framing_fields_of_the_caller_are_replaced() -> None:
    async with connected(served(echo)) as (client, place):
        fields = [(b"Host", b"h"), (b"Transfer-Encoding", b"gzip"), (b"Expect", b"x"), (b"Content-Length", b"3")]
        async with client.request("PUT", "/", fields, b"abc") as response:
            await response.read(10)
        assert place.ours[0].writes == [b"PUT / HTTP/1.1\r\nHost: h\r\ncontent-length: 3\r\n\r\nabc"]


@virtual_clock
async def test_bodiless_requests_say_so_only_where_a_body_is_expected() -> None:
    async with connected(served(echo)) as (client, place):
        for method in ("GET", "DELETE", "POST"):
            async with client.request(method, "/") as response:
                await response.read(10)
        assert [b"content-length: 0" in write for write in place.ours[0].writes] == [False, False, True]


@virtual_clock
async def test_streamed_body_is_chunked_or_of_the_length_announced() -> None:
    async with connected(served(echo)) as (client, place):
        async with client.request("POST", "/", body=pieces(b"ab", b"", b"c")) as response:
            assert await response.read(10) == b"abc"
        length = [(b"content-length", b"3")]
        async with client.request("POST", "/", length, pieces(b"ab", b"c", delay_s=1)) as response:
            assert await response.read(10) == b"abc"
        assert len(place.ours) == 1
        assert b"2\r\nab\r\n" in place.ours[0].writes
        assert place.ours[0].writes[-1] == b"c"


@virtual_clock
async def test_trailers_both_ways() -> None:
    async with connected(served(echo)) as (client, _):
        for body in (b"abc", pieces(b"abc")):
            async with client.request("POST", "/", body=body, trailers=[(b"x-sum", b"6")]) as response:
                assert [piece async for piece in response.body()] == [b"abc"]
                assert response.trailers == [(b"x-sum", b"6")]
        assert client.pool.open == 1


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_bodiless_answers_end_with_their_head(method: str, status: int) -> None:
    @virtual_clock
    async def check() -> None:
        answer = b"HTTP/1.1 %d X\r\nContent-Length: 5\r\n\r\n" % status
        async with connected(saying(answer, answer)) as (client, place):
            for _ in range(2):
                async with client.request(method, "/") as response:
                    assert response.ended
                    assert await response.receive() == b""
            assert len(place.ours) == 1

    check()


@virtual_clock
async def test_interim_answers_are_passed_over() -> None:
    answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK
    async with connected(saying(answer)) as (client, _):
        assert await get(client) == b"ok"
    async with connected(saying(b"HTTP/1.1 103 E\r\n\r\n" * 17 + OK)) as (client, _):
        with pytest.raises(MalformedError):
            await get(client)


@virtual_clock
async def test_each_piece_is_received_as_it_comes() -> None:
    async def events(exchange: Exchange) -> None:
        await exchange.send_head(200, [])
        for number in range(3):
            await trio.sleep(100)
            await exchange.send(b"%d" % number)
        await exchange.end()

    async with connected(served(events)) as (client, _), client.request("GET", "/") as response:
        assert not response.buffered
        started = trio.current_time()
        times = [round(trio.current_time() - started) async for _ in response.body()]
        assert times == [100, 200, 300]
        assert response.ended


@virtual_clock
async def test_buffered_answers_say_so() -> None:
    async with connected(saying(OK)) as (client, _), client.request("GET", "/") as response:
        assert response.buffered
        assert response.ended
        assert await response.receive() == b"ok"
        assert await response.receive() == b""


@virtual_clock
async def test_cancelled_receive_loses_nothing() -> None:
    async def slow(stream: FakeStream) -> None:
        await receive_until(stream, b"\r\n\r\n")
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabcdef":
            await stream.send_all(bytes([byte]))
            await trio.sleep(1)

    async with connected(slow) as (client, _), client.request("GET", "/") as response:
        got = b""
        while len(got) < 6:
            with trio.move_on_after(0.3):
                got += await response.receive()
        assert got == b"abcdef"


@virtual_clock
async def test_switched_connection_passes_raw_bytes_and_is_not_kept() -> None:
    async def chat(exchange: Exchange) -> None:
        stream = await exchange.upgrade()
        await stream.send_all(b"hello")
        while data := await stream.receive_some():
            await stream.send_all(data.upper())

    fields = [(b"Connection", b"Upgrade"), (b"Upgrade", b"chat")]
    async with connected(served(chat)) as (client, _):
        async with client.request("GET", "/", fields) as response:
            assert response.status == 101
            assert response.upgraded is not None
            assert await receive_until(response.upgraded, b"hello") == b"hello"
            await response.upgraded.send_all(b"abc")
            assert await receive_until(response.upgraded, b"ABC") == b"ABC"
            await response.upgraded.send_eof()
            assert await response.upgraded.receive_some() == b""
        assert client.pool.open == 0


@virtual_clock
async def test_bytes_behind_101_are_the_first_raw_ones() -> None:
    answer = b"HTTP/1.1 101 X\r\nUpgrade: y\r\n\r\nfirst"
    fields = [(b"connection", b"upgrade"), (b"upgrade", b"y")]
    async with connected(saying(answer)) as (client, _), client.request("GET", "/", fields) as response:
        assert response.upgraded is not None
        assert await response.upgraded.receive_some(3) == b"fir"
        assert await response.upgraded.receive_some() == b"st"


@virtual_clock
async def test_switching_unasked_is_refused() -> None:
    async with connected(saying(b"HTTP/1.1 101 X\r\nUpgrade: y\r\n\r\n")) as (client, place):
        with pytest.raises(MalformedError):
            await get(client)
        assert place.ours[0].was_reset


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", True),
        (OK + b"HTTP/1.1 200 OK", True),
        (OK + b"\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", False),
        (b"HTTP/1.1 200 OK\r\n\r\nok", False),
        (b"HTTP/1.1 204 No Content\r\n\r\nunasked", True),
    ],
)
def test_connection_that_cannot_carry_another_request_is_not_kept(answer: bytes, read: bool) -> None:
    @virtual_clock
    async def check() -> None:
        async with connected(saying(answer)) as (client, place):
            async with client.request("GET", "/") as response:
                if read:
                    await response.read(1000)
            assert (client.pool.open, client.pool.idle) == (0, 0)
            assert place.ours[0].ended
            assert place.ours[0].was_reset == (not read)

    check()


@virtual_clock
async def test_small_answer_nobody_read_keeps_the_connection() -> None:
    async with connected(saying(OK, OK)) as (client, place):
        for _ in range(2):
            async with client.request("GET", "/"):
                pass
        assert len(place.ours) == 1


@virtual_clock
async def test_callers_close_is_honoured() -> None:
    async with connected(served(echo)) as (client, _):
        async with client.request("GET", "/", [(b"Connection", b"close")]) as response:
            await response.read(10)
        assert client.pool.open == 0


@pytest.mark.parametrize("how", ["close", "reset", "babble"])
def test_connection_that_died_while_kept_is_replaced(how: str) -> None:
    @virtual_clock
    async def check() -> None:
        async with connected(served(echo)) as (client, place):
            await get(client)
            await {
                "close": place.theirs[0].aclose,
                "reset": place.theirs[0].reset,
                "babble": place.theirs[0].aclose,
            }[how]()
            await get(client)
            assert len(place.ours) == 2
            assert (client.pool.open, client.pool.idle) == (1, 1)

    check()


@virtual_clock
async def test_connection_kept_too_long_is_closed() -> None:
    async with connected(served(echo), max_idle_s=30) as (client, place):
        await get(client)
        await trio.sleep(31)
        await get(client)
        assert place.ours[0].ended
        await trio.sleep(31)
        await client.sweep()
        assert client.pool.open == 0
        assert place.ours[1].ended


@virtual_clock
async def test_closing_the_client_closes_idle_connections_now_and_busy_ones_later() -> None:
    async def slow(exchange: Exchange) -> None:
        await exchange.receive()
        if exchange.request.target == "/slow":
            await trio.sleep(5)
        await exchange.respond(200, [], b"")

    async with connected(served(slow)) as (client, place):
        async with client.request("GET", "/slow") as busy:
            await get(client)
            await client.aclose()
            assert [one.ended for one in place.ours] == [False, True]
            await busy.read(10)
        assert client.pool.open == 0
        with pytest.raises(MisuseError):
            client.request("GET", "/")


# -- failures ----------------------------------------------------------------------------------------------------------


@virtual_clock
async def test_connection_that_cannot_be_opened_means_not_sent() -> None:
    async def fail() -> trio.abc.Stream:
        raise OSError("refused")

    async def hang() -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    for opener, message in ((fail, "refused"), (hang, "within 10 s")):
        client = Client(opener)
        with pytest.raises(NotSentError, match=message):
            await get(client)
        assert client.pool.open == 0


@virtual_clock
async def test_connection_closed_here_meanwhile_means_not_sent() -> None:
    async def open_closed() -> trio.abc.Stream:
        ours, _ = stream_pair()
        await ours.aclose()
        return ours

    with pytest.raises(NotSentError):
        await get(Client(open_closed))


@pytest.mark.parametrize("then", ["close", "reset"])
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", MaybeSentError),
        (b"HTTP/1.1 100 Continue\r\n\r\n", MaybeSentError),
        (b"HTTP/1.1 200 OK\r\nConte", IncompleteError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok", IncompleteError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", IncompleteError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n", IncompleteError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX: y\r\n", IncompleteError),
    ],
)
def test_answer_cut_short_is_never_complete(answer: bytes, error: type[Exception], then: str) -> None:
    @virtual_clock
    async def check() -> None:
        async with connected(saying(answer, then=then)) as (client, _):
            with pytest.raises(error):
                await get(client)
            assert client.pool.open == 0

    check()


@virtual_clock
async def test_answer_until_close_is_complete_at_a_proper_end_only() -> None:
    async with connected(saying(b"HTTP/1.1 200 OK\r\n\r\nok", then="close")) as (client, _):
        assert await get(client) == b"ok"
        assert client.pool.open == 0
    async with connected(saying(b"HTTP/1.1 200 OK\r\n\r\nok", then="reset")) as (client, _):
        with pytest.raises(IncompleteError):
            await get(client)


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\n",
        b"HTTP/1.1 200 OK\r\nX : y\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 40_000,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    ],
)
def test_answer_that_is_no_http_is_the_servers_fault(answer: bytes) -> None:
    @virtual_clock
    async def check() -> None:
        async with connected(saying(answer)) as (client, place):
            with pytest.raises((MalformedError, LimitError)) as caught:
                await get(client)
            assert (caught.value.status, caught.value.reason) == (502, "malformed_answer")
            assert place.ours[0].was_reset
            assert client.pool.open == 0

    check()


@virtual_clock
async def test_answer_larger_than_wanted_is_a_limit() -> None:
    async with connected(saying(OK)) as (client, _), client.request("GET", "/") as response:
        with pytest.raises(LimitError):
            await response.read(1)


@pytest.mark.parametrize("when_s", [0.005, 0.5, 5.0])
def test_cancelled_request_resets_its_connection(when_s: float) -> None:
    async def slow(exchange: Exchange) -> None:
        await trio.sleep(1)
        await exchange.send_head(200, [])
        await exchange.send(b"x")
        await trio.sleep(100)

    @virtual_clock
    async def check() -> None:
        async with connected(served(slow)) as (client, place):
            with trio.move_on_after(when_s):
                await get(client)
            assert (client.pool.open, client.pool.idle) == (0, 0)
            assert all(one.was_reset for one in place.ours)
            place.peer = served(echo)
            await get(client)

    check()


class CancelAtStep(trio.abc.Instrument):
    """Cancels *scope* just before the *step*-th time that the task which made this goes on."""

    def __init__(self, scope: trio.CancelScope, step: int) -> None:
        self._scope = scope
        self._task = trio.lowlevel.current_task()
        self._left = step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if self._left == 0:
                self._scope.cancel()


@pytest.mark.parametrize("kind", ["no body", "one write", "streamed", "asked for"])
def test_cancelled_at_any_step_a_request_leaves_nothing_behind(kind: str) -> None:
    bodies: dict[str, Callable[[], bytes | AsyncIterator[bytes]]] = {
        "no body": lambda: b"",
        "one write": lambda: b"x" * 1000,
        "streamed": lambda: pieces(b"x" * 50_000, b"y" * 50_000, b"z"),
        "asked for": lambda: b"x" * 100_000,
    }

    @virtual_clock
    async def check() -> None:
        async with connected(served(echo), max_connections=2) as (client, _):
            for step in range(1, 200):
                finished = False
                with trio.CancelScope() as scope:
                    instrument = CancelAtStep(scope, step)
                    trio.lowlevel.add_instrument(instrument)
                    try:
                        request = client.request("POST", "/", body=bodies[kind](), expect_continue=kind == "asked for")
                        async with request as response:
                            await response.read(1_000_000)
                        finished = True
                    finally:
                        trio.lowlevel.remove_instrument(instrument)
                assert client.pool.open == client.pool.idle
                if finished and not scope.cancel_called:
                    break
            assert finished
            assert step > 3

    check()


@virtual_clock
async def test_error_in_the_callers_block_passes_unwrapped_and_resets() -> None:
    async def early(exchange: Exchange) -> None:
        await exchange.send_head(200, [])
        await exchange.receive_all(100)

    async with connected(served(early)) as (client, place):
        call = client.request("POST", "/", body=pieces(b"a", b"b", delay_s=1))
        with pytest.raises(ZeroDivisionError):
            async with call:
                raise ZeroDivisionError
        assert client.pool.open == 0
        assert place.ours[0].was_reset


@virtual_clock
async def test_context_left_is_over() -> None:
    async def endless(exchange: Exchange) -> None:
        await exchange.send_head(200, [])
        await trio.sleep_forever()

    async with connected(served(endless)) as (client, _):
        async with client.request("GET", "/") as response:
            pass
        with pytest.raises(MisuseError):
            await response.receive()


# -- bodies ------------------------------------------------------------------------------------------------------------


@virtual_clock
async def test_what_the_bodys_source_raises_reaches_the_caller_and_cuts_the_request() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        await trio.sleep(1)
        raise ZeroDivisionError

    async def early(exchange: Exchange) -> None:
        await exchange.send_head(200, [])
        await exchange.send(b"early")
        await exchange.receive_all(100)

    for handler in (echo, early):
        async with connected(served(handler)) as (client, place):
            with pytest.raises(ZeroDivisionError):
                async with client.request("POST", "/", body=broken()) as response:
                    await response.read(100)
            assert place.ours[0].was_reset
            assert client.pool.open == 0


@pytest.mark.parametrize("length", [2, 4])
def test_body_of_another_length_than_announced_is_cut(length: int) -> None:
    @virtual_clock
    async def check() -> None:
        async with connected(served(echo)) as (client, place):
            with pytest.raises(MisuseError):
                async with client.request("POST", "/", [(b"content-length", b"%d" % length)], pieces(b"ab", b"c")) as r:
                    await r.read(10)
            assert place.ours[0].was_reset
            with pytest.raises(MisuseError):
                client.request("POST", "/", [(b"content-length", b"%d" % length)], b"abc")

    check()


@virtual_clock
async def test_answer_that_comes_before_the_body_has_gone_is_seen() -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.respond(413, [], b"too much")

    async def endless() -> AsyncIterator[bytes]:
        while True:
            await trio.sleep(0.1)
            yield b"x" * 1000

    async with connected(served(refuse)) as (client, _):
        async with client.request("POST", "/", body=endless()) as response:
            assert response.status == 413
            assert await response.read(100) == b"too much"
            assert not response.body_sent
        assert client.pool.open == 0


@virtual_clock
async def test_peer_that_refuses_and_closes_is_understood_though_sending_failed() -> None:
    async def refuse(stream: FakeStream) -> None:
        await receive_until(stream, b"\r\n\r\n")
        await stream.send_all(b"HTTP/1.1 413 X\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
        await stream.aclose()

    body = pieces(b"a", b"b", b"c", delay_s=1)
    async with connected(refuse) as (client, _), client.request("POST", "/", body=body) as response:
        await trio.sleep(10)
        assert (response.status, await response.read(10)) == (413, b"no")
        assert not response.body_sent


@virtual_clock
async def test_echo_of_a_long_body_does_not_deadlock() -> None:
    async def mirror(exchange: Exchange) -> None:
        await exchange.send_head(200, [])
        while data := await exchange.receive():
            await exchange.send(data)
        await exchange.end()

    body = bytes(range(256)) * 4000
    async with connected(served(mirror)) as (client, place):
        for _ in range(2):
            async with client.request("POST", "/", body=body) as response:
                assert await response.read(2_000_000) == body
        assert len(place.ours) == 1


# -- Expect: 100-continue ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_body_waits_for_continue(streamed: bool) -> None:
    async def slow(exchange: Exchange) -> None:
        await trio.sleep(2)
        await echo(exchange)

    @virtual_clock
    async def check() -> None:
        async with connected(served(slow)) as (client, place):
            body = pieces(b"abc") if streamed else b"abc"
            async with client.request("POST", "/", body=body, expect_continue=True) as response:
                assert await response.read(10) == b"abc"
                assert response.body_sent
            assert b"expect: 100-continue\r\n\r\n" in place.ours[0].writes[0]
            assert client.pool.idle == 1

    check()


@virtual_clock
async def test_refused_body_is_not_sent_and_the_connection_not_kept() -> None:
    async def refuse(exchange: Exchange) -> None:
        await trio.sleep(2)
        await exchange.respond(429, [], b"later")

    async with connected(served(refuse)) as (client, place):
        async with client.request("POST", "/", body=b"abc", expect_continue=True) as response:
            assert (response.status, await response.read(10)) == (429, b"later")
            assert not response.body_sent
        assert len(place.ours[0].writes) == 1
        assert client.pool.open == 0


@virtual_clock
async def test_server_that_knows_no_continue_gets_the_body_after_a_while() -> None:
    async def old(stream: FakeStream) -> None:
        await receive_until(stream, b"\r\n\r\n")
        await receive_until(stream, b"abc")
        await stream.send_all(OK)
        await trio.sleep_forever()

    async with connected(old) as (client, _):
        started = trio.current_time()
        call = client.request("POST", "/", body=b"abc", expect_continue=True, continue_timeout_s=3)
        async with call as response:
            assert await response.read(10) == b"ok"
        assert 3 <= trio.current_time() - started < 4
        assert client.pool.idle == 1


@virtual_clock
async def test_request_without_a_body_expects_nothing() -> None:
    async with connected(served(echo)) as (client, place):
        async with client.request("POST", "/", expect_continue=True) as response:
            await response.read(10)
        assert b"expect" not in place.ours[0].writes[0]


# -- the pool ----------------------------------------------------------------------------------------------------------


@virtual_clock
async def test_requests_beyond_the_pool_wait_in_order() -> None:
    order: list[str] = []

    async def slow(exchange: Exchange) -> None:
        order.append(exchange.request.target)
        await trio.sleep(1)
        await exchange.respond(200, [], b"")

    async with connected(served(slow), max_connections=2) as (client, place):
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(get, client, f"/{number}")
                await trio.sleep(0.001)
            await trio.sleep(0.1)
            assert (client.pool.open, client.pool.waiting) == (2, 4)
        assert order == [f"/{number}" for number in range(6)]
        assert len(place.ours) == 2
        assert trio.current_time() < 4


@virtual_clock
async def test_waiting_for_a_connection_has_an_end() -> None:
    async def never(exchange: Exchange) -> None:
        await trio.sleep_forever()

    async with connected(served(never), max_connections=1, acquire_timeout_s=5) as (client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(get, client)
            await trio.sleep(1)
            with pytest.raises(PoolTimeoutError):
                await get(client)
            assert client.pool.waiting == 0
            nursery.cancel_scope.cancel()
        assert client.pool.open == 0


@virtual_clock
async def test_place_of_a_failed_connection_goes_to_the_next_in_line() -> None:
    async def reset_after_a_while(stream: FakeStream) -> None:
        await receive_until(stream, b"\r\n\r\n")
        await trio.sleep(1)
        await stream.reset()

    failed = 0

    async with connected(reset_after_a_while, max_connections=1) as (client, place):

        async def try_once() -> None:
            nonlocal failed
            try:
                await get(client)
            except MaybeSentError:
                failed += 1

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(try_once)
        assert failed == 5
        assert len(place.ours) == 5
        assert client.pool.open == 0


@virtual_clock
async def test_cancelled_waiter_passes_its_turn_on() -> None:
    async def slow(exchange: Exchange) -> None:
        await trio.sleep(1)
        await exchange.respond(200, [], b"")

    async with connected(served(slow), max_connections=1) as (client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(get, client)
            await trio.sleep(0.1)

            async def impatient() -> None:
                with trio.move_on_after(0.91):  # just when its turn comes
                    await get(client)

            nursery.start_soon(impatient)
            await trio.sleep(0.1)
            nursery.start_soon(get, client)
        assert client.pool.open == client.pool.idle
        assert client.pool.waiting == 0


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("GET", "/a b", []),
        ("GET", "/\r\nX: y", []),
        ("G T", "/", []),
        ("GET", "/", [(b"x", b"a\r\nb: c")]),
        ("GET", "/", [(b"x: y\r\nz", b"a")]),
        ("GET", "/", [(b"content-length", b"-1")]),
        ("POST", "/", [(b"content-length", b"1"), (b"content-length", b"1")]),
    ],
)
def test_request_that_cannot_be_one_is_misuse_at_once(method: str, target: str, headers: Headers) -> None:
    @virtual_clock
    async def check() -> None:
        async with connected(served(echo)) as (client, place):
            with pytest.raises(MisuseError):
                client.request(method, target, headers)
            assert place.ours == []

    check()


@virtual_clock
async def test_source_left_in_its_middle_is_closed() -> None:
    closed: list[bool] = []

    async def source() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x"
                await trio.sleep(0.01)
        finally:
            closed.append(True)

    async def refuse(exchange: Exchange) -> None:
        await exchange.respond(413, [], b"")

    async with connected(served(refuse)) as (client, _):
        async with client.request("POST", "/", body=source()) as response:
            await response.read(10)
        assert closed == [True]


@virtual_clock
async def test_source_that_cannot_be_closed_fails_the_request_as_any_error_of_its_own() -> None:
    async def source() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x"  # left here: it is the connection that fails
        finally:
            raise OSError("cannot close the file")

    refusal = saying(b"HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n", then="close")
    async with connected(refusal) as (client, _):
        with pytest.raises(OSError, match="cannot close the file"):  # noqa: PT012  leaving is what raises
            async with client.request("POST", "/", body=source()) as response:
                await trio.sleep(1)
                await response.read(10)
        assert client.pool.open == 0
