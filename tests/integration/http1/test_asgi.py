"""FastAPI behind the server: bodies, streams, disconnects, background work."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio
from fastapi import BackgroundTasks, FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.middleware.base import BaseHTTPMiddleware
from trio.testing import trio_test

from ngpu_protocol.http1 import AsgiHandler, Client, serve_tcp, tcp_opener


class Item(BaseModel):
    name: str
    count: int


class Application:
    """A small application and what happened in it."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.background_done = trio.Event()
        self.stream_ended = trio.Event()
        self.app.post("/items/{key}")(self.make)
        self.app.get("/events")(self.events)
        self.app.get("/background")(self.background)
        self.app.post("/count")(self.count)
        self.app.get("/fails")(self.fails)

    async def make(self, key: str, item: Item, q: str = "") -> dict[str, object]:
        return {"key": key, "item": item, "q": q}

    async def events(self) -> StreamingResponse:
        async def produce() -> AsyncIterator[str]:
            try:
                for number in range(1000):
                    yield f"data: {number}\n\n"
                    await trio.sleep(0.1)
            finally:
                self.stream_ended.set()

        return StreamingResponse(produce(), media_type="text/event-stream")

    async def background(self, tasks: BackgroundTasks) -> str:
        async def later() -> None:
            await trio.sleep(0.8)
            self.background_done.set()

        tasks.add_task(later)
        return "started"

    async def count(self, request: Request) -> dict[str, int]:
        total = 0
        async for piece in request.stream():
            total += len(piece)
        return {"bytes": total}

    async def fails(self) -> None:
        raise RuntimeError("secret")


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Application, Client]]:
    application = Application()
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(partial(serve_tcp, AsgiHandler(application.app)))
        client = Client(tcp_opener("127.0.0.1", addresses[0].port))
        yield application, client
        await client.aclose()
        nursery.cancel_scope.cancel()


JSON = [(b"content-type", b"application/json")]


@trio_test
async def test_documented_calls_work() -> None:
    async with running() as (_, client):
        async with client.request("POST", "/items/a%20b?q=%C3%A9", JSON, b'{"name":"n","count":2}') as response:
            assert response.status == 200
            text = (await response.read(1000)).decode()
            assert text == '{"key":"a b","item":{"name":"n","count":2},"q":"\u00e9"}'
        async with client.request("POST", "/items/a", JSON, b'{"name":"n"}') as response:
            assert response.status == 422
        async with client.request("GET", "/openapi.json") as response:
            assert b"/items/{key}" in await response.read(100_000)
        async with client.request("GET", "/nothing") as response:
            assert response.status == 404
        async with client.request("HEAD", "/openapi.json") as response:
            assert (response.status, await response.receive()) == (200, b"")
        assert client.pool.open == 1


@trio_test
async def test_large_bodies_stream_in() -> None:
    async with running() as (_, client), client.request("POST", "/count", body=bytes(3_000_000)) as response:
        assert await response.read(100) == b'{"bytes":3000000}'


@trio_test
async def test_events_arrive_one_by_one_and_leaving_ends_their_source() -> None:
    async with running() as (application, client):
        async with client.request("GET", "/events") as response:
            times = []
            for number in range(4):
                assert await response.receive() == f"data: {number}\n\n".encode()
                times.append(trio.current_time())
            assert 0.2 < times[-1] - times[0] < 60
        with trio.fail_after(60):
            await application.stream_ended.wait()


@trio_test
async def test_background_work_outlives_the_client() -> None:
    async with running() as (application, client):
        async with client.request("GET", "/background", [(b"connection", b"close")]) as response:
            assert await response.read(100) == b'"started"'
        with trio.fail_after(60):
            await application.background_done.wait()


@trio_test
async def test_failure_is_a_500_without_its_detail() -> None:
    async with running() as (_, client), client.request("GET", "/fails") as response:
        assert response.status == 500
        assert b"secret" not in await response.read(1000)


@trio_test
async def test_middleware_that_reads_ahead_works() -> None:
    application = Application()

    class Tagging(BaseHTTPMiddleware):
        async def dispatch(self, request, call_next):  # type: ignore[no-untyped-def]
            response = await call_next(request)
            response.headers["x-tag"] = "1"
            return response

    application.app.add_middleware(Tagging)
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(partial(serve_tcp, AsgiHandler(application.app)))
        client = Client(tcp_opener("127.0.0.1", addresses[0].port))
        for _ in range(3):
            async with client.request("POST", "/items/a", JSON, b'{"name":"n","count":2}') as response:
                assert response.status == 200
                assert (b"x-tag", b"1") in response.headers
                await response.read(1000)
        assert client.pool.open == 1
        await client.aclose()
        nursery.cancel_scope.cancel()
