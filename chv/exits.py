"""What the exits of a VM were and what they cost, read while the guest runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from msgspec import Struct, field

from ._bus import FIRST_DEVICE_SLOT, bucket_bounds
from ._kvmrun import REASONS, nanoseconds_per_tick

Statistics = dict[int, tuple[int, int, int, int, dict[int, int]]]


class ExitStats(Struct, frozen=True):
    """Exits of one kind or to one device.

    Times are nanoseconds from KVM_RUN's return to the next one, the handler included; they come from
    a histogram with four buckets to each power of two, so a percentile is right to within 25 %.
    """

    reads: int
    writes: int
    total_ns: int
    max_ns: int
    histogram: list[tuple[float, float, int]]  # (from ns, to ns, exits)

    @property
    def count(self) -> int:
        return self.reads + self.writes

    @property
    def mean_ns(self) -> float:
        return self.total_ns / self.count if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """The time in ns that ``percent`` (0 to 100) of the exits did not exceed; 0 when there were none."""
        if not 0 <= percent <= 100:
            raise ValueError(f"percent: {percent}; allowed are 0 to 100")
        # Not self.count: a running guest's counters are copied one after the other.
        wanted = sum(count for _, _, count in self.histogram) * percent / 100
        seen = 0
        for _, high, count in self.histogram:
            seen += count
            if seen >= wanted:
                return min(high, float(self.max_ns))
        return 0.0


class Exits(Struct, frozen=True):
    """``reasons`` by KVM exit reason ("io", "mmio", ..., "unclaimed-pio"), ``devices`` by device name."""

    reasons: dict[str, ExitStats] = field(default_factory=dict)
    devices: dict[str, ExitStats] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """All exits that came to this process."""
        return sum(stats.count for name, stats in self.reasons.items() if not name.startswith("unclaimed"))


def merge(parts: Iterable[Statistics]) -> Statistics:
    """The sum of several vCPUs' statistics."""
    totals: dict[int, tuple[int, int, int, int, Counter[int]]] = {}
    for part in parts:
        for slot, (reads, writes, ticks, most, histogram) in part.items():
            r, w, t, m, h = totals.get(slot, (0, 0, 0, 0, Counter()))
            h.update(histogram)
            totals[slot] = (r + reads, w + writes, t + ticks, max(m, most), h)
    return {slot: (r, w, t, m, dict(h)) for slot, (r, w, t, m, h) in totals.items()}


def present(statistics: Statistics, names: list[str]) -> Exits:
    """Statistics by slot number as exits by name."""
    scale = nanoseconds_per_tick()
    exits = Exits()
    for slot, (reads, writes, ticks, most, buckets) in sorted(statistics.items()):
        histogram = [
            (bucket_bounds(b)[0] * scale, bucket_bounds(b)[1] * scale, count)
            for b, count in sorted(buckets.items())
        ]
        stats = ExitStats(reads, writes, round(ticks * scale), round(most * scale), histogram)
        if slot >= FIRST_DEVICE_SLOT:
            exits.devices[names[slot - FIRST_DEVICE_SLOT]] = stats
        else:
            exits.reasons[REASONS.get(slot, f"reason-{slot}")] = stats
    return exits
