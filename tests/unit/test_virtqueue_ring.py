"""The ring's rules: what a chain may be, and what breaks a ring."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chv._irq import IrqSource
from chv._virtqueue import Queue, RamMap
from chv.memory import GuestMemory
from tests.virtio_driver import DESCRIPTOR, INDIRECT, NEXT, WRITE, QueueBench, Ring

MiB = 1 << 20
SIZE = 8
RAM = 16 * MiB
TOP = (1 << 64) - 1

NOT_IN_RAM = "a buffer or a table of descriptors is not in RAM"
TOO_LONG = "a descriptor chain is longer than the queue"
BAD_INDIRECT = "an indirect descriptor is nested, of a bad length, chained on, or was not negotiated"
BAD_ORDER = "a readable buffer follows a writable one"
BEYOND_TABLE = "a descriptor's index is beyond its table"
BAD_INDEX = "the available index is further ahead than the queue is long"
BAD_RING = "a part of the ring is misaligned or not in RAM"


def table(ring: Ring, entries: list[tuple[int, int, int, int]], address: int = 0x200000) -> tuple[int, int]:
    """A table of indirect descriptors in memory; (address, bytes)."""
    data = b"".join(DESCRIPTOR.pack(*entry) for entry in entries)
    ring.memory.write(address, data)
    return address, len(data)


# -- chains that are right ---------------------------------------------------------------------


@pytest.mark.parametrize("indirect", [False, True])
@given(
    readable=st.lists(st.binary(min_size=1, max_size=40), max_size=4),
    writable=st.lists(st.integers(1, 40), max_size=4),
)
def test_a_chain_is_its_buffers_in_order(indirect: bool, readable: list[bytes], writable: list[int]) -> None:
    if not readable and not writable:
        readable = [b"x"]
    with QueueBench(SIZE, indirect=True) as bench:
        head = bench.ring.add(readable, writable, indirect=indirect)
        chain = bench.queue.pop()
        assert chain is not None
        assert chain.head == head
        assert [bytes(view) for view in chain.readable] == readable
        assert [len(view) for view in chain.writable] == writable
        assert chain.readable_bytes == sum(map(len, readable))
        assert chain.writable_bytes == sum(writable)
        assert bench.queue.pop() is None
        assert bench.queue.error is None


def test_buffers_of_length_0_are_left_out_wherever_they_point() -> None:
    with QueueBench() as bench:
        bench.ring.add_buffers(
            [(TOP, 0, 0), (0x1000, 5, 0), (TOP, 0, WRITE), (0x2000, 6, WRITE), (0, 0, WRITE)]
        )
        chain = bench.queue.pop()
        assert chain is not None
        assert [len(view) for view in chain.readable] == [5]
        assert [len(view) for view in chain.writable] == [6]


def test_a_chain_of_nothing_but_empty_buffers_comes_and_goes() -> None:
    with QueueBench() as bench:
        head = bench.ring.add_buffers([(TOP, 0, 0), (0, 0, WRITE)])
        chain = bench.queue.pop()
        assert chain is not None
        assert (chain.readable, chain.writable, chain.read(), chain.write(b"x")) == ([], [], b"", 0)
        chain.done()
        assert bench.ring.used() == [(head, 0)]


@pytest.mark.parametrize("size", [1, 2, 32768])
def test_a_chain_may_be_as_long_as_the_queue(size: int) -> None:
    with QueueBench(size) as bench:
        bench.ring.add_buffers([(0x1000 + n, 1, WRITE) for n in range(size)])
        chain = bench.queue.pop()
        assert chain is not None
        assert chain.writable_bytes == size


def test_ordinary_descriptors_may_lead_to_one_indirect_table() -> None:
    """virtio 1.2, 2.7.5.3.2: the device must handle it; the table's descriptor itself does not count."""
    with QueueBench(4, indirect=True) as bench:
        ring = bench.ring
        address, length = table(
            ring, [(0x3000, 3, NEXT, 2), (0x5000, 5, WRITE, 0), (0x4000, 4, NEXT | WRITE, 1)], 0x200003
        )
        ring.describe(0, 0x2000, 2, NEXT, 1)
        # Its WRITE flag means nothing, says the same section.
        ring.describe(1, address, length, INDIRECT | WRITE)
        ring.publish(0)
        chain = bench.queue.pop()
        assert chain is not None
        assert [len(view) for view in chain.readable] == [2, 3]
        assert [len(view) for view in chain.writable] == [4, 5]


