"""The event device and the power registers."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chv.acpi.ged import Event, Ged
from chv.acpi.power import RESET_VALUE, SLEEP_VALUE, PowerRegisters


class Line:
    def __init__(self) -> None:
        self.pulses = 0

    def pulse(self) -> None:
        self.pulses += 1


def test_an_event_is_read_once() -> None:
    line = Line()
    ged = Ged(line)
    assert ged.read(0, 1) == 0
    ged.notify(Event.CPU)
    assert line.pulses == 1
    assert ged.read(0, 1) == 1
    assert ged.read(0, 1) == 0


def test_events_add_up_until_they_are_read() -> None:
    line = Line()
    ged = Ged(line)
    ged.notify(Event.CPU)
    ged.notify(Event.POWER_BUTTON | Event.MEMORY)
    ged.notify(Event.CPU)
    assert line.pulses == 3
    assert ged.read(0, 1) == 0b1011
    assert ged.read(0, 1) == 0


def test_the_interrupt_is_repeated_for_what_was_not_read() -> None:
    line = Line()
    ged = Ged(line)
    assert ged.repeat() is False
    assert line.pulses == 0
    ged.notify(Event.CPU)
    assert ged.repeat() is True
    assert line.pulses == 2
    ged.read(0, 1)
    assert ged.repeat() is False
    assert line.pulses == 2


@given(st.integers(0, 3), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF))
def test_other_accesses(offset: int, size: int, value: int) -> None:
    ged = Ged(Line())
    ged.notify(Event.PCI)
    ged.write(offset, size, value)
    if (offset, size) != (0, 1):
        assert ged.read(offset, size) == 0
    assert ged.read(0, 1) == 4  # neither a write nor a stray read takes the event away


def test_ged_state() -> None:
    ged = Ged(Line())
    ged.notify(Event.CPU | Event.POWER_BUTTON)
    other = Ged(Line())
    other.load(ged.save())
    assert other.read(0, 1) == 9
    ged.reset()
    assert ged.read(0, 1) == 0


def test_no_event_is_lost_between_threads() -> None:
    ged = Ged(Line())
    seen = 0
    done = threading.Event()

    def notify(event: Event) -> None:
        for _ in range(500):
            ged.notify(event)

    def read() -> None:
        nonlocal seen
        while not done.is_set():
            seen |= ged.read(0, 1)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=notify, args=(event,)) for event in Event]
    for thread in [reader, *writers]:
        thread.start()
    for thread in writers:
        thread.join(60)
    done.set()
    reader.join(60)
    assert seen | ged.read(0, 1) == 0b1111
    assert ged.read(0, 1) == 0


class Machine:
    def __init__(self) -> None:
        self.actions: list[str] = []
        self.power = PowerRegisters(
            lambda: self.actions.append("reset"), lambda: self.actions.append("shutdown")
        )


@pytest.mark.parametrize(("value", "action"), [(1, "reset"), (0x34, "shutdown")])
def test_actions(value: int, action: str) -> None:
    machine = Machine()
    machine.power.write(0, 1, value)
    assert machine.actions == [action]


@given(st.integers(0, 3), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF))
def test_everything_else_has_no_effect(offset: int, size: int, value: int) -> None:
    machine = Machine()
    machine.power.write(offset, size, value)
    expected = []
    if (offset, size) == (0, 1) and value in (RESET_VALUE, SLEEP_VALUE):
        expected = ["reset" if value == RESET_VALUE else "shutdown"]
    assert machine.actions == expected
    assert machine.power.read(offset, size) == 0


def test_power_state() -> None:
    machine = Machine()
    machine.power.load(machine.power.save())
    assert machine.power.save() == {}
