"""Buses: ranges, lookups, handlers in Python and in C. A dict of addresses is the model."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chv._bus import FIRST_DEVICE_SLOT, Bus, CDevice, SlotNames, buffer_address
from chv.devices._timer import PmTimer
from chv.errors import BusError, DeviceError

SIZES = (1, 2, 4, 8)


class Cell:
    """Answers with its own number, so that the reader knows who answered."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.log: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return (self.number << 4 | offset & 0xF) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append((offset, size, value))


def make_bus(limit: int = 0x10000) -> Bus:
    return Bus("pio", limit, SlotNames())


# -- against a model ----------------------------------------------------------------------

bases = st.integers(0, 300)
ranges = st.tuples(bases, st.integers(1, 20))


@settings(deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("add"), ranges),
            st.tuples(st.just("remove"), bases),
            st.tuples(st.just("look"), st.tuples(bases, st.sampled_from(SIZES))),
        ),
        max_size=80,
    )
)
def test_any_sequence_of_changes_and_lookups_agrees_with_a_dict(steps: list[tuple[str, object]]) -> None:
    bus = make_bus()
    owner: dict[int, Cell] = {}
    cells: dict[int, tuple[int, Cell]] = {}  # base -> size, handler
    for number, (action, what) in enumerate(steps):
        if action == "add":
            assert isinstance(what, tuple)
            base, size = what
            cell = Cell(number)
            if any(address in owner for address in range(base, base + size)):
                with pytest.raises(BusError, match="overlaps"):
                    bus.add(base, size, cell)
            else:
                bus.add(base, size, cell)
                owner.update(dict.fromkeys(range(base, base + size), cell))
                cells[base] = (size, cell)
        elif action == "remove":
            assert isinstance(what, int)
            if what in cells:
                bus.remove(what)
                size, _ = cells.pop(what)
                for address in range(what, what + size):
                    del owner[address]
            else:
                with pytest.raises(BusError, match="no pio range starts"):
                    bus.remove(what)
        else:
            assert isinstance(what, tuple)
            address, size = what
            holders = {owner.get(a) for a in range(address, address + size)}
            found = holders.pop() if len(holders) == 1 else None
            if found is None:
                assert bus.read(address, size) == (1 << 8 * size) - 1
                bus.write(address, size, 0x77)
            else:
                base = next(b for b, (_, cell) in cells.items() if cell is found)
                assert bus.read(address, size) == found.read(address - base, size)
                bus.write(address, size, number)
                assert found.log[-1] == (address - base, size, number & (1 << 8 * size) - 1)
    assert bus.ranges() == [(base, cells[base][0], "Cell") for base in sorted(cells)]


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=12, unique=True))
def test_ranges_anywhere_in_64_bits_are_found_at_both_ends(points: list[int]) -> None:
    points = sorted({max(p, 1) for p in points})
    bus = Bus("mmio", 0, SlotNames())
    added: list[tuple[int, int, Cell]] = []
    for number, (base, following) in enumerate(zip(points, [*points[1:], 1 << 64], strict=True)):
        cell = Cell(number)
        bus.add(base, following - base, cell)
        added.append((base, following - base, cell))
    for base, size, cell in added:
        assert bus.read(base, 1) == cell.read(0, 1)
        assert bus.read(base + size - 1, 1) == cell.read(size - 1, 1)
        if base + size < 1 << 64:
            assert bus.read(base + size - 1, 2) == 0xFFFF
    assert bus.read(points[0] - 1, 1) == 0xFF


# -- adding ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "size"),
    [(0, 0), (0, -1), (-1, 1), (-1, 4), (0xFFFF, 2), (0x10000, 1), (0, 0x10001), (1 << 70, 1)],
)
def test_a_range_outside_the_space_is_refused(base: int, size: int) -> None:
    with pytest.raises(BusError, match=r"thing: range .* does not lie in the pio space \(0 to 0xffff\)"):
        make_bus().add(base, size, Cell(), "thing")


@pytest.mark.parametrize(
    ("base", "size"), [((1 << 64) - 1, 2), (1 << 64, 1), (0, 1 << 64), (0, (1 << 64) + 1)]
)
def test_a_range_that_wraps_is_refused(base: int, size: int) -> None:
    with pytest.raises(BusError, match="does not lie in the mmio space"):
        Bus("mmio", 0, SlotNames()).add(base, size, Cell())


def test_the_edges_of_the_space_are_allowed() -> None:
    bus = Bus("mmio", 0, SlotNames())
    bus.add((1 << 64) - 8, 8, Cell(1))
    bus.add(0, (1 << 64) - 8, Cell(2))
    assert bus.read((1 << 64) - 8, 8) == 0x10
    assert bus.read((1 << 64) - 16, 8) == 0x20


