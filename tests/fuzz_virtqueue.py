"""Hostile rings against the virtqueue, guided by coverage::

    python -m tests.fuzz_virtqueue --seconds 60

An input is a program of a driver that keeps no rule and of a device: descriptors, indexes, tables and
rings anywhere; pop, write, done, signal, reset, save and load in any order. After each step the queue is
compared with tests/virtqueue_model.py, and all memory at the end. An input that takes the model along a
new pair of branches is kept and mutated further. A quarter of the time goes to a second kind of run:
another process scribbles over the ring while this one works on it, and only what holds for any guest is
checked.

A failure prints the input; ``--input HEX`` runs that one again.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import cast

from chv._bus import buffer_address
from chv._irq import IrqSource, IrqStatus
from chv._virtqueue import Chain, Queue, RamMap
from chv.memory import GuestMemory, Region
from tests.fuzzing import Inputs, parser, seed_of
from tests.virtqueue_model import BAD_INDEX, Image, Model, ModelChain

REGIONS = {0x0: 0x3000, 0x8000: 0x2000}  # base -> bytes; a hole between, nothing behind
MAX_SIZE = 64
TABLE = 0x8100  # where programs like to put tables of indirect descriptors
PLACES = [
    0,
    1,
    0x1000,
    0x2FF0,
    0x2FFF,
    0x3000,
    0x7FF0,
    0x7FFF,
    0x8000,
    TABLE,
    TABLE + 8,
    0x9FF0,
    0x9FFF,
    0xA000,
]
PLACES += [1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 16, (1 << 64) - 1]
LENGTHS = [0, 1, 2, 8, 15, 16, 17, 32, 48, 64, 0x100, 0x400, 0x410, 0x1000, 0x2000, 0x2001, 0x3000]
LENGTHS += [0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF]
FLAGS = [0, 1, 1, 2, 3, 3, 4, 5, 6, 7, 0xFFF8, 0xFFF9]


class Mismatch(AssertionError):
    """The queue did not do what the model says."""


class SmallMemory:
    """What RamMap needs of a GuestMemory, with small regions and a hole."""

    def __init__(self, fds: list[int] | None = None) -> None:
        """With ``fds``: of those files, shared with other processes."""
        self.regions = []
        for number, (base, size) in enumerate(REGIONS.items()):
            mapping = mmap.mmap(fds[number] if fds else -1, size)
            self.regions.append(Region(base, size, buffer_address(mapping), mapping))

    def write(self, address: int, data: bytes) -> None:
        for region in self.regions:
            if region.base <= address < region.end:
                start = address - region.base
                region.mapping[start : start + len(data)] = data

    def guest_address(self, view: memoryview) -> int:
        address = buffer_address(view)
        for region in self.regions:
            if region.address <= address and address + len(view) <= region.address + region.size:
                return address - region.address + region.base
        raise Mismatch(f"a buffer of {len(view)} bytes at {address:#x} is not in guest memory")

    def close(self) -> None:
        for region in self.regions:
            region.mapping.close()


class Reader:
    """The bytes of an input, one decision after another; 0 when they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def byte(self) -> int:
        self.position += 1
        return self.data[self.position - 1] if self.position <= len(self.data) else 0

    def word(self) -> int:
        return self.byte() | self.byte() << 8

    def of(self, choices: list[int]) -> int:
        return choices[self.byte() % len(choices)]

    def address(self) -> int:
        kind = self.byte()
        if kind < 128:
            return self.word() % 0xA100 & ~15 if kind & 1 else self.word() % 0xA100
        return (self.of(PLACES) + (self.byte() - 128 if kind & 1 else 0)) % (1 << 64)

    def length(self) -> int:
        kind = self.byte()
        return self.byte() if kind < 64 else self.of(LENGTHS)

    @property
    def empty(self) -> bool:
        return self.position >= len(self.data)


