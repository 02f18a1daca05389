"""The queue API of devices written in Python, with a driver in Python on the other side."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from chv._irq import IrqSource, IrqStatus
from chv._virtqueue import Queue, RamMap
from chv.memory import GuestMemory
from tests.virtio_driver import Ring

SIZE = 8


class Bench:
    """A queue, its driver, and the ISR status that its interrupts end in."""

    def __init__(self) -> None:
        self.memory = GuestMemory(16 << 20)
        self.status = IrqStatus()
        self.queue = Queue(RamMap(self.memory), 0, 256, IrqSource(self.status, 1), IrqSource(self.status, 2))
        self.ring = Ring(self.memory, 0x100000, SIZE)

    def close(self) -> None:
        self.queue.close()
        self.memory.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_a_device_in_a_thread_answers_each_request(bench: Bench, event_idx: bool, indirect: bool) -> None:
    queue, ring = bench.queue, bench.ring
    ring.enable(queue, event_idx=event_idx, indirect=True)
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
