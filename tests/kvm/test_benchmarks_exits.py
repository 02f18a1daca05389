"""The guests of the exit benchmarks run, and every contestant sees the same exits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import exit_contestants, guests
from benchmarks.exit_contestants import Contestant, Exits, Floor, Qemu, Worker
from benchmarks.guests import Guest
from tests.support import require

ITERATIONS = 6
COUNTING = ("floor", *exit_contestants.WORKERS)


@pytest.fixture(params=COUNTING)
def contestant(request: pytest.FixtureRequest) -> Iterator[Contestant]:
    made = Floor() if request.param == "floor" else Worker(request.param)
    yield made
    made.close()


def expected(group: str) -> Exits:
    """How many exits the register has while a guest of this group runs."""
    counts = {"pio": 0, "mmio": 0}
    for case in guests.cases_of(group):
        if case.access is not None:
            repeated = guests.REPEATED if case.name.startswith("rep_") else 1
            counts[case.access[0]] += ITERATIONS * repeated
    return counts


def check(guest: Guest, output: bytes) -> None:
    found = guests.samples(output)
    assert list(found) == [case.name for case in guests.cases_of(guest.group)]
    for name, ticks in found.items():
        assert len(ticks) == ITERATIONS, name
        assert all(0 < tick < 1 << 32 for tick in ticks), name


@pytest.mark.parametrize("group", guests.GROUPS)
def test_each_contestant_has_the_same_exits(group: str, contestant: Contestant, tmp_path: Path) -> None:
    guest = guests.write_guest(tmp_path, group, ITERATIONS)
    output, counts = contestant.run(guest)
    check(guest, output)
    assert counts == expected(group)


def test_a_worker_runs_one_guest_after_another(tmp_path: Path) -> None:
    worker = Worker("chv_c")
    try:
        for group in ("single", "wake", "single"):
            _, counts = worker.run(guests.write_guest(tmp_path, group, ITERATIONS))
            assert counts == expected(group)
    finally:
        worker.close()


@pytest.mark.parametrize("group", ["single", "ipi"])
def test_qemu_runs_the_same_guests(group: str, tmp_path: Path) -> None:
    require(shutil.which("qemu-system-x86_64"), "QEMU is not installed")
    guest = guests.write_guest(tmp_path, group, ITERATIONS)
    output, _ = Qemu().run(guest)
    check(guest, output)
