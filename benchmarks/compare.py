"""What changed between two results of a benchmark, beyond the noise.

``python -m benchmarks.compare OLD.json NEW.json``. A figure changed if the two medians lie further apart
than the halves of both spreads together, and by more than 2 %. Where there is a ratio to the
reference it is what is compared: two runs are seldom made on an equally busy machine. Gauges that are
no times (bytes, descriptors) changed by more than 2 %. Exit status 1 if something became worse.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEAST = 0.02
"""Smaller changes, as a part of the old figure, are not told."""


@dataclass(frozen=True)
class Change:
    """One figure, then and now; ``worse`` is None for a gauge that is neither good nor bad."""

    case: str
    contestant: str
    what: str
    old: float
    new: float
    noise: float

    @property
    def part(self) -> float:
        """How much it changed, as a part of the old figure."""
        return (self.new - self.old) / self.old if self.old else float("inf")

    @property
    def beyond_noise(self) -> bool:
        """Whether it changed at all."""
        return abs(self.new - self.old) > self.noise and abs(self.part) > LEAST


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    """Every figure that both results have."""
    then = {case["name"]: case["contestants"] for case in old["cases"]}
    for case in new["cases"]:
        for name, now in case["contestants"].items():
            before = then.get(case["name"], {}).get(name)
            if before is not None:
                yield from figures(case["name"], name, before, now, old["reference"])


def figures(
    case: str, name: str, old: dict[str, Any], new: dict[str, Any], reference: str
) -> Iterator[Change]:
    """The figures of one contestant in one case: its ratio or else its median, and its gauges."""
    ratio = f"ratio_to_{reference}"
    if name != reference and ratio in old and ratio in new:
        noise = (old["ratio_spread"] + new["ratio_spread"]) / 2
        yield Change(case, name, f"/ {reference}", old[ratio], new[ratio], noise)
    elif "p50_ns" in old and "p50_ns" in new:
        noise = (old.get("p50_spread_ns", 0) + new.get("p50_spread_ns", 0)) / 2
        yield Change(case, name, "p50, ns", old["p50_ns"], new["p50_ns"], noise)
    for what, gauge in new.get("values", {}).items():
        if what in old.get("values", {}):
            before = old["values"][what]["value"]
            yield Change(case, name, f"{what}, {gauge['unit']}", before, gauge["value"], 0)


def better_is_more(what: str) -> bool:
    """Whether a gauge is the better the more it is: what is counted in a time."""
    return what.endswith(("/s", "a second"))


def read(path: Path) -> dict[str, Any]:
    """A result; ``SystemExit`` with what is wrong if it is not one."""
    try:
        found = json.loads(path.read_text())
        if {"benchmark", "reference", "cases"} <= set(found):
            return dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path}: {error}") from None
    raise SystemExit(f"{path}: not a result of a benchmark: it needs benchmark, reference and cases")


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each change."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    options = parser.parse_args(arguments)
    old, new = read(options.old), read(options.new)
    if old["benchmark"] != new["benchmark"]:
        parser.error(f"{options.old} is of {old['benchmark']}, {options.new} of {new['benchmark']}")
    found = list(changes(old, new))
    worse = 0
    for change in found:
        if change.beyond_noise:
            bad = (change.new > change.old) != better_is_more(change.what)
            worse += bad
            print(
                f"{'worse ' if bad else 'better'} {change.case}: {change.contestant} {change.what}: "
                f"{change.old:.4g} -> {change.new:.4g} ({change.part:+.1%})"
            )
    changed = sum(change.beyond_noise for change in found)
    print(f"{len(found)} figures compared, {changed} changed beyond the noise, {worse} of them for the worse")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
