"""Results: cases, their contestants and rounds, as JSON and as a table.

A *case* is one question (``outl_to_user``), a *contestant* one who answers it (``floor``,
``chv_c``, ``qemu``). Contestants take turns in short rounds, so that what disturbs the
machine disturbs them all; ratios are taken within a round, and their median is reported.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .environment import commit, machine
from .statistics import curve, median, spread, summary

VERSION = 1


@dataclass
class Contestant:
    """Rounds of samples in nanoseconds, gauges of other units, and why it is absent if it is."""

    rounds: list[Sequence[float]] = field(default_factory=list)
    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # by name and unit
    extra: dict[str, Any] = field(default_factory=dict)
    absent: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The quantiles of all rounds together, and what else is known."""
        if self.absent is not None:
            return {"absent": self.absent}
        found: dict[str, Any] = {}
        if self.rounds:
            everything = [sample for samples in self.rounds for sample in samples]
            found.update(summary(everything))
            found["curve_ns"] = curve(everything)
            found["rounds"] = len(self.rounds)
            found["p50_spread_ns"] = spread([median(samples) for samples in self.rounds])
        if self.values:
            found["values"] = {
                name: {"value": median(taken), "unit": unit} for (name, unit), taken in self.values.items()
            }
        return {**found, **self.extra}


@dataclass
class Case:
    """One question, and who answered it with what."""

    name: str
    facts: dict[str, Any]
    contestants: dict[str, Contestant] = field(default_factory=dict)

    def add(self, contestant: str, samples_ns: Sequence[float], **extra: Any) -> None:
        """One round's samples, in nanoseconds. Call it once a round for each contestant."""
        who = self._who(contestant)
        who.rounds.append(list(samples_ns))
        who.extra.update(extra)

    def value(self, contestant: str, name: str, value: float, unit: str) -> None:
        """A gauge that is not a time: bytes, descriptors, bytes a second. Of several, the median is told."""
        self._who(contestant).values.setdefault((name, unit), []).append(value)

    def absent(self, contestant: str, why: str) -> None:
        """This contestant cannot answer here, and why."""
        self._who(contestant).absent = why

    def _who(self, contestant: str) -> Contestant:
        return self.contestants.setdefault(contestant, Contestant())

    def ratios(self, contestant: str, reference: str) -> list[float]:
        """A contestant's median over the reference's, round by round; empty if they share no round."""
        pairs = zip(self._who(contestant).rounds, self._who(reference).rounds, strict=False)
        return [median(ours) / median(theirs) for ours, theirs in pairs if median(theirs) > 0]

    def as_json(self, reference: str) -> dict[str, Any]:
        """The case with ``ratio_to_REFERENCE`` and ``ratio_spread`` for everyone but the reference."""
        found = {}
        for name, who in self.contestants.items():
            found[name] = who.as_json()
            if who.rounds and reference in self.contestants:
                ratios = self.ratios(name, reference)
                if ratios:
                    found[name][f"ratio_to_{reference}"] = median(ratios)
                    found[name]["ratio_spread"] = spread(ratios)
        return {"name": self.name, **self.facts, "contestants": found}


@dataclass
class Report:
    """All cases of one benchmark."""

    benchmark: str
    quick: bool = False
    reference: str = "floor"
    cases: list[Case] = field(default_factory=list)

    def case(self, name: str, **facts: Any) -> Case:
        """A new case; facts go into its JSON (``userspace_exit=True``)."""
        made = Case(name, facts)
        self.cases.append(made)
        return made

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {
            "benchmark": self.benchmark,
            "version": VERSION,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "quick": self.quick,
            "reference": self.reference,
            "commit": commit(),
            "machine": machine(),
            "cases": [case.as_json(self.reference) for case in self.cases],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; a reader never sees half of it."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        half = target.with_name(target.name + f".{os.getpid()}")
        half.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        half.replace(target)

    def print(self) -> None:
        """A table for each kind of figure, on the terminal."""
        from .tables import print_report

        print_report(self.as_json())


def parser(doc: str | None) -> argparse.ArgumentParser:
    """What all benchmarks understand; a module adds its own options to it."""
    made = argparse.ArgumentParser(
        description=(doc or "").partition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="fewer and shorter rounds: a look, not a result")
    made.add_argument("--json", metavar="FILE", type=Path, help="write the results to this file")
    made.add_argument("--rounds", metavar="N", type=_positive, help="how often the contestants take turns")
    return made


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def finish(report: Report, options: argparse.Namespace) -> None:
    """Print the table, and write the JSON if it was asked for."""
    report.print()
    if options.json is not None:
        report.save(options.json)


@contextmanager
def progress(total: int, text: str) -> Iterator[Any]:
    """A progress bar on a terminal, nothing elsewhere; ``.advance(text)`` is one step."""
    from .tables import Progress

    with Progress(total, text) as shown:
        yield shown
