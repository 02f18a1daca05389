"""The CPU hotplug registers, without a VM and without a guest: both sides are played here."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import asdict

from chv import layout
from chv.cpu_hotplug import (
    EJECT,
    FLAGS,
    INSERTING,
    MAXIMUM,
    NEXT,
    NONE,
    OST_EVENT,
    OST_STATUS,
    PRESENT,
    REMOVING,
    SELECT,
    CpuHotplug,
)
from chv.errors import ConfigError, ResizeError, ResizePending


class Guest:
    """The guest's half, as its AML does it, and a list of what was ejected."""

    def __init__(self, boot: int = 2, maximum: int = 4) -> None:
        self.ejected: list[int] = []
        self.cpus = CpuHotplug(boot, maximum, self.ejected.append)

    def flags(self, index: int) -> int:
        self.cpus.write(SELECT, 4, index)
        return self.cpus.read(FLAGS, 1)

    def command(self, index: int, value: int) -> None:
        self.cpus.write(SELECT, 4, index)
        self.cpus.write(FLAGS, 1, value)

    def next(self, index: int) -> int:
        self.cpus.write(SELECT, 4, index)
        return self.cpus.read(NEXT, 4)

    def ost(self, index: int, event: int, status: int) -> None:
        self.cpus.write(SELECT, 4, index)
        self.cpus.write(OST_EVENT, 4, event)
        self.cpus.write(OST_STATUS, 4, status)


def test_boot() -> None:
    guest = Guest(boot=2, maximum=4)
    assert [guest.flags(index) for index in range(4)] == [PRESENT, PRESENT, 0, 0]
    assert [slot.acknowledged for slot in guest.cpus.slots] == [True, True, False, False]
    assert guest.cpus.present_count == 2
    assert guest.next(0) == NONE


@pytest.mark.parametrize("boot", [0, -1, 5])
def test_boot_count_out_of_range(boot: int) -> None:
    with pytest.raises(ConfigError, match=rf"cpus\.boot_vcpus: {boot} is not in 1\.\.4"):
        Guest(boot=boot, maximum=4)


@pytest.mark.parametrize("maximum", [0, -1, MAXIMUM + 1])
def test_maximum_out_of_range(maximum: int) -> None:
    with pytest.raises(ConfigError, match=r"cpus\.max_vcpus"):
        Guest(boot=1, maximum=maximum)


def test_insertion() -> None:
    guest = Guest()
    guest.cpus.insert(2)
    assert guest.flags(2) == PRESENT | INSERTING
    assert guest.next(0) == 2
    assert guest.next(3) == NONE
    assert not guest.cpus.slots[2].acknowledged
    guest.command(2, INSERTING)
    assert guest.flags(2) == PRESENT
    assert guest.next(0) == NONE
    assert guest.cpus.slots[2].acknowledged
    assert guest.cpus.present_count == 3


def test_acknowledging_what_was_not_inserted_has_no_effect() -> None:
    guest = Guest()
    guest.command(3, INSERTING)
    assert not guest.cpus.slots[3].acknowledged


def test_removal_is_honoured_long_after_its_notice_was_acknowledged() -> None:
    guest = Guest()
    guest.cpus.request_removal(1)
    assert guest.flags(1) == PRESENT | REMOVING
    guest.command(1, REMOVING)
    assert guest.flags(1) == PRESENT
    assert guest.next(0) == NONE
    assert guest.cpus.removal_pending
    assert guest.ejected == []
    guest.command(1, EJECT)
    assert guest.ejected == [1]
    assert guest.flags(1) == 0
    assert not guest.cpus.removal_pending
    assert guest.cpus.present_count == 1
    assert not guest.cpus.slots[1].acknowledged


def test_eject_before_the_acknowledgement() -> None:
    guest = Guest()
    guest.cpus.request_removal(1)
    guest.command(1, REMOVING | EJECT)
    assert guest.ejected == [1]
    assert guest.flags(1) == 0


@pytest.mark.parametrize("index", [0, 1, 3])
def test_an_eject_that_nobody_asked_for_is_ignored_and_counted(index: int) -> None:
    guest = Guest()
    guest.command(index, EJECT)
    assert guest.ejected == []
    assert guest.cpus.present_count == 2
    assert guest.cpus.ignored_ejects == 1


def test_a_second_eject_is_ignored() -> None:
    guest = Guest()
    guest.cpus.request_removal(1)
    guest.command(1, EJECT)
    guest.command(1, EJECT)
    assert guest.ejected == [1]
    assert guest.cpus.ignored_ejects == 1


def test_on_eject_may_use_the_registers() -> None:
    seen: list[int] = []
    cpus = CpuHotplug(2, 2, lambda index: seen.append(cpus.present_count))
    cpus.request_removal(1)
    cpus.write(SELECT, 4, 1)
    cpus.write(FLAGS, 1, EJECT)
    assert seen == [1]