def test_the_rings_go_round_and_round() -> None:
    """70,000 chains: the 16-bit indexes wrap, the ring of 4 entries wraps often."""
    with QueueBench(4) as bench:
        ring, queue = bench.ring, bench.queue
        for n in range(70_000):
            ring.describe(n % 4, 0x1000, 8, WRITE)
            ring.publish(n % 4)
            chain = queue.pop()
            assert chain is not None
            chain.done(n % 9)
            if n in (0, 65535, 65536, 69_999):
                entry = ring.used_ring + 4 + 8 * (n % 4)
                assert struct.unpack("<II", ring.memory.read(entry, 8)) == (n % 4, n % 9)
                assert struct.unpack("<H", ring.memory.read(ring.used_ring + 2, 2))[0] == (n + 1) & 0xFFFF
        assert queue.chains == 70_000
        assert queue.error is None


def test_a_driver_may_fill_the_whole_ring() -> None:
    with QueueBench(SIZE) as bench:
        heads = [bench.ring.add([bytes([n])]) for n in range(SIZE)]
        chains = [bench.queue.pop() for _ in range(SIZE + 1)]
        assert [chain.head for chain in chains if chain] == heads
        assert chains[-1] is None
        assert bench.queue.error is None
        for chain in reversed(chains[:-1]):
            assert chain is not None
            chain.done()
        assert bench.ring.used() == [(head, 0) for head in reversed(heads)]


# -- chains that are wrong ---------------------------------------------------------------------


def loop_of_two(ring: Ring) -> None:
    ring.describe(0, 0x1000, 1, NEXT, 1)
    ring.describe(1, 0x1000, 1, NEXT, 0)
    ring.publish(0)


def loop_of_empty_buffers(ring: Ring) -> None:
    ring.describe(0, 0, 0, NEXT, 0)
    ring.publish(0)


def loop_in_a_table(ring: Ring) -> None:
    ring.describe(0, *table(ring, [(0x1000, 1, NEXT, 0)]), INDIRECT)
    ring.publish(0)


def head_beyond(ring: Ring) -> None:
    ring.publish(SIZE)


def head_far_beyond(ring: Ring) -> None:
    ring.publish(0xFFFF)


def next_beyond(ring: Ring) -> None:
    ring.describe(0, 0x1000, 1, NEXT, SIZE)
    ring.publish(0)


def next_beyond_a_table(ring: Ring) -> None:
    """The queue has that many descriptors, the table does not."""
    ring.describe(0, *table(ring, [(0x1000, 1, NEXT, 2), (0x1000, 1, 0, 0)]), INDIRECT)
    ring.publish(0)


def readable_after_writable(ring: Ring) -> None:
    ring.add_buffers([(0x1000, 1, WRITE), (0x2000, 1, 0)])


def readable_after_writable_across_a_table(ring: Ring) -> None:
    ring.describe(0, 0x1000, 1, NEXT | WRITE, 1)
    ring.describe(1, *table(ring, [(0x1000, 1, 0, 0)]), INDIRECT)
    ring.publish(0)


def empty_readable_after_writable(ring: Ring) -> None:
    ring.add_buffers([(0x1000, 1, WRITE), (0x2000, 0, 0)])


def nested_table(ring: Ring) -> None:
    ring.describe(0, *table(ring, [(0x200000, 16, INDIRECT, 0)]), INDIRECT)
    ring.publish(0)


def table_of_nothing(ring: Ring) -> None:
    ring.describe(0, 0x200000, 0, INDIRECT)
    ring.publish(0)


def table_of_a_part(ring: Ring) -> None:
    ring.describe(0, 0x200000, 24, INDIRECT)
    ring.publish(0)


def table_longer_than_the_queue(ring: Ring) -> None:
    ring.describe(0, *table(ring, [(0x1000, 1, 0, 0)] * (SIZE + 1)), INDIRECT)
    ring.publish(0)


def table_and_chain_longer_than_the_queue(ring: Ring) -> None:
    ring.describe(0, 0x1000, 1, NEXT, 1)
    ring.describe(1, *table(ring, [(0x1000, 1, 0, 0)] * SIZE), INDIRECT)
    ring.publish(0)


def table_of_the_greatest_length(ring: Ring) -> None:
    ring.describe(0, 0x200000, 0xFFFFFFF0, INDIRECT)
    ring.publish(0)


def table_with_next(ring: Ring) -> None:
    ring.describe(0, *table(ring, [(0x1000, 1, 0, 0)]), INDIRECT | NEXT, 1)
    ring.publish(0)


