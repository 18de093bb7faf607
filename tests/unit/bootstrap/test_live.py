"""Answers that go on: their places are given back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from starlette.types import Message
from trio.testing import trio_test

from ngpu_bootstrap.api.live import STREAMS_PER_WORKSPACE, Live
from ngpu_bootstrap.api.models import HealthView
from ngpu_bootstrap.errors import NotServed, Refusal
from ngpu_protocol.http1 import Client


async def never() -> Message:
    raise AssertionError


async def gone(message: Message) -> None:
    raise OSError("the client has left")


@trio_test
async def test_a_client_that_leaves_before_the_first_piece_keeps_no_place() -> None:
    live = Live(lambda: False)
    responses = []  # kept: what the collector of garbage gives back is not what is meant
    for _ in range(STREAMS_PER_WORKSPACE + 1):
        responses.append(response := live.events("1", HealthView))
        with pytest.raises(Exception):  # noqa: B017, PT011 - starlette's own, whichever it is
            await response({"type": "http", "asgi": {"spec_version": "2.4"}}, never, gone)


def test_streams_of_one_workspace_are_bounded() -> None:
    live = Live(lambda: False)
    responses = [live.events("1", HealthView) for _ in range(STREAMS_PER_WORKSPACE)]
    with pytest.raises(NotServed):
        live.events("1", HealthView)
    responses.append(live.events("2", HealthView))


@trio_test
async def test_a_node_that_cannot_be_asked_for_logs_is_said_to_be_silent() -> None:
    async def broken() -> trio.abc.Stream:
        raise trio.BrokenResourceError

    live = Live(lambda: False)
    node = SimpleNamespace(node="0xA", requests=Client(broken, authority="a"))
    for _ in range(STREAMS_PER_WORKSPACE + 1):
        with pytest.raises(Refusal) as refused:
            await live.logs("1", cast(Any, node), tail=1, follow=False)
        assert (refused.value.status, refused.value.reason) == (502, "node_silent")
