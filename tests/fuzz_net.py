"""A hostile driver for virtio-net, made of bytes: ``python -m tests.fuzz_net --seconds 60``.

An input is a program of steps that write descriptors, indexes and commands, kick, stop, and put frames on the
wire. Whatever it does, the device must go on, let nothing out that the guest may not send, stop when it is
told to, and serve a good driver afterwards. Inputs that make the device do something new (its errors and
counters: none, one, more) are kept and changed further.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import random
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from chv.virtio._net import Receiver
from chv.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC
from chv.virtio.net import F_CTRL_GUEST_OFFLOADS, F_CTRL_VQ, F_GUEST_CSUM, F_MQ, F_MRG_RXBUF
from tests.sanitized.edges import Edges
from tests.unit.virtio_net_bench import HEADER, MAC, SPACE, Bench, frame
from tests.virtio_driver import Ring

PAIRS = 2
SIZE = 8
STEPS_MAX = 64
INPUT_MAX = 400
LONGEST = 12 + 65535 + 18
HANG = 60  # seconds after which a step or a stop has hung
FEATURES = F_CTRL_VQ | F_CTRL_GUEST_OFFLOADS | F_GUEST_CSUM
CHOICES = (F_MRG_RXBUF, F_EVENT_IDX, F_INDIRECT_DESC, F_MQ)
LENGTHS = (0, 1, 11, 12, 13, 25, 26, 72, 1526, 4096, 65565, 65566, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF)

Signature = tuple[object, ...]


class Program:
    """The bytes of an input, taken one after the other; 0 behind the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def ended(self) -> bool:
        return self._at >= len(self._data)

    def take(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        self._at += count
        return piece.ljust(count, b"\0")

    def number(self, below: int) -> int:
        return int.from_bytes(self.take(1 if below <= 256 else 2), "little") % below


class Target:
    """One device for all inputs, and what a driver can do to it."""

    def __init__(self) -> None:
        self.bench = Bench(PAIRS, SIZE, filtered=True)
        for index, fd in enumerate(self.bench.wire.fds):
            self.bench.device._receivers[index] = Receiver(fd, 1)
        for end in self.bench.wire.far:
            end.setblocking(False)
        self.steps: tuple[Callable[[Program], None], ...] = (
            self.describe,
            self.publish,
            self.kick,
            self.index,
            self.scribble,
            self.arrive,
            self.arrive,
            self.transmit,
            self.transmit,
            self.offer,
            self.offer,
            self.command,
            self.pause,
            self.reset_queue,
            self.drain,
        )
        self.features = 0
        self.only: tuple[int, ...] = ()

    def close(self) -> None:
        self.bench.close()

    def run(self, data: bytes) -> Signature:
        """Carry out an input; what the device did. AssertionError for what it may not do."""
        program = Program(data)
        before = self.bench.device.counters()
        chosen = program.number(16)
        self.features = FEATURES | sum(bit for n, bit in enumerate(CHOICES) if chosen >> n & 1)
        served = program.number(256)
        self.only = tuple(n for n in self.bench.queues if not served >> n & 1)
        self.begin(self.only)
        for _ in range(STEPS_MAX):
            if program.ended:
                break
            self.steps[program.number(len(self.steps))](program)
        self.bench.device.stop()
        self.drain(program)
        after = self.bench.device.counters()
        errors = tuple(queue.error for queue in self.bench.queues.values())
        self.be_good()
        return errors, chosen, tuple(min(after[name] - before[name], 2) for name in before)

    def begin(self, only: tuple[int, ...]) -> None:
        for ring in self.bench.rings:
            ring.clear()
        self.bench.start(self.features, only)

    def be_good(self) -> None:
        """After a reset, a driver that does nothing wrong gets what it should."""
        self.bench.device.reset()
        self.features = F_MRG_RXBUF
        for end in self.bench.wire.near:
            with contextlib.suppress(BlockingIOError):
                while True:
                    end.recv(1)
        self.begin((0, 1))
        self.bench.send([HEADER + frame(60)])
        self.bench.tx.wait(1)
        assert self.bench.far.recv(100) == HEADER + frame(60)
        (head,) = self.bench.offer(200)
        self.bench.far.send(HEADER + frame(60))
        assert self.bench.rx.wait(1) == [(head, 72)]
        assert self.bench.rx.written(head)[12:72] == frame(60)
        self.bench.device.stop()
        self.bench.device.reset()

    # -- steps

    def ring(self, program: Program) -> Ring:
        return self.bench.rings[program.number(len(self.bench.rings))]

    def address(self, program: Program, ring: Ring) -> int:
        end = (len(self.bench.rings) + 1) * SPACE
        bases = (ring.data, ring.desc, ring.avail, ring.used_ring, 0, end, end - 72, (1 << 64) - 72, 1 << 40)
        return (bases[program.number(len(bases))] + program.number(256)) % (1 << 64)

    def describe(self, program: Program) -> None:
        ring = self.ring(program)
        number = program.number(SIZE)
        address = self.address(program, ring)
        length = LENGTHS[program.number(len(LENGTHS))]
        ring.describe(number, address, length, program.number(8), program.number(SIZE + 2))

    def publish(self, program: Program) -> None:
        self.ring(program).publish(program.number(SIZE + 1))

    def kick(self, program: Program) -> None:
        self.bench.queues[program.number(len(self.bench.queues))].kick()

    def index(self, program: Program) -> None:
        ring = self.ring(program)
        ring.set_avail_index(ring.avail_index + program.number(2 * SIZE) - 2)

    def scribble(self, program: Program) -> None:
        ring = self.ring(program)
        offset = program.number(ring.data - ring.desc - 16)
        self.bench.memory.write(ring.desc + offset, program.take(16))

    def arrive(self, program: Program) -> None:
        length = (0, 13, 14, 60, 1514, 9000, 65535)[program.number(7)]
        with contextlib.suppress(BlockingIOError):
            self.bench.wire.far[program.number(PAIRS)].send(HEADER + frame(length))

    def transmit(self, program: Program) -> None:
        number = 2 * program.number(PAIRS) + 1
        mac = MAC if program.number(2) else program.take(6)
        whole = HEADER + (mac + mac + frame(2000))[: program.number(2000)]
        at = program.number(40)
        self.add(number, [whole[:at], whole[at:]], [], program)

    def offer(self, program: Program) -> None:
        lengths = [program.number(3000) for _ in range(1 + program.number(3))]
        self.add(2 * program.number(PAIRS), [], lengths, program)

    def command(self, program: Program) -> None:
        size = program.number(20)
        self.add(len(self.bench.rings) - 1, [program.take(size)], [1] * program.number(3), program)

    def add(self, number: int, readable: list[bytes], writable: list[int], program: Program) -> None:
        ring = self.bench.rings[number]
        if not ring.free or len(readable) + len(writable) > len(ring.free):
            ring.free = list(range(SIZE))  # the driver does not care what is still in use
        ring.add(readable, writable, indirect=bool(program.number(2)))
        self.bench.queues[number].kick()

    def pause(self, program: Program) -> None:
        if program.number(4) == 0:
            self.bench.device.stop()
            self.bench.device.start({n: self.bench.queues[n] for n in self.only}, self.features)

    def reset_queue(self, program: Program) -> None:
        number = program.number(len(self.bench.queues))
        queue = self.bench.queues[number]
        self.bench.device.stop_queue(number)
        self.bench.rings[number].clear()
        self.bench.rings[number].enable(
            queue, event_idx=bool(self.features & F_EVENT_IDX), indirect=bool(self.features & F_INDIRECT_DESC)
        )
        if number in self.only:
            self.bench.device.start_queue(queue)

    def drain(self, program: Program) -> None:
        """Look at all that the device sent."""
        for end in self.bench.wire.far:
            while (data := receive(end)) is not None:
                assert 26 <= len(data) <= LONGEST, f"a frame of {len(data)} bytes left"
                assert data[18:24] == MAC, f"a frame from {data[18:24].hex(':')} left"


def receive(end: socket.socket) -> bytes | None:
    try:
        return end.recv(1 << 18)
    except BlockingIOError:
        return None


def mutate(data: bytes, corpus: list[bytes], choose: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(choose.randint(1, 6)):
        at = choose.randint(0, len(changed))
        match choose.randint(0, 4):
            case 0:
                changed[at:at] = choose.randbytes(choose.randint(1, 16))
            case 1:
                del changed[at : at + choose.randint(1, 16)]
            case 2 if at < len(changed):
                changed[at] = choose.choice((0, 1, 0xFF, choose.randrange(256)))
            case 3:
                other = choose.choice(corpus)
                start = choose.randint(0, len(other))
                changed[at:at] = other[start : start + choose.randint(1, 60)]
            case _:
                changed += struct.pack("<H", choose.randrange(65536))
    return bytes(changed[:INPUT_MAX])


def fuzz(target: Target, seconds: float, seed: int, record: Path) -> tuple[int, int]:
    """How many inputs were run, and how many did something new."""
    choose = random.Random(seed)
    corpus = [choose.randbytes(100)]
    seen: set[Signature] = set()
    edges = Edges()
    runs = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = (
            mutate(choose.choice(corpus), corpus, choose) if choose.random() < 0.9 else choose.randbytes(200)
        )
        record.write_bytes(data)
        faulthandler.dump_traceback_later(HANG, exit=True)
        signature = target.run(data)
        runs += 1
        if edges.new() or signature not in seen:
            seen.add(signature)
            corpus.append(data)
    faulthandler.cancel_dump_traceback_later()
    print(
        f"{runs} inputs, {len(seen)} kinds of behaviour, {len(corpus)} inputs kept, {edges}: no failure",
        flush=True,
    )
    return runs, len(seen)


def main() -> int:
    sys.setswitchinterval(0.0002)  # threads start and end all the time
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_net", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="of the choices; printed when not given")
    parser.add_argument("--record", type=Path, help="has the last input if it crashes")
    parser.add_argument("--input", type=Path, help="run this file's bytes alone")
    options = parser.parse_args()
    faulthandler.enable()
    target = Target()
    try:
        if options.input is not None:
            print(target.run(options.input.read_bytes()))
            return 0
        seed = random.randrange(1 << 32) if options.seed is None else options.seed
        record = options.record or Path(tempfile.gettempdir()) / f"chv-fuzz-net-{seed}"
        print(f"seed {seed}; the last input is in {record}", flush=True)
        fuzz(target, options.seconds, seed, record)
        record.unlink(missing_ok=True)
    finally:
        target.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
