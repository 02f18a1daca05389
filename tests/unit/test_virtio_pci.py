"""virtio over PCI as a driver sees it (virtio 1.2, 3.1 and 4.1)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

from chv.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_RESET, F_VERSION_1
from tests.virtio_driver import Ring

from .pci_machine import Echo, PciMachine

STATUS, FEATURES_OK = 0x14, 8
ISR, CONFIG, NOTIFY, TABLE = 0x2000, 0x4000, 0x6000, 0x8000
NO_VECTOR = 0xFFFF


class Driver:
    """A guest's driver: accesses to the BAR, and the steps of 3.1.1."""

    def __init__(self, machine: PciMachine, slot: int = 1) -> None:
        self.machine = machine
        self.slot = slot
        self.transport = machine.transports[slot - 1]

    def read(self, offset: int, size: int) -> int:
        address = self.machine.read(self.slot, 0x10) & ~0xF | self.machine.read(self.slot, 0x14) << 32
        return self.machine.mmio.read(address + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        address = self.machine.read(self.slot, 0x10) & ~0xF | self.machine.read(self.slot, 0x14) << 32
        self.machine.mmio.write(address + offset, size, value)

    def negotiate(self, features: int = F_VERSION_1) -> int:
        self.write(STATUS, 1, 1)
        self.write(STATUS, 1, 3)
        for select in (0, 1):
            self.write(0x08, 4, select)
            self.write(0x0C, 4, features >> 32 * select & 0xFFFF_FFFF)
        self.write(STATUS, 1, 3 | FEATURES_OK)
        return self.read(STATUS, 1)

    def ring(self, index: int, base: int, size: int = 16, vector: int = NO_VECTOR) -> Ring:
        ring = Ring(self.machine.memory, base, size)
        self.write(0x16, 2, index)
        self.write(0x18, 2, size)
        self.write(0x1A, 2, vector)
        for offset, value in ((0x20, ring.desc), (0x28, ring.avail), (0x30, ring.used_ring)):
            self.write(offset, 4, value & 0xFFFF_FFFF)
            self.write(offset + 4, 4, value >> 32)
        self.write(0x1C, 2, 1)
        return ring

    def go(self) -> None:
        self.write(STATUS, 1, 15)

    def echo(self, ring: Ring, data: bytes, index: int = 0) -> bytes:
        head = ring.add(readable=[data], writable=[len(data)])
        self.write(NOTIFY + 4 * index, 2, index)
        assert ring.wait() == [(head, len(data))]
        return ring.written(head)


@pytest.fixture
def start() -> Iterator[Callable[..., Driver]]:
    machines = []

    def make(features: int = 0) -> Driver:
        machines.append(PciMachine(Echo(features)))
        return Driver(machines[-1])

    yield make
    for machine in machines:
        machine.close()


def raised(fd: int) -> int:
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(fd)
    return 0


def test_identity_and_capabilities(start: Callable[..., Driver]) -> None:
    machine = start().machine
    assert machine.read(1, 0) == (0x1040 + 42) << 16 | 0x1AF4
    assert machine.read(1, 8, 1) == 1
    assert machine.read(1, 0x2C) == (0x1040 + 42) << 16 | 0x1AF4
    kinds = {}
    for offset, ident in machine.capabilities(1):
        if ident == 9:
            bar, at, length = (
                machine.read(1, offset + 4, 1),
                machine.read(1, offset + 8),
                machine.read(1, offset + 12),
            )
            kinds[machine.read(1, offset + 3, 1)] = (bar, at, length)
            assert machine.read(1, offset + 2, 1) == (20 if machine.read(1, offset + 3, 1) in (2, 5) else 16)
            if machine.read(1, offset + 3, 1) == 2:
                assert machine.read(1, offset + 16) == 4, "the notification multiplier"
        else:
            assert ident == 0x11
            assert machine.read(1, offset + 2, 2) == 2, "three vectors"
            assert (machine.read(1, offset + 4), machine.read(1, offset + 8)) == (0x8000, 0x48000)
    assert kinds[1] == (0, 0, 0x3C)
    assert kinds[2] == (0, NOTIFY, 0x2000)
    assert kinds[3] == (0, ISR, 1)
    assert kinds[4] == (0, CONFIG, 0x1000)
    assert 5 in kinds


def test_a_driver_starts_the_device_and_its_chains_come_back(start: Callable[..., Driver]) -> None:
    driver = start(F_EVENT_IDX | F_INDIRECT_DESC)
    features = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC
    assert driver.negotiate(features) == 3 | FEATURES_OK
    ring, other = driver.ring(0, 0x10000), driver.ring(1, 0x200000, 32)
    driver.go()
    assert driver.read(STATUS, 1) == 15
    assert driver.echo(ring, b"hello") == b"olleh"
    assert driver.echo(other, b"there", 1) == b"ereht"
    device = driver.transport.device
    assert isinstance(device, Echo)
    assert device.starts == [([0, 1], features)]


@pytest.mark.parametrize("features", [0, F_EVENT_IDX, F_VERSION_1 | 1, F_VERSION_1 | 1 << 63])
def test_features_that_cannot_be_are_refused(start: Callable[..., Driver], features: int) -> None:
    driver = start()
    assert driver.negotiate(features) == 3
    driver.go()
    assert not driver.read(STATUS, 1) & 4
    device = driver.transport.device
    assert isinstance(device, Echo)
    assert not device.starts


def test_features_are_fixed_once_they_are_ok(start: Callable[..., Driver]) -> None:
    driver = start()
    driver.negotiate()
    driver.write(0x08, 4, 0)
    driver.write(0x0C, 4, 0xFFFF_FFFF)
    assert driver.read(0x0C, 4) == 0
    driver.write(0x00, 4, 1)
    assert driver.read(0x04, 4) == (F_VERSION_1 | F_RING_RESET) >> 32
    driver.write(0x00, 4, 7)
    assert driver.read(0x04, 4) == 0


def test_status_bits_go_away_only_by_a_reset(start: Callable[..., Driver]) -> None:
    driver = start()
    driver.negotiate()
    driver.write(STATUS, 1, 1)
    assert driver.read(STATUS, 1) == 11
    driver.write(STATUS, 1, 128)
    assert driver.read(STATUS, 1) == 139
    driver.write(STATUS, 1, 0)
    assert driver.read(STATUS, 1) == 0


def test_a_reset_at_any_time_leaves_nothing(start: Callable[..., Driver]) -> None:
    driver = start()
    for round_ in range(20):
        driver.negotiate()
        ring = driver.ring(0, 0x10000, vector=0)
        driver.go()
        assert driver.echo(ring, b"x" * 100) == b"x" * 100
        ring.add(readable=[b"pending"], writable=[7])
        driver.write(NOTIFY, 2, 0)
        driver.write(STATUS, 1, 0)
        assert driver.read(STATUS, 1) == 0, round_
        driver.write(0x16, 2, 0)
        assert [driver.read(offset, 2) for offset in (0x18, 0x1A, 0x1C)] == [256, NO_VECTOR, 0]
        assert [driver.read(offset, 8) for offset in (0x20, 0x28, 0x30)] == [0, 0, 0]


def test_queue_registers(start: Callable[..., Driver]) -> None:
    driver = start()
    assert driver.read(0x12, 2) == 2
    driver.write(0x16, 2, 1)
    assert (driver.read(0x18, 2), driver.read(0x1E, 2)) == (256, 1)
    for bad in (0, 3, 257, 512, 0xFFFF):
        driver.write(0x18, 2, bad)
        assert driver.read(0x18, 2) == 256
    driver.write(0x18, 2, 64)
    driver.write(0x20, 8, 0x1_2345_6780)
    assert (driver.read(0x20, 4), driver.read(0x24, 4)) == (0x2345_6780, 1)
    driver.write(0x22, 4, 7)  # no field
    driver.write(0x20, 2, 7)
    assert driver.read(0x20, 8) == 0x1_2345_6780
    driver.write(0x1C, 2, 1)
    driver.write(0x18, 2, 16)
    driver.write(0x20, 8, 0)
    assert (driver.read(0x18, 2), driver.read(0x20, 8)) == (64, 0x1_2345_6780), "fixed while enabled"
    driver.write(0x16, 2, 2)
    assert [driver.read(offset, 2) for offset in (0x18, 0x1C, 0x1E)] == [0, 0, 0]
    assert driver.read(0x1A, 2) == NO_VECTOR
    driver.write(0x1C, 2, 1)


def test_one_queue_is_reset_and_used_again(start: Callable[..., Driver]) -> None:
    driver = start()
    driver.negotiate(F_VERSION_1 | F_RING_RESET)
    ring, other = driver.ring(0, 0x10000), driver.ring(1, 0x200000)
    driver.go()
    assert driver.echo(ring, b"ab") == b"ba"
    driver.write(0x16, 2, 0)
    driver.write(0x3A, 2, 1)
    assert (driver.read(0x3A, 2), driver.read(0x1C, 2)) == (0, 0)
    assert driver.echo(other, b"cd", 1) == b"dc", "the other one goes on"
    ring = driver.ring(0, 0x400000, 32)
    assert driver.echo(ring, b"ef") == b"fe"


def test_a_notification_before_driver_ok_is_harmless_and_not_lost(start: Callable[..., Driver]) -> None:
    driver = start()
    driver.negotiate()
    ring = driver.ring(0, 0x10000)
    head = ring.add(readable=[b"early"], writable=[5])
    driver.write(NOTIFY, 2, 0)
    driver.write(NOTIFY + 4 * 77, 4, 77)
    driver.go()
    assert ring.wait() == [(head, 5)]


def test_a_broken_ring_asks_for_a_reset(start: Callable[..., Driver]) -> None:
    driver = start()
    driver.negotiate()
    ring = driver.ring(0, 0x10000)
    driver.go()
    ring.describe(0, 1 << 40, 16)
    ring.publish(0)
    driver.write(NOTIFY, 2, 0)
    for _ in range(2000):
        if driver.read(STATUS, 1) & 64:
            break
        os.sched_yield()
    assert driver.read(STATUS, 1) == 15 | 64
    assert driver.read(ISR, 1) & 2, "a configuration interrupt"
    driver.write(STATUS, 1, 0)
    driver.negotiate()
    ring = driver.ring(0, 0x10000)
    driver.go()
    assert driver.echo(ring, b"well") == b"llew"


def test_rings_outside_of_memory_ask_for_a_reset(start: Callable[..., Driver]) -> None:
    driver = start()
    driver.negotiate()
    driver.write(0x16, 2, 0)
    driver.write(0x20, 8, 1 << 50)
    driver.write(0x1C, 2, 1)
    driver.go()
    assert driver.read(STATUS, 1) == 15 | 64


def test_without_msix_the_status_register_and_the_pin_tell(start: Callable[..., Driver]) -> None:
    driver = start()
    line = driver.transport._isr.line
    assert line is not None
    assert line.gsi == 17
    driver.negotiate()
    ring = driver.ring(0, 0x10000)
    driver.go()
    driver.echo(ring, b"a")
    while not line.asserted:
        os.sched_yield()
    assert driver.read(ISR, 1) == 1
    assert line.asserted == 0
    assert driver.read(ISR, 1) == 0
    driver.transport.device.config_changed()
    assert driver.read(ISR, 1) == 2
    assert driver.read(0x15, 1) == 1, "the generation"


def test_interrupt_disable_keeps_the_pin_low_and_the_status_registers_tell(
    start: Callable[..., Driver],
) -> None:
    """PCI Local Bus 3.0, 6.2.2 and 6.2.3: a driver may poll, and what waits is raised later."""
    driver = start()
    line = driver.transport._isr.line
    assert line is not None
    command = driver.machine.read(1, 4, 2)
    driver.machine.write(1, 4, command | 0x400, 2)
    driver.negotiate()
    driver.go()
    assert driver.machine.read(1, 6, 2) & 8 == 0
    driver.transport.device.config_changed()
    assert line.asserted == 0
    assert driver.machine.read(1, 6, 2) & 8
    assert driver.machine.read(1, 4) >> 16 & 8
    driver.machine.write(1, 4, command, 2)
    assert line.asserted
    assert driver.read(ISR, 1) == 2
    assert line.asserted == 0
    assert driver.machine.read(1, 7, 1) == 0
    assert driver.machine.read(1, 6, 2) & 8 == 0


def test_with_msix_each_queue_has_its_vector(start: Callable[..., Driver]) -> None:
    driver = start()
    msix = driver.transport._msix
    driver.machine.write(1, 0x84 + 2, 0x8000, 2)
    driver.negotiate()
    driver.write(0x10, 2, 2)
    ring, other = driver.ring(0, 0x10000, vector=1), driver.ring(1, 0x200000, vector=NO_VECTOR)
    driver.go()
    driver.echo(ring, b"a")
    while not msix.pending_read(0, 1):
        os.sched_yield()
    assert msix.pending_read(0, 1) == 0b010, "masked, so it waits"
    driver.echo(other, b"b", 1)
    driver.transport.device.config_changed()
    assert msix.pending_read(0, 1) == 0b110
    for place, value in enumerate((0xFEE0_0000, 0, 0x55, 0)):
        driver.write(TABLE + 16 + 4 * place, 4, value)
    assert driver.machine.vm.irqfds
    assert driver.read(0x48000, 8) == 0b100
    assert driver.read(ISR, 1) == 0


@pytest.mark.parametrize("vector", [3, 100, 0xFFFE])
def test_a_vector_that_does_not_exist_reads_back_as_none(start: Callable[..., Driver], vector: int) -> None:
    driver = start()
    driver.write(0x10, 2, vector)
    assert driver.read(0x10, 2) == NO_VECTOR
    driver.write(0x1A, 2, vector)
    assert driver.read(0x1A, 2) == NO_VECTOR
    driver.write(0x1A, 2, 2)
    assert driver.read(0x1A, 2) == 2


def test_the_window_in_configuration_space_reaches_the_bar(start: Callable[..., Driver]) -> None:
    machine = start().machine
    window = next(o for o, ident in machine.capabilities(1) if ident == 9 and machine.read(1, o + 3, 1) == 5)

    def aim(offset: int, length: int, bar: int = 0) -> None:
        machine.write(1, window + 4, bar, 1)
        machine.write(1, window + 8, offset)
        machine.write(1, window + 12, length)

    aim(CONFIG, 4)
    assert machine.read(1, window + 16) == int.from_bytes(b"abcd", "little")
    aim(STATUS, 1)
    machine.write(1, window + 16, 1, 1)
    assert machine.read(1, window + 16, 1) == 1
    for offset, length, bar in (
        (0x80000, 4, 0),
        (CONFIG, 3, 0),
        (CONFIG + 1, 4, 0),
        (CONFIG, 4, 1),
        (1 << 31, 4, 0),
    ):
        aim(offset, length, bar)
        machine.write(1, window + 16, 0xFFFF_FFFF)
        machine.read(1, window + 16)
    assert Driver(machine).read(CONFIG, 4) == int.from_bytes(b"abcd", "little")


def test_a_pause_keeps_the_rings(start: Callable[..., Driver]) -> None:
    driver = start()
    driver.negotiate()
    ring = driver.ring(0, 0x10000)
    driver.go()
    assert driver.echo(ring, b"ab") == b"ba"
    driver.transport.pause()
    head = ring.add(readable=[b"cd"], writable=[2])
    driver.write(NOTIFY, 2, 0)
    assert ring.used() == []
    driver.transport.resume()
    assert ring.wait() == [(head, 2)]


def test_state_survives_in_another_machine(start: Callable[..., Driver]) -> None:
    first, second = start(), start()
    first.negotiate()
    ring = first.ring(0, 0x10000)
    first.go()
    assert first.echo(ring, b"ab") == b"ba"
    first.transport.pause()
    state = first.transport.save()
    second.transport.pause()
    second.machine.memory.write(0, first.machine.memory.read(0, 16 << 20))
    second.transport.load(state)
    second.transport.resume()
    ring.memory = second.machine.memory
    assert second.echo(ring, b"cd") == b"dc"


def test_closing_gives_everything_back(start: Callable[..., Driver]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    driver = start()
    driver.machine.write(1, 0x84 + 2, 0x8000, 2)
    driver.negotiate()
    ring = driver.ring(0, 0x10000, vector=1)
    driver.go()
    driver.echo(ring, b"a")
    driver.machine.close()
    assert driver.machine.vm.ioeventfds == {}
    assert driver.machine.vm.irqfds == {}
    assert len(os.listdir("/proc/self/fd")) == before
    device = driver.transport.device
    assert isinstance(device, Echo)
    assert device.resets
