"""One server connection over a stream in memory: framing, order, refusals, endings, and how a handler learns that the
client left. Times are those of a virtual clock."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from ngpu_protocol.http1 import (
    ClientGoneError,
    Draining,
    Exchange,
    Handler,
    IncompleteError,
    LimitError,
    Limits,
    MisuseError,
    Remote,
    serve_stream,
)
from tests.support.streams import FakeStream, receive_all, receive_until, stream_pair
from tests.support.virtual_clock import virtual_clock

GET = b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n"


class Served:
    """The client's end of a served connection, and whether serving it has ended."""

    def __init__(self) -> None:
        self.client, self.server = stream_pair()
        self.ended = trio.Event()
        self.scope = trio.CancelScope()


@asynccontextmanager
async def serving(handler: Handler, **options: Any) -> AsyncIterator[Served]:
    served = Served()

    async def run() -> None:
        with served.scope:
            await serve_stream(served.server, handler, **options)
        served.ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        yield served
        nursery.cancel_scope.cancel()


async def echo(exchange: Exchange) -> None:
    body = await exchange.receive_all(1_000_000)
    await exchange.respond(200, [(b"x-target", exchange.request.target.encode())], body)


async def refuse(exchange: Exchange) -> None:
    await exchange.respond(401, [], b"no")


async def exchange_raw(
    handler: Handler, request: bytes, *, finish: bool = False, **options: Any
) -> tuple[bytes, FakeStream]:
    """Send *request* and return all that comes until the server ends the connection, and the client's end."""
    async with serving(handler, **options) as served:
        await served.client.send_all(request)
        if finish:
            await served.client.send_eof()
        with trio.fail_after(500):
            return await receive_all(served.client), served.client


def close(request: bytes) -> bytes:
    return request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)


# -- framing -----------------------------------------------------------------------------------------------------------


@virtual_clock
async def test_small_exchange_is_one_write() -> None:
    async with serving(echo) as served:
        await served.client.send_all(b"POST /a?b HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc")
        answer = await receive_until(served.client, b"abc")
        assert answer == b"HTTP/1.1 200 OK\r\nx-target: /a?b\r\ncontent-length: 3\r\n\r\nabc"
        assert len(served.server.writes) == 1


@virtual_clock
async def test_pipelined_requests_are_answered_in_order() -> None:
    async def slow_first(exchange: Exchange) -> None:
        if exchange.request.target == "/0":
            await trio.sleep(5)
        await echo(exchange)

    requests = b"".join(b"POST /%d HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\n%d" % (n, n) for n in range(4))
    answer, _ = await exchange_raw(slow_first, requests + close(GET))
    places = [answer.index(b"x-target: /%d" % n) for n in range(4)]
    assert places == sorted(places)
    assert answer.count(b"HTTP/1.1 200") == 5


@virtual_clock
async def test_bytes_that_trickle_in_make_the_same_request() -> None:
    request = (
        close(b"POST /t HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n") + b"3\r\nabc\r\n0\r\nX: y\r\n\r\n"
    )
    whole, _ = await exchange_raw(echo, request)
    async with serving(echo) as served:
        for at in range(len(request)):
            await served.client.send_all(request[at : at + 1])
            await trio.sleep(0.01)
        assert await receive_all(served.client) == whole
    assert whole.endswith(b"\r\n\r\nabc")


@virtual_clock
async def test_empty_line_before_a_request_is_ignored() -> None:
    answer, _ = await exchange_raw(echo, b"\r\n" + GET + b"\r\n" + close(GET))
    assert answer.count(b"HTTP/1.1 200") == 2


@virtual_clock
async def test_trailers_both_ways() -> None:
    async def handler(exchange: Exchange) -> None:
        body = await exchange.receive_all(100)
        await exchange.send_head(200, [])
        await exchange.send(body)
        await exchange.end([(b"ngpu-receipt", exchange.trailers[0][1])])

    request = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nX-Sum: 7\r\n\r\n"
    answer, _ = await exchange_raw(handler, request, finish=True)
    assert answer.endswith(b"transfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nngpu-receipt: 7\r\n\r\n")