class Run:
    """One program, in two worlds: the queue's memory and the model's."""

    def __init__(self, data: bytes) -> None:
        self.reader = Reader(data)
        self.memory = SmallMemory()
        self.image = Image({base: bytes(size) for base, size in REGIONS.items()})
        self.last = ""
        self.seen: set[tuple[str, str]] = set()
        self.model = Model(self.image, self.note)
        self.status = IrqStatus()
        self.queue = Queue(
            RamMap(cast(GuestMemory, self.memory)),
            3,
            MAX_SIZE,
            IrqSource(self.status, 1),
            IrqSource(self.status, 2),
        )
        self.chains: list[tuple[Chain, ModelChain]] = []
        self.interrupts = 0

    def note(self, branch: str) -> None:
        self.seen.add((self.last, branch))
        self.last = branch

    def go(self) -> set[tuple[str, str]]:
        """Run it; the pairs of branches that the model took, one after the other."""
        try:
            self.enable(plain=self.reader.byte() < 240)
            steps = 0
            while not self.reader.empty and steps < 400:
                steps += 1
                STEPS[self.reader.byte() % len(STEPS)](self)
                self.compare()
            for region in self.memory.regions:
                same(region.mapping[:], bytes(self.image.regions[region.base]), f"memory at {region.base:#x}")
        finally:
            self.queue.close()
            self.memory.close()
        return self.seen

    def compare(self) -> None:
        state = self.queue.save()
        same(state["error"], self.model.error, "error")
        same(state["next_avail"], self.model.taken % 65536, "next_avail")
        same(state["next_used"], self.model.pushed % 65536, "next_used")
        expected = (self.model.queue_interrupts > 0) | (self.model.config_interrupts > 0) << 1
        self.model.queue_interrupts = self.model.config_interrupts = 0
        same(self.status.take(), expected, "interrupts")

    # -- the driver

    def put(self, address: int, data: bytes) -> None:
        """Write what lies in memory of ``data``, in both worlds."""
        for base, size in REGIONS.items():
            start, end = max(address, base), min(address + len(data), base + size)
            if start < end:
                part = data[start - address : end - address]
                self.image.put(start, part)
                self.memory.write(start, part)

    def enable(self, *, plain: bool) -> None:
        read = self.reader
        bits = read.byte()
        size = 1 << read.byte() % 7
        desc, avail, used = (
            (0x1000, 0x1800, 0x2000) if plain else (read.address(), read.address(), read.address())
        )
        if bits & 4:
            desc, avail, used = desc & ~15, avail & ~1, used & ~3
        event_idx, indirect = bool(bits & 1), bool(bits & 2)
        self.queue.enable(size, desc, avail, used, event_idx=event_idx, indirect=indirect)
        self.model.enable(size, desc, avail, used, event_idx=event_idx, indirect=indirect)

    def again(self) -> None:
        self.enable(plain=self.reader.byte() < 128)

    def entry(self, at: int) -> None:
        read = self.reader
        address, length, flags = read.address(), read.length(), read.of(FLAGS)
        following = read.byte() % 72 if read.byte() < 250 else read.word()
        self.put(
            at,
            address.to_bytes(8, "little")
            + length.to_bytes(4, "little")
            + flags.to_bytes(2, "little")
            + following.to_bytes(2, "little"),
        )

    def describe(self) -> None:
        if self.model.size:
            self.entry(self.model.desc + 16 * (self.reader.byte() % self.model.size))

    def good_chain(self) -> None:
        """A chain that is right, so that programs get further: readable, then writable, in RAM."""
        if not self.model.working:
            return
        read, size = self.reader, self.model.size
        at = self.model.desc
        readable, count = read.byte() % (size + 1), 1 + read.byte() % min(size, 5)
        first = read.byte() % size
        for n in range(count):
            flags = (n < count - 1) | (0 if n < readable else 2)
            number = (first + n) % size
            entry = (0x8400 + read.byte() * 8).to_bytes(8, "little") + (1 + read.byte() % 64).to_bytes(
                4, "little"
            )
            self.put(
                at + 16 * number, entry + bytes([flags, 0]) + ((number + 1) % size).to_bytes(2, "little")
            )
        self.offer(first)

    def long_chain(self) -> None:
        """Every descriptor leads to the next one, the last to the first; or one is the end."""
        size = self.model.size
        if not self.model.working:
            return
        for n in range(size):
            tail = b"\1\0" + ((n + 1) % size).to_bytes(2, "little")
            self.put(self.model.desc + 16 * n, (0x8400 + n).to_bytes(8, "little") + b"\1\0\0\0" + tail)
        if self.reader.byte() & 1:
            self.put(self.model.desc + 16 * (self.reader.byte() % size) + 12, b"\0\0")
        self.offer(self.reader.byte() % size)

    def table(self) -> None:
        self.entry(TABLE + 16 * (self.reader.byte() % 8))

    def use_table(self) -> None:
        if self.model.size:
            at = self.model.desc + 16 * (self.reader.byte() % self.model.size)
            length = 16 * (self.reader.byte() % 9)
            self.put(at, TABLE.to_bytes(8, "little") + length.to_bytes(4, "little") + b"\4\0\0\0")

    def publish(self) -> None:
        if self.model.working:
            self.offer(self.reader.byte() % (self.model.size + (self.reader.byte() > 240)))

    def offer(self, head: int) -> None:
        model = self.model
        index = self.image.number(model.avail + 2, 2)
        self.put(model.avail + 4 + 2 * (index % model.size), head.to_bytes(2, "little"))
        self.put(model.avail + 2, ((index + 1) % 65536).to_bytes(2, "little"))

    def lie(self) -> None:
        if self.model.working:
            ahead = self.reader.byte() if self.reader.byte() < 128 else self.reader.word()
            self.put(self.model.avail + 2, ((self.model.taken + ahead) % 65536).to_bytes(2, "little"))

    def want(self) -> None:
        """used_event near what comes next, and the flags."""
        if self.model.working:
            event = self.model.pushed + self.reader.byte() - 128
            self.put(self.model.avail + 4 + 2 * self.model.size, (event % 65536).to_bytes(2, "little"))
            self.put(self.model.avail, self.reader.of([0, 1, 2, 3]).to_bytes(2, "little"))

    def poke(self) -> None:
        self.put(self.reader.address(), bytes([self.reader.byte()] * (1 + self.reader.byte() % 16)))

    # -- the device

    def pop(self) -> None:
        self.taken(self.queue.pop(), self.model.pop())

    def taken(self, chain: Chain | None, expected: ModelChain | None) -> None:
        same(chain is None, expected is None, "a chain")
        if chain is None or expected is None:
            return
        same(chain.head, expected.head, "head")
        for views, buffers, name in [
            (chain.readable, expected.readable, "readable"),
            (chain.writable, expected.writable, "writable"),
        ]:
            same([(self.memory.guest_address(view), len(view)) for view in views], buffers, name)
        same(chain.readable_bytes, sum(length for _, length in expected.readable), "readable bytes")
        same(chain.writable_bytes, sum(length for _, length in expected.writable), "writable bytes")
        self.chains.append((chain, expected))

    def one(self) -> tuple[Chain, ModelChain] | None:
        if not self.chains:
            return None
        return self.chains[self.reader.byte() % len(self.chains)]

    def read(self) -> None:
        if pair := self.one():
            same(pair[0].read(), self.model.read(pair[1]), "read()")

    def write(self) -> None:
        data = bytes([self.reader.byte()]) * self.reader.byte()
        if pair := self.one():
            same(pair[0].write(data), self.model.write(pair[1], data), "write()")

    def done(self) -> None:
        if pair := self.one():
            chain, expected = pair
            written: int | None = None
            if self.reader.byte() & 1:
                written = self.reader.length() % (chain.writable_bytes + 1)
            chain.done(written)
            self.model.done(expected, expected.written if written is None else written)
            self.chains.remove(pair)

    def give_back(self) -> None:
        if self.chains:
            chain, expected = self.chains[-1]
            if self.model.give_back(expected):
                chain.give_back()
                self.chains.pop()

    def signal(self) -> None:
        self.queue.signal()
        self.model.signal()

    def kicks(self) -> None:
        if self.reader.byte() & 1:
            self.queue.disable_kick()
            self.model.disable_kick()
        else:
            same(self.queue.enable_kick(), self.model.enable_kick(), "enable_kick()")

    def serve(self) -> None:
        """Iterate; the ring may overlap itself and never run dry: leave it after some chains."""
        limit = 1 + self.reader.byte() % 100
        model = self.iterate()
        for chain in self.queue:
            expected = next(model, None)
            self.taken(chain, expected)
            self.chains.pop()
            assert expected is not None
            chain.write(b"served")
            self.model.write(expected, b"served")
            chain.done()
            self.model.done(expected, expected.written)
            limit -= 1
            if not limit:
                break
        else:
            same(next(model, None), None, "a chain more")
        model.close()

    def iterate(self) -> Generator[ModelChain]:
        taken, more, promised = 0, True, False
        try:
            while more:
                before = taken
                self.model.disable_kick()
                while (chain := self.model.pop()) is not None:
                    yield chain
                    taken += 1
                    if taken % 64 == 0:
                        self.model.signal()
                self.model.signal()
                if promised and taken == before and not self.model.error:
                    self.model.breaks(BAD_INDEX)
                promised = more = self.model.enable_kick()
        finally:
            if more:
                self.model.signal()
                self.model.enable_kick()

    # -- the transport

    def reset(self) -> None:
        self.queue.reset()
        self.model.reset()

    def save_and_load(self) -> None:
        state = self.queue.save()
        self.queue.load(state)
        if state["size"] and self.model.working:
            self.image.put_number(self.model.used, 2, 0)
        elif state["size"]:
            self.model.config_interrupts += 1  # the ring is as impossible as before
        self.model.generation += 1


