"""Exit statistics: histogram buckets, percentiles, sums over vCPUs and names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chv._bus import FIRST_DEVICE_SLOT, bucket_bounds
from chv._kvmrun import REASONS, nanoseconds_per_tick
from chv.exits import Exits, ExitStats, Statistics, merge, present

LAST_BUCKET = 251  # of 64-bit tick counts


def bucket_of(ticks: int) -> int:
    """The bucket of a tick count, from the bounds alone."""
    return next(b for b in range(LAST_BUCKET + 1) if bucket_bounds(b)[0] <= ticks < bucket_bounds(b)[1])


def test_buckets_have_no_gaps_and_hold_every_64_bit_number() -> None:
    assert bucket_bounds(0) == (0, 1)
    for bucket in range(LAST_BUCKET):
        assert bucket_bounds(bucket)[1] == bucket_bounds(bucket + 1)[0]
        assert bucket_bounds(bucket)[0] < bucket_bounds(bucket)[1]
    assert bucket_bounds(LAST_BUCKET)[1] == 1 << 64


def test_a_bucket_is_no_wider_than_a_quarter_of_its_start() -> None:
    for bucket in range(4, LAST_BUCKET + 1):
        low, high = bucket_bounds(bucket)
        assert high - low <= max(1, low // 4)


@given(st.lists(st.integers(0, (1 << 40) - 1), min_size=1, max_size=60))
def test_percentiles_are_right_to_within_a_bucket(ticks: list[int]) -> None:
    histogram: dict[int, int] = {}
    for value in ticks:
        histogram[bucket_of(value)] = histogram.get(bucket_of(value), 0) + 1
    statistics: Statistics = {2: (len(ticks), 0, sum(ticks), max(ticks), histogram)}
    stats = present(statistics, []).reasons["io"]
    scale = stats.max_ns / max(ticks) if max(ticks) else nanoseconds_per_tick()
    ordered = sorted(ticks)
    for percent in (1, 50, 90, 99, 100):
        exact = ordered[max(0, -(-len(ticks) * percent // 100) - 1)]
        found = stats.percentile(percent)
        # max_ns is rounded to a nanosecond, and the tick's length is measured anew each time.
        assert exact * scale * 0.99 - 1 <= found <= (exact * 1.25 + 1) * scale * 1.01 + 1
        assert found <= stats.max_ns
    values = [stats.percentile(percent) for percent in range(101)]
    assert values == sorted(values)


def test_no_exits_have_no_times() -> None:
    stats = ExitStats(0, 0, 0, 0, [])
    assert (stats.count, stats.mean_ns, stats.percentile(50)) == (0, 0.0, 0.0)


def test_percentiles_of_a_histogram_that_lags_behind_the_count() -> None:
    # Counters of a running guest are copied one after the other: 12 exits, of which 10 are in the histogram.
    stats = ExitStats(12, 0, 1200, 120, [(96.0, 112.0, 10)])
    assert stats.percentile(100) == stats.percentile(50) == 112.0


def test_the_highest_percentile_is_not_beyond_the_maximum() -> None:
    stats = ExitStats(1, 1, 205, 105, [(96.0, 112.0, 2)])
    assert stats.percentile(100) == 105.0
    assert stats.mean_ns == 102.5


@pytest.mark.parametrize("percent", [-1, 100.5, 1000])
def test_percentiles_beyond_100_are_refused(percent: float) -> None:
    with pytest.raises(ValueError, match="allowed are 0 to 100"):
        ExitStats(1, 0, 1, 1, [(0.0, 1.0, 1)]).percentile(percent)


counters = st.tuples(
    st.integers(0, 1000),
    st.integers(0, 1000),
    st.integers(0, 1 << 50),
    st.integers(0, 1 << 40),
    st.dictionaries(st.integers(0, LAST_BUCKET), st.integers(1, 1000), max_size=5),
)


@given(st.lists(st.dictionaries(st.integers(0, 100), counters, max_size=5), max_size=5))
def test_sums_over_vcpus(parts: list[Statistics]) -> None:
    copies = [{slot: (*values[:4], dict(values[4])) for slot, values in part.items()} for part in parts]
    total = merge(parts)
    assert parts == copies
    assert set(total) == {slot for part in parts for slot in part}
    for slot, (reads, writes, ticks, most, histogram) in total.items():
        given_ = [part[slot] for part in parts if slot in part]
        assert reads == sum(p[0] for p in given_)
        assert writes == sum(p[1] for p in given_)
        assert ticks == sum(p[2] for p in given_)
        assert most == max(p[3] for p in given_)
        assert sum(histogram.values()) == sum(n for p in given_ for n in p[4].values())
    assert merge([total]) == total


def test_slots_become_names() -> None:
    one = (1, 0, 10, 10, {10: 1})
    statistics: Statistics = {2: one, 6: one, 29: one, 62: one, 63: one, FIRST_DEVICE_SLOT + 1: one}
    exits = present(statistics, ["serial", "timer"])
    assert list(exits.reasons) == ["io", "mmio", "reason-29", "unclaimed-pio", "unclaimed-mmio"]
    assert list(exits.devices) == ["timer"]
    assert exits.count == 3  # what is unclaimed is one of io and mmio already


def test_two_results_share_nothing() -> None:
    assert Exits().reasons is not Exits().reasons


def test_reasons_have_the_numbers_of_the_kernels_interface() -> None:
    # linux/kvm.h
    assert REASONS[2] == "io"
    assert REASONS[5] == "hlt"
    assert REASONS[6] == "mmio"
    assert REASONS[8] == "shutdown"
    assert REASONS[9] == "fail-entry"
    assert REASONS[17] == "internal-error"
    assert REASONS[24] == "system-event"
    assert len(set(REASONS.values())) == len(REASONS)


def test_a_tick_is_that_of_a_processor() -> None:
    assert 0.05 < nanoseconds_per_tick() < 10
