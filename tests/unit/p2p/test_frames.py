from __future__ import annotations

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import memory_stream_pair, trio_test

from ngpu_protocol.p2p import FrameError, receive_frame, send_frame


class Trickle(trio.abc.ReceiveStream):
    """Gives *data* in pieces of the sizes in *cuts*, then ends."""

    def __init__(self, data: bytes, cuts: list[int]) -> None:
        self._data = data
        self._cuts = cuts

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        size = min(max_bytes or 65536, self._cuts.pop() if self._cuts else 65536)
        data, self._data = self._data[:size], self._data[size:]
        return data

    async def aclose(self) -> None:
        self._data = b""


class Collect(trio.abc.SendStream):
    def __init__(self) -> None:
        self.data = b""
        self.writes = 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.data += data
        self.writes += 1

    async def wait_send_all_might_not_block(self) -> None: ...

    async def aclose(self) -> None: ...


@trio_test
async def test_a_frame_is_its_length_and_its_bytes_in_one_write() -> None:
    sink = Collect()
    await send_frame(sink, b"abc")
    assert sink.data == b"\x00\x00\x00\x03abc"
    assert sink.writes == 1


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300)), st.lists(st.integers(1, 50)))
def test_frames_survive_any_cutting(frames: list[bytes], cuts: list[int]) -> None:
    async def run() -> None:
        sink = Collect()
        for frame in frames:
            await send_frame(sink, frame)
        source = Trickle(sink.data, cuts)
        for frame in frames:
            assert await receive_frame(source, 300) == frame
        assert await receive_frame(source, 300) is None

    trio.run(run)


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
@trio_test
async def test_an_end_inside_a_frame_is_an_error(cut: int) -> None:
    with pytest.raises(FrameError, match="ended"):
        await receive_frame(Trickle(b"\x00\x00\x00\x03abc"[:cut], []), 100)


@trio_test
async def test_a_frame_above_the_limit_is_refused_before_any_of_it_is_read() -> None:
    ours, theirs = memory_stream_pair()
    await theirs.send_all(b"\xff\xff\xff\xff")
    with pytest.raises(FrameError, match="4294967295"):
        await receive_frame(ours, 1024)