def table_past_the_end(ring: Ring) -> None:
    ring.describe(0, RAM - 16, 32, INDIRECT)
    ring.publish(0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (loop_of_two, TOO_LONG),
        (loop_of_empty_buffers, TOO_LONG),
        (loop_in_a_table, TOO_LONG),
        (head_beyond, BEYOND_TABLE),
        (head_far_beyond, BEYOND_TABLE),
        (next_beyond, BEYOND_TABLE),
        (next_beyond_a_table, BEYOND_TABLE),
        (readable_after_writable, BAD_ORDER),
        (readable_after_writable_across_a_table, BAD_ORDER),
        (empty_readable_after_writable, BAD_ORDER),
        (nested_table, BAD_INDIRECT),
        (table_of_nothing, BAD_INDIRECT),
        (table_of_a_part, BAD_INDIRECT),
        (table_longer_than_the_queue, BAD_INDIRECT),
        (table_and_chain_longer_than_the_queue, BAD_INDIRECT),
        (table_of_the_greatest_length, BAD_INDIRECT),
        (table_with_next, BAD_INDIRECT),
        (table_past_the_end, NOT_IN_RAM),
    ],
)
def test_a_wrong_chain_breaks_the_ring(wrong: Callable[[Ring], None], words: str) -> None:
    with QueueBench(SIZE, indirect=True) as bench:
        good = bench.ring.add([b"before"])
        taken = bench.queue.pop()
        assert taken is not None
        wrong(bench.ring)
        assert bench.queue.pop() is None
        assert bench.queue.error == f"queue 0: {words}"
        assert bench.status.take() == 2, "a configuration interrupt: the device needs a reset"
        # Nothing more is taken, whatever comes; what was taken before can still be given back.
        bench.ring.add([b"after"])
        assert bench.queue.pop() is None
        assert list(bench.queue) == []
        assert bench.queue.enable_kick() is False
        assert bench.status.take() == 0, "once"
        taken.done()
        assert bench.ring.used() == [(good, 0)]
        # Until it is enabled again.
        bench.ring.clear()
        bench.ring.enable(bench.queue)
        bench.ring.add([b"again"])
        chain = bench.queue.pop()
        assert chain is not None
        assert chain.read() == b"again"


def test_tables_are_refused_when_not_negotiated() -> None:
    with QueueBench(SIZE, indirect=False) as bench:
        bench.ring.add([b"x"], indirect=True)
        assert bench.queue.pop() is None
        assert bench.queue.error == f"queue 0: {BAD_INDIRECT}"


@pytest.mark.parametrize("flags", [0, WRITE])
@pytest.mark.parametrize(
    ("address", "length", "good"),
    [
        (0, 1, True),
        (0, RAM, True),
        (RAM - 1, 1, True),
        (RAM - 1, 2, False),
        (RAM, 1, False),
        (1, RAM, False),
        (0, 0xFFFFFFFF, False),
        (0xC000_0000, 4096, False),
        (TOP, 1, False),
        (TOP, 2, False),
        (TOP - 0xFFFFFFFE, 0xFFFFFFFF, False),
        (TOP - 10, 0x1000, False),
        (1 << 63, 1, False),
    ],
)
def test_each_byte_of_a_buffer_is_in_ram(address: int, length: int, flags: int, good: bool) -> None:
    with QueueBench(SIZE, memory=RAM) as bench:
        bench.ring.add_buffers([(address, length, flags)])
        chain = bench.queue.pop()
        if good:
            assert chain is not None
            assert [len(view) for view in chain.readable + chain.writable] == [length]
        else:
            assert chain is None
            assert bench.queue.error == f"queue 0: {NOT_IN_RAM}"


@pytest.mark.parametrize("ahead", [SIZE + 1, 0x7FFF, 0x8000, 0xFFFF])
@pytest.mark.parametrize("taken", [0, 3])
def test_an_index_too_far_ahead_breaks_the_ring(ahead: int, taken: int) -> None:
    """0xffff ahead is one behind: a driver that takes chains back."""
    with QueueBench(SIZE) as bench:
        for _ in range(taken):
            bench.ring.add([b"x"])
            assert bench.queue.pop() is not None
        bench.ring.set_avail_index(taken + ahead)
        assert bench.queue.pop() is None
        assert bench.queue.error == f"queue 0: {BAD_INDEX}"