@virtual_clock
async def test_each_send_goes_out_at_once_unless_more_is_at_hand() -> None:
    async def events(exchange: Exchange) -> None:
        await exchange.send_head(200, [(b"content-type", b"text/event-stream")])
        await exchange.send(b"data: 1\n\n")
        await trio.sleep(3600)
        await exchange.send(b"data: 2\n\n", more=True)
        await exchange.end([(b"t", b"1")])

    async with serving(events) as served:
        await served.client.send_all(GET)
        await receive_until(served.client, b"data: 1\n\n\r\n")
        assert trio.current_time() % 3600 < 1
        await receive_until(served.client, b"t: 1\r\n\r\n")
        assert len(served.server.writes) == 3


@virtual_clock
async def test_a_held_head_goes_with_the_first_bytes() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send_head(200, [(b"content-length", b"4")], more=True)
        await exchange.send(b"ab", more=True)
        await exchange.send(b"cd", more=True)
        await exchange.end()

    async with serving(handler) as served:
        await served.client.send_all(GET)
        await receive_until(served.client, b"abcd")
        assert len(served.server.writes) == 1


@virtual_clock
async def test_what_is_held_back_stays_small() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send_head(200, [])
        for _ in range(10):
            await exchange.send(bytes(50_000), more=True)
        await exchange.end()

    answer, client = await exchange_raw(handler, close(GET))
    assert len(answer) > 500_000
    assert client.peer is not None
    assert max(map(len, client.peer.writes)) < 150_000


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("status", [200, 204, 304])
@pytest.mark.parametrize("whole", [True, False])
def test_bodiless_answers_have_no_body(method: str, status: int, whole: bool) -> None:
    async def handler(exchange: Exchange) -> None:
        if whole:
            await exchange.respond(status, [(b"x", b"y")], b"content")
        else:
            await exchange.send_head(status, [(b"x", b"y")])
            await exchange.send(b"content")
            await exchange.end([(b"t", b"1")])

    @virtual_clock
    async def check() -> None:
        request = b"%b / HTTP/1.1\r\nHost: h\r\n\r\n" % method.encode()
        answer, _ = await exchange_raw(handler, request + close(request))
        has_body = method == "GET" and status == 200
        assert answer.count(b"HTTP/1.1 %d" % status) == 2
        assert answer.count(b"content\r\n" if not whole else b"content") >= (2 if has_body else 0)
        assert (b"content" in answer.replace(b"content-length", b"")) == has_body
        assert (b"content-length" in answer) == (whole and status == 200)
        assert (b"transfer-encoding" in answer) == (has_body and not whole)

    check()


