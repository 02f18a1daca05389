"""The entropy device: what it reads reaches the guest's buffers, and no source can hang it."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chv.config import RngConfig
from chv.errors import ConfigError
from chv.virtio.device import F_VERSION_1
from chv.virtio.rng import Rng, check

from .virtio_machine import machine

MOST = 65536


def opened(src: str | Path) -> Rng:
    return Rng.open(RngConfig(src=str(src)), "rng", "__rng")


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[tuple[Rng, int]]:
    """A device whose source is a FIFO, and a descriptor that writes into it."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    rng = opened(path)
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    yield rng, writer
    os.close(writer)
    rng.close()


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit, "did not happen in time"
        time.sleep(0.002)


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("__rng")]


def test_what_it_is() -> None:
    rng = opened("/dev/urandom")
    assert (rng.ID, rng.features, rng.queue_sizes, rng.config()) == (4, F_VERSION_1, (256,), b"")
    rng.close()
    rng.close()


@pytest.mark.parametrize("src", ["/dev/urandom", "/dev/random"])
def test_buffers_are_filled_with_something_else_each_time(src: str) -> None:
    rng = opened(src)
    with machine(rng) as m:
        (ring,), (queue,) = m.rings, m.queues
        heads = [ring.add(writable=[64]), ring.add(writable=[32, 1, 31])]
        queue.kick()
        assert sorted(ring.wait(2)) == sorted((head, 64) for head in heads)
        first, second = map(ring.written, heads)
        assert len({first, second, bytes(64)}) == 3
        counters = rng.counters()
        assert (counters["read_ops"], counters["read_bytes"], counters["read_errors"]) == (2, 128, 0)
        assert counters["read_latency_min"] <= counters["read_latency_avg"] <= counters["read_latency_max"]
    rng.close()


def test_a_large_buffer_is_filled_in_part() -> None:
    """So that a guest's terabyte does not keep the worker from being stopped."""
    rng = opened("/dev/urandom")
    with machine(rng) as m:
        head = m.rings[0].add(writable=[MOST - 1, 2, MOST])
        m.queues[0].kick()
        assert m.rings[0].wait() == [(head, MOST)]
        data = m.rings[0].written(head)
        assert data[MOST - 1] or data[:MOST].strip(b"\0")
        assert data[MOST:] == bytes(MOST + 1)
    rng.close()


def test_a_chain_without_room_gets_nothing_and_comes_back() -> None:
    rng = opened("/dev/urandom")
    with machine(rng) as m:
        nothing = m.rings[0].add(readable=[b"x"])
        something = m.rings[0].add(writable=[4])
        m.queues[0].kick()
        assert m.rings[0].wait(2) == [(nothing, 0), (something, 4)]
    rng.close()


def test_the_worker_waits_while_a_pipe_is_empty(fifo: tuple[Rng, int]) -> None:
    rng, writer = fifo
    with machine(rng) as m:
        ring, queue = m.rings[0], m.queues[0]
        head = ring.add(writable=[16])
        queue.kick()
        os.write(writer, b"abc")
        assert ring.wait() == [(head, 3)]  # it does not wait for more
        assert ring.written(head)[:3] == b"abc"
        head = ring.add(writable=[2, 2])
        queue.kick()
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.1  # nor does it look again and again
        assert ring.used() == []
        os.write(writer, b"defgh")
        assert ring.wait() == [(head, 4)]
        assert ring.written(head) == b"defg"
    assert rng.counters()["read_errors"] == 0


def test_stop_while_the_source_has_nothing(fifo: tuple[Rng, int]) -> None:
    """The chain stays in the ring: the device goes on with it after a pause."""
    rng, writer = fifo
    with machine(rng) as m:
        head = m.rings[0].add(writable=[16])
        m.queues[0].kick()
        until(lambda: m.queues[0].chains == 0 and bool(workers()))
        rng.stop()
        assert workers() == []
        assert m.rings[0].used() == []
        m.start()
        os.write(writer, b"xy")
        assert m.rings[0].wait() == [(head, 2)]


def test_a_file_is_read_once_over_all_reboots(tmp_path: Path) -> None:
    path = tmp_path / "seed"
    path.write_bytes(b"0123456789")
    rng = opened(path)
    for expected in (b"0123", b"4567"):
        with machine(rng) as m:
            head = m.rings[0].add(writable=[4])
            m.queues[0].kick()
            assert m.rings[0].wait() == [(head, 4)]
            assert m.rings[0].written(head) == expected
    with machine(rng) as m:
        first, second = (m.rings[0].add(writable=[4]) for _ in range(2))
        m.queues[0].kick()
        assert m.rings[0].wait() == [(first, 2)]
        until(lambda: rng.counters()["read_errors"] > 0)
        assert m.rings[0].used() == []  # never a used buffer without a byte
        with path.open("ab") as file:
            file.write(b"more")
        m.queues[0].kick()
        assert m.rings[0].wait() == [(second, 4)]
        assert m.rings[0].written(second) == b"more"
    rng.close()


def test_a_source_that_fails_is_counted_and_tried_again() -> None:
    reader, writer = os.pipe()
    rng = Rng("__rng", writer)  # which cannot be read
    with machine(rng) as m:
        head = m.rings[0].add(writable=[4])
        m.queues[0].kick()
        until(lambda: rng.counters()["read_errors"] > 0)
        assert m.rings[0].used() == []
        with open("/dev/zero", "rb") as zero:
            os.dup2(zero.fileno(), writer)
        m.queues[0].kick()
        assert m.rings[0].wait() == [(head, 4)]
    rng.close()
    os.close(reader)


def test_a_broken_ring_does_not_end_the_device() -> None:
    rng = opened("/dev/urandom")
    with machine(rng) as m:
        m.rings[0].publish(4711)
        m.queues[0].kick()
        until(lambda: m.queues[0].error is not None)
    with machine(rng) as m:
        head = m.rings[0].add(writable=[8])
        m.queues[0].kick()
        assert m.rings[0].wait() == [(head, 8)]
    rng.close()


@pytest.mark.parametrize(
    ("src", "message"),
    [
        ("", "rng.src: empty; it is the path of a source of random numbers"),
        ("a\0b", "rng.src: it contains a NUL character"),
        ("/nonexistent/x", "rng.src: cannot read '/nonexistent/x': No such file or directory"),
        ("/", "rng.src: cannot read '/': Is a directory"),
    ],
)
def test_bad_sources(src: str, message: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        opened(src)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with pytest.raises(ConfigError, match=r"rng\.src: .* is empty"):
        opened(path)


def test_check_opens_nothing() -> None:
    check(RngConfig(src="/nonexistent/x"), "rng", 1)
    with pytest.raises(ConfigError, match=r"^rng\.src"):
        check(RngConfig(src=""), "rng", 1)
