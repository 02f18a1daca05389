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

In a round each runs its guests once, in an order that rotates; the first samples of a guest are left out, as
they meet cold caches. A ratio is that of two medians of one round; the report has the median of the ratios.
``over_floor_ns`` is the difference of the two, taken likewise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
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
ROUNDS, QUICK_ROUNDS = 100, 10
ITERATIONS = 100
SPIN_ITERATIONS = 20  # each exit waits for the GIL
IPI_ITERATIONS = 25  # both vCPUs compute, on a machine that may have no two cores to spare

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
    made.add_argument("--only", metavar="NAME", action="append", help="this contestant, beside the floor")
    options = made.parse_args(arguments)
    contestants, absent = invite(options)
    try:
        rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
        report = measure(contestants, absent, rounds=rounds, quick=options.quick)
    finally:
        for contestant in contestants:
            contestant.close()
    finish(report, options)
    return 0


def invite(options: argparse.Namespace) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants, and why others are absent."""
    found: list[Contestant] = [Floor()]
    absent: dict[str, str] = {}
    wanted = options.only or [*exit_contestants.WORKERS, "qemu"]
    try:
        for name in wanted:
            if name in exit_contestants.WORKERS:
                found.append(Worker(name))
        if "qemu" in wanted:
            _try(Qemu, "qemu", found, absent)
        for text in options.peer:
            name, _, path = text.partition("=")
            _try(partial(Peer, name, path or name), name, found, absent)
    except BaseException:
        for contestant in found:
            contestant.close()
        raise
    return found, absent


def _try(make: Callable[[], Contestant], name: str, found: list[Contestant], absent: dict[str, str]) -> None:
    try:
        found.append(make())
    except Absent as reason:
        absent[name] = str(reason)


def measure(
    contestants: Sequence[Contestant],
    absent: dict[str, str],
    *,
    rounds: int,
    quick: bool = False,
    iterations: int = ITERATIONS,
) -> Report:
    """Run the rounds; the first contestant is the floor."""
    report = Report("exits", quick)
    cases = {case.name: report.case(case.name, **facts(case)) for case in guests.CASES}
    scale = nanoseconds_per_tick()
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(contestants, Path(folder), iterations)
        for name, why in absent.items():
            for case in cases.values():
                case.absent(name, why)
        for contestant in contestants:
            for kind in guests.CASES:
                why_not = contestant.lacks(kind)
                if why_not is not None:
                    cases[kind.name].absent(contestant.name, why_not)
        with progress(rounds * sum(map(len, plan.values())), "exits") as bar:
            for number in range(rounds):
                turn = number % len(contestants)
                for group in guests.GROUPS:
                    for contestant in (*contestants[turn:], *contestants[:turn]):
                        guest = plan[contestant.name].get(group)
                        if guest is not None:
                            bar.advance(f"{group}: {contestant.name}")
                            if not _take_turn(contestant, guest, cases, scale):
                                del plan[contestant.name][group]
    for case in cases.values():
        compare(case)
    return report


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


def _take_turn(contestant: Contestant, guest: Guest, cases: dict[str, Case], scale: float) -> bool:
    """One guest of one contestant; False if it fails and need not be tried again."""
    try:
        output, _ = contestant.run(guest)
        taken = guests.samples(output)
    except (Absent, ValueError) as reason:
        if contestant.name == "floor":
            raise
        for case in guests.cases_of(guest.group):
            if contestant.lacks(case) is None and not has_rounds(cases[case.name], contestant.name):
                cases[case.name].absent(contestant.name, str(reason))
        print(f"{guest.group}: {contestant.name} is left out from here: {reason}", file=sys.stderr)
        return False
    extra = {"switch_interval_s": switch_interval()} if contestant.name == "chv_py_spin" else {}
    for name, ticks in taken.items():
        if contestant.lacks(guests.BY_NAME[name]) is None:
            kept = ticks[WARM_UP:] if len(ticks) > 2 * WARM_UP else ticks
            cases[name].add(contestant.name, [tick * scale for tick in kept], **extra)
    return True


def has_rounds(case: Case, name: str) -> bool:
    """Whether this contestant has answered the case at least once."""
    return name in case.contestants and bool(case.contestants[name].rounds)


def compare(case: Case) -> None:
    """Add what the report's own ratios do not say: nanoseconds above the floor, and chv beside QEMU."""
    floor = case.contestants["floor"].rounds
    for name, who in case.contestants.items():
        if who.rounds and name != "floor":
            pairs = zip(who.rounds, floor, strict=False)
            who.extra["over_floor_ns"] = median([median(ours) - median(its) for ours, its in pairs])
    if has_rounds(case, "qemu") and has_rounds(case, "chv_c"):
        case.contestants["chv_c"].extra["ratio_to_qemu"] = median(case.ratios("chv_c", "qemu"))


if __name__ == "__main__":
    sys.exit(main())
