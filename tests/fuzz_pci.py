"""A hostile driver against PCI's configuration space and the virtio transport::

    python -m tests.fuzz_pci --seconds 60

An input is a program: configuration accesses by ports and by memory of every width, BARs moved over RAM, over
each other and out of the world, MSI-X tables and control, the registers of the common configuration in any
order, notifications at any time, the configuration access capability, and now and then what a good driver
does, so that the states behind it are met. Nothing may raise or hang; what is read fits its width; identities
stay. At the end each device, put at a good place and reset, must work, and after the end no irqfd,
ioeventfd or descriptor may be left. ``--input HEX`` runs one input again.
"""

from __future__ import annotations

import os
import sys
import time

from chv import layout
from chv.virtio.device import F_RING_RESET, F_VERSION_1
from tests.fuzz_virtqueue import Mismatch, Reader, same
from tests.fuzzing import Inputs, parser, seed_of
from tests.unit.pci_machine import MEMORY, Echo, PciMachine
from tests.unit.test_virtio_pci import NOTIFY, STATUS, TABLE, Driver

DEVICES = 3
WIDTHS = [1, 2, 4, 8]
HOME = 0xC800_0000  # where each device's BAR is put to see whether it still works
BAR_SIZE = 1 << 19
RINGS = 0x100000
HANG = 60  # seconds
RESET = 20.0  # seconds that a reset may take

COMMON = [
    0x00, 0x04, 0x08, 0x0C, 0x10, 0x12, 0x14, 0x15, 0x16, 0x18, 0x1A, 0x1C, 0x1E, 0x20, 0x24, 0x28,
    0x2C, 0x30, 0x34, 0x38, 0x3A,
]  # fmt: skip
PLACES = [
    0x2000, 0x2001, 0x4000, 0x4002, 0x5FFF, NOTIFY, NOTIFY + 4, NOTIFY + 0x1FFC, TABLE, TABLE + 12,
    TABLE + 44, TABLE + 48, 0x48000, 0x48004, 0x3C, 0x7FFFC, 0x7FFFF,
]  # fmt: skip
VALUES = [
    0, 1, 2, 3, 4, 8, 11, 15, 16, 64, 128, 255, 256, 257, 0x7FFF, 0x8000, 0xC000, 0xFFFF, 0x100000,
    MEMORY - 8, 0xFEE00000, 0xFFFFFFFF, 1 << 45, 1 << 63, (1 << 64) - 1,
]  # fmt: skip
ADDRESSES = [
    0, 0x1000, MEMORY - 0x1000, layout.DEVICES_32BIT, HOME, HOME + BAR_SIZE, HOME + 0x1000, layout.ECAM,
    layout.IOAPIC, 0xFEE00000, 0xFFF80000, 0xFFFFFFFF, 1 << 40, (1 << 46) - BAR_SIZE, 1 << 46, (1 << 64)
    - BAR_SIZE, (1 << 64) - 1,
]  # fmt: skip
REGISTERS = [
    0x00, 0x04, 0x06, 0x08, 0x0C, 0x10, 0x14, 0x18, 0x30, 0x34, 0x3C, 0x40, 0x50, 0x60, 0x70, 0x74,
    0x80, 0x84, 0x86, 0x88, 0xFC,
]  # fmt: skip


