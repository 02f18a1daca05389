"""Who is told what and when: interrupts, kicks, and a worker that waits (virtio 1.2, 2.7.7 and 2.7.10)."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chv._virtqueue import KICKED, OTHER, STOPPED, Queue
from tests.virtio_driver import WRITE, QueueBench

SIZE = 8


def ready(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def serve(bench: QueueBench, count: int) -> None:
    """``count`` chains come and go, without a signal."""
    for _ in range(count):
        bench.ring.add([b"x"])
        chain = bench.queue.pop()
        assert chain is not None
        chain.done()
        bench.ring.used()


def fail_in_a_loop(queue: Queue) -> None:
    for chain in queue:
        chain.done()
        raise ZeroDivisionError


# -- interrupts ------------------------------------------------------------------------------


def test_done_alone_does_not_interrupt_and_signal_does_once() -> None:
    with QueueBench() as bench:
        serve(bench, 3)
        assert not bench.interrupted()
        bench.queue.signal()
        assert bench.interrupted()
        bench.queue.signal()
        assert not bench.interrupted()
        assert bench.queue.interrupts == 1


@pytest.mark.parametrize("event_idx", [False, True])
def test_nothing_done_nothing_signalled(event_idx: bool) -> None:
    with QueueBench(event_idx=event_idx) as bench:
        bench.queue.signal()
        bench.ring.add([b"x"])
        assert bench.queue.pop() is not None
        bench.queue.signal()
        assert not bench.interrupted()


def test_the_flag_keeps_interrupts_away() -> None:
    with QueueBench() as bench:
        bench.ring.want_interrupts(False)
        serve(bench, 1)
        bench.queue.signal()
        assert not bench.interrupted()
        # Wanted again: the driver looks at the ring itself then (2.7.7.1), only what is new is signalled.
        bench.ring.want_interrupts(True)
        bench.queue.signal()
        assert not bench.interrupted()
        serve(bench, 1)
        bench.queue.signal()
        assert bench.interrupted()


def test_other_bits_of_the_flags_mean_nothing() -> None:
    with QueueBench() as bench:
        bench.memory.write(bench.ring.avail, b"\xfe\xff")
        serve(bench, 1)
        bench.queue.signal()
        assert bench.interrupted()


def test_with_event_idx_the_flag_means_nothing() -> None:
    with QueueBench(event_idx=True) as bench:
        bench.ring.want_interrupts(False)
        serve(bench, 1)
        bench.queue.signal()
        assert bench.interrupted()


@pytest.mark.parametrize(
    ("event", "before", "after", "interrupts"),
    [
        (0, 0, 1, True),
        (1, 0, 1, False),
        (1, 0, 2, True),
        (1, 0, 5, True),
        (4, 0, 5, True),
        (5, 0, 5, False),
        (2, 3, 5, False),
        (3, 3, 5, True),
        (0xFFFF, 0, 5, False),
        (0xFFFF, 0xFFFE, 0x10003, True),
        (0, 0xFFFE, 0x10003, True),
        (2, 0xFFFE, 0x10003, True),
        (3, 0xFFFE, 0x10003, False),
        (0xFFFD, 0xFFFE, 0x10003, False),
    ],
)
def test_used_event_names_the_chain_that_interrupts(
    event: int, before: int, after: int, interrupts: bool
) -> None:
    """Signalled at ``before`` chains, then at ``after``: one of them is number ``event``, or none is."""
    with QueueBench(event_idx=True) as bench:
        start = before & 0xFFFF
        state = bench.queue.save()
        bench.queue.load({**state, "next_avail": start, "next_used": start, "signalled": start})
        bench.ring.set_avail_index(start)
        bench.ring.used_index = start
        bench.ring.set_used_event(event)
        serve(bench, after - before)
        bench.queue.signal()
        assert bench.interrupted() == interrupts


@given(
    start=st.integers(0, 0xFFFF),
    batches=st.lists(st.tuples(st.integers(0, SIZE), st.integers(-3, 12)), max_size=12),
)
def test_any_order_of_batches_and_events(start: int, batches: list[tuple[int, int]]) -> None:
    """Against the rule itself: an interrupt if and only if chain number used_event is in the batch."""
    with QueueBench(event_idx=True) as bench:
        bench.queue.load({**bench.queue.save(), "next_avail": start, "next_used": start, "signalled": start})
        bench.ring.set_avail_index(start)
        bench.ring.used_index = start
        total = start
        for count, event in batches:
            bench.ring.set_used_event(total + event)
            serve(bench, count)
            bench.queue.signal()
            assert bench.interrupted() == (0 <= event < count)
            total += count


def test_65536_chains_without_a_signal_are_not_none() -> None:
    """The indexes are where they were; the driver's event is long past and would never come."""
    with QueueBench(event_idx=True) as bench:
        serve(bench, 1)
        bench.queue.signal()
        assert bench.interrupted()
        bench.ring.set_used_event(1)
        serve(bench, 65536)
        bench.queue.signal()
        assert bench.interrupted()
        # And more than that: the difference says 1, and it is not 1.
        bench.ring.set_used_event(100)
        serve(bench, 65537)
        bench.queue.signal()
        assert bench.interrupted()
        # From then on the rule holds again.
        bench.ring.set_used_event(101)
        serve(bench, 1)
        bench.queue.signal()
        assert not bench.interrupted()