def test_add_and_remove_twenty_times() -> None:
    guest = Guest(boot=1, maximum=2)
    for _ in range(20):
        guest.cpus.insert(1)
        guest.command(1, INSERTING)
        guest.cpus.request_removal(1)
        guest.command(1, REMOVING)
        guest.command(1, EJECT)
        guest.ost(1, 3, 0)
    assert guest.ejected == [1] * 20
    assert guest.cpus.ignored_ejects == 0
    assert not guest.cpus.slots[1].refused


def test_inserted_and_asked_to_go_before_the_guest_looked() -> None:
    guest = Guest()
    guest.cpus.insert(2)
    guest.cpus.request_removal(2)
    assert guest.flags(2) == PRESENT | INSERTING | REMOVING
    guest.command(2, INSERTING | REMOVING)
    assert guest.flags(2) == PRESENT
    guest.command(2, EJECT)
    assert guest.ejected == [2]


@pytest.mark.parametrize(
    ("index", "error"),
    [(0, "vCPU 0 cannot be removed"), (2, "not present"), (4, "0..3"), (-1, "0..3")],
)
def test_removals_that_cannot_be_asked_for(index: int, error: str) -> None:
    guest = Guest()
    with pytest.raises(ResizeError, match=error):
        guest.cpus.request_removal(index)
    assert not guest.cpus.removal_pending


@pytest.mark.parametrize(("index", "error"), [(0, "present already"), (4, "0..3"), (-1, "0..3")])
def test_insertions_that_cannot_be(index: int, error: str) -> None:
    with pytest.raises(ResizeError, match=error):
        Guest().cpus.insert(index)


def test_no_insertion_while_the_removal_is_pending() -> None:
    guest = Guest()
    guest.cpus.request_removal(1)
    with pytest.raises(ResizePending, match="vCPU 1"):
        guest.cpus.insert(1)


# _OST statuses of an ejection: ACPI 6.5, 6.3.5.
@pytest.mark.parametrize("event", [3, 0x103])
@pytest.mark.parametrize(
    ("status", "refused"),
    [(0, False), (0x84, False), (1, True), (2, True), (0x80, True), (0x81, True), (0x82, True), (0x83, True)],
)
def test_a_refusal_cancels_the_removal(event: int, status: int, refused: bool) -> None:
    guest = Guest()
    guest.cpus.request_removal(1)
    guest.ost(1, event, status)
    slot = guest.cpus.slots[1]
    assert (slot.ost_event, slot.ost_status) == (event, status)
    assert slot.refused is refused
    assert guest.cpus.removal_pending is not refused
    assert slot.present
    guest.command(1, EJECT)
    assert guest.ejected == ([] if refused else [1])


def test_a_failed_insertion_is_recorded_and_cancels_nothing() -> None:
    guest = Guest()
    guest.cpus.request_removal(1)
    guest.ost(1, 1, 1)
    assert (guest.cpus.slots[1].ost_event, guest.cpus.slots[1].ost_status) == (1, 1)
    assert guest.cpus.removal_pending
    assert not guest.cpus.slots[1].refused


def test_asking_again_after_a_refusal() -> None:
    guest = Guest()
    guest.cpus.request_removal(1)
    guest.command(1, REMOVING)
    guest.ost(1, 3, 0x82)
    guest.cpus.request_removal(1)
    assert not guest.cpus.slots[1].refused
    assert guest.flags(1) == PRESENT | REMOVING
    guest.command(1, REMOVING | EJECT)
    assert guest.ejected == [1]


def test_the_ost_event_is_latched_and_read_back() -> None:
    guest = Guest()
    guest.cpus.write(OST_EVENT, 4, 0x103)
    assert guest.cpus.read(OST_EVENT, 4) == 0x103
    assert guest.cpus.slots[0].ost_event is None  # reported only with its status


def test_reset() -> None:
    guest = Guest(boot=1, maximum=4)
    guest.cpus.insert(1)
    guest.cpus.insert(2)
    guest.cpus.request_removal(1)
    guest.ost(2, 1, 1)
    guest.cpus.reset(3)
    assert [guest.flags(index) for index in range(4)] == [PRESENT] * 3 + [0]
    assert [slot.acknowledged for slot in guest.cpus.slots] == [True] * 3 + [False]
    assert not guest.cpus.removal_pending
    assert guest.cpus.slots[2].ost_event is None


def test_save_and_load() -> None:
    guest = Guest()
    guest.cpus.insert(2)
    guest.cpus.request_removal(1)
    guest.ost(0, 0x200, 0x80)
    guest.command(3, EJECT)
    other = Guest(boot=1)
    other.cpus.load(guest.cpus.save())
    assert other.cpus.save() == guest.cpus.save()
    assert other.cpus.read(SELECT, 4) == 3
    assert other.cpus.slots[0].ost_event == 0x200
    other.command(1, EJECT)
    assert other.ejected == [1]


def test_load_of_another_size() -> None:
    with pytest.raises(ConfigError, match="4 vCPUs, not of 8"):
        Guest(maximum=8).cpus.load(Guest(maximum=4).cpus.save())


