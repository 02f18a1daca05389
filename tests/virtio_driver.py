"""A guest's driver for one split virtqueue (virtio 1.2, 2.7), in Python on plain guest memory: no KVM.

    ring = Ring(memory, base=0x100000, size=8)
    ring.enable(queue)
    device.start({0: queue}, features)
    head = ring.add(readable=[b"request"], writable=[512])
    queue.kick()
    (used,) = ring.wait(1)        # (head, written)
    reply = ring.written(head)

What a driver must not do is a call away: :meth:`Ring.describe` and :meth:`Ring.publish` write anything.
:class:`QueueBench` is a queue, its memory and its ring for one test::

    with QueueBench(size=8) as bench:
        bench.ring.add([b"request"])
        chain = bench.queue.pop()
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from types import TracebackType

from chv._irq import IrqSource, IrqStatus
from chv._virtqueue import Queue, RamMap
from chv.memory import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = NO_NOTIFY = 1

DESCRIPTOR = struct.Struct("<QIHH")


class Ring:
    """``size`` entries laid out from ``base`` on; buffers come from the ``data_size`` bytes behind them."""

    def __init__(self, memory: GuestMemory, base: int, size: int, *, data_size: int = 1 << 20) -> None:
        self.memory = memory
        self.size = size
        self.desc = -(-base // 16) * 16
        self.avail = self.desc + 16 * size
        self.used_ring = -(-(self.avail + 6 + 2 * size) // 4) * 4
        self.data = -(-(self.used_ring + 6 + 8 * size) // 4096) * 4096
        self.end = self.data + data_size  #: the first address that is not the ring's
        self.clear()

    def clear(self) -> None:
        """As a driver leaves it before it enables the queue: everything 0, all descriptors free."""
        self.memory.write(self.desc, bytes(self.data - self.desc))
        self.free = list(range(self.size - 1, -1, -1))
        self.avail_index = 0
        self.used_index = 0
        self._data_next = self.data
        self._chains: dict[int, list[int]] = {}  # head -> its descriptors in the table
        self._writable: dict[int, list[tuple[int, int]]] = {}  # head -> (address, length)

    def enable(self, queue: Queue, *, event_idx: bool = False, indirect: bool = False) -> None:
        """Give the ring to ``queue``, as the transport does."""
        queue.enable(self.size, self.desc, self.avail, self.used_ring, event_idx=event_idx, indirect=indirect)

    # -- chains

    def add(
        self, readable: Sequence[bytes] = (), writable: Sequence[int] = (), *, indirect: bool = False
    ) -> int:
        """Make a chain available; its head. ``writable`` is lengths. IndexError: no descriptor is free."""
        buffers = [(self._place(data), len(data), 0) for data in readable]
        areas = [(self._place(bytes(length)), length) for length in writable]
        buffers += [(address, length, WRITE) for address, length in areas]
        head = self.add_buffers(buffers, indirect=indirect)
        self._writable[head] = areas
        return head

    def add_buffers(self, buffers: Sequence[tuple[int, int, int]], *, indirect: bool = False) -> int:
        """Make a chain of (address, length, 0 or WRITE) available; its head."""
        table = b"".join(
            DESCRIPTOR.pack(address, length, flags | NEXT, n + 1)
            for n, (address, length, flags) in enumerate(buffers[:-1])
        ) + DESCRIPTOR.pack(*buffers[-1], 0)
        if indirect:
            buffers = [(self._place(table), len(table), INDIRECT)]
        if len(buffers) > len(self.free):
            raise IndexError(f"{len(self.free)} descriptors are free, {len(buffers)} are needed")
        taken = [self.free.pop() for _ in buffers]
        for n, (address, length, flags) in enumerate(buffers):
            last = n == len(buffers) - 1
            self.describe(
                taken[n], address, length, flags if last else flags | NEXT, 0 if last else taken[n + 1]
            )
        self._chains[taken[0]] = taken
        self._writable[taken[0]] = [(address, length) for address, length, flags in buffers if flags == WRITE]
        self.publish(taken[0])
        return taken[0]

    def describe(self, number: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        """Write descriptor ``number``, whatever it says."""
        self.memory.write(self.desc + 16 * number, DESCRIPTOR.pack(address, length, flags, following))

    def publish(self, head: int) -> None:
        """Put ``head`` into the available ring."""
        self.memory.write(self.avail + 4 + 2 * (self.avail_index % self.size), struct.pack("<H", head))
        self.set_avail_index(self.avail_index + 1)

    def set_avail_index(self, index: int) -> None:
        self.avail_index = index & 0xFFFF
        self.memory.write(self.avail + 2, struct.pack("<H", self.avail_index))

    def used(self) -> list[tuple[int, int]]:
        """(head, written) of the chains that came back since the last call; they are free again."""
        back = []
        while self.used_index != self._u16(self.used_ring + 2):
            entry = self.used_ring + 4 + 8 * (self.used_index % self.size)
            head, written = struct.unpack("<II", self.memory.read(entry, 8))
            self.free += reversed(self._chains.pop(head, []))
            self.used_index = (self.used_index + 1) & 0xFFFF
            back.append((head, written))
        return back

    def wait(self, count: int = 1, timeout: float = 30) -> list[tuple[int, int]]:
        """What :meth:`used` returns, once it is ``count`` chains; AssertionError after ``timeout`` s."""
        back = self.used()
        deadline = time.monotonic() + timeout
        while len(back) < count:
            assert time.monotonic() < deadline, f"{len(back)} of {count} chains came back in {timeout} s"
            time.sleep(0.0005)
            back += self.used()
        return back

    def written(self, head: int) -> bytes:
        """All writable buffers of a chain from :meth:`add`, joined: until their room is used again."""
        return b"".join(self.memory.read(address, length) for address, length in self._writable[head])

    # -- notifications

    def kick_wanted(self, event_idx: bool = False) -> bool:
        """Whether the device wants to be notified of the chain that was added last."""
        if event_idx:
            return self._u16(self.used_ring + 4 + 8 * self.size) == (self.avail_index - 1) & 0xFFFF
        return not self._u16(self.used_ring) & NO_NOTIFY

    def want_interrupts(self, wanted: bool) -> None:
        """The flag that counts without EVENT_IDX."""
        self.memory.write(self.avail, struct.pack("<H", 0 if wanted else NO_INTERRUPT))

    def set_used_event(self, index: int) -> None:
        """With EVENT_IDX: interrupt when the used chain with this number (free-running) is in the ring."""
        self.memory.write(self.avail + 4 + 2 * self.size, struct.pack("<H", index & 0xFFFF))

    def avail_event(self) -> int:
        return self._u16(self.used_ring + 4 + 8 * self.size)

    def _u16(self, address: int) -> int:
        return int.from_bytes(self.memory.read(address, 2), "little")

    def _place(self, data: bytes) -> int:
        if self._data_next + len(data) > self.end:
            self._data_next = self.data
        address = self._data_next
        assert address + len(data) <= self.end, f"{len(data)} bytes do not fit into the ring's data"
        self.memory.write(address, data)
        self._data_next = -(-(address + len(data)) // 16) * 16
        return address


class QueueBench:
    """An enabled queue on memory of its own, its driver, and the ISR status in which its interrupts end."""

    def __init__(
        self, size: int = 8, *, event_idx: bool = False, indirect: bool = False, memory: int = 16 << 20
    ) -> None:
        self.memory = GuestMemory(memory)
        self.status = IrqStatus()
        self.ram = RamMap(self.memory)
        self.queue = Queue(self.ram, 0, 32768, IrqSource(self.status, 1), IrqSource(self.status, 2))
        self.ring = Ring(self.memory, 0x100000, size)
        self.ring.enable(self.queue, event_idx=event_idx, indirect=indirect)

    def interrupted(self) -> bool:
        """Whether the queue interrupted since the last call."""
        return bool(self.status.take() & 1)

    def close(self) -> None:
        self.queue.close()
        self.memory.close()

    def __enter__(self) -> QueueBench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