# -- kicks -----------------------------------------------------------------------------------


def test_the_flag_asks_for_kicks() -> None:
    with QueueBench() as bench:
        assert bench.ring.kick_wanted()
        bench.queue.disable_kick()
        assert not bench.ring.kick_wanted()
        assert bench.queue.enable_kick() is False
        assert bench.ring.kick_wanted()


def test_with_event_idx_the_index_asks_for_kicks_and_the_flag_stays_0() -> None:
    with QueueBench(event_idx=True) as bench:
        for n in range(3):
            assert bench.queue.enable_kick() is False
            assert bench.ring.avail_event() == n
            bench.queue.disable_kick()
            bench.ring.add([b"x"])
            assert bench.ring.kick_wanted(True)
            bench.ring.add([b"x"])
            assert not bench.ring.kick_wanted(True), "one kick is enough"
            bench.ring.set_avail_index(n + 1)
            assert bench.queue.pop() is not None
            assert bench.memory.read(bench.ring.used_ring, 2) == b"\0\0"


def test_enabling_clears_a_flag_that_an_earlier_driver_left() -> None:
    with QueueBench() as bench:
        bench.queue.disable_kick()
        bench.ring.enable(bench.queue, event_idx=True)
        assert bench.memory.read(bench.ring.used_ring, 2) == b"\0\0"


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_chain_that_came_before_kicks_were_asked_for_is_not_lost(event_idx: bool) -> None:
    with QueueBench(event_idx=event_idx) as bench:
        bench.queue.disable_kick()
        assert bench.queue.pop() is None
        bench.ring.add([b"x"])  # no kick: it was not asked for
        assert bench.queue.enable_kick() is True
        assert bench.queue.pop() is not None
        assert bench.queue.enable_kick() is False


@pytest.mark.parametrize("event_idx", [False, True])
def test_iterating_asks_for_kicks_at_the_end(event_idx: bool) -> None:
    with QueueBench(event_idx=event_idx) as bench:
        bench.ring.add([b"x"])
        for chain in bench.queue:
            if not event_idx:
                assert not bench.ring.kick_wanted()
            chain.done()
        bench.ring.add([b"x"])
        assert bench.ring.kick_wanted(event_idx)


@pytest.mark.parametrize("event_idx", [False, True])
def test_iterating_signals_at_the_end_and_when_left(event_idx: bool) -> None:
    with QueueBench(event_idx=event_idx) as bench:
        for _ in range(3):
            bench.ring.add([b"x"])
        for chain in bench.queue:
            chain.done()
            assert not bench.interrupted()
            break
        assert bench.interrupted()
        bench.ring.set_used_event(1)  # means nothing without EVENT_IDX
        for chain in bench.queue:
            chain.done()
        assert bench.interrupted()
        assert bench.queue.interrupts == 2

        bench.ring.set_used_event(3)
        bench.ring.add([b"x"])
        with pytest.raises(ZeroDivisionError):
            fail_in_a_loop(bench.queue)
        assert bench.interrupted()
        assert bench.ring.kick_wanted() or event_idx


def test_a_guest_that_never_stops_adding_is_interrupted_all_the_same() -> None:
    with QueueBench() as bench:
        bench.ring.add([b"x"])
        for n, chain in enumerate(bench.queue):
            chain.done()
            bench.ring.used()
            if n == 200:
                break
            bench.ring.add([b"x"])
        assert bench.queue.interrupts == 4, "after 64, 128 and 192 chains, and when it was left"


# -- a worker that waits -----------------------------------------------------------------------


def test_a_kick_is_seen_once_and_never_lost() -> None:
    with QueueBench() as bench:
        queue = bench.queue
        queue.prepare()
        queue.kick()
        queue.kick()
        assert queue.wait() == KICKED
        assert queue.wait(timeout=0) == 0
        assert not ready(queue.kick_fd)


