"""Mocks of firmware: each does what the real one does with PCI and virtio, in its order.

:class:`RustFirmware` is rust-hypervisor-firmware 0.5 and later, and with ``old`` the releases of 2019;
:class:`Edk2` is EDK2's OvmfPkg/CloudHv. What would be a panic of the firmware is an AssertionError here.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from chv.virtio.device import F_VERSION_1

from .pci_machine import PciMachine

SECTOR = 512
COMMAND, STATUS, BAR0, BARS_END, CAPABILITIES = 0x04, 0x06, 0x10, 0x28, 0x34
DECODING = 2
NEXT, WRITE = 1, 2
READ_REQUEST, WRITE_REQUEST, FLUSH_REQUEST = 0, 1, 4
F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY = 1 << 5, 1 << 6, 1 << 9, 1 << 10
RINGS, BUFFERS = 0x150000, 0x160000  # within 0x100000-0x200000, the firmware's own memory
QUEUE_SIZE = 16
SECONDS = 30


@dataclass
class Bar:
    address: int
    size: int


class RustFirmware:
    """Its disk driver. ``features`` are those of the device that it accepts."""

    def __init__(self, machine: PciMachine, *, old: bool = False, features: int = F_VERSION_1) -> None:
        self.machine = machine
        self.old = old
        self.features = features
        self.next_head = self.avail_index = 0
        self.notifications = 0

    # -- PCI: configuration mechanism 1, 32-bit accesses only

    def config_read(self, slot: int, register: int, size: int = 4) -> int:
        self.machine.pio.write(0xCF8, 4, 1 << 31 | slot << 11 | register & 0xFC)
        word = self.machine.pio.read(0xCFC, 4)
        return word >> 8 * (register & 3) & (1 << 8 * size) - 1

    def config_write(self, slot: int, register: int, value: int) -> None:
        self.machine.pio.write(0xCF8, 4, 1 << 31 | slot << 11 | register & 0xFC)
        self.machine.pio.write(0xCFC, 4, value)

    def find(self, vendor: int, device: int) -> int:
        for slot in range(32):
            if (self.config_read(slot, 0, 2), self.config_read(slot, 2, 2)) == (vendor, device):
                return slot
        raise AssertionError(f"no {vendor:04x}:{device:04x} in any slot")

    def read_bars(self, slot: int) -> list[Bar]:
        """A 64-bit BAR takes two registers and one entry of the table."""
        if not self.old:
            command = self.config_read(slot, COMMAND)
            self.config_write(slot, COMMAND, command | DECODING)
        bars, register = [], BAR0
        while register < BARS_END:
            value = self.config_read(slot, register)
            assert not value & 1, "virtio has no I/O BARs"
            kind = value >> 1 & 3
            assert kind in (0, 2), "an unsupported type of BAR is a panic"
            bar = Bar(value & ~0xF, 0 if self.old else self.size(slot, register))
            if kind == 2:
                register += 4
                bar.address |= self.config_read(slot, register) << 32
            assert not bar.size or bar.address, "a BAR without an address is a panic"
            bars.append(bar)
            register += 4
        return bars

    def size(self, slot: int, register: int) -> int:
        before = self.config_read(slot, register)
        self.config_write(slot, register, 0xFFFF_FFFF)
        mask = self.config_read(slot, register) & ~0xF
        self.config_write(slot, register, before)
        return -mask & 0xFFFF_FFFF

    # -- virtio

    def initialize(self) -> None:
        self.slot = self.find(0x1AF4, 0x1042)
        self.bars = self.read_bars(self.slot)
        self.find_structures()
        self.start_device()

    def find_structures(self) -> None:
        assert self.config_read(self.slot, STATUS, 2) & 1 << 4, "no capabilities"
        self.structures: dict[int, tuple[int, int]] = {}
        at = self.config_read(self.slot, CAPABILITIES, 1)
        while 0 < at < 0xFF:
            if self.config_read(self.slot, at, 1) == 9:
                kind, bar = self.config_read(self.slot, at + 3, 1), self.config_read(self.slot, at + 4, 1)
                offset, length = self.config_read(self.slot, at + 8), self.config_read(self.slot, at + 12)
                if kind in (1, 2, 4):
                    self.structures[kind] = (self.bars[bar].address + offset, length)
                if kind == 2:
                    self.multiplier = self.config_read(self.slot, at + 16)
            at = self.config_read(self.slot, at + 1, 1)
        assert self.structures[1][1] >= 0x38
        assert self.structures[4][1] >= 8
        self.common, self.notify_base = self.structures[1][0], self.structures[2][0]

    def read(self, offset: int, size: int) -> int:
        return self.machine.mmio.read(self.common + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.machine.mmio.write(self.common + offset, size, value)

    def add_status(self, bit: int) -> None:
        self.write(0x14, 1, self.read(0x14, 1) | bit)

    def start_device(self) -> None:
        self.write(0x14, 1, 0)
        self.add_status(1)
        self.add_status(2)
        offered = 0
        for select in (0, 1):
            self.write(0x00, 4, select)
            offered |= self.read(0x04, 4) << 32 * select
        assert offered & F_VERSION_1
        for select in (0, 1):
            self.write(0x08, 4, select)
            self.write(0x0C, 4, (offered & self.features) >> 32 * select & 0xFFFF_FFFF)
        self.add_status(8)
        assert self.read(0x14, 1) & 8, "the features were refused"
        self.write(0x16, 2, 0)
        assert self.read(0x18, 2) >= QUEUE_SIZE
        self.write(0x18, 2, QUEUE_SIZE)
        self.desc, self.avail, self.used = RINGS, RINGS + 0x100, RINGS + 0x124
        self.machine.memory.write(RINGS, bytes(0x1000))
        for offset, address in ((0x20, self.desc), (0x28, self.avail), (0x30, self.used)):
            self.write(offset, 4, address & 0xFFFF_FFFF)
            self.write(offset + 4, 4, address >> 32)
        self.write(0x1C, 2, 1)
        self.add_status(4)

    def capacity(self) -> int:
        """In sectors."""
        base = self.structures[4][0]
        return self.machine.mmio.read(base, 4) | self.machine.mmio.read(base + 4, 4) << 32

    # -- one request at a time: a header of 16 bytes, 512 of data, 1 of status

    def request(self, kind: int, sector: int, data: bytes | None) -> bytes:
        memory, head = self.machine.memory, self.next_head
        memory.write(BUFFERS, struct.pack("<IIQ", kind, 0, sector))
        memory.write(BUFFERS + 0x200, data or bytes(SECTOR))
        memory.write(BUFFERS + 0x400, b"\0")
        size = 0 if kind == FLUSH_REQUEST else SECTOR
        parts = (
            (BUFFERS, 16, NEXT),
            (BUFFERS + 0x200, size, NEXT | (WRITE if kind == READ_REQUEST else 0)),
            (BUFFERS + 0x400, 1, WRITE),
        )
        for place, (address, length, flags) in enumerate(parts):
            number = (head + place) % QUEUE_SIZE
            following = (number + 1) % QUEUE_SIZE if flags & NEXT else 0
            memory.write(self.desc + 16 * number, struct.pack("<QIHH", address, length, flags, following))
        memory.write(self.avail + 4 + 2 * (self.avail_index % QUEUE_SIZE), struct.pack("<H", head))
        self.avail_index = self.avail_index + 1 & 0xFFFF
        memory.write(self.avail + 2, struct.pack("<H", self.avail_index))
        self.next_head = (head + 3) % QUEUE_SIZE
        self.notify()
        deadline = time.monotonic() + SECONDS
        while struct.unpack("<H", memory.read(self.used + 2, 2))[0] != self.avail_index:
            assert time.monotonic() < deadline, "the firmware polls for ever"
            os.sched_yield()
        assert memory.read(BUFFERS + 0x400, 1) == b"\0", "the request failed"
        return memory.read(BUFFERS + 0x200, SECTOR)

    def notify(self) -> None:
        """32 bits wide, at the offset that it asks for each time."""
        self.notifications += 1
        place = self.notify_base + self.read(0x1E, 2) * self.multiplier
        self.machine.mmio.write(place, 4, 0)

    def read_sector(self, sector: int) -> bytes:
        return self.request(READ_REQUEST, sector, None)


class Edk2(RustFirmware):
    """PCI enumeration that moves every BAR, to where ``place`` says; then a disk driver like the other."""

    def __init__(self, machine: PciMachine, place: Callable[[int, int], int]) -> None:
        super().__init__(machine, features=F_VERSION_1 | F_FLUSH | F_RO | F_BLK_SIZE | F_TOPOLOGY)
        self.place = place
        self.moved: dict[int, int] = {}

    def enumerate(self) -> None:
        """Decoding off, all BARs sized, then all placed, then decoding on."""
        assert self.config_read(0, 2, 2) == 0x0D57, "only this host bridge selects the CloudHv paths"
        sizes = {}
        for slot in range(1, 32):
            if self.config_read(slot, 0, 2) == 0xFFFF:
                continue
            self.config_write(slot, COMMAND, self.config_read(slot, COMMAND) & 0xFFFF & ~7)
            sizes[slot] = self.size64(slot)
        for number, (slot, size) in enumerate(sizes.items()):
            self.moved[slot] = address = self.place(number, size)
            self.config_write(slot, BAR0, address & 0xFFFF_FFFF)
            self.config_write(slot, BAR0 + 4, address >> 32)
        for slot in sizes:
            self.config_write(slot, COMMAND, self.config_read(slot, COMMAND) & 0xFFFF | 6)

    def size64(self, slot: int) -> int:
        for register in (BAR0, BAR0 + 4):
            self.config_write(slot, register, 0xFFFF_FFFF)
        mask = self.config_read(slot, BAR0) & ~0xF | self.config_read(slot, BAR0 + 4) << 32
        return -mask & (1 << 64) - 1