class Run:
    """One machine with three devices, and one program."""

    def __init__(self, data: bytes) -> None:
        self.reader = Reader(data)
        self.seen: set[tuple[str, str]] = set()
        self.last = ""
        self.devices = [Echo(F_RING_RESET) for _ in range(DEVICES)]
        self.machine = PciMachine(*self.devices)
        self.drivers = [Driver(self.machine, slot) for slot in range(1, DEVICES + 1)]
        self.identities = [self.machine.read(slot, 0) for slot in range(DEVICES + 1)]
        self.steps = [
            self.ports, self.ecam, self.move, self.command, self.bar, self.bar, self.bar, self.msix,
            self.good, self.ring, self.notify, self.window, self.host, self.status,
        ]  # fmt: skip

    def go(self) -> set[tuple[str, str]]:
        try:
            while not self.reader.empty:
                step = self.steps[self.reader.byte() % len(self.steps)]
                step()
                self.note(step.__name__)
            for slot, identity in enumerate(self.identities):
                same(self.machine.read(slot, 0), identity, f"the identity of slot {slot}")
            for driver in self.drivers:
                self.still_works(driver)
        finally:
            self.machine.close()
        same(self.machine.vm.irqfds, {}, "irqfds after the end")
        same(self.machine.vm.ioeventfds, {}, "ioeventfds after the end")
        return self.seen

    def note(self, branch: str) -> None:
        self.seen.add((self.last, branch))
        self.last = branch

    # -- what a program does

    def value(self) -> int:
        kind = self.reader.byte()
        return self.reader.word() if kind < 64 else VALUES[kind % len(VALUES)]

    def driver(self) -> Driver:
        return self.drivers[self.reader.byte() % DEVICES]

    def width(self) -> int:
        return WIDTHS[self.reader.byte() % 3]

    def fits(self, value: int, size: int) -> None:
        if not 0 <= value < 1 << 8 * size:
            raise Mismatch(f"{value:#x} read with {size} bytes")

    def ports(self) -> None:
        """Any access to 0xcf8-0xcff, straight."""
        address = 1 << 31 | (self.reader.byte() % 8) << 11 | self.reader.of(REGISTERS)
        self.machine.pio.write(0xCF8, 4, address if self.reader.byte() < 240 else self.value() & 0xFFFFFFFF)
        port, size = 0xCF8 + self.reader.byte() % 8, self.width()
        if self.reader.byte() & 1:
            self.fits(self.machine.pio.read(port, size), size)
        elif port != 0xCF9:
            self.machine.pio.write(port, size, self.value() % (1 << 8 * size))

    def ecam(self) -> None:
        slot = self.reader.byte() % 5
        offset = layout.ECAM + (slot << 15) + self.reader.of(REGISTERS) + self.reader.byte() % 4
        if self.reader.byte() > 250:
            offset = layout.ECAM + self.value() % (layout.ECAM_SIZE - 8)
        size = WIDTHS[self.reader.byte() % 4]
        if self.reader.byte() & 1:
            self.fits(self.machine.mmio.read(offset, size), size)
        else:
            self.machine.mmio.write(offset, size, self.value() % (1 << 8 * size))

    def move(self) -> None:
        slot, address = self.reader.byte() % DEVICES + 1, self.reader.of(ADDRESSES)
        if self.reader.byte() & 1:
            self.machine.write(slot, 0x14, address >> 32)
        self.machine.write(slot, 0x10, address & 0xFFFFFFFF)
        self.note(f"moved {self.machine.transports[slot - 1].bar_address(0) is not None}")

    def command(self) -> None:
        slot = self.reader.byte() % DEVICES + 1
        self.machine.write(slot, 4, self.reader.of([0, 2, 2, 2, 6, 6, 0x402, 0x406, 0xFFFF]), 2)

    def bar(self) -> None:
        driver = self.driver()
        offset = self.reader.of(COMMON) if self.reader.byte() < 160 else self.reader.of(PLACES)
        size = WIDTHS[self.reader.byte() % 4]
        if self.reader.byte() % 3 == 0:
            self.fits(driver.read(offset, size), size)
        else:
            driver.write(offset, size, self.value() % (1 << 8 * size))
            self.note(f"wrote {offset:#x}")

    def msix(self) -> None:
        driver = self.driver()
        self.machine.write(driver.slot, 0x86, self.reader.of([0, 0x8000, 0xC000, 0x4000]), 2)
        offset = TABLE + 4 * (self.reader.byte() % 13)
        driver.write(offset, 4, self.reader.of([0, 1, 0xFEE00000, 0xFEE01000, 0x4041, 0xFFFFFFFF]))

    def good(self) -> None:
        """What a good driver does up to its first notification."""
        driver = self.driver()
        self.note(f"negotiated {driver.negotiate(F_VERSION_1 | F_RING_RESET)}")
        for index in range(self.reader.byte() % 3):
            driver.ring(index, RINGS + (driver.slot * 2 + index) * 0x100000, 16, self.reader.byte() % 4)
        driver.go()

    def ring(self) -> None:
        """A queue of any size at any place."""
        driver = self.driver()
        driver.write(0x16, 2, self.reader.of([0, 1, 1, 2, 0xFFFF]))
        driver.write(0x18, 2, self.reader.of([0, 1, 3, 16, 256, 257, 0x8000]))
        for offset in (0x20, 0x28, 0x30):
            driver.write(offset, 8, self.value())
        driver.write(0x1C, 2, 1)
        if self.reader.byte() & 1:
            driver.write(0x3A, 2, 1)

    def notify(self) -> None:
        driver = self.driver()
        index = self.reader.byte() % 4
        driver.write(NOTIFY + 4 * index, self.width(), index)
        address = driver.transport.bar_address(0)
        fd = None if address is None else self.machine.vm.ioeventfds.get(address + NOTIFY + 4 * index)
        if fd is not None:  # as KVM does
            os.eventfd_write(fd, 1)
            self.note("notified")

    def window(self) -> None:
        """The configuration access capability (virtio 1.2, 4.1.4.9)."""
        driver = self.driver()
        found = [at for at, ident in self.machine.capabilities(driver.slot) if ident == 9]
        at = next(at for at in found if self.machine.read(driver.slot, at + 3, 1) == 5)
        self.machine.write(driver.slot, at + 4, self.reader.of([0, 0, 0, 1, 5, 255]), 1)
        self.machine.write(driver.slot, at + 8, self.reader.of([*COMMON, *PLACES, 0xFFFFFFFF]))
        self.machine.write(driver.slot, at + 12, self.reader.of([0, 1, 2, 3, 4, 8, 0xFFFFFFFF]))
        if self.reader.byte() & 1:
            self.fits(self.machine.read(driver.slot, at + 16, 4), 4)
        else:
            self.machine.write(driver.slot, at + 16, self.value() & 0xFFFFFFFF)

    def host(self) -> None:
        self.driver().transport.device.config_changed()

    def status(self) -> None:
        driver = self.driver()
        driver.write(STATUS, 1, self.reader.of([0, 0, 1, 3, 11, 15, 64, 128, 255]))
        self.note(f"status {driver.read(STATUS, 1)}")

    # -- after it

    def still_works(self, driver: Driver) -> None:
        """Put where nothing else is, and reset, the device answers."""
        self.machine.write(driver.slot, 4, 0, 2)
        self.machine.write(driver.slot, 0x14, 0)
        self.machine.write(driver.slot, 0x10, HOME + driver.slot * BAR_SIZE)
        for other in range(1, DEVICES + 1):
            if other != driver.slot:
                self.machine.write(other, 4, 0, 2)
        self.machine.write(driver.slot, 4, 6, 2)
        self.machine.write(driver.slot, 0x86, 0, 2)
        same(driver.transport.bar_address(0), HOME + driver.slot * BAR_SIZE, "the BAR's address")
        driver.write(STATUS, 1, 0)
        end = time.monotonic() + RESET
        while driver.read(STATUS, 1):
            if time.monotonic() > end:
                raise Mismatch("the reset does not end")
        same(driver.negotiate(), 11, "the status after the negotiation")
        ring = driver.ring(0, RINGS)
        driver.go()
        same(driver.echo(ring, b"abc"), b"cba", "the answer")
        driver.write(STATUS, 1, 0)


class Corpus(Inputs):
    """Programs that led somewhere new."""

    def run(self, data: bytes) -> set[tuple[str, str]]:
        before = len(os.listdir("/proc/self/fd"))
        seen = Run(data).go()
        same(len(os.listdir("/proc/self/fd")), before, "open descriptors")
        return seen


def main(arguments: list[str] | None = None) -> int:
    chosen = parser("fuzz_pci", __doc__).parse_args(arguments)
    if chosen.input is not None:
        Run(chosen.input).go()
        print("every device works")
        return 0
    seed = seed_of(chosen)
    print(f"seed {seed}", flush=True)
    corpus = Corpus(seed, chosen.record)
    corpus.keep_on(chosen.seconds, HANG)
    print(f"{corpus.progress()}: every device works")
    return 0


if __name__ == "__main__":
    sys.exit(main())
