"""What real firmware needs of PCI and virtio. Each test's docstring names what the firmware does or needs."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chv import layout
from chv.config.schema import DiskConfig
from chv.virtio.block import Block
from chv.virtio.console import Console
from chv.virtio.device import F_VERSION_1, VirtioDevice
from chv.virtio.net import Net
from chv.virtio.rng import Rng

from .firmware_mock import (
    CAPABILITIES,
    F_BLK_SIZE,
    F_FLUSH,
    F_RO,
    F_TOPOLOGY,
    FLUSH_REQUEST,
    QUEUE_SIZE,
    READ_REQUEST,
    RINGS,
    SECTOR,
    WRITE_REQUEST,
    Edk2,
    RustFirmware,
)
from .pci_machine import PHYS_BITS, Echo, PciMachine
from .test_virtio_pci import Driver

SECTORS = 256


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([n % 251]) * SECTOR for n in range(SECTORS)))
    return path


@pytest.fixture
def boot(disk: Path) -> Iterator[Callable[..., PciMachine]]:
    """A machine whose disk is behind a device of another kind; keywords are the disk's."""
    machines: list[PciMachine] = []
    blocks: list[VirtioDevice] = []

    def make(**config: object) -> PciMachine:
        blocks.append(Block.open(DiskConfig(path=str(disk), **config), "disks[0]", "_disk0"))  # type: ignore[arg-type]
        machines.append(PciMachine(Echo(), blocks[-1]))
        return machines[-1]

    yield make
    for machine in machines:
        machine.close()
    for block in blocks:
        block.close()


def sector(number: int) -> bytes:
    return bytes([number % 251]) * SECTOR


# -- rust-hypervisor-firmware ------------------------------------------------------------


def test_it_reads_a_disk_from_end_to_end(boot: Callable[..., PciMachine]) -> None:
    """All of it in order: chains of three descriptors (16/512/1), one 512-byte request at a time."""
    firmware = RustFirmware(boot())
    firmware.initialize()
    assert firmware.capacity() == SECTORS
    assert all(firmware.read_sector(n) == sector(n) for n in range(SECTORS))
    assert firmware.notifications == SECTORS


def test_the_indexes_of_its_ring_wrap_around(boot: Callable[..., PciMachine]) -> None:
    """A 20 MB kernel and initrd is 40,000 notifications: more than the ring of 16 by far."""
    firmware = RustFirmware(boot())
    firmware.initialize()
    for n in range(5 * QUEUE_SIZE + 1):
        assert firmware.read_sector(n % SECTORS) == sector(n % SECTORS)
    assert firmware.machine.transports[1].queues[0].error is None


def test_it_finds_the_disk_in_any_slot(boot: Callable[..., PciMachine]) -> None:
    """Bus 0, function 0 of devices 0-31, 32-bit accesses by 0xcf8 and 0xcfc; it looks for 1af4:1042."""
    firmware = RustFirmware(boot())
    assert firmware.find(0x1AF4, 0x1042) == 2
    assert firmware.config_read(0, 0) == 0x0D57_8086
    assert [slot for slot in range(32) if firmware.config_read(slot, 0) != 0xFFFF_FFFF] == [0, 1, 2]


def test_its_bars_have_addresses_below_4_gib(boot: Callable[..., PciMachine]) -> None:
    """It places none: a BAR with a size and address 0 is a panic, so they are placed, and below 4 GiB."""
    firmware = RustFirmware(boot())
    bars = firmware.read_bars(2)
    assert [bar.size for bar in bars] == [0x80000, 0, 0, 0, 0]
    assert layout.DEVICES_32BIT <= bars[0].address < 1 << 32


def test_sizing_leaves_a_bar_where_it_was(boot: Callable[..., PciMachine]) -> None:
    """It sizes BARs by writing ones and restoring, with memory decoding on."""
    machine = boot()
    before = [transport.bar_address(0) for transport in machine.transports]
    firmware = RustFirmware(machine)
    firmware.read_bars(1)
    firmware.read_bars(2)
    assert [transport.bar_address(0) for transport in machine.transports] == before


def test_its_table_of_bars_leads_to_the_structures(boot: Callable[..., PciMachine]) -> None:
    """A 64-bit BAR takes one slot in its table, so the capabilities must point at BAR 0."""
    firmware = RustFirmware(boot())
    firmware.slot = 2
    at, bars = firmware.config_read(2, CAPABILITIES, 1), set()
    while at:
        if firmware.config_read(2, at, 1) == 9:
            bars.add(firmware.config_read(2, at + 4, 1))
        at = firmware.config_read(2, at + 1, 1)
    assert bars == {0}


