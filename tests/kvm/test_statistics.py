"""Counts and times of exits: right at the end, and consistent while the guest runs."""

from __future__ import annotations

import time

from chv._bus import FIRST_DEVICE_SLOT, bucket_bounds
from chv.exits import ExitStats, merge, present

from .guest import Recorder, TinyGuest, eventually

MMIO = 0x20000000

# 20 times: two reads of port 0x40, one write of port 0x50, one read at MMIO, one of a port that nobody has
MIXED = """
    b9 14 00 00 00  ; mov ecx, 20
    e4 40           ; again: in al, 0x40
    e4 41           ; in al, 0x41
    e6 50           ; out 0x50, al
    8a 07           ; mov al, [edi]
    e4 60           ; in al, 0x60
    e2 f4           ; loop again
    e6 f4           ; out 0xf4, al
"""
FOREVER = """
    e4 40           ; again: in al, 0x40
    e6 41           ; out 0x41, al
    eb fa           ; jmp again
"""


def test_every_exit_is_counted_by_reason_and_by_device() -> None:
    with TinyGuest(MIXED, registers={"rdi": MMIO}) as guest:
        guest.pio.add(0x40, 2, Recorder(), "one")
        guest.pio.add(0x50, 1, Recorder(), "two")
        guest.mmio.add(MMIO, 1, Recorder(), "three")
        guest.run_to_done()
        exits = guest.exits()
    counts = {name: (stats.reads, stats.writes) for name, stats in exits.devices.items()}
    assert counts == {"one": (40, 0), "two": (0, 20), "three": (20, 0), "done": (0, 1)}
    reasons = {name: stats.count for name, stats in exits.reasons.items()}
    assert reasons == {"io": 81, "mmio": 20, "unclaimed-pio": 20}
    assert exits.count == 101


def test_ranges_of_one_name_are_counted_together() -> None:
    with TinyGuest(MIXED, registers={"rdi": MMIO}) as guest:
        guest.pio.add(0x40, 2, Recorder(), "both")
        guest.mmio.add(MMIO, 1, Recorder(), "both")
        guest.run_to_done()
        assert guest.exits().devices["both"].reads == 60


class Slow(Recorder):
    def read(self, offset: int, size: int) -> int:
        time.sleep(0.002)
        return 0


def test_times_are_those_of_the_handler() -> None:
    with TinyGuest(MIXED, registers={"rdi": MMIO}) as guest:
        guest.pio.add(0x40, 1, Slow(), "slow")
        guest.pio.add(0x50, 1, Recorder(), "quick")
        start = time.monotonic_ns()
        guest.run_to_done()
        took = time.monotonic_ns() - start
        exits = guest.exits()
    slow, quick = exits.devices["slow"], exits.devices["quick"]
    assert 20 * 2e6 <= slow.total_ns <= took
    assert 2e6 <= slow.mean_ns <= slow.max_ns <= took
    assert slow.percentile(50) >= 2e6 * 0.99
    assert quick.percentile(50) < 1e6
    assert exits.reasons["io"].total_ns >= slow.total_ns + quick.total_ns


def assert_sane(stats: ExitStats) -> None:
    counted = sum(count for _, _, count in stats.histogram)
    # The guest runs on while its counters are copied, one after the other.
    assert abs(counted - stats.count) <= 1000
    assert 0 < stats.percentile(1) <= stats.percentile(50) <= stats.percentile(99) <= stats.percentile(100)
    assert stats.percentile(100) <= max(stats.max_ns, stats.histogram[-1][1])


def test_statistics_can_be_read_while_the_guest_runs() -> None:
    with TinyGuest(FOREVER) as guest:
        guest.pio.add(0x40, 2, Recorder(), "device")
        guest.start()
        eventually(lambda: "device" in guest.exits().devices)
        last: ExitStats | None = None
        for _ in range(200):
            stats = guest.exits().devices["device"]
            assert_sane(stats)
            if last is not None:
                assert stats.reads >= last.reads
                assert stats.writes >= last.writes
                assert stats.total_ns >= last.total_ns * 0.999  # the tick's length is measured ever better
            last = stats
        assert abs(stats.reads - stats.writes) <= 1000


def test_histogram_and_totals_agree_tick_for_tick() -> None:
    with TinyGuest(MIXED, registers={"rdi": MMIO}) as guest:
        guest.pio.add(0x40, 1, Slow(), "slow")
        guest.pio.add(0x50, 1, Recorder(), "quick")
        guest.run_to_done()
        statistics = merge(vcpu.run.statistics() for vcpu in guest.vcpus)
    assert any(slot >= FIRST_DEVICE_SLOT for slot in statistics)
    for reads, writes, ticks, most, histogram in statistics.values():
        assert sum(histogram.values()) == reads + writes
        assert sum(bucket_bounds(b)[0] * n for b, n in histogram.items()) <= ticks
        assert ticks <= sum((bucket_bounds(b)[1] - 1) * n for b, n in histogram.items())
        low, high = bucket_bounds(max(histogram))
        assert low <= most < high


def test_statistics_outlive_the_vcpu() -> None:
    with TinyGuest(MIXED, registers={"rdi": MMIO}) as guest:
        guest.run_to_done()
        vcpu = guest.vcpus[0]
        vcpu.close()
        assert present(vcpu.run.statistics(), guest.names.names).reasons["io"].count == 81
