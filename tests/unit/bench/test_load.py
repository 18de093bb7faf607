"""The load generator's reading of answers, and what the report makes of the figures."""

import pytest

from tests.bench.load import complete_answer
from tests.bench.measure import Line, StreamLine
from tests.bench.report import Receipts, goals

HEAD = b"HTTP/1.1 200 OK\r\nDate: now\r\n"


@pytest.mark.parametrize(
    "wire",
    [
        HEAD + b"Content-Length: 5\r\n\r\nhello",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n",
        HEAD + b"Trailer: R\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nR: abc\r\nS: d\r\n\r\n",
    ],
)
def test_an_answer_is_complete_with_its_last_byte_and_not_before(wire: bytes) -> None:
    for cut in range(len(wire)):
        assert complete_answer(bytearray(wire[:cut])) is None, cut
    answer = complete_answer(bytearray(wire + b"HTTP/1.1 200"))
    assert answer is not None
    status, body_start, end, closes = answer
    assert (status, end, closes) == (200, len(wire), False)
    assert b"hello"[:2] in wire[body_start:end]


def line(system: str, clients: int, rate: float, p50_ms: float, errors: int = 0) -> Line:
    return Line(system, clients, rate, p50_ms, p50_ms * 2, 100, 100, {"500": errors} if errors else {}, {})


def test_goals_are_met_or_not_or_not_measured() -> None:
    lines = [
        line("ngpu", 16, 500, 30),
        line("litellm", 16, 100, 90),
        line("ngpu", 1, 200, 5),
        line("litellm", 1, 90, 9),
    ]
    streams = [StreamLine("direct", 1, 0, 900, 900), StreamLine("ngpu", 5, 4, 100, 30)]
    met = {goal.what: goal.met for goal in goals(lines, streams, Receipts(10, 10, 10, {}))}
    assert met == {
        "requests/s against LiteLLM, c=16": True,
        "p50 against LiteLLM's, c=1": False,
        "added time to first byte": True,
        "100 MB body, slower way": False,
        "errors of ours": True,
        "receipts verified and stored": True,
    }
    assert {goal.met for goal in goals([line("direct", 1, 9, 1)], [], None)} == {None}
    assert goals(lines, streams, Receipts(10, 10, 9, {"skew": 1}))[-1].met is False
