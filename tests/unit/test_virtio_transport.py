"""The transport's rules: who may write what when, resets while something is under way, state."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chv._irq import IrqSource, IrqStatus
from chv._virtqueue import Queue, RamMap
from chv.memory import GuestMemory
from chv.virtio.common import CommonConfig
from chv.virtio.device import F_EVENT_IDX, F_RING_RESET, F_VERSION_1

from .pci_machine import Echo, PciMachine
from .test_virtio_pci import Driver

STATUS, GENERATION, ISR, CONFIG, TABLE = 0x14, 0x15, 0x2000, 0x4000, 0x8000
OK, FEATURES_OK, NEEDS_RESET = 15, 8, 64
NO_VECTOR = 0xFFFF
MSIX_CONTROL = 0x84 + 2
SECONDS = 30


@contextmanager
def driving(device: Echo) -> Iterator[Driver]:
    machine = PciMachine(device)
    try:
        yield Driver(machine)
    finally:
        machine.close()


# -- the registers, without PCI ----------------------------------------------------------


class Registers:
    """A common configuration with three MSI-X vectors and the device behind it."""

    def __init__(self, features: int = F_EVENT_IDX) -> None:
        self.memory = GuestMemory(1 << 20)
        ram, self.status = RamMap(self.memory), IrqStatus()
        self.device = Echo(features)
        self.queues = [
            Queue(ram, index, size, IrqSource(self.status, 1), IrqSource(self.status, 2))
            for index, size in enumerate(self.device.queue_sizes)
        ]
        self.config_irq = IrqSource(self.status, 2)
        self.common = CommonConfig(
            self.device, self.queues, self.config_irq, lambda cause, vector: vector < 3
        )
        self.read, self.write = self.common.read, self.common.write

    def __enter__(self) -> Registers:
        return self

    def __exit__(self, *_: object) -> None:
        self.common.reset()
        for queue in self.queues:
            queue.close()
        self.memory.close()

    def accept(self, features: int) -> None:
        for select in (0, 1):
            self.write(0x08, 4, select)
            self.write(0x0C, 4, features >> 32 * select & 0xFFFF_FFFF)


FIELDS = [
    *((offset, 4) for offset in (0x00, 0x04, 0x08, 0x0C, 0x20, 0x24, 0x28, 0x2C, 0x30, 0x34)),
    *((offset, 2) for offset in (0x10, 0x12, 0x16, 0x18, 0x1A, 0x1C, 0x1E, 0x3A)),
    *((offset, 1) for offset in (0x14, 0x15)),
    *((offset, 8) for offset in (0x20, 0x28, 0x30)),
]


def test_a_field_answers_at_its_offset_and_width_only() -> None:
    with Registers() as registers:
        before = registers.common.save()
        for offset in range(0x2000):
            for size in (1, 2, 4, 8):
                if (offset, size) in FIELDS:
                    continue
                assert registers.read(offset, size) == 0, (offset, size)
                registers.write(offset, size, (1 << 8 * size) - 1)
        assert registers.common.save() == before


def test_what_the_device_says_cannot_be_written() -> None:
    with Registers() as registers:
        for offset, size in ((0x04, 4), (0x12, 2), (GENERATION, 1), (0x1E, 2)):
            before = registers.read(offset, size)
            registers.write(offset, size, 0x55)
            assert registers.read(offset, size) == before


def test_all_steps_of_a_driver_in_one_write() -> None:
    with Registers() as registers:
        registers.accept(F_VERSION_1)
        registers.write(STATUS, 1, OK)
        assert registers.read(STATUS, 1) == OK
        assert registers.device.starts == [([], F_VERSION_1)]


def test_a_driver_that_was_refused_may_ask_for_less() -> None:
    with Registers() as registers:
        registers.accept(F_VERSION_1 | 1 << 5)
        registers.write(STATUS, 1, 3 | FEATURES_OK)
        assert registers.read(STATUS, 1) == 3
        registers.accept(F_VERSION_1)
        registers.write(STATUS, 1, 3 | FEATURES_OK)
        assert registers.read(STATUS, 1) == 3 | FEATURES_OK


@pytest.mark.parametrize("bit", [16, 32, 64])
def test_bits_that_are_not_the_drivers_stay_clear(bit: int) -> None:
    with Registers() as registers:
        registers.write(STATUS, 1, 1 | bit)
        assert registers.read(STATUS, 1) == 1


class Model:
    """What the registers are to be, written down a second time: plain values, one rule a line."""

    def __init__(self, offered: int) -> None:
        self.offered = offered
        self.reset()

    def reset(self) -> None:
        self.status = self.accepted = self.driver_select = self.select = 0
        self.size, self.vector, self.enabled = [256, 256], [NO_VECTOR] * 2, [0, 0]
        self.address = [[0, 0, 0], [0, 0, 0]]

    def write(self, name: str, value: int) -> None:
        here = self.select < 2
        if name == "status":
            if value == 0:
                self.reset()
                return
            bits = self.status | value & 0x8F
            if (
                bits & 8
                and not self.status & 8
                and (self.accepted & ~self.offered or not self.accepted >> 32 & 1)
            ):
                bits &= ~8
            self.status = bits if bits & 8 else bits & ~4
        elif name == "driver_select":
            self.driver_select = value
        elif name == "accept":
            if not self.status & 8 and self.driver_select < 2:
                words = [self.accepted & 0xFFFF_FFFF, self.accepted >> 32]
                words[self.driver_select] = value
                self.accepted = words[0] | words[1] << 32
        elif name == "select":
            self.select = value
        elif name == "vector" and here:
            self.vector[self.select] = value if value < 3 else NO_VECTOR
        elif name == "reset" and here and value == 1 and self.accepted >> 40 & 1:
            self.size[self.select], self.vector[self.select] = 256, NO_VECTOR
            self.enabled[self.select], self.address[self.select] = 0, [0, 0, 0]
        elif here and not self.enabled[self.select]:
            if name == "size" and value in (1, 2, 4, 8, 16, 32, 64, 128, 256):
                self.size[self.select] = value
            elif name == "enable" and value == 1:
                self.enabled[self.select] = 1
            elif name in ("desc", "avail", "used"):
                self.address[self.select][("desc", "avail", "used").index(name)] = value

    def seen(self) -> list[int]:
        here = self.select < 2
        s = self.select
        return [
            self.status,
            self.select,
            *([self.size[s], self.vector[s], self.enabled[s], s] if here else [0, NO_VECTOR, 0, 0]),
            *(self.address[s] if here else [0, 0, 0]),
            (self.accepted >> 32 * self.driver_select & 0xFFFF_FFFF) if self.driver_select < 2 else 0,
        ]


WRITES = {
    "status": (STATUS, 1),
    "driver_select": (0x08, 4),
    "accept": (0x0C, 4),
    "select": (0x16, 2),
    "size": (0x18, 2),
    "vector": (0x1A, 2),
    "enable": (0x1C, 2),
    "reset": (0x3A, 2),
    "desc": (0x20, 8),
    "avail": (0x28, 8),
    "used": (0x30, 8),
}
VALUES = st.sampled_from([0, 1, 2, 3, 4, 11, 15, 128, 256, 257, 512, 0x101, 0x8000, 0xFFFF, 1 << 29])
STEPS = st.lists(st.tuples(st.sampled_from(sorted(WRITES)), VALUES), max_size=40)


@settings(deadline=None)
@given(STEPS)
def test_the_registers_follow_the_model(steps: list[tuple[str, int]]) -> None:
    with Registers() as registers:
        model = Model(registers.common.offered)
        for name, value in steps:
            offset, size = WRITES[name]
            value &= (1 << 8 * size) - 1
            registers.write(offset, size, value)
            model.write(name, value)
            seen = [
                registers.read(o, s) for o, s in ((STATUS, 1), (0x16, 2), (0x18, 2), (0x1A, 2), (0x1C, 2))
            ]
            seen += [registers.read(o, s) for o, s in ((0x1E, 2), (0x20, 8), (0x28, 8), (0x30, 8), (0x0C, 4))]
            # Rings that lie nowhere break the device once it runs; the model has no rings.
            seen[0] &= ~NEEDS_RESET
            assert seen == model.seen(), (name, value)


# -- the configuration's generation (4.1.4.3.1) -------------------------------------------


def test_the_generation_is_new_before_the_device_has_told() -> None:
    with Registers() as registers:
        first = registers.read(GENERATION, 1)
        assert registers.read(GENERATION, 1) == first
        registers.device.written[0] ^= 1  # and a driver reads on before config_changed() is called
        second = registers.read(GENERATION, 1)
        assert second != first
        registers.device.config_changed()
        assert registers.read(GENERATION, 1) not in (first, second)


def test_the_generation_wraps_around() -> None:
    with Registers() as registers:
        for _ in range(300):
            registers.device.config_changed()
        assert registers.read(GENERATION, 1) == 300 % 256


def test_nobody_is_interrupted_before_driver_ok() -> None:
    with Registers() as registers:
        registers.accept(F_VERSION_1)
        registers.write(STATUS, 1, 11)
        registers.device.config_changed()
        assert registers.status.value == 0
        registers.write(STATUS, 1, OK)
        registers.device.config_changed()
        assert registers.status.value == 2


# -- a device that fails on the host's side -------------------------------------------------


class Failing(Echo):
    """Its workers raise, or cannot be started."""

    def __init__(self) -> None:
        super().__init__()
        self.fail_start = self.fail_work = False

    def start(self, queues: dict[int, Queue], features: int) -> None:  # type: ignore[override]
        super().start(queues, features)
        if self.fail_start:
            raise OSError(28, "No space left on device")

    def work(self, queue: Queue) -> None:
        if self.fail_work:
            raise ValueError("a bug in the device")
        super().work(queue)


@pytest.mark.parametrize("where", ["fail_start", "fail_work"])
def test_a_device_that_fails_asks_for_a_reset(where: str, caplog: pytest.LogCaptureFixture) -> None:
    device = Failing()
    with driving(device) as driver:
        setattr(device, where, True)
        driver.negotiate()
        driver.ring(0, 0x10000)
        driver.go()
        while not driver.read(STATUS, 1) & NEEDS_RESET:
            os.sched_yield()
        while not driver.read(ISR, 1) & 2:
            os.sched_yield()
        assert "echo" in caplog.text
        driver.write(STATUS, 1, 0)
        assert driver.read(STATUS, 1) == 0
        setattr(device, where, False)
        driver.negotiate()
        ring = driver.ring(0, 0x10000)
        driver.go()
        assert driver.echo(ring, b"ab") == b"ba"
        assert driver.read(STATUS, 1) == OK


# -- resets while something is under way ------------------------------------------------------


class Slow(Echo):
    """Holds each chain until it is let go, and tells of a new configuration before it ends."""

    def __init__(self) -> None:
        super().__init__()
        self.holds, self.may_go = threading.Event(), threading.Event()

    def work(self, queue: Queue) -> None:
        while not queue.stopping:
            for chain in queue:
                self.holds.set()
                self.may_go.wait(SECONDS)
                self.config_changed()
                chain.write(b"late")
                chain.done()
            queue.wait()


def test_a_reset_waits_for_what_is_under_way_and_only_then_reads_as_done() -> None:
    device = Slow()
    with driving(device) as driver:
        driver.negotiate()
        ring = driver.ring(0, 0x10000)
        driver.go()
        head = ring.add(writable=[4])
        driver.write(0x6000, 2, 0)
        assert device.holds.wait(SECONDS)
        seen: list[int] = []
        threads = [
            threading.Thread(target=lambda: driver.write(STATUS, 1, 0)),
            threading.Thread(target=lambda: seen.append(driver.read(STATUS, 1))),
        ]
        threads[0].start()
        while not driver.transport.queues[0].stopping:
            os.sched_yield()
        threads[1].start()
        assert ring.used() == []
        device.may_go.set()
        for thread in threads:
            thread.join(SECONDS)
            assert not thread.is_alive()
        assert seen == [0]
        assert ring.used() == [(head, 4)], "it was completed before the reset was"
        assert driver.read(ISR, 1) == 0


def test_one_queue_is_reset_while_its_worker_is_busy() -> None:
    device = Slow()
    with driving(device) as driver:
        driver.negotiate(F_VERSION_1 | F_RING_RESET)
        ring = driver.ring(0, 0x10000, vector=1)
        driver.go()
        head = ring.add(writable=[4])
        driver.write(0x6000, 2, 0)
        assert device.holds.wait(SECONDS)
        driver.write(0x16, 2, 0)
        thread = threading.Thread(target=lambda: driver.write(0x3A, 2, 1))
        thread.start()
        device.may_go.set()
        thread.join(SECONDS)
        assert not thread.is_alive()
        assert ring.used() == [(head, 4)]
        assert [driver.read(offset, 2) for offset in (0x18, 0x1A, 0x1C, 0x3A)] == [256, NO_VECTOR, 0, 0]
        assert driver.read(STATUS, 1) == OK


def test_a_reset_lowers_the_pin_and_clears_the_status() -> None:
    with driving(Echo()) as driver:
        line = driver.transport._isr.line
        assert line is not None
        driver.negotiate()
        ring = driver.ring(0, 0x10000)
        driver.go()
        driver.echo(ring, b"a")
        while not line.asserted:
            os.sched_yield()
        driver.write(STATUS, 1, 0)
        assert line.asserted == 0, "firmware leaves it up; another device may share it"
        assert driver.read(ISR, 1) == 0


def test_queues_that_were_not_enabled_have_no_worker_and_may_come_later() -> None:
    device = Echo()
    with driving(device) as driver:
        driver.negotiate(F_VERSION_1 | F_RING_RESET)
        ring = driver.ring(1, 0x10000)
        driver.go()
        assert device.starts == [([1], F_VERSION_1)]
        assert driver.echo(ring, b"ab", 1) == b"ba"
        late = driver.ring(0, 0x200000)
        assert driver.echo(late, b"cd") == b"dc"


def test_vcpus_that_get_in_each_others_way() -> None:
    """Three vCPUs write whatever they like, and the host changes the configuration all the time."""
    before = len(os.listdir("/proc/self/fd"))
    with driving(Echo()) as driver:
        ended = threading.Event()
        errors: list[BaseException] = []

        def vcpu(seed: int) -> None:
            chance = random.Random(seed)
            try:
                for _ in range(300):
                    offset, size = chance.choice(FIELDS)
                    driver.write(offset, size, chance.choice((0, 1, 2, 3, 4, 15, 16, 256)))
                    driver.read(offset, size)
                    driver.write(TABLE + 4 * chance.randrange(12), 4, chance.choice((0, 1, 0xFEE0_0000)))
                    if chance.random() < 0.1:
                        driver.machine.write(1, MSIX_CONTROL, chance.choice((0, 0x8000, 0xC000)), 2)
                        driver.negotiate()
                        driver.write(0x1C, 2, 1)
                        driver.go()
            except BaseException as error:
                errors.append(error)

        def host() -> None:
            while not ended.is_set():
                driver.transport.device.config_changed()

        vcpus = [threading.Thread(target=vcpu, args=(seed,)) for seed in range(3)]
        other = threading.Thread(target=host)
        for thread in (*vcpus, other):
            thread.start()
        for thread in vcpus:
            thread.join(120)
            assert not thread.is_alive()
        ended.set()
        other.join(SECONDS)
        assert errors == []
        driver.write(STATUS, 1, 0)
        assert driver.read(STATUS, 1) == 0
        vm = driver.machine.vm
    assert len(os.listdir("/proc/self/fd")) == before
    assert vm.irqfds == {}


# -- the end, and state ------------------------------------------------------------------------


def test_what_changes_after_the_end_is_written_to_nobodys_descriptor() -> None:
    device = Echo()
    with driving(device) as driver:
        driver.machine.write(1, MSIX_CONTROL, 0x8000, 2)
        driver.write(0x10, 2, 0)
        driver.negotiate()
        driver.go()
        device.config_changed()
        assert driver.transport._msix.pending_read(0, 1) == 1
    others = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(16)]  # they take the numbers that are free now
    try:
        device.config_changed()
        for fd in others:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(fd)
    finally:
        for fd in others:
            os.close(fd)


def test_a_status_that_nobody_has_read_moves_along() -> None:
    with driving(Echo()) as first, driving(Echo()) as second:
        first.negotiate()
        ring = first.ring(0, 0x10000)
        first.go()
        first.echo(ring, b"ab")
        first.transport.device.config_changed()
        first.transport.pause()
        state = first.transport.save()
        assert state["isr"] == 3
        second.transport.pause()
        second.transport.load(state)
        line = second.transport._isr.line
        assert line is not None
        assert line.asserted
        assert second.read(ISR, 1) == 3
        assert line.asserted == 0


def test_state_is_plain_values_and_comes_back_as_it_was() -> None:
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or isinstance(value, (int, str, bytes, bool))

    with driving(Echo(F_EVENT_IDX)) as first, driving(Echo(F_EVENT_IDX)) as second:
        first.machine.write(1, MSIX_CONTROL, 0x8000, 2)
        first.write(0x10, 2, 2)
        first.negotiate(F_VERSION_1 | F_EVENT_IDX)
        first.ring(1, 0x10000, vector=1)
        first.go()
        for place, value in enumerate((0xFEE0_0000, 0, 0x55, 0)):
            first.write(TABLE + 16 + 4 * place, 4, value)
        first.transport.pause()
        state = first.transport.save()
        assert plain(state)
        second.transport.pause()
        second.transport.load(state)
        assert second.transport.save() == state
        assert (0xFEE0_0000, 0x55) in second.machine.vm.routes.values()
