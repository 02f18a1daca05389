"""Guest memory: both sides of the hole below 4 GiB, and bounds."""

from __future__ import annotations

import array
import ctypes
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chv.errors import ConfigError, GuestMemoryError
from chv.layout import HIGH_RAM, LOW_RAM_END, PAGE_SIZE, RAM_32BIT_END, RAM_64BIT, GiB, MiB
from chv.memory import GuestMemory

SMALL = 2 * MiB
LARGE = 6 * GiB  # 3 GiB on each side; pages that nobody touches cost nothing
LARGE_END = RAM_64BIT + LARGE - RAM_32BIT_END


@pytest.fixture(scope="module")
def small() -> Iterator[GuestMemory]:
    memory = GuestMemory(SMALL)
    yield memory
    memory.close()


@pytest.fixture(scope="module")
def large() -> Iterator[GuestMemory]:
    memory = GuestMemory(LARGE)
    yield memory
    memory.close()


@pytest.mark.parametrize("size", [0, -PAGE_SIZE, 1, PAGE_SIZE - 1, PAGE_SIZE + 1])
def test_sizes_that_are_no_pages_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"memory.size: {size} is not a positive multiple of 4096"):
        GuestMemory(size)


def test_more_than_the_host_can_map_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory.size: the host cannot map"):
        GuestMemory(1 << 60)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (PAGE_SIZE, [(0, PAGE_SIZE)]),
        (RAM_32BIT_END - PAGE_SIZE, [(0, RAM_32BIT_END - PAGE_SIZE)]),
        (RAM_32BIT_END, [(0, RAM_32BIT_END)]),
        (RAM_32BIT_END + PAGE_SIZE, [(0, RAM_32BIT_END), (RAM_64BIT, PAGE_SIZE)]),
        (LARGE, [(0, RAM_32BIT_END), (RAM_64BIT, LARGE - RAM_32BIT_END)]),
    ],
)
def test_memory_lies_on_both_sides_of_the_hole(size: int, expected: list[tuple[int, int]]) -> None:
    memory = GuestMemory(size)
    try:
        assert [(region.base, region.size) for region in memory.regions] == expected
        assert sum(region.size for region in memory.regions) == memory.size == size
    finally:
        memory.close()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (PAGE_SIZE, [(0, PAGE_SIZE)]),
        (LOW_RAM_END, [(0, LOW_RAM_END)]),
        (MiB, [(0, LOW_RAM_END)]),
        (MiB + PAGE_SIZE, [(0, LOW_RAM_END), (HIGH_RAM, PAGE_SIZE)]),
        (LARGE, [(0, LOW_RAM_END), (HIGH_RAM, RAM_32BIT_END - HIGH_RAM), (RAM_64BIT, 3 * GiB)]),
    ],
)
def test_the_memory_map_leaves_the_tables_area_out(size: int, expected: list[tuple[int, int]]) -> None:
    memory = GuestMemory(size)
    try:
        assert list(memory.memory_map()) == expected
    finally:
        memory.close()


EDGES = [0, 1, PAGE_SIZE - 1, RAM_32BIT_END - 8, RAM_64BIT, RAM_64BIT + 1, LARGE_END - 8]


@pytest.mark.parametrize("address", EDGES)
def test_what_is_written_is_read_at_every_edge(large: GuestMemory, address: int) -> None:
    large.write(address, b"12345678")
    assert large.read(address, 8) == b"12345678"
    with large.view(address, 4) as view:
        assert bytes(view) == b"1234"
        view[:2] = b"ab"
    assert large.read(address, 4) == b"ab34"
    region = large.find(address, 8)
    assert ctypes.string_at(region.address + address - region.base, 4) == b"ab34"


OUTSIDE = [
    (-1, 1),
    (-1, 2),
    (-8, 8),
    (RAM_32BIT_END - 1, 2),
    (RAM_32BIT_END, 1),
    (RAM_64BIT - 1, 1),
    (RAM_64BIT - 1, 2),
    (RAM_32BIT_END - 4, RAM_64BIT - RAM_32BIT_END + 8),
    (LARGE_END - 1, 2),
    (LARGE_END, 1),
    (1 << 64, 1),
    ((1 << 64) - 1, 2),
    (0, LARGE),
    (0, -1),
    (8, -4),
]


@pytest.mark.parametrize(("address", "length"), OUTSIDE)
def test_what_is_not_wholly_in_ram_is_refused(large: GuestMemory, address: int, length: int) -> None:
    for call in (large.find, large.read, large.view):
        with pytest.raises(GuestMemoryError, match="are not in RAM"):
            call(address, length)


@pytest.mark.parametrize(("address", "length"), [(a, n) for a, n in OUTSIDE if 0 < n < 16])
def test_writes_beyond_ram_change_nothing(large: GuestMemory, address: int, length: int) -> None:
    with pytest.raises(GuestMemoryError):
        large.write(address, b"x" * length)


def test_the_message_says_what_is_ram(large: GuestMemory) -> None:
    with pytest.raises(GuestMemoryError) as caught:
        large.read(RAM_32BIT_END, 4)
    assert str(caught.value) == (
        "4 bytes at guest address 0xc0000000 are not in RAM (0x0-0xbfffffff, 0x100000000-0x1bfffffff)"
    )


@given(st.data())
@settings(max_examples=200)
def test_any_sequence_of_writes_reads_back_like_a_bytearray(data: st.DataObject) -> None:
    model = bytearray(PAGE_SIZE)
    memory = GuestMemory(PAGE_SIZE, thp=False)
    try:
        for address, content in data.draw(
            st.lists(st.tuples(st.integers(-8, PAGE_SIZE + 8), st.binary(max_size=64)), max_size=20)
        ):
            if address >= 0 and address + len(content) <= PAGE_SIZE:
                memory.write(address, content)
                model[address : address + len(content)] = content
            else:
                with pytest.raises(GuestMemoryError):
                    memory.write(address, content)
        assert memory.read(0, PAGE_SIZE) == model
    finally:
        memory.close()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_every_kind_of_bytes_can_be_written(small: GuestMemory, kind: type) -> None:
    small.write(0x1000, kind(b"abc"))
    assert small.read(0x1000, 3) == b"abc"


def test_wider_elements_are_written_as_their_bytes(small: GuestMemory) -> None:
    small.write(0x1000, memoryview(array.array("I", [0x04030201, 0x08070605])))
    assert small.read(0x1000, 8) == bytes(range(1, 9))


def test_nothing_can_be_read_and_written_anywhere_in_ram(small: GuestMemory) -> None:
    for address in (0, 5, SMALL):
        assert small.read(address, 0) == b""
        small.write(address, b"")
    with pytest.raises(GuestMemoryError):
        small.read(SMALL + 1, 0)


def test_clear_makes_all_of_it_zeros(large: GuestMemory) -> None:
    for address in EDGES:
        large.write(address, b"\xff" * 8)
    large.clear()
    assert all(large.read(address, 8) == bytes(8) for address in EDGES)


def test_memory_is_zeros_at_first() -> None:
    memory = GuestMemory(SMALL)
    try:
        assert memory.read(0, SMALL) == bytes(SMALL)
    finally:
        memory.close()


def test_closing_waits_for_views() -> None:
    memory = GuestMemory(PAGE_SIZE)
    view = memory.view(0, 8)
    with pytest.raises(BufferError):
        memory.close()
    view.release()
    memory.close()
    memory.close()
    with pytest.raises(GuestMemoryError):
        memory.read(0, 1)
