"""How long a stock Linux kernel takes to its /init, beside QEMU's microvm and q35.

Debian's 6.12 and 6.1 cloud kernels with 1, 4 and 16 vCPUs and 512 MiB, the same bzImage, initramfs and
command line for everyone, taking turns. Two figures: from the start of the VMM's process, and from its first
KVM_RUN, to /init's write of port 0xe9. A last round, for the breakdown,
has initcall_debug on the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.linux import kvm_stats
from benchmarks.linux.boots import Boot, BootFailed, Wanted, chv, qemu_boot
from benchmarks.linux.guest import initramfs
from benchmarks.linux.kernel_log import breakdown
from benchmarks.linux.where import enter
from benchmarks.results import Case, Report, finish, parser, progress
from tests.guests import SERIES, kernel

REFERENCE = "qemu_microvm"
CONTESTANTS = ("chv", REFERENCE, "qemu_q35")
CMDLINE = "console=ttyS0 quiet panic=-1"
IN_DETAIL = "initcall_debug log_buf_len=1M"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = parser(__doc__)
    made.add_argument("--kernel", choices=SERIES, action="append", help="only these series")
    made.add_argument("--vcpus", type=int, action="append", metavar="N", help="only these numbers of vCPUs")
    options = made.parse_args(given)
    initramfs()
    if (status := enter("benchmarks.boot", given, options.json)) is not None:
        return status
    report = Report("boot", options.quick, reference=REFERENCE)
    series = options.kernel or (SERIES[:1] if options.quick else SERIES)
    counts = options.vcpus or ([1, 4] if options.quick else [1, 4, 16])
    rounds = options.rounds or (2 if options.quick else 5)
    kvm_stats.available()
    with progress(len(series) * len(counts) * (rounds + 1) * len(CONTESTANTS), "boot") as bar:
        for name in series:
            for vcpus in counts:
                measure(report, name, vcpus, rounds, bar)
                if options.json is not None:
                    report.save(options.json)
    finish(report, options)
    return 0


def measure(report: Report, series: str, vcpus: int, rounds: int, bar: Any) -> None:
    """Two cases: one kernel, one number of vCPUs, all contestants in turn."""
    facts = {"kernel": kernel(series).release, "vcpus": vcpus, "memory_mib": 512}
    running = report.case(f"first_run_to_init/{series}/{vcpus}", **facts)
    whole = report.case(f"start_to_init/{series}/{vcpus}", **facts)
    wanted = Wanted(str(kernel(series).bzimage), str(initramfs()), CMDLINE, vcpus)
    detailed = Wanted(wanted.kernel, wanted.initramfs, f"{CMDLINE} {IN_DETAIL}", vcpus)
    out: set[str] = set()
    for number in range(rounds + 1):
        for who in CONTESTANTS:
            bar.advance(f"boot {series}, {vcpus} vCPUs: {who}")
            if who in out:
                continue
            try:
                boot = run(who, wanted if number < rounds else detailed)
            except BootFailed as failure:
                out.add(who)
                for case in (running, whole):
                    case.absent(who, str(failure))
                continue
            if number < rounds:
                note(running, whole, who, boot)
            else:
                running.contestants[who].extra["parts_ms"] = parts(boot)


def run(who: str, wanted: Wanted, tries: int = 2) -> Boot:
    """One boot. A failed one is said and tried again: now and then a guest dies of its emulated machine."""
    for _ in range(tries - 1):
        try:
            return once(who, wanted)
        except BootFailed as failure:
            print(f"boot: {who} with {wanted.vcpus} vCPUs: {failure}", file=sys.stderr)
    return once(who, wanted)


def once(who: str, wanted: Wanted) -> Boot:
    """One boot, or BootFailed."""
    return chv(wanted) if who == "chv" else qemu_boot(wanted, who.removeprefix("qemu_"))


def note(running: Case, whole: Case, who: str, boot: Boot) -> None:
    """Put one boot into the cases, and what was counted in it."""
    running.add(who, [boot.init - boot.first_run], kvm=boot.kvm, exits=boot.exits)
    whole.add(who, [boot.init - boot.start], host_ns=boot.host)
    if boot.before_clock is not None:
        running.value(who, "before the kernel's clock", boot.before_clock / 1e6, "ms")
    for name in ("exits", "io_exits", "mmio_exits"):
        if name in boot.kvm:
            running.value(who, name, boot.kvm[name], "exits")
    for step, ns in boot.host.items():
        whole.value(who, f"host: {step}", ns / 1e6, "ms")


def parts(boot: Boot) -> dict[str, float]:
    """The stacked bar: host, what goes by before the kernel's clock, and the kernel's own parts, in ms."""
    found = {"host": (boot.first_run - boot.start) / 1e6}
    if boot.before_clock is not None:
        found["before_clock"] = boot.before_clock / 1e6
    return {**found, **{name: us / 1000 for name, us in breakdown(boot.log).items()}}


if __name__ == "__main__":
    sys.exit(main())