@given(st.integers(0, 0xFFFFFFFF))
def test_a_vcpu_that_cannot_exist(index: int) -> None:
    guest = Guest(boot=2, maximum=4)
    before = [asdict(slot) for slot in guest.cpus.slots]
    if index >= 4:
        assert guest.flags(index) == 0
        guest.command(index, 0xFF)
        guest.ost(index, 3, 1)
        assert guest.next(index) == NONE
        assert [asdict(slot) for slot in guest.cpus.slots] == before
        assert guest.cpus.ignored_ejects == 0


REGISTERS = {(SELECT, 4), (FLAGS, 1), (NEXT, 4), (OST_EVENT, 4), (OST_STATUS, 4)}
ACCESSES = st.tuples(st.integers(0, layout.CPU_HOTPLUG_SIZE - 1), st.sampled_from([1, 2, 4]))


@given(st.lists(st.tuples(ACCESSES, st.booleans(), st.integers(0, 0xFFFFFFFF)), max_size=50))
def test_any_access(accesses: list[tuple[tuple[int, int], bool, int]]) -> None:
    """A hostile guest: nothing raises, reads fit their width, nothing is ejected or comes to be present."""
    guest = Guest(boot=2, maximum=4)
    guest.cpus.insert(2)
    for (offset, size), write, value in accesses:
        value &= (1 << 8 * size) - 1
        if write:
            before = guest.cpus.save()
            guest.cpus.write(offset, size, value)
            if (offset, size) not in REGISTERS:
                assert guest.cpus.save() == before
        else:
            read = guest.cpus.read(offset, size)
            assert 0 <= read < 1 << 8 * size
            if (offset, size) not in REGISTERS:
                assert read == 0
    assert guest.ejected == []
    assert guest.cpus.present_count == 3


class Both(RuleBasedStateMachine):
    """Host and guest act in any order; the slots agree with a simple account of what must be so."""

    def __init__(self) -> None:
        super().__init__()
        self.guest = Guest(boot=2, maximum=4)
        self.present = {0, 1}
        self.asked: set[int] = set()

    @rule(index=st.integers(0, 3))
    def insert(self, index: int) -> None:
        if index in self.present:
            with pytest.raises(ResizeError):
                self.guest.cpus.insert(index)
        else:
            self.guest.cpus.insert(index)
            self.present.add(index)

    @rule(index=st.integers(0, 3))
    def remove(self, index: int) -> None:
        if index == 0 or index not in self.present:
            with pytest.raises(ResizeError):
                self.guest.cpus.request_removal(index)
        else:
            self.guest.cpus.request_removal(index)
            self.asked.add(index)

    @rule()
    def scan(self) -> None:
        index = 0
        while (index := self.guest.next(index)) != NONE:
            flags = self.guest.flags(index)
            assert flags & (INSERTING | REMOVING)
            self.guest.command(index, flags & (INSERTING | REMOVING))
        assert not any(slot.inserting or slot.removing for slot in self.guest.cpus.slots)

    @rule(index=st.integers(0, 5))
    def eject(self, index: int) -> None:
        before = list(self.guest.ejected)
        self.guest.command(index, EJECT)
        assert self.guest.ejected == before + ([index] if index in self.asked else [])
        if index in self.asked:
            self.asked.remove(index)
            self.present.remove(index)

    @rule(
        index=st.integers(0, 5), event=st.sampled_from([0, 1, 3, 0x103]), status=st.sampled_from([0, 1, 0x84])
    )
    def report(self, index: int, event: int, status: int) -> None:
        self.guest.ost(index, event, status)
        if event in (3, 0x103) and status == 1:
            self.asked.discard(index)

    @invariant()
    def agree(self) -> None:
        slots = self.guest.cpus.slots
        assert {slot.index for slot in slots if slot.present} == self.present
        assert {slot.index for slot in slots if slot.removal_pending} == self.asked
        assert self.guest.cpus.present_count == len(self.present)
        for slot in slots:
            assert slot.present or not (slot.inserting or slot.removing or slot.acknowledged)
            assert slot.removal_pending or not slot.removing


TestBoth = Both.TestCase


def test_from_many_threads() -> None:
    """One side asks, another gives back: every vCPU goes exactly once, whatever the order."""
    ejected: list[int] = []
    cpus = CpuHotplug(64, 64, ejected.append)
    lock = threading.Lock()  # the guest's own, as its AML has one: select and command belong together

    def give_back() -> None:
        for index in range(64):
            while index and cpus.slots[index].present:
                with lock:
                    cpus.write(SELECT, 4, index)
                    cpus.write(FLAGS, 1, EJECT)

    guests = [threading.Thread(target=give_back) for _ in range(3)]
    for thread in guests:
        thread.start()
    for index in range(1, 64):
        cpus.request_removal(index)
    for thread in guests:
        thread.join(60)
    assert sorted(ejected) == list(range(1, 64))
    assert cpus.present_count == 1
