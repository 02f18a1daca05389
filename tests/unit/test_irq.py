"""Interrupts of PCI devices: by message, by pin, or not at all; what would reach KVM is seen in its stead."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from chv._irq import IrqLine, IrqSource, IrqStatus
from chv.interrupts import GsiRoutes


class FakeVm:
    """Keeps what KVM would have been told."""

    def __init__(self) -> None:
        self.routes: list[dict[int, tuple[int, int]]] = []
        self.connected: dict[int, int] = {}

    def set_routes(self, pins: int, messages: dict[int, tuple[int, int]]) -> None:
        assert pins == 24
        self.routes.append(dict(messages))

    def irqfd(self, eventfd: int, gsi: int, assign: bool = True) -> None:
        if assign:
            assert gsi not in self.connected
            self.connected[gsi] = eventfd
        else:
            assert self.connected.pop(gsi) == eventfd


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def raised(fd: int) -> int:
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(fd)
    return 0


def test_a_cause_interrupts_by_message_by_pin_or_not_at_all(eventfd: int) -> None:
    line = IrqLine(-1, 17)
    status = IrqStatus(line, 3)
    queue, config = IrqSource(status, 1), IrqSource(status, 2)
    queue.use_message(eventfd)
    queue.pulse()
    assert (raised(eventfd), status.value, line.asserted) == (1, 0, 0)
    queue.use_nothing()
    queue.pulse()
    assert (raised(eventfd), status.value, line.asserted) == (0, 0, 0)
    queue.use_pin()
    queue.pulse()
    config.pulse()
    assert (status.value, line.asserted) == (3, 1 << 3)
    assert status.take() == 3
    assert (status.value, line.asserted) == (0, 0)


def test_a_shared_line_stays_high_until_its_last_device_lets_go() -> None:
    line = IrqLine(-1, 16)
    one, other = IrqStatus(line, 0), IrqStatus(line, 31)
    IrqSource(one).pulse()
    IrqSource(other).pulse()
    assert line.asserted == 1 | 1 << 31
    one.take()
    assert line.asserted == 1 << 31
    other.take()
    assert line.asserted == 0


def test_a_cause_without_status_goes_nowhere() -> None:
    source = IrqSource()
    source.pulse()
    assert source.status is None


def test_vectors_get_messages_above_the_pins_and_keep_what_is_raised_while_masked() -> None:
    vm = FakeVm()
    routes = GsiRoutes(vm, 24)  # type: ignore[arg-type]
    first, second = routes.vector(), routes.vector()
    try:
        assert (first.gsi, second.gsi) == (24, 25)
        os.eventfd_write(first.fd, 1)
        assert first.pending
        assert not second.pending
        first.unmask(0xFEE00000, 0x41)
        assert vm.connected == {24: first.fd}
        assert vm.routes[-1] == {24: (0xFEE00000, 0x41)}
        assert not first.pending, "KVM has it now"
        changes = len(vm.routes)
        first.unmask(0xFEE00000, 0x41)
        assert len(vm.routes) == changes, "the same message costs no new table"
        first.unmask(0xFEE01000, 0x42)
        assert vm.routes[-1] == {24: (0xFEE01000, 0x42)}
        first.reset()
        assert vm.connected == {}
        assert not first.pending
    finally:
        first.close()
        second.close()
    assert first.fd == -1


def test_a_gated_pin_stays_low_and_is_raised_when_the_gate_opens() -> None:
    line = IrqLine(-1, 16)
    one, other = IrqStatus(line, 1), IrqStatus(line, 2)
    one.gate(True)
    IrqSource(one).pulse()
    assert (one.value, line.asserted) == (1, 0)
    IrqSource(other).pulse()
    assert line.asserted == 1 << 2, "only its own pin is gated"
    one.gate(False)
    assert line.asserted == 1 << 1 | 1 << 2
    one.gate(True)
    other.take()
    assert line.asserted == 0
    assert one.take() == 1
    one.gate(False)
    assert line.asserted == 0, "nothing waits any more"
    IrqStatus(None).gate(True)
