"""What a split virtqueue has to do (virtio 1.2, 2.7), once more, for the fuzzer to compare with.

It is written from the rules, not from chv/_virtqueue.pyx: numbers of chains do not wrap, memory is a few
bytearrays, nothing is fast. ``note`` is told which branches ran: the fuzzer's coverage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

NEXT, WRITE, INDIRECT = 1, 2, 4

BAD_INDEX, BAD_HEAD, LOOP, BAD_ADDRESS, BAD_INDIRECT, BAD_ORDER, BAD_RING = range(1, 8)


class Image:
    """Guest memory: base -> content."""

    def __init__(self, regions: dict[int, bytes]) -> None:
        self.regions = {base: bytearray(content) for base, content in regions.items()}

    def has(self, address: int, length: int) -> bool:
        return any(
            base <= address and address + length <= base + len(content)
            for base, content in self.regions.items()
        )

    def _at(self, address: int) -> tuple[bytearray, int]:
        for base, content in self.regions.items():
            if base <= address < base + len(content):
                return content, address - base
        raise AssertionError(f"{address:#x} is not in memory")

    def get(self, address: int, length: int) -> bytes:
        if not length:
            return b""
        content, start = self._at(address)
        return bytes(content[start : start + length])

    def put(self, address: int, data: bytes) -> None:
        content, start = self._at(address)
        assert start + len(data) <= len(content)
        content[start : start + len(data)] = data

    def number(self, address: int, length: int) -> int:
        return int.from_bytes(self.get(address, length), "little")

    def put_number(self, address: int, length: int, value: int) -> None:
        self.put(address, (value & ((1 << 8 * length) - 1)).to_bytes(length, "little"))


@dataclass
class ModelChain:
    head: int
    position: int  # the number of the chain after it
    generation: int
    readable: list[tuple[int, int]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)
    written: int = 0
    completed: bool = False


class Broken(Exception):
    def __init__(self, error: int) -> None:
        super().__init__(error)
        self.error = error


class Model:
    def __init__(self, image: Image, note: Callable[[str], None]) -> None:
        self.image = image
        self.note = note
        self.generation = 0
        self.queue_interrupts = self.config_interrupts = 0
        self.reset()

    def reset(self) -> None:
        self.generation += 1
        self.working = False
        self.error = 0
        self.size = 0
        self.taken = self.pushed = self.signalled = 0

    def enable(self, size: int, desc: int, avail: int, used: int, *, event_idx: bool, indirect: bool) -> None:
        self.reset()
        self.size, self.desc, self.avail, self.used = size, desc, avail, used
        self.event_idx, self.indirect = event_idx, indirect
        parts = [(desc, 16 * size, 16), (avail, 6 + 2 * size, 2), (used, 6 + 8 * size, 4)]
        if all(address % align == 0 and self.image.has(address, n) for address, n, align in parts):
            self.working = True
            self.image.put_number(used, 2, 0)
            self.note("enabled")
        else:
            self.breaks(BAD_RING)

    def breaks(self, error: int) -> None:
        self.note(f"error {error}")
        self.error = error
        self.config_interrupts += 1

    # -- taking

    def pop(self) -> ModelChain | None:
        if not self.working or self.error:
            return None
        ahead = (self.image.number(self.avail + 2, 2) - self.taken) % 65536
        if not ahead:
            self.note("nothing there")
            return None
        try:
            if ahead > self.size:
                raise Broken(BAD_INDEX)
            head = self.image.number(self.avail + 4 + 2 * (self.taken % self.size), 2)
            chain = ModelChain(head, self.taken + 1, self.generation)
            self.walk(chain)
        except Broken as broken:
            self.breaks(broken.error)
            return None
        self.taken += 1
        self.note(f"chain {min(len(chain.readable), 3)} {min(len(chain.writable), 3)}")
        return chain

    def walk(self, chain: ModelChain) -> None:
        table, entries, nested = self.desc, self.size, False
        number, steps, writing = chain.head, 0, False
        while True:
            if number >= entries:
                raise Broken(BAD_HEAD)
            at = table + 16 * number
            address, length = self.image.number(at, 8), self.image.number(at + 8, 4)
            flags, following = self.image.number(at + 12, 2), self.image.number(at + 14, 2)
            if flags & INDIRECT:
                count, rest = divmod(length, 16)
                if nested or not self.indirect or flags & NEXT or rest or not 1 <= count <= self.size - steps:
                    self.note(f"bad table {nested} {self.indirect} {flags & NEXT} {bool(rest)} {not count}")
                    raise Broken(BAD_INDIRECT)
                if not self.image.has(address, length):
                    raise Broken(BAD_ADDRESS)
                self.note(f"table after {min(steps, 3)}")
                table, entries, nested, number = address, count, True, 0
                continue
            steps += 1
            if steps > self.size:
                raise Broken(LOOP)
            if flags & WRITE:
                writing = True
            elif writing:
                raise Broken(BAD_ORDER)
            if length and not self.image.has(address, length):
                raise Broken(BAD_ADDRESS)
            if length:
                (chain.writable if flags & WRITE else chain.readable).append((address, length))
            if not flags & NEXT:
                return
            number = following

    def give_back(self, chain: ModelChain) -> bool:
        """False: it is not the last one."""
        if chain.generation == self.generation:
            if chain.position != self.taken:
                return False
            self.taken -= 1
            self.note("given back")
        chain.completed = True
        return True

    # -- buffers

    def read(self, chain: ModelChain) -> bytes:
        if chain.generation != self.generation:
            return b""
        return b"".join(self.image.get(*buffer) for buffer in chain.readable)

    def write(self, chain: ModelChain, data: bytes) -> int:
        if chain.generation != self.generation:
            return 0
        position, before = 0, chain.written
        for address, length in chain.writable:
            for n in range(length):
                if before <= position < before + len(data):
                    self.image.put(address + n, data[position - before : position - before + 1])
                    chain.written += 1
                position += 1
                if position >= before + len(data):
                    return chain.written - before
        return chain.written - before

    def done(self, chain: ModelChain, written: int) -> None:
        chain.completed = True
        if chain.generation != self.generation or not self.working:
            self.note("done and void")
            return
        entry = self.used + 4 + 8 * (self.pushed % self.size)
        self.image.put_number(entry, 4, chain.head)
        self.image.put_number(entry + 4, 4, min(written, 0xFFFFFFFF))
        self.pushed += 1
        self.image.put_number(self.used + 2, 2, self.pushed)

    # -- telling

    def signal(self) -> None:
        count = self.pushed - self.signalled
        if not self.working or not count:
            return
        if self.event_idx:
            event = self.image.number(self.avail + 4 + 2 * self.size, 2)
            wanted = (event - self.signalled) % 65536 < count
        else:
            wanted = not self.image.number(self.avail, 2) & 1
        self.note(f"signal {wanted}")
        self.queue_interrupts += wanted
        self.signalled = self.pushed

    def disable_kick(self) -> None:
        if self.working and not self.event_idx:
            self.image.put_number(self.used, 2, 1)

    def enable_kick(self) -> bool:
        if not self.working or self.error:
            return False
        if self.event_idx:
            self.image.put_number(self.used + 4 + 8 * self.size, 2, self.taken)
        else:
            self.image.put_number(self.used, 2, 0)
        more = self.image.number(self.avail + 2, 2) != self.taken % 65536
        self.note(f"kicks on {more}")
        return more
