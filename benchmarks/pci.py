"""What PCI's registers cost a VMM: configuration reads of a bus scan, by ports and by memory, and MSI-X.

Without KVM: each access is a call of the bus from Python, as a test makes it, so it has some 0.2 us of Python
in it; ``floor`` is the same call for chv's PM timer, a device in C. What is served in C is near it, what
is left to Python is not. A sample is the mean of a hundred accesses.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from chv import layout
from chv.devices._timer import PmTimer
from tests.unit.pci_machine import Echo, PciMachine

from .results import Report, finish, parser, progress

AT_ONCE = 100
ADDRESS, DATA = layout.PCI_CONFIG_PORT, layout.PCI_CONFIG_PORT + 4
TABLE = 0x8000


def cases(machine: PciMachine) -> dict[str, Callable[[], object]]:
    """What is measured: a name and an access."""
    pio, mmio = machine.pio, machine.mmio
    device = layout.ECAM + (1 << 15)
    bar = machine.transports[0].bar_address(0)
    assert bar is not None
    pio.write(ADDRESS, 4, 1 << 31 | 1 << 11)
    mask = iter(int(step % 2) for step in range(1 << 62))
    return {
        "config_address_port_write": lambda: pio.write(ADDRESS, 4, 1 << 31 | 1 << 11),
        "config_data_port_read": lambda: pio.read(DATA, 4),
        "config_ecam_read": lambda: mmio.read(device, 4),
        "config_absent_slot_read": lambda: mmio.read(layout.ECAM + (20 << 15), 4),
        "config_ecam_write": lambda: mmio.write(device + 0x3C, 1, 11),
        "bar_status_read": lambda: mmio.read(bar + 0x14, 1),
        "msix_table_read": lambda: mmio.read(bar + TABLE, 4),
        "msix_mask_and_unmask": lambda: mmio.write(bar + TABLE + 12, 4, next(mask)),
        "msix_address_write": lambda: mmio.write(bar + TABLE, 4, 0xFEE00000),
    }


def sample(access: Callable[[], object], count: int) -> list[float]:
    """``count`` times the mean of a hundred accesses, in ns."""
    found = []
    for _ in range(count):
        started = time.perf_counter_ns()
        for _ in range(AT_ONCE):
            access()
        found.append((time.perf_counter_ns() - started) / AT_ONCE)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure all cases in turns and show them."""
    options = parser(__doc__).parse_args(arguments)
    rounds = options.rounds or (3 if options.quick else 15)
    report = Report("pci", options.quick)
    machine = PciMachine(Echo())
    try:
        machine.write(1, 0x86, 0x8000, 2)
        timer = PmTimer()
        machine.pio.add(0x600, 4, timer, "floor")
        measured = cases(machine)
        kept = {name: report.case(name) for name in measured}
        with progress(rounds, "pci") as bar:
            for _ in range(rounds):
                for name, access in measured.items():
                    kept[name].add("floor", sample(lambda: machine.pio.read(0x600, 4), 30))
                    kept[name].add("chv", sample(access, 30))
                bar.advance()
    finally:
        machine.close()
    finish(report, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
