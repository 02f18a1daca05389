"""Hostile requests against virtio-blk, guided by coverage::

    python -m tests.fuzz_block --seconds 60

An input is a disk (its size, engine, options) and a program of a driver: requests of any type, for any
sectors, in buffers cut at any place and at any address, several at a time. What comes back, and the file at
the end, is compared with tests/block_model.py. An input that takes the model along a new pair of branches
is kept and mutated further. A quarter of the time goes to a second kind of run: this thread scribbles over
ring and requests while the device works on them; then the disk must keep its size, the device must stop
when told to, and memory that is no buffer must stay as it is.

A failure prints the input; ``--input HEX`` runs that one again.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from chv.errors import ConfigError
from chv.virtio._block import io_uring_error
from tests.block_bench import NOT_WRITTEN, Bench
from tests.block_model import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    OUT,
    RANGE,
    SECTOR,
    WRITE_ZEROES,
    Answer,
    Model,
    Touched,
)
from tests.fuzz_virtqueue import Mismatch, Reader, same
from tests.fuzzing import Inputs, parser, seed_of
from tests.virtio_driver import WRITE

SECTORS = 96
KINDS = [
    IN,
    IN,
    IN,
    IN,
    OUT,
    OUT,
    OUT,
    OUT,
    FLUSH,
    GET_ID,
    DISCARD,
    DISCARD,
    WRITE_ZEROES,
    WRITE_ZEROES,
    2,
    1 << 31,
]
EDGES = [SECTORS, SECTORS - 1, SECTORS - 2, 1 << 32, 1 << 54, 1 << 55, 1 << 63, (1 << 64) - 1]
ODD = [0, 1, 2, 15, 16, 17, 511, 513, 1023]
COUNTS = [0, 1, 2, 8, SECTORS, 1 << 22, (1 << 22) + 1, 0xFFFFFFFF]
MAX_BATCH = 12
DATA = 0x400000  # guest memory for buffers
DATA_SIZE = 2 << 20


class Run:
    """One disk and one program."""

    def __init__(self, data: bytes, folder: Path) -> None:
        self.reader = Reader(data)
        self.seen: set[tuple[str, str]] = set()
        self.last = ""
        self.path = folder / "disk.img"
        self.path.write_bytes(os.urandom(SECTORS * SECTOR))
        self.bench = self.open()
        block = self.bench.block
        self.model = Model(
            self.path.read_bytes(),
            readonly=block.file.readonly,
            ranges=block.file.punches_holes,
            serial=block.serial,
            note=self.note,
        )
        self.at = DATA
        self.waiting: dict[int, tuple[Answer, list[tuple[int, int]]]] = {}
        self.touched: list[Touched] = []

    def open(self) -> Bench:
        bits = self.reader.byte()
        options = {
            "disable_io_uring": bool(bits & 1),
            "readonly": bits & 0x1C == 0x1C,
            "direct": bool(bits & 2),
        }
        try:
            bench = Bench(self.path, start=False, **options)
        except ConfigError:  # no direct I/O here
            bench = Bench(self.path, start=False, **{**options, "direct": False})
        bench.start()
        if bits & 0x40:
            bench.block.write_config(32, b"\0")
        return bench

    def note(self, branch: str) -> None:
        self.seen.add((self.last, branch))
        self.last = branch

    def go(self) -> set[tuple[str, str]]:
        try:
            while not self.reader.empty:
                self.request()
            self.settle()
        finally:
            self.bench.close()
        same(self.path.read_bytes() == self.model.content, True, "the file's content")
        return self.seen

    # -- requests

    def request(self) -> None:
        """Add one to those on their way, which wait until one conflicts with them."""
        readable, writable = self.content()
        inputs = self.cut(readable)
        outputs = self.cut(bytes([NOT_WRITTEN]) * writable)
        if not inputs and not outputs:
            return
        indirect = bool(self.reader.byte() & 1)
        answer, touched = self.model.answer(readable, writable)
        crowded = len(self.waiting) == MAX_BATCH or len(inputs + outputs) > len(self.bench.rings[0].free)
        if crowded or any(a.conflicts(b) for a in self.touched for b in touched):
            self.settle()
        buffers = [(self.place(part), len(part), 0) for part in inputs]
        areas = [(self.place(part), len(part)) for part in outputs]
        buffers += [(address, length, WRITE) for address, length in areas]
        head = self.bench.rings[0].add_buffers(buffers, indirect=indirect)
        self.waiting[head] = (answer, areas)
        self.touched += touched
        if self.reader.byte() & 3 == 0:
            self.bench.queues[0].kick()

    def settle(self) -> None:
        """Wait for all that is on its way, and look at it."""
        self.bench.queues[0].kick()
        for head, used in self.bench.rings[0].wait(len(self.waiting)):
            answer, areas = self.waiting.pop(head)
            same(used, answer.used, "used length")
            found = b"".join(self.bench.memory.read(address, length) for address, length in areas)
            if answer.status is None:
                continue
            rest = bytes([NOT_WRITTEN]) * (len(found) - len(answer.data) - 1)
            same(found[-1], answer.status, "status")
            same(found[:-1] == answer.data + rest, True, "what was read")
        self.touched = []
        self.at = DATA

    def content(self) -> tuple[bytes, int]:
        """The bytes that a request gives to the device, and how many it has room for."""
        read = self.reader
        kind = read.of(KINDS)
        odd = read.byte()
        readable = kind.to_bytes(4, "little") + bytes(4) + self.sector().to_bytes(8, "little")
        length = SECTOR * (read.byte() % 12) if odd < 230 else read.of(ODD)
        writable = 1
        if kind == OUT:
            readable += random.Random(read.byte()).randbytes(length)
        elif kind in (DISCARD, WRITE_ZEROES):
            readable += self.ranges()
        else:
            writable += length
        if odd >= 250:
            readable = readable[: read.byte()]
        if odd % 32 == 31:
            writable = 0
        return readable, writable

    def sector(self) -> int:
        kind = self.reader.byte()
        return kind % SECTORS if kind < 200 else self.reader.of(EDGES)

    def ranges(self) -> bytes:
        read = self.reader
        parts = b""
        count = read.byte()
        for _ in range(count % 4 if count < 250 else 65):
            size = read.byte() % 24 if read.byte() < 200 else read.of(COUNTS)
            parts += RANGE.pack(self.sector(), size, read.of([0, 0, 0, 1, 1, 2, 1 << 31]))
        return parts if count % 16 else parts[:-1]

    def cut(self, data: bytes) -> list[bytes]:
        """Cut it at up to four places; a part may be empty."""
        places = sorted(self.reader.word() % (len(data) + 1) for _ in range(self.reader.byte() % 5))
        if places:
            self.note(f"cut {min(len(places), 3)}")
        edges = [0, *places, len(data)]
        return [data[start:end] for start, end in itertools.pairwise(edges) if end > start or places]

    def place(self, data: bytes) -> int:
        """Put it into guest memory, at a multiple of 512 or anywhere."""
        step = self.reader.byte()
        address = -(-self.at // SECTOR) * SECTOR + (step if step & 1 else 0)
        assert address + len(data) <= DATA + DATA_SIZE
        self.bench.memory.write(address, data)
        self.at = address + len(data)
        return address


# -- inputs --------------------------------------------------------------------------------------


class Corpus(Inputs):
    """Inputs that showed something new, and what they showed; ``with`` keeps the folder for the disks."""

    def __init__(self, seed: int, record: Path | None = None) -> None:
        super().__init__(seed, record)
        self.folder = tempfile.TemporaryDirectory(prefix="chv-fuzz-")

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *args: object) -> None:
        self.folder.cleanup()

    def run(self, data: bytes) -> set[tuple[str, str]]:
        return Run(data, Path(self.folder.name)).go()


# -- a guest that writes at the same time ----------------------------------------------------------


def hammer(enough: Callable[[dict[str, int]], bool], seed: int, folder: Path) -> dict[str, int]:
    """Scribble over ring and requests of disks at work until ``enough(outcomes)``; how often each was."""
    rng = random.Random(seed)
    outcomes: dict[str, int] = {}
    path = folder / "hammered.img"
    path.write_bytes(os.urandom(SECTORS * SECTOR))
    while not enough(outcomes):
        with Bench(path, disable_io_uring=bool(rng.randrange(2)), direct=False) as bench:
            scribble(bench, rng)
            error = bench.queues[0].error or "no error"
            bench.block.stop()
            check_untouched(bench)
            outcomes[error] = outcomes.get(error, 0) + 1
            outcomes["chains"] = outcomes.get("chains", 0) + bench.queues[0].chains
            outcomes["failed"] = outcomes.get("failed", 0) + bench.block.counters()["io_errors"]
        same(path.stat().st_size, SECTORS * SECTOR, "the file's size")
    return outcomes


GUARD = 0x300_0000  # no descriptor that scribble writes reaches here
GUARD_SIZE = 1 << 16


def check_untouched(bench: Bench) -> None:
    same(bench.memory.read(GUARD, GUARD_SIZE) == bytes(GUARD_SIZE), True, "memory that is no buffer")


def scribble(bench: Bench, rng: random.Random) -> None:
    """Change descriptors, requests and indexes, until the ring is broken or enough was done."""
    ring = bench.rings[0]
    for _ in range(3000):
        head = rng.randrange(ring.size // 3) * 3
        good_request(bench, rng, head)
        ring.publish(head)
        # And, while the device may be at it:
        bench.memory.write(DATA + rng.randrange(64) * 256, rng.choice(KINDS).to_bytes(4, "little"))
        good_request(bench, rng, rng.randrange(ring.size // 3) * 3)
        if rng.random() < 0.01:
            flags = rng.choice([0, 1, 2, 3, 4, 5, 0xFFF8])
            length = rng.choice([0, 1, 511, 4096, 1 << 31, 0xFFFFFFFF])
            ring.describe(rng.randrange(ring.size), DATA, length, flags, rng.randrange(ring.size + 1))
        ring.used_index = ring._u16(ring.used_ring + 2)
        if (ring.avail_index - ring.used_index) % 65536 > ring.size // 2:
            bench.queues[0].kick()
            time.sleep(0.0002)
        if bench.queues[0].error:
            return


def good_request(bench: Bench, rng: random.Random, head: int) -> None:
    """A request in the three descriptors from ``head`` on, which another may be in the middle of."""
    ring, memory = bench.rings[0], bench.memory
    kind = rng.choice(KINDS)
    where = DATA + rng.randrange(64) * 256
    memory.write(
        where, kind.to_bytes(4, "little") + bytes(4) + rng.randrange(SECTORS + 2).to_bytes(8, "little")
    )
    memory.write(where + 16, RANGE.pack(rng.randrange(SECTORS), rng.randrange(9), 0))
    ranges = kind in (DISCARD, WRITE_ZEROES)
    ring.describe(head, where, 32 if ranges else 16, 1, head + 1)
    data, length = DATA + rng.randrange(64) * 256, rng.choice([512, 512, 1024, 4096])
    ring.describe(head + 1, data, length, 1 if kind == OUT else 1 | WRITE, head + 2)
    ring.describe(head + 2, where + 40, 1, WRITE)


# -- the command -----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    chosen = parser("fuzz_block", __doc__).parse_args(arguments)
    seed = seed_of(chosen)
    with Corpus(seed, chosen.record) as corpus:
        folder = Path(corpus.folder.name)
        if chosen.input is not None:
            Run(chosen.input, folder).go()
            print("the disk and the model agree")
            return 0
        print(f"seed {seed}, io_uring {'is not there' if io_uring_error() else 'is used'}", flush=True)
        corpus.keep_on(chosen.seconds * 0.75)
        print(f"{corpus.progress()}: all agree")
        end = time.monotonic() + chosen.seconds * 0.25
        outcomes = hammer(lambda outcomes: time.monotonic() > end, seed, folder)
        print("with a guest that scribbles over ring and requests:")
        for name, count in sorted(outcomes.items()):
            print(f"  {count:9} {name}")
    return 0


__all__ = ["Corpus", "Mismatch", "Run", "hammer", "main"]

if __name__ == "__main__":
    sys.exit(main())