def test_the_capabilities_that_it_reads(boot: Callable[..., PciMachine]) -> None:
    """Types 1 (length >= 0x38), 2 (multiplier at +16) and 4 (length >= 8); status bit 4, the list at 0x34."""
    firmware = RustFirmware(boot())
    firmware.slot = 2
    firmware.bars = firmware.read_bars(2)
    firmware.find_structures()
    base = firmware.bars[0].address
    assert firmware.structures == {1: (base, 0x3C), 2: (base + 0x6000, 0x2000), 4: (base + 0x4000, 0x1000)}
    assert firmware.multiplier == 4


def test_it_needs_a_queue_of_16(boot: Callable[..., PciMachine]) -> None:
    """Queue 0, maximum size >= 16, uses 16."""
    firmware = RustFirmware(boot(queue_size=QUEUE_SIZE))
    firmware.initialize()
    assert firmware.machine.transports[1].queues[0].size == QUEUE_SIZE
    assert firmware.read_sector(7) == sector(7)


def test_it_accepts_version_1_alone(boot: Callable[..., PciMachine]) -> None:
    """Features: only VERSION_1 is accepted, whatever else is offered."""
    firmware = RustFirmware(boot())
    firmware.initialize()
    assert firmware.machine.transports[1].device.accepted == F_VERSION_1


def test_a_disk_that_cannot_be_written(boot: Callable[..., PciMachine]) -> None:
    """... and BLK_F_RO."""
    firmware = RustFirmware(boot(readonly=True), features=F_VERSION_1 | F_RO)
    firmware.initialize()
    assert firmware.machine.transports[1].device.accepted == F_VERSION_1 | F_RO
    assert firmware.read_sector(9) == sector(9)


def test_it_writes_a_sector_and_flushes(boot: Callable[..., PciMachine], disk: Path) -> None:
    """A boot entry's counter is written back: a readable buffer in the middle, and a flush of no data."""
    firmware = RustFirmware(boot())
    firmware.initialize()
    firmware.request(WRITE_REQUEST, 3, b"w" * SECTOR)
    firmware.request(FLUSH_REQUEST, 0, None)
    assert disk.read_bytes()[3 * SECTOR : 4 * SECTOR] == b"w" * SECTOR


def test_nothing_waits_for_an_interrupt(boot: Callable[..., PciMachine]) -> None:
    """It polls everything: interrupts off, MSI-X never touched. The pin may stay up for ever."""
    firmware = RustFirmware(boot())
    firmware.initialize()
    transport = firmware.machine.transports[1]
    line = transport._isr.line
    assert line is not None
    for n in range(4):
        assert firmware.read_sector(n) == sector(n)
    while not line.asserted:
        os.sched_yield()
    assert not transport._msix.enabled
    assert firmware.machine.vm.irqfds == {}
    assert firmware.read_sector(5) == sector(5)


def test_linux_resets_what_it_left_running(boot: Callable[..., PciMachine]) -> None:
    """No reset before the kernel starts: the firmware's queue is still set up when Linux resets it."""
    machine = boot()
    firmware = RustFirmware(machine)
    firmware.initialize()
    for n in range(5):
        firmware.read_sector(n)
    line = machine.transports[1]._isr.line
    assert line is not None
    linux = Driver(machine, 2)
    assert linux.read(0x14, 1) == 15
    linux.write(0x14, 1, 0)
    assert linux.read(0x14, 1) == 0
    assert not line.asserted, "or a device that shares the line would be called for ever"
    machine.memory.write(RINGS, b"\xa5" * 0x1000)  # Linux uses the memory for something else
    linux.negotiate()
    ring = linux.ring(0, 0x400000, 128)
    linux.go()
    head = ring.add(readable=[struct.pack("<IIQ", READ_REQUEST, 0, 11)], writable=[SECTOR, 1])
    linux.write(0x6000, 2, 0)
    assert ring.wait() == [(head, SECTOR + 1)]
    assert ring.written(head) == sector(11) + b"\0"
    assert machine.memory.read(RINGS, 0x1000) == b"\xa5" * 0x1000


def test_a_restart_finds_everything_as_it_was(boot: Callable[..., PciMachine], disk: Path) -> None:
    """The BARs of a new power-on are where those of the last were."""
    first = RustFirmware(boot())
    first.initialize()
    first.machine.close()
    first.machine.transports[1].device.close()
    second = RustFirmware(boot())
    second.initialize()
    assert second.bars == first.bars
    assert second.read_sector(1) == sector(1)


