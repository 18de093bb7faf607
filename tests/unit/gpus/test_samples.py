"""From looks to windows: the driver's ticks, its silence, clocks that are set, rubbish."""

from __future__ import annotations

import math
import random

import pytest

from ngpu_node.gpus.driver import Look, Sample
from ngpu_node.gpus.samples import SampleReader, Window

WALL = 1_700_000_000_000_000
MS = 1000  # in microseconds
PID = 42


def look(at_us: int, *samples: tuple[int | None, int, float], wall_step_us: int = 0, continuous: bool = False) -> Look:
    """Return a look *at_us* after the start; samples are (pid, time after the start, percent)."""
    found = tuple(Sample(pid, WALL + wall_step_us + when, percent) for pid, when, percent in samples)
    return Look(found, WALL + wall_step_us + at_us, at_us * 1000, continuous)


def reader() -> SampleReader:
    return SampleReader(WALL, 0)


def busy_ms(window: Window, pid: int | None = PID) -> float:
    assert window.busy_ns is not None
    return round(window.busy_ns.get(pid, 0) / 1e6, 3)


def test_a_tick_says_what_the_time_since_the_last_one_was() -> None:
    samples = reader()
    samples.read(look(220 * MS, (PID, 200 * MS, 0)))
    (window,) = samples.read(look(420 * MS, (PID, 400 * MS, 40)))
    assert (window.from_ns, window.to_ns) == (200_000_000, 400_000_000)
    assert busy_ms(window) == 81.0  # 40 % is anything from 40 to 41


def test_a_mean_over_several_ticks_stands_for_all_of_them() -> None:
    samples = reader()
    samples.read(look(220 * MS, (PID, 200 * MS, 0)))
    (window,) = samples.read(look(1220 * MS, (PID, 1000 * MS, 60), (7, 1200 * MS, 40)))
    assert (window.from_ns, window.to_ns) == (200_000_000, 1_200_000_000)
    assert busy_ms(window) == 599.0  # 3 of 5 ticks at the least: their rounding down is less than the mean's up
    assert busy_ms(window, 7) == 398.0


@pytest.mark.parametrize("ticks", [1, 2, 3, 5])
def test_whole_percents_cost_nobody_anything_on_the_average(ticks: int) -> None:
    chance = random.Random(ticks)
    off = []
    for _ in range(500):
        samples = reader()
        samples.read(look(220 * MS, (PID, 200 * MS, 0)))
        true = [chance.uniform(60, 99.99) for _ in range(ticks)]
        told = math.ceil(sum(int(each) for each in true) / ticks)  # what the driver makes of it
        at = (1 + ticks) * 200 * MS
        (window,) = samples.read(look(at + 20 * MS, (PID, at, told)))
        off.append(busy_ms(window) / (2 * ticks) - sum(true) / ticks)  # in percent
    assert max(off) < 1
    assert -0.2 <= sum(off) / len(off) <= 0.05


def test_the_first_tick_stands_for_a_whole_period() -> None:
    (window,) = reader().read(look(70 * MS, (PID, 50 * MS, 20)))
    assert (window.from_ns, window.to_ns) == (0, 50_000_000)
    assert busy_ms(window) == 41.0


def test_nothing_new_is_no_news_until_ticks_must_have_passed() -> None:
    samples = reader()
    assert samples.read(look(100 * MS)) == []
    assert samples.read(look(400 * MS)) == []
    (window,) = samples.read(look(1000 * MS))
    assert (window.from_ns, window.busy_ns) == (0, {})
    assert 700_000_000 <= window.to_ns <= 940_000_000
    (window,) = samples.read(look(1220 * MS, (PID, 1200 * MS, 10)))
    assert busy_ms(window) == 40.0


def test_samples_of_a_device_are_added_up() -> None:
    samples = reader()
    samples.read(look(220 * MS, (None, 200 * MS, 0)))
    (window,) = samples.read(look(820 * MS, (None, 400 * MS, 10), (None, 600 * MS, 20), (None, 800 * MS, 30)))
    assert busy_ms(window, None) == 123.0


def test_parts_are_never_more_than_the_whole() -> None:
    samples = reader()
    samples.read(look(220 * MS, (PID, 200 * MS, 0)))
    (window,) = samples.read(look(420 * MS, (PID, 400 * MS, 80), (7, 400 * MS, 80)))
    assert busy_ms(window) + busy_ms(window, 7) <= 200.0


@pytest.mark.parametrize(
    "rubbish",
    [
        (PID, 400 * MS, 4_294_967_295),
        (PID, 400 * MS, -1),
        (PID, -WALL, 50),
        (PID, 200 * MS, 50),  # was seen before
        (PID, 3600_000 * MS, 50),
    ],
)
def test_rubbish_is_not_read(rubbish: tuple[int, int, int]) -> None:
    samples = reader()
    samples.read(look(220 * MS, (PID, 200 * MS, 0)))
    assert samples.read(look(420 * MS, rubbish)) == []
    (window,) = samples.read(look(620 * MS, (PID, 600 * MS, 50)))
    assert busy_ms(window) == 200.0