def test_wake_ends_a_wait_and_says_nothing() -> None:
    with QueueBench() as bench:
        bench.queue.wake()
        assert bench.queue.wait() == 0
        assert not ready(bench.queue.wake_fd)


def test_stop_lasts_until_prepare() -> None:
    with QueueBench() as bench:
        queue, ring = bench.queue, bench.ring
        ring.add([b"x"])
        queue.stop()
        assert queue.stopping
        assert queue.wait() == STOPPED
        assert queue.wait() == STOPPED
        assert queue.pop() is None, "however many the guest adds"
        assert list(queue) == []
        assert queue.enable_kick() is False
        queue.prepare()
        assert not queue.stopping
        assert not ready(queue.wake_fd)
        assert queue.wait(timeout=0) == 0
        assert queue.pop() is not None


def test_prepare_keeps_a_kick() -> None:
    with QueueBench() as bench:
        bench.queue.kick()
        bench.queue.prepare()
        assert bench.queue.wait() == KICKED


def test_another_descriptor() -> None:
    with QueueBench() as bench:
        read_end, write_end = os.pipe()
        try:
            assert bench.queue.wait(read_end, timeout=0) == 0
            os.write(write_end, b"x")
            assert bench.queue.wait(read_end) == OTHER
            bench.queue.kick()
            assert bench.queue.wait(read_end) == OTHER | KICKED
            os.read(read_end, 1)
        finally:
            os.close(write_end)
            assert bench.queue.wait(read_end) == OTHER, "the other side is gone"
            os.close(read_end)


def test_the_descriptors_do_not_block_and_are_not_inherited() -> None:
    with QueueBench() as bench:
        for fd in (bench.queue.kick_fd, bench.queue.wake_fd):
            assert not os.get_blocking(fd)
            assert not os.get_inheritable(fd)


@pytest.mark.parametrize(("how", "bits"), [(Queue.stop, STOPPED), (Queue.kick, KICKED), (Queue.wake, 0)])
def test_a_wait_in_another_thread_ends(how: Callable[[Queue], None], bits: int) -> None:
    """The waiting thread has released the GIL, or this one could not go on."""
    with QueueBench() as bench:
        bench.queue.prepare()
        waiting = threading.Event()
        seen = []

        def work() -> None:
            waiting.set()
            seen.append(bench.queue.wait(timeout=60))

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        waiting.wait(60)
        how(bench.queue)
        worker.join(30)
        assert not worker.is_alive()
        assert seen == [bits]


def test_a_worker_takes_what_lay_in_the_ring_before_it_started() -> None:
    """As after a resume: the kick came to the worker that was stopped."""
    with QueueBench(event_idx=True) as bench:
        heads = [bench.ring.add([], [8]) for _ in range(3)]
        bench.queue.prepare()

        def work() -> None:
            while not bench.queue.stopping:
                for chain in bench.queue:
                    chain.write(b"late")
                    chain.done()
                bench.queue.wait()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            assert bench.ring.wait(3) == [(head, 4) for head in heads]
        finally:
            bench.queue.stop()
            worker.join(30)
        assert not worker.is_alive()


@pytest.mark.parametrize("event_idx", [False, True])
def test_no_kick_and_no_interrupt_is_lost_between_two_threads(event_idx: bool) -> None:
    """The driver kicks only when asked to and sleeps until its interrupt: one lost, and this hangs."""
    with QueueBench(4, event_idx=event_idx) as bench:
        queue, ring = bench.queue, bench.ring
        vector = os.eventfd(0, os.EFD_CLOEXEC)
        queue.irq.use_message(vector)
        queue.prepare()

        def work() -> None:
            while not queue.stopping:
                for chain in queue:
                    chain.done()
                queue.wait()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            back = 0
            for n in range(1, 3001):
                ring.add_buffers([(0x1000, 8, WRITE)])
                if ring.kick_wanted(event_idx):
                    queue.kick()
                ring.set_used_event(ring.used_index)
                while back < n - n % 3:  # batches of up to 3 in the ring
                    got = ring.used()
                    ring.set_used_event(ring.used_index)
                    got += ring.used()
                    back += len(got)
                    if not got:
                        assert select.select([vector], [], [], 30)[0], f"no interrupt at chain {n}"
                        os.read(vector, 8)
        finally:
            queue.stop()
            worker.join(30)
            os.close(vector)
        assert not worker.is_alive()
