"""Summaries of samples: quantiles, and ratios of interleaved rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

CURVE = (*(part / 20 for part in range(1, 20)), 0.98, 0.99, 0.995, 0.999, 1.0)
"""The parts at which a distribution is kept for a picture of it."""


class Summary(TypedDict):
    """Quantiles of a set of samples, in nanoseconds, and how many there were."""

    p50_ns: float
    p90_ns: float
    p99_ns: float
    p999_ns: float
    max_ns: float
    n: int


def quantile(ordered: Sequence[float], part: float) -> float:
    """The smallest sample that at least this part (0 to 1) of the samples does not exceed.

    Always a sample that was taken, never one between two ("nearest rank").
    ``ordered`` is sorted; raises ``ValueError`` if it is empty.
    """
    if not ordered:
        raise ValueError("no samples: there is no quantile")
    return ordered[max(math.ceil(part * len(ordered)) - 1, 0)]


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    if not values:
        raise ValueError("no values: there is no median")
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def summary(samples_ns: Sequence[float]) -> Summary:
    """Quantiles of samples in nanoseconds."""
    ordered = sorted(samples_ns)
    return {
        "p50_ns": quantile(ordered, 0.5),
        "p90_ns": quantile(ordered, 0.9),
        "p99_ns": quantile(ordered, 0.99),
        "p999_ns": quantile(ordered, 0.999),
        "max_ns": ordered[-1],
        "n": len(ordered),
    }


def curve(samples_ns: Sequence[float]) -> list[float]:
    """The quantiles at :data:`CURVE`."""
    ordered = sorted(samples_ns)
    return [quantile(ordered, part) for part in CURVE]


def spread(values: Sequence[float]) -> float:
    """The interquartile range: how far the middle half of the values lies apart."""
    ordered = sorted(values)
    return quantile(ordered, 0.75) - quantile(ordered, 0.25)
