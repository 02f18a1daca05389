"""The queue API of devices written in Python, with a driver in Python on the other side."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chv._irq import IrqSource
from chv._virtqueue import Chain, Queue, RamMap
from chv.errors import DeviceError
from chv.memory import GuestMemory
from tests.virtio_driver import WRITE, QueueBench, Ring

SIZE = 8
RELEASED = "released memoryview"


@pytest.fixture
def bench() -> Iterator[QueueBench]:
    with QueueBench(SIZE) as made:
        yield made


def take(bench: QueueBench, readable: list[bytes], writable: list[int]) -> Chain:
    """A chain of these buffers, made available and taken."""
    bench.ring.add(readable, writable)
    chain = bench.queue.pop()
    assert chain is not None
    return chain


# -- reading and writing -------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=SIZE), st.integers(0, 300))
def test_read_joins_what_is_readable(parts: list[bytes], limit: int) -> None:
    with QueueBench(SIZE) as bench:
        chain = take(bench, parts or [b"-"], [])
        joined = b"".join(parts or [b"-"])
        assert chain.read() == joined
        assert chain.read(limit) == joined[:limit]


@given(
    st.lists(st.integers(1, 30), max_size=SIZE - 1),
    st.lists(st.binary(max_size=60), max_size=5),
)
def test_write_fills_what_is_writable_from_where_it_was(lengths: list[int], parts: list[bytes]) -> None:
    with QueueBench(SIZE) as bench:
        chain = take(bench, [b"-"], lengths)
        room = sum(lengths)
        expected = b""
        for part in parts:
            fitting = part[: room - len(expected)]
            assert chain.write(part) == len(fitting)
            expected += fitting
        chain.done()
        ((head, written),) = bench.ring.used()
        assert written == len(expected)
        assert bench.ring.written(head) == expected.ljust(room, b"\0")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_write_takes_any_bytes(bench: QueueBench, kind: Callable[[bytes], bytes]) -> None:
    chain = take(bench, [], [4])
    assert chain.write(kind(b"abcdef")) == 4
    chain.done()
    assert bench.ring.written(0) == b"abcd"


def test_write_takes_no_text(bench: QueueBench) -> None:
    with pytest.raises(TypeError):
        take(bench, [], [4]).write("text")  # type: ignore[arg-type]


def test_a_negative_limit_is_refused(bench: QueueBench) -> None:
    with pytest.raises(ValueError, match=r"^limit: -1 is negative$"):
        take(bench, [b"x"], []).read(-1)


def test_read_is_bounded_when_the_guest_names_the_same_memory_often() -> None:
    with QueueBench(1024, memory=64 << 20) as bench:
        bench.ring.add_buffers([(0, 64 << 20, 0)] * 1024)
        chain = bench.queue.pop()
        assert chain is not None
        assert chain.readable_bytes == 64 << 30
        assert len(chain.read()) == 16 << 20


# -- the views -----------------------------------------------------------------------------------


def test_the_views_are_guest_memory_itself(bench: QueueBench) -> None:
    bench.ring.add_buffers([(0x8000, 4, 0), (0x9000, 4, WRITE)])
    chain = bench.queue.pop()
    assert chain is not None
    bench.memory.write(0x8000, b"late")
    assert bytes(chain.readable[0]) == b"late"
    chain.writable[0][:] = b"back"
    assert bench.memory.read(0x9000, 4) == b"back"
    chain.done(4)
    assert bench.ring.used() == [(0, 4)]


def test_views_are_released_when_the_chain_is_done(bench: QueueBench) -> None:
    chain = take(bench, [b"x"], [1])
    views = chain.readable + chain.writable
    chain.done()
    for view in views:
        with pytest.raises(ValueError, match=RELEASED):
            bytes(view)


def test_views_are_released_when_the_queue_is_reset(bench: QueueBench) -> None:
    chain = take(bench, [b"x"], [1])
    views = chain.readable + chain.writable
    bench.queue.reset()
    for view in views:
        with pytest.raises(ValueError, match=RELEASED):
            bytes(view)


def test_a_view_that_somebody_slices_and_keeps_cannot_crash() -> None:
    memory = GuestMemory(16 << 20)
    queue = Queue(RamMap(memory), 0, SIZE, IrqSource(), IrqSource())
    ring = Ring(memory, 0x100000, SIZE)
    ring.enable(queue)
    ring.add([b"kept"])
    chain = queue.pop()
    assert chain is not None
    kept = chain.readable[0][1:]
    chain.done()
    queue.close()
    # The memory refuses to go while the view is there, and goes after.
    with pytest.raises(BufferError):
        memory.close()
    assert bytes(kept) == b"ept"
    kept.release()
    memory.close()


def test_a_view_in_use_survives_the_end_of_its_chain(bench: QueueBench) -> None:
    chain = take(bench, [b"x"], [])
    view = chain.readable[0]
    with memoryview(view):  # exports it: release() would raise
        chain.done()
        assert bench.ring.used() == [(0, 0)]
    view.release()


def test_memory_cannot_close_under_an_enabled_queue() -> None:
    memory = GuestMemory(16 << 20)
    queue = Queue(RamMap(memory), 0, SIZE, IrqSource(), IrqSource())
    Ring(memory, 0x100000, SIZE).enable(queue)
    with pytest.raises(BufferError):
        memory.close()
    queue.reset()
    memory.close()
    # And a queue on memory that is gone touches none of it.
    with pytest.raises(ValueError, match="closed"):
        queue.enable(SIZE, 0x1000, 0x2000, 0x3000)
    assert queue.pop() is None
    queue.signal()
    queue.disable_kick()
    assert queue.enable_kick() is False
    queue.close()


# -- done, once ----------------------------------------------------------------------------------


def test_a_chain_is_completed_once(bench: QueueBench) -> None:
    chain = take(bench, [b"x"], [1])
    chain.done()
    for again in (chain.done, chain.give_back, chain.read, lambda: chain.write(b"x")):
        with pytest.raises(DeviceError, match=r"^chain 0: it was completed already$"):
            again()
    with pytest.raises(DeviceError):
        _ = chain.readable
    with pytest.raises(DeviceError):
        _ = chain.writable
    assert bench.ring.used() == [(0, 0)]


@pytest.mark.parametrize("written", [-1, 6, 1 << 64])
def test_no_more_than_there_is_room_for_was_written(bench: QueueBench, written: int) -> None:
    chain = take(bench, [b"x"], [5])
    with pytest.raises(ValueError, match=rf"^written: {written} is not within 0-5, what the chain has room"):
        chain.done(written)
    assert bench.ring.used() == []
    chain.done(5)
    assert bench.ring.used() == [(0, 5)]


def test_chains_are_done_in_any_order_and_thread(bench: QueueBench) -> None:
    chains = [take(bench, [b"x"], []) for _ in range(SIZE)]
    order = [3, 0, 7, 1, 6, 2, 5, 4]

    def complete() -> None:
        for n in order:
            chains[n].done()

    thread = threading.Thread(target=complete)
    thread.start()
    thread.join()
    assert [head for head, _ in bench.ring.used()] == [chains[n].head for n in order]


def test_a_chain_is_void_after_a_reset(bench: QueueBench) -> None:
    chain = take(bench, [b"x"], [4])
    bench.ring.clear()
    bench.ring.enable(bench.queue)
    assert chain.read() == b""
    assert chain.write(b"x") == 0
    assert chain.readable == []
    assert chain.writable == []
    chain.done()
    assert bench.ring.used() == []
    other = take(bench, [b"y"], [])
    other.done()
    assert bench.ring.used() == [(0, 0)]


def test_giving_a_chain_back_after_a_reset_does_nothing(bench: QueueBench) -> None:
    chain = take(bench, [b"x"], [4])
    bench.ring.clear()
    bench.ring.enable(bench.queue)
    chain.give_back()
    assert bench.queue.save()["next_avail"] == 0


def test_a_chain_that_was_given_back_comes_again(bench: QueueBench) -> None:
    first = take(bench, [b"1"], [])
    second = take(bench, [b"2"], [])
    with pytest.raises(DeviceError, match="a later one was taken"):
        first.give_back()
    second.give_back()
    assert bench.queue.chains == 1
    again = bench.queue.pop()
    assert again is not None
    assert again.read() == b"2"
    again.give_back()
    # The one before it is the last now.
    assert first.read() == b"1"
    first.give_back()
    assert [chain.read() for chain in bench.queue] == [b"1", b"2"]


def test_a_forgotten_chain_leaves_nothing_behind(bench: QueueBench) -> None:
    chain = take(bench, [b"x"], [1])
    views = chain.readable
    assert views
    class_of_views = weakref.ref(views[0])
    del chain, views
    gc.collect()
    assert class_of_views() is None


def test_a_chain_keeps_its_queue_alive() -> None:
    memory = GuestMemory(16 << 20)

    def make() -> Chain:
        queue = Queue(RamMap(memory), 0, SIZE, IrqSource(), IrqSource())
        ring = Ring(memory, 0x100000, SIZE)
        ring.enable(queue)
        ring.add([b"x"])
        chain = queue.pop()
        assert chain is not None
        return chain

    chain = make()
    gc.collect()
    assert chain.read() == b"x"
    chain.done()
    del chain
    gc.collect()
    memory.close()


# -- the queue ------------------------------------------------------------------------------------


def test_what_a_queue_says_of_itself(bench: QueueBench) -> None:
    queue = Queue(bench.ram, 5, 256, bench.queue.irq, bench.queue.config_irq)
    assert (queue.index, queue.size, queue.max_size, queue.error) == (5, 0, 256, None)
    assert queue.ram is bench.ram
    assert queue.ram.memory is bench.memory
    assert queue.irq is bench.queue.irq
    assert queue.config_irq is bench.queue.config_irq
    assert (queue.chains, queue.interrupts, queue.stopping) == (0, 0, False)
    assert queue.pop() is None, "it is not enabled"
    bench.ring.enable(queue)
    assert queue.size == SIZE
    queue.close()


def test_close_gives_the_descriptors_back_and_may_be_repeated(bench: QueueBench) -> None:
    queue = Queue(bench.ram, 0, 8, IrqSource(), IrqSource())
    fds = (queue.kick_fd, queue.wake_fd)
    queue.close()
    queue.close()
    assert (queue.kick_fd, queue.wake_fd) == (-1, -1)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    queue.kick()
    queue.wake()
    assert queue.wait(timeout=0) == 0


def test_a_forgotten_queue_gives_its_descriptors_back(bench: QueueBench) -> None:
    before = os.listdir("/proc/self/fd")
    queue = Queue(bench.ram, 0, 8, IrqSource(), IrqSource())
    del queue
    gc.collect()
    assert os.listdir("/proc/self/fd") == before


# -- snapshots --------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_saved_queue_goes_on_in_another(event_idx: bool) -> None:
    with QueueBench(4, event_idx=event_idx, indirect=True) as bench:
        for _ in range(6):
            take(bench, [b"x"], []).done()
            bench.ring.used()
        bench.ring.set_used_event(6)
        waiting = bench.ring.add([b"waiting"], [3], indirect=True)
        state = bench.queue.save()
        assert all(type(value) is int for value in state.values())
        bench.queue.reset()

        other = Queue(bench.ram, 0, 256, bench.queue.irq, bench.queue.config_irq)
        other.load(state)
        assert other.save() == state
        for chain in other:
            assert chain.read() == b"waiting"
            chain.write(b"yes")
            chain.done()
        assert bench.ring.used() == [(waiting, 3)]
        assert bench.interrupted()
        other.close()


def test_a_queue_that_is_not_enabled_is_saved_as_that(bench: QueueBench) -> None:
    bench.queue.reset()
    state = bench.queue.save()
    bench.ring.enable(bench.queue)
    bench.queue.load(state)
    assert bench.queue.size == 0
    assert bench.queue.save() == state


def test_a_broken_ring_stays_broken(bench: QueueBench) -> None:
    bench.ring.publish(77)
    assert bench.queue.pop() is None
    state = bench.queue.save()
    words = bench.queue.error
    bench.queue.reset()
    assert bench.queue.error is None
    bench.queue.load(state)
    assert bench.queue.error == words is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"next_avail": 65536}, "next_avail: 65536 is not within 0-65535"),
        ({"next_used": -1}, "next_used: -1 is not within 0-65535"),
        ({"signalled": 1 << 70}, f"signalled: {1 << 70} is not within 0-65535"),
        ({"error": 8}, "error: 8 is not within 0-7"),
        ({"size": 7}, "size: 7 is not a power of two of 1 to 32768"),
    ],
)
def test_states_that_cannot_be_are_refused(bench: QueueBench, change: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        bench.queue.load({**bench.queue.save(), **change})


# -- a device --------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_a_device_in_a_thread_answers_each_request(event_idx: bool, indirect: bool) -> None:
    with QueueBench(SIZE, event_idx=event_idx, indirect=True) as bench:
        queue, ring = bench.queue, bench.ring
        queue.prepare()

        def work() -> None:
            while not queue.stopping:
                for chain in queue:
                    chain.write(b"re:" + chain.read())
                    chain.done()
                queue.wait()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            for n in range(100):
                head = ring.add([b"abc", bytes([n])], [4, 10], indirect=indirect)
                if ring.kick_wanted(event_idx):
                    queue.kick()
                assert ring.wait(1) == [(head, 7)]
                assert ring.written(head)[:7] == b"re:abc" + bytes([n])
        finally:
            queue.stop()
            worker.join(30)
        assert not worker.is_alive()
        assert queue.chains == 100
        assert queue.error is None


OVERLAPPED = """
from chv._irq import IrqSource
from chv._virtqueue import Queue, RamMap
from chv.memory import GuestMemory

memory = GuestMemory(1 << 20)
queue = Queue(RamMap(memory), 0, 8, IrqSource(), IrqSource())
# The flags of the used ring, which the device writes, are the available index.
queue.enable(8, 0x1000, 0x2002, 0x2004, event_idx=False, indirect=False)
memory.write(0x1000, (0x3000).to_bytes(8, "little") + (4).to_bytes(4, "little") + bytes(4))
taken = sum(1 for chain in queue)
print(taken, queue.error)
"""


def test_rings_that_lie_over_each_other_do_not_hold_python_up() -> None:
    """The device's own flags made the available index go forth and back, and an iteration never ended."""
    ran = subprocess.run(
        [sys.executable, "-c", OVERLAPPED], capture_output=True, text=True, timeout=60, check=True
    )
    taken, _, error = ran.stdout.strip().partition(" ")
    assert int(taken) <= 8
    assert error == "queue 0: the available index is further ahead than the queue is long"
