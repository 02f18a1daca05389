"""A virtio-net device without a VM: rings with a driver in Python, and a pair of sockets for the wire."""

from __future__ import annotations

import functools
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from chv import net
from chv._irq import IrqSource, IrqStatus
from chv._virtqueue import Queue, RamMap
from chv.memory import GuestMemory
from chv.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC
from chv.virtio.net import F_MRG_RXBUF, Net
from tests.virtio_driver import Ring

HEADER = bytes(net.HEADER_SIZE)
MAC = bytes.fromhex("02000000000a")
ETHERNET = b"\xff" * 6 + MAC + bytes.fromhex("88b5")  # 88b5: for experiments (IEEE 802)
SPACE = 4 << 20  # of each ring, with its buffers
ALL_OFFLOADS = 0x1F


@functools.lru_cache(64)
def frame(length: int, *, source: bytes = MAC, seed: int = 0) -> bytes:
    """``length`` bytes that are like no frame with another seed."""
    body = struct.pack("<I", seed) + bytes((seed + n * 7 + (n >> 8)) & 0xFF for n in range(length))
    return (ETHERNET[:6] + source + ETHERNET[12:] + body)[:length]


def eventually(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.0005)


class SocketWire:
    """Datagrams in the place of frames: each pair of queues has a socket, whose other end is in ``far``."""

    def __init__(self, pairs: int = 1, offloads: int = ALL_OFFLOADS) -> None:
        self.offloads = offloads
        self.near: list[socket.socket] = []
        self.far: list[socket.socket] = []
        for _ in range(pairs):
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            for end in (near, far):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            near.setblocking(False)
            far.settimeout(30)
            self.near.append(near)
            self.far.append(far)
        self.fds = [one.fileno() for one in self.near]
        self.calls: list[tuple[str, int]] = []
        self.works = True

    def set_offloads(self, offloads: int) -> bool:
        self.calls.append(("offloads", offloads))
        return self.works

    def set_pairs(self, count: int) -> bool:
        self.calls.append(("pairs", count))
        return self.works

    def reset(self) -> None:
        self.calls.append(("reset", 0))

    def close(self) -> None:
        for one in self.near + self.far:
            one.close()


class Bench:
    """A device with ``pairs`` pairs of queues, started by :meth:`start` and closed at the end of ``with``."""

    def __init__(self, pairs: int = 1, size: int = 16, **options: Any) -> None:
        self.wire = SocketWire(pairs)
        options.setdefault("mac", MAC)
        self.device = Net("_net0", self.wire, queue_size=size, **options)
        sizes = self.device.queue_sizes
        self.memory = GuestMemory((len(sizes) + 1) * SPACE)
        self.status = IrqStatus()
        ram = RamMap(self.memory)
        irq, config_irq = IrqSource(self.status, 1), IrqSource(self.status, 2)
        self.queues = {n: Queue(ram, n, count, irq, config_irq) for n, count in enumerate(sizes)}
        self.rings = [
            Ring(self.memory, (n + 1) * SPACE - (1 << 20), count, data_size=3 << 20)
            for n, count in enumerate(sizes)
        ]
        self.backlog: list[list[bytes]] = [[] for _ in sizes]  # buffers that came and were not looked at
        self.rx, self.tx, self.control = self.rings[0], self.rings[1], self.rings[-1]
        self.far = self.wire.far[0]

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def start(self, features: int = F_MRG_RXBUF, only: tuple[int, ...] | None = None) -> None:
        """As a driver that sets DRIVER_OK, with the queues ``only`` (all, unless told)."""
        for number, queue in self.queues.items():
            self.rings[number].enable(
                queue,
                event_idx=bool(features & F_EVENT_IDX),
                indirect=bool(features & F_INDIRECT_DESC),
            )
        wanted = {n: queue for n, queue in self.queues.items() if only is None or n in only}
        self.device.start(wanted, features)

    def send(self, pieces: list[bytes], queue: int = 1, *, indirect: bool = False) -> int:
        """Put a frame with its header into a transmit queue; the chain's head."""
        head = self.rings[queue].add(pieces, indirect=indirect)
        self.queues[queue].kick()
        return head

    def offer(self, *lengths: int, queue: int = 0) -> list[int]:
        """Chains of one buffer each for frames to the guest."""
        heads = [self.rings[queue].add(writable=[length]) for length in lengths]
        self.queues[queue].kick()
        return heads

    def receive(self, queue: int = 0) -> tuple[bytes, bytes]:
        """The next frame that arrives at the guest: its header, and what follows."""
        ring, buffers = self.rings[queue], self.backlog[queue]

        def take(count: int) -> None:
            """At once: the buffers may be offered again before they are looked at."""
            buffers.extend(ring.written(head)[:length] for head, length in ring.wait(count))

        if not buffers:
            take(1)
        count = struct.unpack("<H", buffers[0][10:12])[0]
        if count > len(buffers):
            take(count - len(buffers))
        data = b"".join(buffers[:count])
        del buffers[:count]
        return data[:12], data[12:]

    def command(self, data: bytes, room: int = 1) -> bytes:
        """Send a control command; the acknowledgement."""
        head = self.control.add([data], [room] if room else [])
        self.queues[len(self.rings) - 1].kick()
        ((back, written),) = self.control.wait(1)
        assert back == head
        return self.control.written(head)[:written]

    def counters(self) -> dict[str, int]:
        return {name: value for name, value in self.device.counters().items() if value}

    def close(self) -> None:
        self.device.stop()
        for queue in self.queues.values():
            queue.close()
        self.device.close()
        self.memory.close()
