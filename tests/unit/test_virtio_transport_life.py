"""The life of a transport: devices that fail, resets in the middle of work, vCPUs at once, the end, state."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from chv._virtqueue import Queue
from chv.virtio.device import F_EVENT_IDX, F_RING_RESET, F_VERSION_1

from .pci_machine import Echo, PciMachine
from .test_virtio_pci import Driver
from .test_virtio_transport import FIELDS

STATUS, ISR, TABLE = 0x14, 0x2000, 0x8000
OK, NEEDS_RESET = 15, 64
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
