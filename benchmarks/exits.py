"""What one exit costs, beside a C program that does nothing else, QEMU, and Python without chv.

Every contestant runs the same machine code (:mod:`benchmarks.guests`), which reads its TSC before and after
the instruction that exits. So a sample is what the guest waits: the way out of the guest, the kernel, the
VMM, and the way back. The case ``stamp`` is what the stamps themselves take; it is part of each sample. For
``hlt_irqfd_wake`` the first stamp is the host's, taken before it writes the eventfd, and the second is the
first instruction of the interrupt's handler. ``ipi`` ends when the sender sees the other vCPU's answer.

- ``floor``: :file:`floor/floor.c`
- ``chv_c``, ``chv_py``: a whole chv machine, its register in C or in Python
- ``chv_py_spin``: the same as chv_py, while another Python thread computes
- ``pure_python``: fcntl, mmap and struct (:mod:`benchmarks.exit_pure`)
- ``qemu``: the guest is its firmware, the register is its pci-testdev

A turn is two runs of one guest, by the floor and by another contestant, and the ratio is that of their two
medians: machines change their speed from second to second, by more than what is looked for. Both run on one
processor, another in the next round, where the guest has one vCPU and nothing computes beside it. All take
turns in a round, in an order that rotates; who of the two is first changes, too. The report has the median of
a case's ratios, and ``over_floor_ns``, the difference of the two medians taken likewise; ``ratio_to_qemu`` is
chv_c's ratio to the floor by QEMU's. The first samples of a guest are left out, as they meet cold caches.
Cases that no VMM has a part in (``cpuid``) show what noise is left.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from chv._kvmrun import nanoseconds_per_tick

from . import exit_contestants, guests
from .exit_chv import switch_interval
from .exit_contestants import Absent, Contestant, Floor, Peer, Qemu, Worker
from .guests import Guest
from .results import Case, Report, finish, parser, progress
from .statistics import median

WARM_UP = 10
ROUNDS, QUICK_ROUNDS = 100, 8
ITERATIONS = 100
SPIN_ITERATIONS = 20  # each exit waits for the GIL
IPI_ITERATIONS = 24  # both vCPUs compute, on a machine that may have no two cores to spare

Plan = dict[str, dict[str, Guest]]  # contestant -> group -> guest


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its status."""
    made = parser(__doc__)
    made.add_argument(
        "--peer",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help=f"one more VMM: {', '.join(exit_contestants.PEERS)}",
    )
    made.add_argument(
        "--only",
        choices=[*exit_contestants.WORKERS, "qemu"],
        action="append",
        help="this contestant beside the floor, not all of them",
    )
    options = made.parse_args(arguments)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    with ExitStack() as stack:
        others, absent = invite(options, stack)
        report = measure(Floor(), others, absent, rounds=rounds, quick=options.quick)
    finish(report, options)
    return 0


def invite(options: argparse.Namespace, stack: ExitStack) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants beside the floor, closed with ``stack``, and why others are absent."""
    wanted = options.only or [*exit_contestants.WORKERS, "qemu"]
    makers: dict[str, Callable[[], Contestant]] = {
        **{name: partial(Worker, name) for name in exit_contestants.WORKERS},
        "qemu": Qemu,
    }
    made = [(name, makers[name]) for name in wanted]
    for text in options.peer:
        name, _, path = text.partition("=")
        made.append((name, partial(Peer, name, path or name)))
    found: list[Contestant] = []
    absent: dict[str, str] = {}
    for name, make in made:
        try:
            contestant = make()
        except Absent as reason:
            absent[name] = str(reason)
        else:
            stack.callback(contestant.close)
            found.append(contestant)
    return found, absent


@dataclass
class ExitCase(Case):
    """A case whose contestants each have the floor's samples of the same turn beside their own."""

    beside: dict[str, list[list[float]]] = field(default_factory=dict)

    def add_turn(self, contestant: str, samples_ns: list[float], floor_ns: list[float]) -> None:
        """One turn's samples of a contestant and of the floor."""
        self.add("floor", floor_ns)
        self.add(contestant, samples_ns)
        self.beside.setdefault(contestant, []).append(floor_ns)

    def pairs(self, contestant: str) -> list[tuple[float, float]]:
        """The medians of a contestant and of the floor, turn by turn."""
        turns = zip(self.contestants[contestant].rounds, self.beside.get(contestant, []), strict=True)
        return [(median(ours), median(floor)) for ours, floor in turns]

    def ratios(self, contestant: str, reference: str) -> list[float]:
        """Ratios of medians to the floor's, turn by turn."""
        if contestant == reference:
            return [1.0]
        return [own / floor for own, floor in self.pairs(contestant)]

    def compare(self) -> None:
        """Add what the report's own ratios do not say: nanoseconds above the floor, and chv beside QEMU."""
        for name in self.beside:
            differences = [own - floor for own, floor in self.pairs(name)]
            self.contestants[name].extra["over_floor_ns"] = median(differences)
        if "qemu" in self.beside and "chv_c" in self.beside:
            chv, qemu = (median(self.ratios(name, "floor")) for name in ("chv_c", "qemu"))
            self.contestants["chv_c"].extra["ratio_to_qemu"] = chv / qemu


