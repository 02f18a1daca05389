"""The CPU hotplug registers and the AML that uses them, with each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chv import cpu_hotplug
from chv.cpu_hotplug import FLAGS, NEXT, OST_EVENT, OST_STATUS, SELECT, CpuHotplug

from .aml_interpreter import Interpreter

FIELDS = {
    b"CSEL": (SELECT, 4),
    b"CFLG": (FLAGS, 1),
    b"CNXT": (NEXT, 4),
    b"CEVT": (OST_EVENT, 4),
    b"COSC": (OST_STATUS, 4),
}


class Machine:
    def __init__(self, boot: int, maximum: int) -> None:
        self.ejected: list[int] = []
        self.cpus = CpuHotplug(boot, maximum, self.ejected.append)
        self.guest = Interpreter(self.cpus.aml(), FIELDS, self.cpus.read, self.cpus.write)

    def scan(self) -> tuple[list[tuple[str, int]], int]:
        """What the guest is told, and how many exits it took."""
        self.guest.notified.clear()
        self.guest.exits = 0
        self.guest.call(b"CSCN")
        assert self.guest.held == 0
        return list(self.guest.notified), self.guest.exits


def test_four_more_at_once() -> None:
    machine = Machine(4, 8)
    for index in range(4, 8):
        machine.cpus.insert(index)
    told, exits = machine.scan()
    assert told == [("C004", 1), ("C005", 1), ("C006", 1), ("C007", 1)]
    assert exits == 1 + 4 * 4  # select 4 too, then for each: select, next, flags, acknowledge
    assert [slot.acknowledged for slot in machine.cpus.slots] == [True] * 8
    assert machine.scan() == ([], 2)
    assert [machine.guest.call(b"CSTA", index) for index in range(8)] == [0x0F] * 8


def test_down_to_two_and_up_again() -> None:
    machine = Machine(8, 8)
    for index in range(2, 8):
        machine.cpus.request_removal(index)
    told, _ = machine.scan()
    assert told == [(f"C00{index}", 3) for index in range(2, 8)]
    for index in (7, 2, 5, 3):
        machine.guest.call(b"CEJ0", index)
    machine.guest.call(b"COST", 4, 3, 0x82)
    assert machine.ejected == [7, 2, 5, 3]
    assert [slot.index for slot in machine.cpus.slots if slot.present] == [0, 1, 4, 6]
    assert [slot.index for slot in machine.cpus.slots if slot.refused] == [4]
    assert [slot.index for slot in machine.cpus.slots if slot.removal_pending] == [6]
    machine.guest.call(b"CEJ0", 4)
    assert machine.cpus.ignored_ejects == 1
    machine.cpus.insert(2)
    assert machine.scan()[0] == [("C002", 1)]
    assert [bool(machine.guest.call(b"CSTA", index)) for index in range(8)] == [
        slot.present for slot in machine.cpus.slots
    ]


@pytest.mark.parametrize("maximum", [1, 2, 3, 254, 300, 1024])
def test_a_scan_costs_what_there_is_to_tell(maximum: int) -> None:
    machine = Machine(1, maximum)
    assert machine.scan() == ([], 2)
    if maximum > 1:
        machine.cpus.insert(maximum - 1)
        told, exits = machine.scan()
        assert told == [(f"C{maximum - 1:03X}", 1)]
        assert exits <= 7


@given(st.data())
def test_each_news_is_told_once(data: st.DataObject) -> None:
    maximum = data.draw(st.integers(1, 40))
    boot = data.draw(st.integers(1, maximum))
    machine = Machine(boot, maximum)
    inserted = data.draw(st.sets(st.integers(boot, maximum - 1))) if boot < maximum else set()
    removed = (
        data.draw(st.sets(st.sampled_from([*range(1, boot), *inserted])))
        if boot + len(inserted) > 1
        else set()
    )
    for index in inserted:
        machine.cpus.insert(index)
    for index in removed:
        machine.cpus.request_removal(index)
    told, exits = machine.scan()
    expected = [(f"C{index:03X}", 1) for index in inserted] + [(f"C{index:03X}", 3) for index in removed]
    assert sorted(told) == sorted(expected)
    assert exits <= 2 + 5 * len(inserted | removed)
    assert machine.scan() == ([], 2)
    for index in removed:
        machine.guest.call(b"CEJ0", index)
    assert sorted(machine.ejected) == sorted(removed)
    assert machine.cpus.ignored_ejects == 0
    assert machine.scan() == ([], 2)


@given(st.lists(st.integers(0, 0xFFFFFFFF), min_size=1, max_size=20), st.integers(1, 40))
def test_a_scan_ends_whatever_the_registers_say(values: list[int], maximum: int) -> None:
    reads = 0

    def read(offset: int, size: int) -> int:
        nonlocal reads
        reads += 1
        assert reads < 10 * maximum + 10
        return values[reads % len(values)] & (1 << 8 * size) - 1

    guest = Interpreter(cpu_hotplug.aml(maximum), FIELDS, read, lambda offset, size, value: None)
    guest.call(b"CSCN")
    assert guest.held == 0
    assert len(guest.notified) <= 2 * maximum
