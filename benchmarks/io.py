"""Disks, networks and entropy under a Linux guest, beside QEMU with the same backends.

fio on virtio-blk (a raw file; 4k random at depths 1, 32 and 128, 128k sequential), TCP over virtio-net both
ways (a tap, no vhost), dd from /dev/hwrng. The guests boot the same image and take turns. Times are per
operation, or per MiB of a stream, so that less is better everywhere; at depth 1 it is the median latency.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.linux.boots import BootFailed
from benchmarks.linux.io_guest import CommandFailed, Files, IoGuest, start
from benchmarks.linux.traffic import entropy, fio_command, fio_result, stream
from benchmarks.linux.where import enter
from benchmarks.results import Case, Report, finish, parser, progress
from tests.images import find

REFERENCE = "qemu_io_uring"
CONTESTANTS = ("chv", REFERENCE, "qemu_threads")
DISK_JOBS = [
    *((pattern, "4k", depth) for depth in (1, 32, 128) for pattern in ("randread", "randwrite")),
    *((pattern, "128k", 8) for pattern in ("read", "write")),
]
QUICK_JOBS = [("randread", "4k", 1), ("randread", "4k", 32), ("randwrite", "4k", 32)]
MIB = 1 << 20
Found = TypeVar("Found")
SETTLE_SECONDS = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = parser(__doc__)
    made.add_argument("--seconds", type=int, help="how long each job runs")
    made.add_argument("--contestant", choices=CONTESTANTS, action="append", help="only these")
    options = made.parse_args(given)
    image = find()
    if (status := enter("benchmarks.io", given, options.json)) is not None:
        return status
    report = Report("io", options.quick, reference=REFERENCE)
    rounds = options.rounds or (1 if options.quick else 3)
    seconds = options.seconds or (2 if options.quick else 5)
    jobs = QUICK_JOBS if options.quick else DISK_JOBS
    wanted = options.contestant or (CONTESTANTS[:2] if options.quick else CONTESTANTS)
    with (
        tempfile.TemporaryDirectory(prefix="chv-bench-io-", dir="/dev/shm") as folder,
        contextlib.ExitStack() as running,
        progress(len(wanted) * (1 + rounds), "io") as bar,
    ):
        files = Files.prepare(image, Path(folder))
        guests: dict[str, IoGuest] = {}
        dead: dict[str, str] = {}
        for who in wanted:
            bar.advance(f"boot {who}")
            try:
                guests[who] = running.enter_context(start(who, files))
            except (BootFailed, CommandFailed) as failure:
                dead[who] = str(failure)
        cases = make_cases(report, jobs)
        for case in cases.values():
            for who, why in dead.items():
                case.absent(who, why)
        for number in range(rounds):
            present = list(guests.values())
            first = number % max(len(present), 1)
            for guest in (*present[first:], *present[:first]):
                bar.advance(f"measure {guest.who}")
                take_turn(guest, cases, jobs, seconds)
                if options.json is not None:
                    report.save(options.json)
    finish(report, options)
    return 0


def make_cases(report: Report, jobs: Sequence[tuple[str, str, int]]) -> dict[str, Case]:
    """A case for each job of fio's, each direction of the network, and entropy."""
    names = {job_name(*job): {"per": "operation", "block": job[1], "depth": job[2]} for job in jobs}
    names |= {name: {"per": "MiB"} for name in ("net/to_guest", "net/from_guest", "rng/read")}
    return {name: report.case(name, **facts) for name, facts in names.items()}


def job_name(pattern: str, block: str, depth: int) -> str:
    """blk/randread/4k/qd32."""
    return f"blk/{pattern}/{block}/qd{depth}"


def take_turn(
    guest: IoGuest, cases: dict[str, Case], jobs: Sequence[tuple[str, str, int]], seconds: int
) -> None:
    """Everything once, by one contestant. What fails is said and left out."""
    guest.turn(True)
    try:
        with said(guest.who, "what was due while it stood still"):
            guest.run(f"sleep {SETTLE_SECONDS}")
        for job in jobs:
            with said(guest.who, job_name(*job)):
                disk(guest, cases[job_name(*job)], job, seconds)
        for name, to_guest in (("net/to_guest", True), ("net/from_guest", False)):
            with said(guest.who, name):
                spent, rate = spending(guest, partial(stream, guest, to_guest, seconds))
                bandwidth(guest.who, cases[name], rate)
                cases[name].value(guest.who, "host cpu", spent / (rate * seconds / MIB) * 1e3, "ms per MiB")
        with said(guest.who, "rng/read"):
            bandwidth(guest.who, cases["rng/read"], entropy(guest, 64 * seconds))
    finally:
        guest.turn(False)


@contextlib.contextmanager
def said(who: str, what: str) -> Any:
    """Say what failed, and go on."""
    try:
        yield
    except CommandFailed as failure:
        print(f"io: {who}, {what}: {failure}", file=sys.stderr)


def spending(guest: IoGuest, work: Callable[[], Found]) -> tuple[float, Found]:
    """The seconds of the processor that the VMM took for some work, outside of the guest, and its result."""
    before = guest.cpu_seconds()
    found = work()
    return guest.cpu_seconds() - before, found


def disk(guest: IoGuest, case: Case, job: tuple[str, str, int], seconds: int) -> None:
    """One job of fio's."""
    spent, found = spending(guest, lambda: fio_result(guest.run(fio_command(*job, seconds))))
    case.add(guest.who, [found.p50_ns if job[2] == 1 else 1e9 / found.iops])
    case.value(guest.who, "operations", found.iops, "/s")
    case.value(guest.who, "host cpu", spent / (found.iops * seconds) * 1e6, "us per operation")
    case.value(guest.who, "bandwidth", found.bytes_per_second / MIB, "MiB/s")


def bandwidth(who: str, case: Case, rate: float) -> None:
    """A stream: nanoseconds for each MiB, and MiB a second."""
    case.add(who, [1e9 * MIB / rate])
    case.value(who, "bandwidth", rate / MIB, "MiB/s")


if __name__ == "__main__":
    sys.exit(main())
