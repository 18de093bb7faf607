"""Answers that are held back to be rewritten: what one attempt left does not get into the next one's answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from trio.testing import trio_test

from ngpu_bootstrap.front.model_sinks import RewritingSink
from ngpu_bootstrap.tasks.states import TaskState


class Recorder:
    """An exchange that keeps what is sent."""

    def __init__(self) -> None:
        self.request = SimpleNamespace(method="POST")
        self.heads: list[int] = []
        self.sent = b""

    async def send_head(self, status: int, fields: Any, *, reason: bytes = b"", more: bool = False) -> None:
        self.heads.append(status)

    async def send(self, data: bytes, *, more: bool = False) -> None:
        self.sent += data

    async def end(self, trailers: Any) -> None:
        self.sent += b"."


@trio_test
async def test_an_attempt_that_answers_in_another_type_begins_anew() -> None:
    exchange = Recorder()
    sink = RewritingSink(cast(Any, exchange), "1", lambda refusal: b"", lambda body, result: body)
    await sink.begin(200, b"", [(b"content-type", b"application/json")], None, more=False)
    await sink.take(b'{"half": ', more=False)  # and the node is lost
    await sink.begin(200, b"", [(b"content-type", b"text/plain")], None, more=False)
    await sink.take(b"whole", more=True)
    receipt = SimpleNamespace(encode=lambda: "receipt")
    attempt = SimpleNamespace(how="answered", receipt=receipt, trailers=[])
    await sink.finish(cast(Any, SimpleNamespace(ending=SimpleNamespace(state=TaskState.FINISHED), attempt=attempt)))
    assert (exchange.heads, exchange.sent) == ([200], b"whole.")