# -- the releases of 2019 ----------------------------------------------------------------


def test_old_releases_find_bars_that_decode_at_reset(boot: Callable[..., PciMachine]) -> None:
    """Before 0.5.0 it writes no command register and sizes nothing: BARs must decode at reset."""
    firmware = RustFirmware(boot(), old=True)
    firmware.initialize()
    assert firmware.bars[0].address < 1 << 32
    assert all(firmware.read_sector(n) == sector(n) for n in range(2 * QUEUE_SIZE))


# -- EDK2, OvmfPkg/CloudHv --------------------------------------------------------------------

PLACES: dict[str, Callable[[int, int], int]] = {
    "32-bit from 0xc0000000": lambda number, size: 0xC000_0000 + (1 - number) * size,
    "32-bit up to 0xfc000000": lambda number, size: 0xFC00_0000 - (number + 1) * size,
    "64-bit, top eighth": lambda number, size: 7 << PHYS_BITS - 3 | number * size,
    "64-bit, top eighth of 40 bits": lambda number, size: (1 << 40) - (number + 1) * size,
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_it_moves_every_bar(boot: Callable[..., PciMachine], place: Callable[[int, int], int]) -> None:
    """32-bit BARs from 0xc0000000 up to 0xfc000000, 64-bit ones in the top eighth of the address width."""
    machine = boot()
    old = [transport.bar_address(0) for transport in machine.transports]
    firmware = Edk2(machine, place)
    firmware.enumerate()
    assert [transport.bar_address(0) for transport in machine.transports] == list(firmware.moved.values())
    at = {address & ~0x7FFFF for address in machine.vm.ioeventfds}
    assert at == set(firmware.moved.values()), "notifications went with them"
    for address in old:
        assert address is not None
        if address not in firmware.moved.values():
            assert machine.mmio.read(address + 0x14, 1) == 0xFF
    firmware.initialize()
    assert [firmware.read_sector(n) == sector(n) for n in range(20)] == [True] * 20


def test_two_bars_that_change_places(boot: Callable[..., PciMachine]) -> None:
    """It moves every BAR, to where another may still be; decoding is off meanwhile."""
    machine = boot()
    first, second = (transport.bar_address(0) for transport in machine.transports)
    assert first is not None
    assert second is not None
    firmware = Edk2(machine, lambda number, size: (second, first)[number])
    firmware.enumerate()
    assert [transport.bar_address(0) for transport in machine.transports] == [second, first]
    assert len(machine.vm.ioeventfds) == 3, "none was lost on the way"
    firmware.initialize()
    assert firmware.read_sector(4) == sector(4)


def test_the_identity_that_its_drivers_look_for() -> None:
    """virtio: 1af4:1040-107f, revision >= 1, subsystem id >= 0x40."""
    assert all(0x1040 + kind.ID <= 0x107F for kind in (Block, Console, Net, Rng))
    machine = PciMachine(Echo())
    try:
        firmware = RustFirmware(machine)
        assert firmware.config_read(1, 0) == (0x1040 + Echo.ID) << 16 | 0x1AF4
        assert firmware.config_read(1, 0x08, 1) >= 1
        assert firmware.config_read(1, 0x0E, 1) == 0, "an ordinary header, one function"
        assert firmware.config_read(1, 0x2C, 2) == 0x1AF4
        assert firmware.config_read(1, 0x2E, 2) >= 0x40
    finally:
        machine.close()


def test_the_features_that_its_disk_driver_accepts(boot: Callable[..., PciMachine]) -> None:
    """VERSION_1, FLUSH, RO, BLK_SIZE, TOPOLOGY."""
    firmware = Edk2(boot(), PLACES["64-bit, top eighth"])
    firmware.enumerate()
    firmware.initialize()
    accepted = F_VERSION_1 | F_FLUSH | F_BLK_SIZE | F_TOPOLOGY
    assert firmware.machine.transports[1].device.accepted == accepted


def test_it_resets_the_machine_by_0xcf9(boot: Callable[..., PciMachine]) -> None:
    """Reset by 0xcf9 (or 0x64): a byte within the ports of the configuration mechanism."""
    machine = boot()
    machine.pio.write(0xCF9, 1, 0x02)
    machine.pio.write(0xCF9, 1, 0x06)
    assert machine.resets == 1
    machine.pio.write(0xCF9, 1, 0x0E)
    assert machine.resets == 2