def test_four_gigabytes_in_one_chain_are_counted_right() -> None:
    size, part = 32, 256 * MiB
    with QueueBench(size, memory=part) as bench:
        bench.ring.add_buffers([(0, part, WRITE)] * size)
        chain = bench.queue.pop()
        assert chain is not None
        assert chain.writable_bytes == size * part > 1 << 32
        # The used ring has 32 bits for it.
        chain.done(chain.writable_bytes)
        assert [written for _, written in bench.ring.used()] == [0xFFFFFFFF]


# -- the two regions of a large memory ---------------------------------------------------------


def test_buffers_lie_in_either_region_and_not_across() -> None:
    memory = GuestMemory(4 << 30)
    low, high = memory.regions
    queue = Queue(RamMap(memory), 0, SIZE, IrqSource(), IrqSource())
    ring = Ring(memory, high.base, SIZE)
    try:
        ring.enable(queue)
        assert queue.error is None
        memory.write(high.base + 0x800000, b"high")
        memory.write(low.end - 3, b"low")
        ring.add_buffers([(low.end - 3, 3, 0), (high.base + 0x800000, 4, 0), (high.end - 1, 1, WRITE)])
        chain = queue.pop()
        assert chain is not None
        assert chain.read() == b"lowhigh"
        assert [bytes(view) for view in chain.readable] == [b"low", b"high"]
        ring.add_buffers([(low.end - 3, 4, 0)])
        assert queue.pop() is None
        assert queue.error == f"queue 0: {NOT_IN_RAM}"
    finally:
        queue.close()
        memory.close()


# -- where the ring lies -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("desc", "avail", "used"),
    [
        (0x1001, 0x2000, 0x3000),
        (0x1008, 0x2000, 0x3000),
        (0x1000, 0x2001, 0x3000),
        (0x1000, 0x2000, 0x3002),
        (RAM, 0x2000, 0x3000),
        (RAM - 16 * SIZE + 16, 0x2000, 0x3000),
        (0x1000, RAM - (6 + 2 * SIZE) + 2, 0x3000),
        (0x1000, 0x2000, RAM - (6 + 8 * SIZE)),
        (0x1000, 0x2000, TOP - 3),
        (TOP - 15, 0x2000, 0x3000),
        (0x1000, TOP - 1, 0x3000),
    ],
)
def test_a_ring_that_cannot_be_is_broken_from_the_start(desc: int, avail: int, used: int) -> None:
    with QueueBench(SIZE, memory=RAM) as bench:
        bench.queue.reset()
        bench.status.take()
        bench.queue.enable(SIZE, desc, avail, used)
        assert bench.queue.error == f"queue 0: {BAD_RING}"
        assert bench.status.take() == 2
        assert bench.queue.pop() is None
        assert bench.queue.enable_kick() is False
        bench.queue.signal()
        bench.queue.disable_kick()
        assert bench.status.take() == 0
        assert not any(bench.memory.read(0x1000, 0x3000))


def test_a_ring_may_end_where_ram_ends() -> None:
    with QueueBench(SIZE, memory=RAM) as bench:
        used = RAM - (8 + 8 * SIZE)
        for addresses in [
            (RAM - 16 * SIZE, 0x2000, 0x3000),
            (0x1000, RAM - (6 + 2 * SIZE), 0x3000),
            (0x1000, 0x2000, used),
        ]:
            bench.queue.enable(SIZE, *addresses)
            assert bench.queue.error is None


@pytest.mark.parametrize("size", [0, -1, 3, 255, 512, 65536])
def test_sizes_that_no_queue_has_are_refused(size: int) -> None:
    with QueueBench() as bench:
        queue = Queue(bench.ram, 7, 256, IrqSource(), IrqSource())
        with pytest.raises(ValueError, match=rf"^size: {size} is not a power of two of 1 to 256$"):
            queue.enable(size, 0x1000, 0x2000, 0x3000)
        assert queue.size == 0
        queue.close()


@pytest.mark.parametrize("size", [0, 3, 65536])
def test_max_sizes_that_no_queue_has_are_refused(size: int) -> None:
    with (
        QueueBench() as bench,
        pytest.raises(ValueError, match=rf"^max_size: {size} is not a power of two of 1 to 32768$"),
    ):
        Queue(bench.ram, 0, size, IrqSource(), IrqSource())


@settings(max_examples=200)
@given(address=st.integers(0, TOP), length=st.integers(1, 0xFFFFFFFF))
def test_no_address_reaches_outside_of_ram(address: int, length: int) -> None:
    with QueueBench(1, memory=2 * MiB) as bench:
        bench.ring.add_buffers([(address, length, WRITE)])
        chain = bench.queue.pop()
        assert (chain is not None) == (address + length <= 2 * MiB)