def test_more_is_not_asked_for_than_the_driver_keeps() -> None:
    samples = reader()
    samples.read(look(220 * MS, (PID, 200 * MS, 0)))
    since = samples.since_us(WALL + 30_000 * MS)
    assert since == WALL + 20_000 * MS
    gap, window = samples.read(look(30_020 * MS, (PID, 30_000 * MS, 50)))
    assert (gap.from_ns, gap.to_ns, gap.busy_ns) == (200_000_000, 20_000_000_000, None)
    assert (window.from_ns, window.to_ns) == (20_000_000_000, 30_000_000_000)
    assert busy_ms(window) == pytest.approx(5000, rel=0.005)


def test_an_answer_that_took_too_long_is_a_gap() -> None:
    samples = reader()
    samples.read(look(220 * MS, (PID, 200 * MS, 0)))
    samples.since_us(WALL + 400 * MS)
    (gap,) = samples.read(look(20_020 * MS, (PID, 20_000 * MS, 50)))
    assert gap.busy_ns is None
    assert "too long" in gap.why


@pytest.mark.parametrize("step", [600_000 * MS, 200 * MS])
def test_a_clock_set_forward_costs_one_look(step: int) -> None:
    samples = reader()
    samples.read(look(220 * MS, (PID, 200 * MS, 0)))
    (gap,) = samples.read(look(420 * MS, (PID, 400 * MS, 50), wall_step_us=step))
    assert (gap.to_ns, gap.busy_ns) == (420_000_000, None)
    assert "+" in gap.why
    (window,) = samples.read(look(620 * MS, (PID, 600 * MS, 50), wall_step_us=step))
    assert busy_ms(window) == 101.0


def test_a_clock_set_back_blinds_until_old_ticks_are_gone() -> None:
    samples, step = reader(), -600_000 * MS
    samples.read(look(220 * MS, (PID, 200 * MS, 0)))
    for at in range(420, 20_400, 200):
        # old ticks, which look new, are merged into what the driver answers
        (gap,) = samples.read(look(at * MS, (PID, at * MS - 20 * MS, 50), wall_step_us=step))
        assert gap.busy_ns is None
    (window,) = samples.read(look(20_620 * MS, (PID, 20_600 * MS, 50), wall_step_us=step))
    assert busy_ms(window) > 0


def test_a_step_back_during_a_rest_blinds_too() -> None:
    samples = reader()
    samples.begin(WALL - 5_000 * MS + 60_000 * MS, 60_000_000_000)
    (gap,) = samples.read(look(60_420 * MS, (PID, 60_400 * MS, 50), wall_step_us=-5_000 * MS))
    assert gap.busy_ns is None


def test_slewing_is_no_step() -> None:
    samples = reader()
    for number in range(1, 100):
        windows = samples.read(
            look(number * 200 * MS + 20 * MS, (PID, number * 200 * MS, 50), wall_step_us=number * 100)
        )
        assert all(window.busy_ns is not None for window in windows)


def test_counters_give_exact_windows_after_the_first() -> None:
    samples = reader()
    (gap,) = samples.read(look(100 * MS, continuous=True))
    assert gap.busy_ns is None
    (window,) = samples.read(look(700 * MS, (None, 700 * MS, 33.5), continuous=True))
    assert (window.from_ns, window.to_ns) == (100_000_000, 700_000_000)
    assert busy_ms(window, None) == 201.0


@pytest.mark.parametrize("percent", [float("nan"), float("inf"), -3.2e9, 1e12, 150.0])
def test_a_counter_that_wrapped_is_a_gap_and_nobody_s_busy_time(percent: float) -> None:
    samples = reader()
    samples.read(look(100 * MS, continuous=True))
    (gap,) = samples.read(look(700 * MS, (None, 700 * MS, percent), continuous=True))
    assert (gap.from_ns, gap.to_ns, gap.busy_ns) == (100_000_000, 700_000_000, None)
    assert "wrap" in gap.why
    (window,) = samples.read(look(1300 * MS, (None, 1300 * MS, 50), continuous=True))
    assert busy_ms(window, None) == 300.0


@pytest.mark.parametrize("wrapped_us", [(1 << 32) - 1, (1 << 64) - 1, 0])
def test_a_time_that_wrapped_is_not_read(wrapped_us: int) -> None:
    samples = reader()
    samples.read(look(220 * MS, (PID, 200 * MS, 0)))
    (window,) = samples.read(look(420 * MS, (PID, wrapped_us - WALL, 99), (PID, 400 * MS, 40)))
    assert window.to_ns == 400_000_000
    assert busy_ms(window) == 81.0


@pytest.mark.parametrize("period", [20, 167, 200, 1000])
def test_the_period_is_learnt_from_the_devices_samples(period: int) -> None:
    samples = reader()
    samples.learn([Sample(None, WALL + n * period * MS + n % 3, 0) for n in range(20)])
    assert abs(samples.period_us - period * MS) <= 3


def test_too_few_or_absurd_samples_teach_nothing() -> None:
    samples = reader()
    samples.learn([Sample(None, WALL, 0), Sample(None, WALL + 5, 0)])
    samples.learn([Sample(None, WALL + n, 0) for n in range(20)])
    samples.learn([Sample(None, WALL + n * 10**9, 0) for n in range(20)])
    assert samples.period_us == 200_000