def test_an_overlap_names_both_and_changes_nothing() -> None:
    bus = make_bus()
    bus.add(0x3F8, 8, Cell(1), "serial")
    with pytest.raises(BusError) as caught:
        bus.add(0x3FF, 2, Cell(2), "other")
    assert str(caught.value) == "other: pio range 0x3ff-0x400 overlaps serial at 0x3f8-0x3ff"
    assert bus.ranges() == [(0x3F8, 8, "serial")]
    bus.add(0x400, 2, Cell(2), "other")


@pytest.mark.parametrize("handler", [object(), None, 5, lambda offset, size: 0])
def test_what_is_no_handler_is_refused(handler: object) -> None:
    with pytest.raises(BusError, match=r"thing: the handler has no read\(\) method"):
        make_bus().add(0, 1, handler, "thing")  # type: ignore[arg-type]


def test_a_handler_that_cannot_write_is_refused() -> None:
    class ReadOnly:
        def read(self, offset: int, size: int) -> int:
            return 0

    with pytest.raises(BusError, match=r"ReadOnly: the handler has no write\(\) method"):
        make_bus().add(0, 1, ReadOnly())  # type: ignore[arg-type]


def test_names_share_slots_and_run_out() -> None:
    names = SlotNames()
    assert names.take("a") == names.take("a") == FIRST_DEVICE_SLOT
    assert names.take("b") == FIRST_DEVICE_SLOT + 1
    for number in range(1984 - 2):
        names.take(f"device{number}")
    assert names.take("b") == FIRST_DEVICE_SLOT + 1
    with pytest.raises(BusError, match="one more: too many devices; 1984 are allowed"):
        names.take("one more")


# -- accesses --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, 5, 16, -1, 1 << 40])
def test_sizes_that_no_processor_has_are_refused(size: int) -> None:
    bus = make_bus()
    with pytest.raises(ValueError, match="not an access size"):
        bus.read(0, size)
    with pytest.raises(ValueError, match="not an access size"):
        bus.write(0, size, 0)


@given(value=st.integers(0, (1 << 70) - 1), size=st.sampled_from(SIZES))
def test_a_write_brings_the_low_bytes(value: int, size: int) -> None:
    bus, cell = make_bus(), Cell()
    bus.add(0, 8, cell)
    bus.write(0, size, value)
    assert cell.log == [(0, size, value & (1 << 8 * size) - 1)]


class Answers:
    def __init__(self, value: object) -> None:
        self.value = value

    def read(self, offset: int, size: int) -> object:
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        raise AssertionError


@given(value=st.integers(-(1 << 70), 1 << 70), size=st.sampled_from(SIZES))
def test_a_read_gives_what_the_handler_returned_or_says_what_is_wrong(value: int, size: int) -> None:
    bus = make_bus()
    bus.add(0, 8, Answers(value))  # type: ignore[arg-type]
    if 0 <= value < 1 << 8 * size:
        assert bus.read(0, size) == value
    else:
        with pytest.raises(DeviceError) as caught:
            bus.read(0, size)
        assert str(caught.value) == (
            f"Answers.read(0x0, {size}) returned {value}; "
            f"allowed is an integer from 0 to {'0x' + 'ff' * size}"
        )


def test_an_exception_passes_through_once_and_is_not_kept() -> None:
    error = RuntimeError("no")

    class Failing(Cell):
        def read(self, offset: int, size: int) -> int:
            raise error

    bus = make_bus()
    bus.add(0, 1, Failing())
    before = sys.getrefcount(error)
    for _ in range(10):
        with pytest.raises(RuntimeError) as caught:
            bus.read(0, 1)
        assert caught.value is error
        del caught
        error.__traceback__ = None
    assert sys.getrefcount(error) == before


# -- lifetime --------------------------------------------------------------------------------


def test_a_bus_in_a_reference_cycle_goes_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    complaints: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)

    class Knows(Cell):
        bus: Bus

    cell = Knows()
    cell.bus = make_bus()
    cell.bus.add(0, 1, cell)
    cell.bus.add(8, 1, cell)
    cell.bus.remove(0)
    del cell
    gc.collect()
    assert complaints == []


def test_a_removed_handler_lives_as_long_as_the_bus() -> None:
    # A vCPU may be on its way into it.
    bus, cell = make_bus(), Cell()
    before = sys.getrefcount(cell)
    bus.add(0, 1, cell)
    bus.remove(0)
    assert sys.getrefcount(cell) > before
    del bus
    assert sys.getrefcount(cell) == before


def test_lookups_while_ranges_change() -> None:
    bus = make_bus()
    bus.add(0x100, 4, Cell(5))
    over = threading.Event()
    wrong: list[int] = []

    def look() -> None:
        while not over.is_set():
            if bus.read(0x102, 2) != 0x52 or bus.read(0x200, 1) not in (0xFF, 0x60):
                wrong.append(1)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        bus.add(0x200, 1, Cell(6))
        bus.add(0x10, 1, Cell(7))
        bus.remove(0x200)
        bus.remove(0x10)
    over.set()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- devices in C -----------------------------------------------------------------------------


