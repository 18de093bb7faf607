"""Reserved GPU time: shared among overlapping tasks, never billed twice."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpu_node.execution.meter import GpuMeter, Holding
from ngpu_protocol.receipts import Meter

MS = 1_000_000
GPU_A, GPU_B, GPU_C = b"a" * 32, b"b" * 32, b"c" * 32


def test_one_task_alone_reserves_its_gpu_for_its_whole_duration() -> None:
    meter = GpuMeter()
    reading = meter.stop(meter.start([GPU_A], 0), 1500 * MS)
    assert (reading.duration_ms, reading.reserved_gpu_ms, reading.gpus) == (1500, 1500, (GPU_A,))
    assert (reading.busy_gpu_ms, reading.meter) == (0, Meter.NONE)


def test_a_task_without_gpus_reserves_nothing() -> None:
    meter = GpuMeter()
    reading = meter.stop(meter.start([], 0), 70 * MS)
    assert (reading.duration_ms, reading.reserved_gpu_ms) == (70, 0)


def test_two_overlapping_tasks_share_the_overlap() -> None:
    meter = GpuMeter()
    first = meter.start([GPU_A], 0)
    second = meter.start([GPU_A], 100 * MS)
    assert meter.stop(first, 300 * MS).reserved_gpu_ms == 100 + 200 // 2
    assert meter.stop(second, 400 * MS).reserved_gpu_ms == 200 // 2 + 100


def test_two_gpus_count_twice() -> None:
    meter = GpuMeter()
    assert meter.stop(meter.start([GPU_A, GPU_B], 0), 100 * MS).reserved_gpu_ms == 200


def test_idle_time_between_tasks_belongs_to_nobody() -> None:
    meter = GpuMeter()
    meter.stop(meter.start([GPU_A], 0), 10 * MS)
    assert meter.stop(meter.start([GPU_A], 1000 * MS), 1010 * MS).reserved_gpu_ms == 10


def test_a_clock_that_steps_back_counts_as_no_time() -> None:
    meter = GpuMeter()
    reading = meter.stop(meter.start([GPU_A], 50 * MS), 40 * MS)
    assert (reading.duration_ms, reading.reserved_gpu_ms) == (0, 0)


def test_reading_twice_is_an_error() -> None:
    meter = GpuMeter()
    holding = meter.start([GPU_A], 0)
    meter.stop(holding, 1)
    with pytest.raises(ValueError, match="already read"):
        meter.stop(holding, 2)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**10),
            st.integers(0, 10**10),
            st.sets(st.sampled_from([GPU_A, GPU_B, GPU_C]), max_size=3),
        ),
        max_size=12,
    )
)
def test_no_gpu_is_ever_billed_beyond_the_time_it_had_a_task(spans: list[tuple[int, int, set[bytes]]]) -> None:
    meter = GpuMeter()
    events: list[tuple[int, int, int]] = []
    for index, (start, length, _) in enumerate(spans):
        events += [(start, 0, index), (start + length, 1, index)]
    holdings: dict[int, Holding] = {}
    total = 0
    for at_ns, kind, index in sorted(events):
        gpus = sorted(spans[index][2])
        if kind == 0:
            holdings[index] = meter.start(gpus, at_ns)
            continue
        reading = meter.stop(holdings[index], at_ns)
        assert 0 <= reading.reserved_gpu_ms <= reading.duration_ms * len(gpus)
        total += reading.reserved_gpu_ms
    busy = sum(_covered([(s, s + n) for s, n, held in spans if gpu in held]) for gpu in (GPU_A, GPU_B, GPU_C))
    assert total * MS <= busy
    # the rounding costs less than a millisecond a task and never more
    held_tasks = sum(1 for _, _, held in spans if held)
    assert busy - total * MS <= (held_tasks * 4 + 3) * MS


def _covered(spans: list[tuple[int, int]]) -> int:
    covered, end = 0, -1
    for start, stop in sorted(spans):
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered


class FixedBusy:
    """A source that always found the same."""

    def __init__(self, busy_ms: int, method: str) -> None:
        self.busy_ns = busy_ms * MS
        self.method = method
        self.started: list[tuple[tuple[bytes, ...], object]] = []
        self.looked = 0

    def start(self, gpus: tuple[bytes, ...], holder: object, now_ns: int) -> object:
        self.started.append((tuple(gpus), holder))
        return object()

    def stop(self, started: object, now_ns: int) -> FixedBusy:
        return self

    async def look_before_stop(self, gpus: object) -> None:
        self.looked += 1


def test_busy_time_is_what_the_source_measured() -> None:
    source = FixedBusy(70, "nvml-process")
    meter = GpuMeter(source)
    reading = meter.stop(meter.start([GPU_A], 0, "workspace"), 100 * MS)
    assert (reading.reserved_gpu_ms, reading.busy_gpu_ms, reading.meter) == (100, 70, Meter("nvml-process"))
    assert source.started == [((GPU_A,), "workspace")]


def test_busy_time_is_never_more_than_reserved() -> None:
    meter = GpuMeter(FixedBusy(500, "nvml-device"))
    reading = meter.stop(meter.start([GPU_A], 0), 100 * MS)
    assert (reading.busy_gpu_ms, reading.meter) == (100, Meter("nvml-device"))


def test_a_task_without_gpus_is_not_metered() -> None:
    source = FixedBusy(500, "nvml-device")
    meter = GpuMeter(source)
    holding = meter.start([], 0)
    trio.run(meter.look_before_stop, holding)
    assert meter.stop(holding, 100 * MS).meter is Meter.NONE
    assert (source.started, source.looked) == ([], 0)
