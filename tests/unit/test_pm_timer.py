"""The ACPI PM timer against the host's clock."""

from __future__ import annotations

import time

import pytest

from chv.devices._timer import FREQUENCY, PmTimer

WRAP = 1 << 32


def test_it_counts_at_its_frequency() -> None:
    timer = PmTimer()
    start = time.monotonic_ns()
    first = timer.read(0, 4)
    time.sleep(0.2)
    second = timer.read(0, 4)
    expected = (time.monotonic_ns() - start) * FREQUENCY / 1e9
    assert (second - first) % WRAP == pytest.approx(expected, rel=0.02)
    assert FREQUENCY == 3579545  # ACPI 6.5, 4.8.3.3


def test_it_never_runs_backwards() -> None:
    timer = PmTimer()
    values = [timer.read(0, 4) for _ in range(10_000)]
    assert values == sorted(values)


@pytest.mark.parametrize("elapsed_ns", [0, 1, 10**9, 3 * 10**12 + 7, 10**16 + 12345, 2**62])
def test_the_count_is_exact_and_wraps_after_32_bits(elapsed_ns: int) -> None:
    """Twenty minutes to the first wrap; then for years."""
    timer = PmTimer()
    timer.pause()
    timer.load({"elapsed_ns": elapsed_ns})
    assert timer.read(0, 4) == elapsed_ns * FREQUENCY // 10**9 % WRAP


def test_parts_of_the_register() -> None:
    timer = PmTimer()
    timer.pause()
    timer.load({"elapsed_ns": 10**12})
    whole = timer.read(0, 4).to_bytes(4, "little")
    for size in (1, 2):
        for offset in range(4 - size + 1):
            assert timer.read(offset, size).to_bytes(size, "little") == whole[offset : offset + size]
    assert timer.read(8, 4) == 0


def test_writes_are_ignored() -> None:
    timer = PmTimer()
    timer.pause()
    before = timer.read(0, 4)
    timer.write(0, 4, 0xFFFFFFFF)
    assert timer.read(0, 4) == before


def test_it_stands_still_while_paused() -> None:
    timer = PmTimer()
    timer.pause()
    first = timer.read(0, 4)
    time.sleep(0.05)
    timer.pause()
    assert timer.read(0, 4) == first
    timer.resume()
    timer.resume()
    assert (timer.read(0, 4) - first) % WRAP < FREQUENCY // 50
    time.sleep(0.05)
    assert (timer.read(0, 4) - first) % WRAP >= FREQUENCY // 20


def test_save_and_load() -> None:
    timer = PmTimer()
    timer.pause()
    timer.load({"elapsed_ns": 5 * 10**9})
    assert timer.save() == {"elapsed_ns": 5 * 10**9}
    other = PmTimer()
    other.load(timer.save())
    assert 0 <= (other.read(0, 4) - timer.read(0, 4)) % WRAP < FREQUENCY
    assert 0 <= other.save()["elapsed_ns"] - 5 * 10**9 < 10**9
