"""How long vCPUs take to come and to go, beside QEMU's device_add and device_del on q35.

From the request's first byte to the guest's own news: the uevent of the last vCPU that became present, the
last one brought online in the guest, the last one removed. 1, 4 and 28 vCPUs at once, added to one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from benchmarks.linux.boots import BootFailed, Wanted
from benchmarks.linux.guest import CPUS_INIT, initramfs
from benchmarks.linux.hotplug import Resizable, Silent, chv, q35
from benchmarks.linux.where import enter
from benchmarks.results import Report, finish, parser, progress
from tests.guests import SERIES, kernel

REFERENCE = "qemu_q35"
CONTESTANTS: dict[str, Callable[[Wanted, int], AbstractContextManager[Resizable]]] = {
    "chv": chv,
    REFERENCE: q35,
}
FIGURES = ("present", "online", "removed")
SETTLE_SECONDS = 1.0
"""Between two requests: the guest says that a vCPU is gone a moment before it has given it back."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = parser(__doc__)
    made.add_argument("--kernel", choices=SERIES, default=SERIES[0], help="default %(default)s")
    made.add_argument("--count", type=int, action="append", metavar="N", help="only so many vCPUs at once")
    options = made.parse_args(given)
    files = Wanted(
        str(kernel(options.kernel).bzimage),
        str(initramfs(CPUS_INIT)),
        "console=ttyS0 quiet panic=-1",
        1,
        1024,
    )
    if (status := enter("benchmarks.resize", given, options.json)) is not None:
        return status
    report = Report("resize", options.quick, reference=REFERENCE)
    counts = options.count or ([1, 4] if options.quick else [1, 4, 28])
    rounds = options.rounds or (2 if options.quick else 5)
    with progress(len(counts) * len(CONTESTANTS), "resize") as bar:
        for count in counts:
            measure(report, files, count, rounds, bar)
            if options.json is not None:
                report.save(options.json)
    finish(report, options)
    return 0


def measure(report: Report, wanted: Wanted, count: int, rounds: int, bar: Any) -> None:
    """Three cases: so many vCPUs at once become present, are online, are removed.

    One VMM after the other: an idle guest of the one would share the CPU with the other's.
    """
    cases = {figure: report.case(f"{figure}/{count}", vcpus=count) for figure in FIGURES}
    for who, start in CONTESTANTS.items():
        bar.advance(f"resize by {count}: {who}")
        try:
            with start(wanted, count + 1) as guest:
                for _ in range(rounds):
                    time.sleep(SETTLE_SECONDS)
                    present, online = guest.grow(count)
                    time.sleep(SETTLE_SECONDS)
                    removed = guest.shrink(count)
                    for figure, ns in zip(FIGURES, (present, online, removed), strict=True):
                        cases[figure].add(who, [ns])
        except (BootFailed, Silent) as failure:
            for case in cases.values():
                case.absent(who, str(failure)[:300])


if __name__ == "__main__":
    sys.exit(main())