STEPS = [
    Run.describe,
    Run.describe,
    Run.good_chain,
    Run.good_chain,
    Run.good_chain,
    Run.long_chain,
    Run.table,
    Run.table,
    Run.use_table,
    Run.publish,
    Run.publish,
    Run.publish,
    Run.lie,
    Run.want,
    Run.poke,
    Run.pop,
    Run.pop,
    Run.pop,
    Run.read,
    Run.write,
    Run.done,
    Run.done,
    Run.give_back,
    Run.signal,
    Run.kicks,
    Run.serve,
    Run.reset,
    Run.save_and_load,
    Run.again,
]


def same(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise Mismatch(f"{what}: {found!r:.200}, and the model says {expected!r:.200}")


# -- mutation ------------------------------------------------------------------------------------


class Corpus(Inputs):
    """Inputs that showed something new, and what they showed."""

    def run(self, data: bytes) -> set[tuple[str, str]]:
        return Run(data).go()


# -- a guest that writes at the same time ----------------------------------------------------------


def scribble(memory: SmallMemory, seed: int) -> None:
    """Change ring, tables and indexes until killed, or until the process that wants it is gone."""
    parent = os.getppid()
    rng = random.Random(seed)
    ring = memory.regions[0].mapping
    tables = memory.regions[1].mapping
    good = [0x8400, 0x8800, 0x8C00], [1, 16, 64], [0, 0, 1, 2, 3]
    wild = [0x1000, 0x2FF0, TABLE, TABLE, 0x9FFF, 1 << 63], [0, 16, 48, 0x1000, 0xFFFFFFFF], FLAGS
    entries = [
        rng.choice(addresses).to_bytes(8, "little")
        + rng.choice(lengths).to_bytes(4, "little")
        + rng.choice(flags).to_bytes(2, "little")
        + rng.randrange(17 if addresses is wild[0] else 16).to_bytes(2, "little")
        for addresses, lengths, flags in [good] * 60 + [wild] * 20
    ]
    index = 0
    while os.getppid() == parent:
        number = 16 * rng.randrange(16)
        ring[0x1000 + number : 0x1010 + number] = rng.choice(entries)
        number %= 128
        tables[0x100 + number : 0x110 + number] = rng.choice(entries)
        ring[0x1804 + index % 16 * 2] = 16 if rng.random() < 0.001 else rng.randrange(16)
        index = (index + 1) % 65536 if rng.random() < 0.999 else rng.randrange(65536)
        ring[0x1802:0x1804] = index.to_bytes(2, "little")
        ring[0x1800] = rng.randrange(2)


@contextlib.contextmanager
def scribbler(seed: int) -> Iterator[SmallMemory]:
    """Memory that another process scribbles over."""
    with contextlib.ExitStack() as stack:
        fds = []
        for base, size in REGIONS.items():
            fds.append(os.memfd_create(f"region {base:#x}"))
            stack.callback(os.close, fds[-1])
            os.truncate(fds[-1], size)
        memory = SmallMemory(fds)
        stack.callback(memory.close)
        words = [
            sys.executable,
            "-m",
            "tests.fuzz_virtqueue",
            "--seed",
            str(seed),
            "--scribble",
            *map(str, fds),
        ]
        child = stack.enter_context(subprocess.Popen(words, pass_fds=fds, cwd=Path(__file__).parents[1]))
        stack.callback(child.kill)
        yield memory


def hammer(enough: Callable[[dict[str, int]], bool], seed: int) -> dict[str, int]:
    """Work on a ring that another process scribbles over, until ``enough(outcomes)``; how often each was."""
    outcomes: dict[str, int] = {}
    with scribbler(seed) as memory:
        ram = RamMap(cast(GuestMemory, memory))
        with contextlib.closing(Queue(ram, 0, MAX_SIZE, IrqSource(), IrqSource())) as queue:
            while not enough(outcomes):
                served = scribbled(memory, queue, sum(outcomes.values()))
                name = queue.error or "no error"
                outcomes[name] = outcomes.get(name, 0) + 1
                outcomes["chains"] = outcomes.get("chains", 0) + served
    return outcomes


def scribbled(memory: SmallMemory, queue: Queue, bits: int) -> int:
    """Enable the queue and serve it until it is broken, empty, or has shown 1000 chains; how many."""
    queue.enable(16, 0x1000, 0x1800, 0x2000, event_idx=bool(bits & 1), indirect=bool(bits & 6))
    # Begin just behind where the driver is, or the index is too far ahead each time.
    index = (int.from_bytes(memory.regions[0].mapping[0x1802:0x1804], "little") - 9) % 65536
    queue.load({**queue.save(), "next_avail": index, "next_used": index, "signalled": index})
    served = 0
    for chain in queue:
        check_any(memory, chain)
        served += 1
        if served == 1000:
            break
    return served


def check_any(memory: SmallMemory, chain: Chain) -> None:
    """What holds whatever the guest does: buffers in memory, not too many, none empty."""
    views = chain.readable + chain.writable
    if len(views) > 16:
        raise Mismatch(f"{len(views)} buffers in a queue of 16")
    for view in views:
        memory.guest_address(view)
    if not all(len(view) for view in views):
        raise Mismatch("an empty buffer")
    same(sum(len(view) for view in views), chain.readable_bytes + chain.writable_bytes, "the sum of lengths")
    # Written to where it hurts nobody but the guest.
    chain.done(chain.write(chain.read(64)))


# -- the command -----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    made = parser("fuzz_virtqueue", __doc__)
    made.add_argument("--scribble", type=int, nargs=len(REGIONS), default=None, help=argparse.SUPPRESS)
    chosen = made.parse_args(arguments)
    if chosen.scribble is not None:
        scribble(SmallMemory(chosen.scribble), chosen.seed)
        return 0
    if chosen.input is not None:
        Run(chosen.input).go()
        print("the queue and the model agree")
        return 0
    seed = seed_of(chosen)
    print(f"seed {seed}", flush=True)
    corpus = Corpus(seed, chosen.record)
    corpus.keep_on(chosen.seconds * 0.75)
    print(f"{corpus.progress()}: all agree")
    end = time.monotonic() + chosen.seconds * 0.25
    outcomes = hammer(lambda outcomes: time.monotonic() > end, seed)
    print("with a process that scribbles over the ring:")
    for name, count in sorted(outcomes.items()):
        print(f"  {count:9} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
