"""Boot a kernel to its prompt and print what left KVM for this process, and how long each took.

    python -m examples.exit_latencies --kernel vmlinuz --initramfs initrd

The initramfs must give a root shell on ttyS0.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from chv.exits import ExitStats
from chv.testing import Guest

HEAD = ("reads", "writes", "mean us", "50 % us", "99 % us", "max us", "sum ms")


def table(title: str, rows: Mapping[str, ExitStats]) -> None:
    """One line for each name, the most expensive first."""
    print(f"{title:<18}" + "".join(f"{head:>10}" for head in HEAD))
    for name, stats in sorted(rows.items(), key=lambda row: -row[1].total_ns):
        microseconds = (stats.mean_ns, stats.percentile(50), stats.percentile(99), stats.max_ns)
        numbers = [f"{stats.reads:>10}", f"{stats.writes:>10}"]
        numbers += [f"{ns / 1000:>10.1f}" for ns in microseconds]
        print(f"  {name:<16}" + "".join(numbers) + f"{stats.total_ns / 1e6:>10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--initramfs", required=True)
    parser.add_argument("--cpus", default="boot=1", help="default %(default)s")
    parser.add_argument("--boot-timeout", type=float, default=120.0, metavar="SECONDS")
    options = parser.parse_args()

    with Guest(kernel=options.kernel, initramfs=options.initramfs, cpus=options.cpus) as vm:
        vm.boot()
        vm.wait_for_prompt(options.boot_timeout)
        exits = vm.exits
    print(f"{exits.count} exits from power-on to the prompt")
    table("by reason", exits.reasons)
    table("by device", exits.devices)


if __name__ == "__main__":
    main()