def test_a_device_in_c_answers_on_a_bus_as_it_does_alone() -> None:
    bus, timer = make_bus(), PmTimer()
    bus.add(0x608, 4, timer)
    timer.pause()
    assert bus.read(0x608, 4) == timer.read(0, 4)
    assert bus.write(0x608, 4, 1) == timer.write(0, 4, 1) == 0


def test_a_device_without_functions_says_so() -> None:
    device = CDevice()
    with pytest.raises(DeviceError, match="no read handler"):
        device.read(0, 1)
    with pytest.raises(DeviceError, match="no write handler"):
        device.write(0, 1, 0)
    with pytest.raises(BusError, match="thing: the device has no handlers"):
        make_bus().add(0, 1, device, "thing")


def test_the_address_of_a_buffer() -> None:
    buffer = bytearray(b"abc")
    address = buffer_address(buffer)
    assert ctypes.string_at(address, 3) == b"abc"
    with pytest.raises((BufferError, ValueError, TypeError)):
        buffer_address(b"read only")


# -- ranges that move ------------------------------------------------------------------------


def test_a_movable_range_answers_where_it_is_placed() -> None:
    bus, cell = make_bus(), Cell(5)
    number = bus.add_movable(0x10, cell, "bar")
    assert bus.read(0, 1) == 0xFF, "nowhere at first, also not around address 0"
    bus.place(number, 0x100)
    assert bus.read(0x102, 1) == 0x52
    assert bus.read(0x10F, 2) == 0xFFFF, "an access that crosses its end is unclaimed"
    bus.place(number, 0x200)
    assert bus.read(0x102, 1) == 0xFF
    assert bus.read(0x203, 1) == 0x53
    bus.place(number, None)
    assert bus.read(0x203, 1) == 0xFF


def test_fixed_ranges_come_before_movable_ones_and_older_before_newer() -> None:
    bus, fixed, first, second = make_bus(), Cell(1), Cell(2), Cell(3)
    older, newer = bus.add_movable(0x10, first), bus.add_movable(0x10, second)
    bus.add(0x104, 4, fixed)
    bus.place(newer, 0x100)
    assert bus.read(0x100, 1) == 0x30
    bus.place(older, 0x100)
    assert bus.read(0x100, 1) == 0x20
    assert bus.read(0x105, 1) == 0x11
    bus.remove(0x104)
    assert bus.read(0x105, 1) == 0x25


def test_a_movable_range_may_end_with_the_address_space_but_not_pass_it() -> None:
    bus = make_bus()
    number = bus.add_movable(0x10, Cell(1))
    bus.place(number, 0xFFF0)
    assert bus.read(0xFFFF, 1) == 0x1F
    for base in (0xFFF1, -1, 1 << 64):
        with pytest.raises(BusError, match="does not lie in the pio space"):
            bus.place(number, base)
    with pytest.raises(BusError, match="no movable pio range has number 7"):
        bus.place(7, 0)


@pytest.mark.parametrize("size", [0, -1, 1 << 63])
def test_a_movable_range_has_a_sensible_size(size: int) -> None:
    with pytest.raises(BusError, match="allowed is 1 to"):
        make_bus().add_movable(size, Cell())


def test_too_many_movable_ranges_are_refused() -> None:
    bus, cell = make_bus(), Cell()
    for _ in range(256):
        bus.add_movable(1, cell, "bar")
    with pytest.raises(BusError, match="256 are allowed"):
        bus.add_movable(1, cell, "bar")


def test_moving_a_range_takes_no_memory() -> None:
    bus = make_bus()
    number = bus.add_movable(0x10, Cell(1))
    before = resident_kib()
    for step in range(200_000):
        bus.place(number, step & 0xFF00)
    assert resident_kib() - before < 4096


def resident_kib() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * 4


def test_accesses_while_a_range_moves_are_claimed_wholly_or_not_at_all() -> None:
    bus = make_bus(0)
    seen: set[int] = set()

    class Offsets:
        def read(self, offset: int, size: int) -> int:
            seen.add(offset)
            return offset

        def write(self, offset: int, size: int, value: int) -> None:
            raise AssertionError("nobody writes")

    number = bus.add_movable(0x10, Offsets())
    over = threading.Event()

    def move() -> None:
        while not over.is_set():
            bus.place(number, 0x1000)
            bus.place(number, 0x1008)

    thread = threading.Thread(target=move)
    thread.start()
    try:
        for _ in range(2000):
            assert bus.read(0x100C, 4) in (0xC, 4)
    finally:
        over.set()
        thread.join()
    assert seen <= {0xC, 4}
