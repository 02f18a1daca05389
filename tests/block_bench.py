"""A virtio-blk device on a real file, and a guest's driver for it: no KVM."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chv._irq import IrqSource, IrqStatus
from chv._virtqueue import Queue, RamMap
from chv.config.schema import DiskConfig
from chv.memory import GuestMemory
from chv.virtio.block import Block
from tests.virtio_driver import WRITE, Ring

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
SECTOR = 512
NOT_WRITTEN = 0xEE  #: what a status byte is before the device writes it

DATA_SIZE = 8 << 20  # of each ring


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def ranges(*parts: tuple[int, int, int]) -> bytes:
    """(sector, sectors, flags) of a discard or write-zeroes request."""
    return b"".join(struct.pack("<QII", *part) for part in parts)


class Bench:
    """``Bench(path, readonly=True, ...)``: the keywords are a DiskConfig's. It runs, until it is closed."""

    def __init__(
        self,
        path: Path,
        *,
        features: int | None = None,
        ring_size: int = 64,
        start: bool = True,
        **config: Any,
    ) -> None:
        self.block = Block.open(DiskConfig(path=str(path), **config), "disks[0]", "_disk0")
        self.features = self.block.features if features is None else features
        self.memory = GuestMemory(64 << 20)
        self.status = IrqStatus()
        ram = RamMap(self.memory)
        self.queues: list[Queue] = []
        self.rings: list[Ring] = []
        for index, size in enumerate(self.block.queue_sizes):
            queue = Queue(ram, index, size, IrqSource(self.status, 1), IrqSource(self.status, 2))
            base = self.rings[-1].end if self.rings else 0x100000
            ring = Ring(self.memory, base, min(size, ring_size), data_size=DATA_SIZE)
            ring.enable(queue, event_idx=True, indirect=True)
            self.queues.append(queue)
            self.rings.append(ring)
        if start:
            self.start()

    def start(self) -> None:
        self.block.start(dict(enumerate(self.queues)), self.features)

    def close(self) -> None:
        self.block.stop()
        self.block.close()
        for queue in self.queues:
            queue.close()
        self.memory.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    @property
    def engine(self) -> str:
        """What the first queue's last run used."""
        return self.block._queues[0].engine

    # -- chains

    def add(
        self,
        readable: Sequence[bytes],
        writable: Sequence[int] = (1,),
        *,
        queue: int = 0,
        indirect: bool = False,
    ) -> int:
        """Make a chain available, with its last writable byte not :data:`OK`; no kick."""
        ring = self.rings[queue]
        buffers = [(ring._place(data), len(data), 0) for data in readable]
        areas = [(ring._place(bytes([NOT_WRITTEN]) * length), length, WRITE) for length in writable]
        head = ring.add_buffers(buffers + areas, indirect=indirect)
        ring._writable[head] = [(address, length) for address, length, _ in areas]
        return head

    def answers(self, count: int, *, queue: int = 0) -> dict[int, tuple[int, bytes, int]]:
        """head -> (status, what is before it in the writable buffers, used length), of ``count`` chains."""
        ring = self.rings[queue]
        back = {}
        for head, written in ring.wait(count):
            whole = ring.written(head)
            back[head] = (whole[-1] if whole else NOT_WRITTEN, whole[:-1], written)
        return back

    def request(
        self,
        readable: Sequence[bytes],
        writable: Sequence[int] = (1,),
        *,
        queue: int = 0,
        indirect: bool = False,
    ) -> tuple[int, bytes, int]:
        """One request, answered: (status, data, used length)."""
        head = self.add(readable, writable, queue=queue, indirect=indirect)
        self.queues[queue].kick()
        return self.answers(1, queue=queue)[head]

    def read(self, sector: int, length: int, **options: Any) -> tuple[int, bytes]:
        return self.request([header(IN, sector)], [length, 1], **options)[:2]

    def write(self, sector: int, data: bytes, **options: Any) -> int:
        return self.request([header(OUT, sector), data], **options)[0]

    def flush(self, **options: Any) -> int:
        return self.request([header(FLUSH)], **options)[0]

    def discard(self, *parts: tuple[int, int, int]) -> int:
        return self.request([header(DISCARD), ranges(*parts)])[0]

    def write_zeroes(self, *parts: tuple[int, int, int]) -> int:
        return self.request([header(WRITE_ZEROES), ranges(*parts)])[0]