def measure(
    floor: Contestant,
    others: Sequence[Contestant],
    absent: dict[str, str],
    *,
    rounds: int,
    quick: bool = False,
    iterations: int = ITERATIONS,
) -> Report:
    """Let all take turns; ``absent`` is who takes no part, and why."""
    report = Report("exits", quick)
    cases = {case.name: ExitCase(case.name, dict(facts(case))) for case in guests.CASES}
    report.cases += cases.values()
    _tell_absent(cases, others, absent)
    scale = nanoseconds_per_tick()
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(others, Path(folder), iterations)
        with progress(rounds * sum(map(len, plan.values())), "exits") as bar:
            for number in range(rounds):
                turn = number % max(len(others), 1)
                for group in guests.GROUPS:
                    for contestant in (*others[turn:], *others[:turn]):
                        guest = plan[contestant.name].get(group)
                        if guest is not None:
                            bar.advance(f"{group}: {contestant.name}")
                            pair = (floor, contestant) if number % 2 else (contestant, floor)
                            with _processor(number, contestant, group):
                                succeeded = _take_turn(pair, guest, cases, scale)
                            if not succeeded:
                                del plan[contestant.name][group]
    for case in cases.values():
        case.compare()
    return report


def _tell_absent(cases: dict[str, ExitCase], others: Sequence[Contestant], absent: dict[str, str]) -> None:
    for kind in guests.CASES:
        for name, why in absent.items():
            cases[kind.name].absent(name, why)
        for contestant in others:
            why_not = contestant.lacks(kind)
            if why_not is not None:
                cases[kind.name].absent(contestant.name, why_not)


def facts(case: guests.Case) -> dict[str, bool | int]:
    """What the report says of a case beside its figures."""
    exits = guests.REPEATED if case.name.startswith("rep_") else 1
    return {"userspace_exit": case.userspace_exit, "exits_per_sample": exits}


def make_plan(contestants: Sequence[Contestant], folder: Path, iterations: int) -> Plan:
    """Which guests each contestant runs in a round."""
    plan: Plan = {}
    for contestant in contestants:
        plan[contestant.name] = {}
        for group in guests.GROUPS:
            count = iterations
            if contestant.name == "chv_py_spin":
                count = min(count, SPIN_ITERATIONS)
            if group == "ipi":
                count = min(count, IPI_ITERATIONS)
            if any(contestant.lacks(case) is None for case in guests.cases_of(group)):
                plan[contestant.name][group] = guests.write_guest(folder, group, count)
    return plan


@contextmanager
def _processor(number: int, contestant: Contestant, group: str) -> Iterator[None]:
    """Keep a turn on one processor, unless it has two threads that are to run at once."""
    allowed = os.sched_getaffinity(0)
    if group == "single" and contestant.name != "chv_py_spin":
        os.sched_setaffinity(0, {sorted(allowed)[number // 2 % len(allowed)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _take_turn(
    pair: tuple[Contestant, Contestant], guest: Guest, cases: dict[str, ExitCase], scale: float
) -> bool:
    """Both run a guest; False if the one that is not the floor fails and need not be tried again."""
    answers: dict[str, dict[str, list[float]]] = {}
    for contestant in pair:
        try:
            answers[contestant.name] = _answers(contestant, guest, scale)
        except (Absent, ValueError) as reason:
            if contestant.name == "floor":
                raise
            for kind in guests.cases_of(guest.group):
                if contestant.name not in cases[kind.name].contestants:
                    cases[kind.name].absent(contestant.name, str(reason))
            print(f"{guest.group}: {contestant.name} is left out from here: {reason}", file=sys.stderr)
            return False
    name = next(contestant.name for contestant in pair if contestant.name != "floor")
    for case, samples_ns in answers[name].items():
        cases[case].add_turn(name, samples_ns, answers["floor"][case])
        if name == "chv_py_spin":
            cases[case].contestants[name].extra["switch_interval_s"] = switch_interval()
    return True


def _answers(contestant: Contestant, guest: Guest, scale: float) -> dict[str, list[float]]:
    """One run's samples in nanoseconds, by case, without the first ones."""
    output, _ = contestant.run(guest)
    return {
        name: [tick * scale for tick in (ticks[WARM_UP:] if len(ticks) > 2 * WARM_UP else ticks)]
        for name, ticks in guests.samples(output).items()
        if contestant.lacks(guests.BY_NAME[name]) is None
    }


if __name__ == "__main__":
    sys.exit(main())
