"""The startup benchmark: what it reads from /proc, and its whole run where there is a /dev/kvm."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import startup
from benchmarks.processes import Absent, connection, held, started, until, vmm_memory
from benchmarks.results import Report

MiB = 1 << 20


class Steps:
    def advance(self, text: str | None = None) -> None:
        pass


def test_imports_are_timed_and_counted() -> None:
    report = Report("startup", reference="python")
    startup.imports(report.case("import"), 1, Steps())
    contestants = report.cases[0].as_json("python")["contestants"]
    assert set(contestants) == {"python", "chv", "chv_vm", "msgspec"}
    assert all(who["n"] == 1 and who["p50_ns"] > 0 for who in contestants.values())
    modules = {name: who["values"]["modules"]["value"] for name, who in contestants.items()}
    assert modules["python"] < modules["chv"] < modules["msgspec"] < modules["chv_vm"]
    assert contestants["chv_vm"]["values"]["foreign_modules"]["value"] == 0


def test_guest_sized_mappings_are_not_the_vmms() -> None:
    before = vmm_memory(os.getpid(), 64 * MiB)
    with mmap.mmap(-1, 64 * MiB) as guest, mmap.mmap(-1, 8 * MiB) as other:
        for mapping in (guest, other):
            mapping.madvise(mmap.MADV_NOHUGEPAGE)
            for page in range(0, len(mapping), mmap.PAGESIZE):
                mapping[page] = 1
        found = vmm_memory(os.getpid(), 64 * MiB) - before
    assert 8 * MiB <= found < 16 * MiB


def test_what_a_process_holds() -> None:
    before = held()
    reader, writer = os.pipe()
    after = held()
    os.close(reader)
    os.close(writer)
    assert after["fds"] == before["fds"] + 2
    assert after["threads"] == before["threads"] >= 1
    assert after["rss"] > 0


def test_a_contestant_that_ends_is_absent_with_its_status() -> None:
    with (
        started([sys.executable, "-c", "raise SystemExit(3)"]) as process,
        pytest.raises(Absent, match="status 3 before the moon"),
    ):
        until(lambda: False, "the moon", process)


def test_a_socket_that_never_comes(tmp_path: Path) -> None:
    with started([sys.executable, "-c", "pass"]) as process, pytest.raises(Absent, match="status 0"):
        connection(str(tmp_path / "none"), process)


def test_who_fails_is_absent_from_then_on() -> None:
    def fails(kernel: Path, name: str) -> float:
        raise Absent("no such program")

    report = Report("startup", reference="good")
    contestants: dict[str, startup.Measure] = {"good": lambda kernel, name: 5.0, "bad": fails}
    startup.take_turns(report.case("x"), contestants, Path("kernel"), 2, Steps())
    found = report.cases[0].as_json("good")["contestants"]
    assert found["bad"] == {"absent": "no such program"}
    assert found["good"]["n"] == 2


def test_help_says_what_the_figures_are() -> None:
    command = [sys.executable, "-m", "benchmarks.startup", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--lives" in shown