@virtual_clock
async def test_content_length_of_the_handler_is_kept_for_head() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.respond(200, [(b"Content-Length", b"1000")], b"")

    answer, _ = await exchange_raw(handler, b"HEAD / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert b"Content-Length: 1000\r\n" in answer


@virtual_clock
async def test_http_1_0_client_gets_no_chunks_and_an_end() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send_head(200, [])
        await exchange.send(b"abc")
        await exchange.end([(b"t", b"dropped")])

    answer, client = await exchange_raw(handler, b"GET / HTTP/1.0\r\n\r\n")
    assert answer == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabc"
    assert not client.broken


@virtual_clock
async def test_framing_fields_of_the_handler_are_replaced() -> None:
    async def handler(exchange: Exchange) -> None:
        fields = [(b"Transfer-Encoding", b"gzip"), (b"Connection", b"keep-alive, x-secret"), (b"X", b"y")]
        await exchange.send_head(200, fields)
        await exchange.end()

    async with serving(handler) as served:
        await served.client.send_all(GET)
        answer = await receive_until(served.client, b"0\r\n\r\n")
    assert answer == b"HTTP/1.1 200 OK\r\nX: y\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"


@virtual_clock
async def test_date_is_added_where_asked_and_missing() -> None:
    answer, _ = await exchange_raw(echo, close(GET), date=True)
    assert b"\r\ndate: " in answer
    assert answer.count(b" GMT\r\n") == 1


@virtual_clock
async def test_interim_answers_go_before_the_final_one() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send_informational(103, [(b"link", b"</x>")])
        await exchange.respond(200, [], b"")

    answer, _ = await exchange_raw(handler, close(GET))
    assert answer.startswith(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 200 OK\r\n")


@virtual_clock
async def test_remote_is_the_handlers_to_see() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.respond_json(200, exchange.remote.peer)

    answer, _ = await exchange_raw(handler, close(GET), remote=Remote(peer="0xabc"))
    assert answer.endswith(b'"0xabc"')


# -- Expect: 100-continue ----------------------------------------------------------------------------------------------

EXPECTING = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"


@virtual_clock
async def test_continue_is_sent_when_the_handler_wants_the_body() -> None:
    async with serving(echo) as served:
        await served.client.send_all(EXPECTING)
        assert await receive_until(served.client, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await served.client.send_all(b"abc")
        assert (await receive_until(served.client, b"abc")).startswith(b"HTTP/1.1 200")
        await served.client.send_all(GET)
        await receive_until(served.client, b"\r\n\r\n")


@virtual_clock
async def test_refusal_before_the_body_sends_no_continue_and_ends_the_connection() -> None:
    answer, client = await exchange_raw(refuse, EXPECTING)
    assert answer == b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno"
    assert not client.broken


@virtual_clock
async def test_body_that_came_unasked_keeps_the_connection() -> None:
    async with serving(refuse) as served:
        await served.client.send_all(EXPECTING + b"abc" + GET)
        answer = await receive_until(served.client, b"no")
        answer += await receive_until(served.client, b"no")
        assert b"100 Continue" not in answer
        assert b"close" not in answer


@virtual_clock
async def test_answering_first_and_receiving_then_is_misuse() -> None:
    seen: list[Exception] = []

    async def handler(exchange: Exchange) -> None:
        await exchange.send_head(200, [])
        try:
            await exchange.receive()
        except MisuseError as error:
            seen.append(error)
        await exchange.end()

    await exchange_raw(handler, EXPECTING)
    assert len(seen) == 1


@virtual_clock
async def test_body_can_be_accepted_before_answering() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.accept_body()
        await exchange.send_head(200, [])
        await exchange.send(await exchange.receive())
        await exchange.end()

    async with serving(handler) as served:
        await served.client.send_all(EXPECTING)
        await receive_until(served.client, b"chunked\r\n\r\n")
        await served.client.send_all(b"abc")
        await receive_until(served.client, b"abc\r\n0\r\n\r\n")


# -- handlers that fail ------------------------------------------------------------------------------------------------


async def explode(exchange: Exchange) -> None:
    raise RuntimeError("secret detail")


async def explode_in_nursery(exchange: Exchange) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(explode, exchange)


async def forget(exchange: Exchange) -> None:
    pass


async def hold_and_explode(exchange: Exchange) -> None:
    await exchange.send_head(200, [(b"content-length", b"5")], more=True)
    raise RuntimeError


async def announce_wrongly(exchange: Exchange) -> None:
    await exchange.respond(200, [(b"content-length", b"5")], b"four")


async def split_answer(exchange: Exchange) -> None:
    await exchange.respond(200, [(b"x", b"y\r\nset-cookie: z")], b"")


@pytest.mark.parametrize(
    "handler", [explode, explode_in_nursery, forget, hold_and_explode, announce_wrongly, split_answer]
)
def test_failure_before_anything_was_sent_is_a_500_and_the_connection_goes_on(handler: Handler) -> None:
    async def handle(exchange: Exchange) -> None:
        await (echo if exchange.request.target == "/x" else handler)(exchange)

    @virtual_clock
    async def check() -> None:
        answer, _ = await exchange_raw(handle, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n" + close(GET))
        assert answer.startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
        assert b'{"reason":"internal_error"' in answer
        assert b"secret" not in answer
        assert b"HTTP/1.1 200 OK\r\nx-target" in answer

    check()


async def half(exchange: Exchange) -> None:
    await exchange.send_head(200, [])
    await exchange.send(b"half")
    raise RuntimeError


async def half_and_forget(exchange: Exchange) -> None:
    await exchange.send_head(200, [])
    await exchange.send(b"half")


async def too_little(exchange: Exchange) -> None:
    await exchange.send_head(200, [(b"content-length", b"5")])
    await exchange.send(b"half")
    await exchange.end()


async def too_much(exchange: Exchange) -> None:
    await exchange.send_head(200, [(b"content-length", b"5")])
    await exchange.send(b"half")
    await exchange.send(b"half")


async def bad_trailer(exchange: Exchange) -> None:
    await exchange.send_head(200, [])
    await exchange.send(b"half")
    await exchange.end([(b"content-length", b"5")])


async def abort(exchange: Exchange) -> None:
    await exchange.send_head(200, [])
    await exchange.send(b"half")
    await exchange.abort()


@pytest.mark.parametrize("handler", [half, half_and_forget, too_little, too_much, bad_trailer, abort])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_answer_that_fails_after_its_head_is_cut(handler: Handler, version: bytes) -> None:
    @virtual_clock
    async def check() -> None:
        async with serving(handler) as served:
            await served.client.send_all(GET.replace(b"1.1", version) + GET)
            got = b""
            with pytest.raises(trio.BrokenResourceError):  # noqa: PT012
                while True:
                    more = await served.client.receive_some()
                    assert more, "an answer that was cut must not end in order"
                    got += more
            assert got.count(b"HTTP/1.1") == 1
            assert b"half" in got
            assert not got.endswith(b"0\r\n\r\n")
            await served.ended.wait()

    check()


@virtual_clock
async def test_remote_errors_become_their_own_status() -> None:
    async def handler(exchange: Exchange) -> None:
        raise IncompleteError("the workspace's answer was cut short")

    answer, _ = await exchange_raw(handler, close(GET))
    assert answer.startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {
        "reason": "incomplete",
        "message": "the workspace's answer was cut short",
    }


@virtual_clock
async def test_two_heads_or_bytes_after_the_end_are_misuse() -> None:
    raised = 0

    async def handler(exchange: Exchange) -> None:
        nonlocal raised
        with pytest.raises(MisuseError):
            await exchange.send(b"x")
        with pytest.raises(MisuseError):
            await exchange.send_head(101, [])
        await exchange.respond(200, [], b"")
        for call in (exchange.send(b"x"), exchange.end(), exchange.respond(200, []), exchange.send_head(200, [])):
            with pytest.raises(MisuseError):
                await call
            raised += 1

    answer, _ = await exchange_raw(handler, close(GET))
    assert raised == 4
    assert answer == b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


# -- malformed and oversize --------------------------------------------------------------------------------------------


POST = b"POST / HTTP/1.1\r\nHost: h\r\n"
BAD = "malformed_request"


@pytest.mark.parametrize(
    ("request_bytes", "status", "reason"),
    [
        (b"GARBAGE\r\n\r\n", 400, BAD),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400, BAD),
        (b"GET / HTTP/1.1\nHost: h\n\n", 400, BAD),
        (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, BAD),
        (POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400, BAD),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n5\nhello", 400, BAD),
        (b"GET /\x01 HTTP/1.1\r\nHost: h\r\n\r\n", 400, BAD),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: \x01\r\n\r\n", 400, BAD),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX : y\r\n\r\n", 400, BAD),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: y\r\n z\r\n\r\n", 400, BAD),
        (b"GET / HTTP/3.0\r\nHost: h\r\n\r\n", 505, "version_unsupported"),
        (b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n", 501, "not_implemented"),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414, "target_too_long"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431, "too_many_headers"),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 40_000, 431, "head_too_large"),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 40_000 + b"\r\n\r\n", 431, "head_too_large"),
        (POST + b"Content-Length: 1000001\r\n\r\n", 413, "body_too_large"),
        (POST + b"Expect: 100-continue\r\nContent-Length: 1000001\r\n\r\n", 413, "body_too_large"),
        (
            POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"100000\r\n" + bytes(0x100000) + b"\r\n",
            413,
            "body_too_large",
        ),
    ],
)
def test_bad_request_gets_its_status_in_json_and_the_end(request_bytes: bytes, status: int, reason: str) -> None:
    @virtual_clock
    async def check() -> None:
        answer, client = await exchange_raw(echo, request_bytes + GET)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert b"connection: close" in head
        refusal = json.loads(body)
        assert refusal["reason"] == reason
        if status == 431:
            assert re.search(r" \d+ .*: send fewer", refusal["message"])
        answers = len(re.findall(rb"HTTP/1\.1 \d\d\d ", answer))
        assert answers == 1, "what follows a bad request must not be read as another"
        assert not client.broken

    check()


@virtual_clock
async def test_second_bad_request_leaves_the_first_answered() -> None:
    answer, _ = await exchange_raw(echo, GET + b"GARBAGE\r\n\r\n" + GET)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1 ") == 2


@virtual_clock
async def test_handler_may_set_its_own_body_limit_and_catch_it() -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.max_body_bytes = 2
        try:
            await exchange.receive()
        except LimitError:
            await exchange.respond_json(413, {"reason": "mine"})

    answer, _ = await exchange_raw(handler, b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc" + close(GET))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'{"reason":"mine"}' in answer
    assert answer.count(b"HTTP/1.1") == 2


# -- bodies nobody read ------------------------------------------------------------------------------------------------


@virtual_clock
async def test_small_unread_body_is_dropped_and_the_connection_goes_on() -> None:
    async with serving(refuse) as served:
        await served.client.send_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n" + b"z" * 400)
        await receive_until(served.client, b"no")
        await served.client.send_all(b"z" * 600 + GET)
        assert b"401" in await receive_until(served.client, b"no")


@virtual_clock
async def test_large_unread_body_ends_the_connection_after_the_answer() -> None:
    async with serving(refuse) as served:
        await served.client.send_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10000000\r\n\r\n" + b"z" * 400)
        answer = await receive_until(served.client, b"no")
        assert b"connection: close" in answer
        assert await served.client.receive_some() == b""
        for _ in range(10):
            await served.client.send_all(bytes(10_000))  # it lingers, so that the answer is not overtaken by a reset
        await served.ended.wait()


@virtual_clock
async def test_endless_unread_chunks_end_the_connection() -> None:
    async with serving(refuse) as served:
        await served.client.send_all(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):  # noqa: PT012
            while True:
                await served.client.send_all(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                await trio.sleep(0.001)
        await served.ended.wait()


# -- clients that leave ------------------------------------------------------------------------------------------------


class Witness:
    """A handler that does *doing* until it is cancelled, and notes when and why it was."""

    def __init__(self, doing: Callable[[Exchange], Any]) -> None:
        self._doing = doing
        self.started = trio.Event()
        self.cancelled_at: float | None = None
        self.gone = False
        self.error: Exception | None = None

    async def __call__(self, exchange: Exchange) -> None:
        self.started.set()
        try:
            await self._doing(exchange)
        except trio.Cancelled:
            self.cancelled_at = trio.current_time()
            self.gone = exchange.client_gone
            raise
        except Exception as error:
            self.error = error
            raise


async def wait_long(exchange: Exchange) -> None:
    await trio.sleep(10_000)


async def begin_and_wait(exchange: Exchange) -> None:
    await exchange.send_head(200, [])
    await trio.sleep(10_000)


async def stream_events(exchange: Exchange) -> None:
    await exchange.send_head(200, [])
    while True:
        await trio.sleep(0.25)  # faster than the timekeeper's tick: no lookout ever starts, the writes must notice
        await exchange.send(b"data\n\n")


async def read_and_wait(exchange: Exchange) -> None:
    await exchange.receive_all(1000)
    await trio.sleep(10_000)


@pytest.mark.parametrize("doing", [wait_long, begin_and_wait, stream_events, read_and_wait])
@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("after_s", [0.0, 0.1, 5.0])
def test_handler_is_cancelled_within_a_second_of_the_client_leaving(
    doing: Callable[[Exchange], Any], how: str, after_s: float
) -> None:
    @virtual_clock
    async def check() -> None:
        witness = Witness(doing)
        async with serving(witness) as served:
            await served.client.send_all(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nab")
            await witness.started.wait()
            await trio.sleep(after_s)
            left_at = trio.current_time()
            await (served.client.aclose() if how == "close" else served.client.reset())
            await served.ended.wait()
            assert witness.cancelled_at is not None
            assert witness.cancelled_at - left_at < 1.0
            assert witness.gone

    check()


@virtual_clock
async def test_client_that_leaves_inside_its_body_cancels_the_handler() -> None:
    witness = Witness(lambda exchange: exchange.receive_all(1000))
    async with serving(witness) as served:
        await served.client.send_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nhalf")
        await trio.sleep(0.01)
        await served.client.send_eof()
        await served.ended.wait()
    assert witness.gone
    assert served.server.writes == []


@virtual_clock
async def test_end_of_bytes_is_no_end_of_interest_where_streams_close_by_halves() -> None:
    async def slow(exchange: Exchange) -> None:
        await trio.sleep(30)
        await echo(exchange)

    async with serving(slow, half_close=True) as served:
        await served.client.send_all(GET)
        await served.client.send_eof()
        answer = await receive_all(served.client)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        await served.ended.wait()
        assert not served.server.was_reset


@virtual_clock
async def test_reset_is_the_end_of_interest_even_there() -> None:
    witness = Witness(wait_long)
    async with serving(witness, half_close=True) as served:
        await served.client.send_all(GET)
        await trio.sleep(2)
        await served.client.reset()
        await served.ended.wait()
    assert witness.gone


@virtual_clock
async def test_shielded_handler_is_told_by_an_exception() -> None:
    seen: list[Exception] = []

    async def handler(exchange: Exchange) -> None:
        with trio.CancelScope(shield=True):
            await exchange.send_head(200, [])
            try:
                while True:
                    await exchange.send(b"x")
                    await trio.sleep(1)
            except ClientGoneError as error:
                seen.append(error)
                raise

    async with serving(handler) as served:
        await served.client.send_all(GET)
        await trio.sleep(3)
        await served.client.reset()
        await served.ended.wait()
    assert len(seen) == 1


@virtual_clock
async def test_requests_pipelined_behind_a_busy_handler_are_kept() -> None:
    async def slow(exchange: Exchange) -> None:
        await trio.sleep(5)
        await echo(exchange)

    async with serving(slow) as served:
        await served.client.send_all(GET)
        await trio.sleep(2)
        await served.client.send_all(b"POST /2 HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\na")
        await trio.sleep(1)
        await served.client.send_all(b"bc")
        assert b"/x" in await receive_until(served.client, b"\r\n\r\n")
        assert b"/2" in await receive_until(served.client, b"abc")


@virtual_clock
async def test_body_that_comes_while_the_handler_waits_is_kept_for_it() -> None:
    async def slow(exchange: Exchange) -> None:
        first = await exchange.receive()
        await trio.sleep(5)
        await exchange.respond(200, [], first + await exchange.receive_all(10_000_000))

    body = bytes(range(256)) * 4000
    async with serving(slow) as served:
        await served.client.send_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\na" % (1 + len(body)))
        for at in range(0, len(body), 1000):
            await served.client.send_all(body[at : at + 1000])
            await trio.sleep(0.01)
        answer = await receive_until(served.client, b"\r\n\r\n")
        while len(answer) < len(body):
            answer += await served.client.receive_some()
        assert answer.endswith(b"a" + body)


@virtual_clock
async def test_work_after_the_answer_outlives_the_client() -> None:
    finished = trio.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.respond(200, [], b"ok")
        await trio.sleep(60)
        finished.set()

    async with serving(handler) as served:
        await served.client.send_all(GET)
        await receive_until(served.client, b"ok")
        await served.client.aclose()
        await served.ended.wait()
    assert finished.is_set()


@virtual_clock
async def test_cancelled_server_cuts_a_running_answer_and_closes_an_idle_connection() -> None:
    witness = Witness(begin_and_wait)
    async with serving(witness) as served:
        await served.client.send_all(GET)
        await receive_until(served.client, b"\r\n\r\n")
        served.scope.cancel()
        with pytest.raises(trio.BrokenResourceError):
            await served.client.receive_some()
    assert not witness.gone
    async with serving(echo) as served:
        await served.client.send_all(GET)
        await receive_until(served.client, b"\r\n\r\n")
        served.scope.cancel()
        assert await served.client.receive_some() == b""


# -- times -------------------------------------------------------------------------------------------------------------


@virtual_clock
async def test_head_that_drips_in_is_timed_out() -> None:
    async with serving(echo, limits=Limits(head_timeout_s=10)) as served:
        started = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):  # noqa: PT012
            while True:
                await served.client.send_all(b"X")
                await trio.sleep(0.7)
        assert 10 <= trio.current_time() - started < 14
        assert b"HTTP/1.1 408 " in served.server.writes[0]


@virtual_clock
async def test_refusal_that_nobody_reads_ends_too() -> None:
    async with serving(echo, limits=Limits(head_timeout_s=5, stall_timeout_s=30)) as served:
        served.server.stall = trio.Event()
        await served.client.send_all(b"GET / HTTP/1.1\r\nHo")
        await trio.sleep(1)
        await served.client.send_all(b"st: \x01\r\n\r\n")
        await served.ended.wait()
        assert trio.current_time() < 40


@virtual_clock
async def test_idle_connection_is_closed_in_order() -> None:
    async with serving(echo, limits=Limits(idle_timeout_s=75)) as served:
        await served.client.send_all(GET)
        await receive_until(served.client, b"\r\n\r\n")
        started = trio.current_time()
        assert await served.client.receive_some() == b""
        assert 75 <= trio.current_time() - started < 77


@virtual_clock
async def test_each_request_starts_the_idle_time_anew() -> None:
    async with serving(echo, limits=Limits(idle_timeout_s=10)) as served:
        for _ in range(10):
            await trio.sleep(9)
            await served.client.send_all(GET)
            await receive_until(served.client, b"\r\n\r\n")


@virtual_clock
async def test_busy_handler_is_not_idle() -> None:
    async def slow(exchange: Exchange) -> None:
        await trio.sleep(1000)
        await echo(exchange)

    async with serving(slow) as served:
        await served.client.send_all(GET)
        await receive_until(served.client, b"\r\n\r\n")
        assert trio.current_time() > 0


@virtual_clock
async def test_body_that_stalls_is_timed_out() -> None:
    async with serving(echo, limits=Limits(stall_timeout_s=20)) as served:
        await served.client.send_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n")
        for _ in range(4):
            await trio.sleep(15)  # slow is not stalled
            await served.client.send_all(b"z")
        started = trio.current_time()
        assert b"HTTP/1.1 408 " in await receive_all(served.client)
        assert 20 <= trio.current_time() - started < 26


@virtual_clock
async def test_client_that_stops_reading_is_cut_off() -> None:
    witness = Witness(stream_events)
    async with serving(witness, limits=Limits(stall_timeout_s=20)) as served:
        await served.client.send_all(GET)
        await receive_until(served.client, b"data")
        served.server.stall = trio.Event()
        await served.ended.wait()
    assert witness.gone
    assert served.server.was_reset


@virtual_clock
async def test_client_that_reads_slowly_gets_all_of_one_large_answer() -> None:
    size = 4 * 1024 * 1024

    async def large(exchange: Exchange) -> None:
        await exchange.respond(200, [], bytes(size))

    async with serving(large, limits=Limits(stall_timeout_s=20)) as served:
        send_all = served.server.send_all

        async def through_a_thin_line(data: bytes | bytearray | memoryview) -> None:
            await trio.sleep(len(data) / 20_000)
            await send_all(data)

        served.server.send_all = through_a_thin_line  # type: ignore[method-assign]
        await served.client.send_all(close(GET))
        started = trio.current_time()
        answer = await receive_all(served.client)
        assert len(answer) > size
        assert trio.current_time() - started > 200


# -- switching protocols -----------------------------------------------------------------------------------------------

UPGRADE = b"GET /chat HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@pytest.mark.parametrize("delay_s", [0.0, 5.0])
def test_switched_connection_passes_raw_bytes_both_ways(delay_s: float) -> None:
    async def handler(exchange: Exchange) -> None:
        await trio.sleep(delay_s)  # longer than a tick: a lookout reads when the switch happens
        stream = await exchange.upgrade([(b"sec-websocket-accept", b"x")])
        while data := await stream.receive_some(5):
            await stream.send_all(data.upper())
        await stream.send_all(b"bye")

    @virtual_clock
    async def check() -> None:
        async with serving(handler) as served:
            await served.client.send_all(UPGRADE + b"early")
            head = await receive_until(served.client, b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
            assert b"upgrade: websocket\r\nconnection: upgrade\r\n" in head
            assert b"sec-websocket-accept: x\r\n" in head
            await served.client.send_all(b" and later")
            assert await receive_until(served.client, b"LATER") == b"EARLY AND LATER"
            await trio.sleep(1000)  # raw bytes have no idle time of ours
            await served.client.send_eof()
            assert await receive_all(served.client) == b"bye"

    check()


@virtual_clock
async def test_switching_unasked_is_misuse() -> None:
    async def handler(exchange: Exchange) -> None:
        with pytest.raises(MisuseError):
            await exchange.upgrade()
        await exchange.respond(200, [], b"")

    answer, _ = await exchange_raw(handler, GET + close(UPGRADE.replace(b"Connection: Upgrade\r\n", b"")))
    assert answer.count(b"HTTP/1.1 200") == 2


@virtual_clock
async def test_client_of_http_1_0_cannot_switch() -> None:
    async def handler(exchange: Exchange) -> None:
        with pytest.raises(MisuseError):
            await exchange.upgrade()
        await exchange.respond(426, [])

    answer, _ = await exchange_raw(handler, UPGRADE.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert answer.startswith(b"HTTP/1.1 426 ")


@virtual_clock
async def test_request_to_switch_may_be_answered_otherwise() -> None:
    async with serving(echo) as served:
        await served.client.send_all(UPGRADE + GET)
        await receive_until(served.client, b"/chat")
        await receive_until(served.client, b"/x")


# -- draining ----------------------------------------------------------------------------------------------------------


@virtual_clock
async def test_draining_closes_idle_connections_and_lets_running_requests_finish() -> None:
    async def slow(exchange: Exchange) -> None:
        await trio.sleep(10)
        await echo(exchange)

    draining = Draining()
    async with serving(echo, draining=draining) as idle, serving(slow, draining=draining) as busy:
        await idle.client.send_all(GET)
        await receive_until(idle.client, b"\r\n\r\n")
        await busy.client.send_all(GET + GET)
        await trio.sleep(1)
        assert draining.connections == 2
        draining.start()
        assert await idle.client.receive_some() == b""
        answer = await receive_all(busy.client)
        assert answer.count(b"HTTP/1.1 200") == 1
        assert b"connection: close" in answer
        await draining.wait_finished()
        assert draining.connections == 0


@virtual_clock
async def test_connection_that_comes_after_draining_began_is_closed() -> None:
    draining = Draining()
    draining.start()
    async with serving(echo, draining=draining) as served:
        assert await served.client.receive_some() == b""
    await draining.wait_finished()
