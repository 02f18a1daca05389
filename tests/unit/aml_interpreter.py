"""As much of an AML interpreter as the CPU hotplug methods need, with registers that act.

acpiexec is the judge of whether the AML is right; but the registers that it shows to AML keep what was
written and do nothing. Here a read or write reaches the device itself, so that the methods and the
device can be tested with each other. Everything not needed is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field


class Leave(Exception):
    """Break or Return."""

    def __init__(self, value: int | None) -> None:
        self.value = value


@dataclass
class Interpreter:
    """``read`` and ``write`` reach the device; ``fields`` has (offset, size) of each named register."""

    aml: bytes
    fields: dict[bytes, tuple[int, int]]
    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]
    notified: list[tuple[str, int]] = field(default_factory=list)
    exits: int = 0
    held: int = 0

    def __post_init__(self) -> None:
        self.methods: dict[bytes, tuple[int, int, int]] = {}  # name: arguments, start, end
        for match in re.finditer(rb"\x14(?=[\x00-\xff]{1,4}(C[A-Z]{3}|CEJ0)[\x00-\x7f])", self.aml):
            end, place = self.package(match.start() + 1)
            name = self.aml[place : place + 4]
            if re.fullmatch(rb"C[A-Z]{3}|CEJ0", name):
                self.methods[name] = (self.aml[place + 4] & 7, place + 5, end)

    def package(self, place: int) -> tuple[int, int]:
        """(where the package ends, where its content starts)."""
        extra = self.aml[place] >> 6
        if not extra:
            return place + self.aml[place], place + 1
        low = self.aml[place] & 0xF
        high = int.from_bytes(self.aml[place + 1 : place + 1 + extra], "little")
        return place + (low | high << 4), place + 1 + extra

    def call(self, name: bytes, *arguments: int) -> int | None:
        count, start, end = self.methods[name]
        assert count == len(arguments)
        frame = {0x68 + n: value for n, value in enumerate(arguments)}
        try:
            self.block(start, end, frame)
        except Leave as leave:
            return leave.value
        return None

    def block(self, place: int, end: int, frame: dict[int, int]) -> None:
        taken = False
        while place < end:
            opcode = self.aml[place]
            if opcode in (0xA0, 0xA2):  # If, While
                stop, start = self.package(place + 1)
                while True:
                    condition, body = self.term(start, frame)
                    taken = condition != 0
                    if taken:
                        try:
                            self.block(body, stop, frame)
                        except Leave as leave:
                            if opcode == 0xA0 or leave.value is not None:
                                raise
                            break
                    if opcode == 0xA0 or not taken:
                        break
                place = stop
            elif opcode == 0xA1:  # Else
                stop, start = self.package(place + 1)
                if not taken:
                    self.block(start, stop, frame)
                place = stop
            elif opcode == 0xA5:  # Break
                raise Leave(None)
            elif opcode == 0xA4:  # Return
                raise Leave(self.term(place + 1, frame)[0])
            else:
                place = self.term(place, frame)[1]

    def term(self, place: int, frame: dict[int, int]) -> tuple[int, int]:
        """(value, where the next term starts)."""
        opcode = self.aml[place]
        if opcode in (0, 1):
            return opcode, place + 1
        if opcode in (0x0A, 0x0B, 0x0C):
            size = 1 << opcode - 0x0A
            return int.from_bytes(self.aml[place + 1 : place + 1 + size], "little"), place + 1 + size
        if 0x60 <= opcode <= 0x6E:
            return frame[opcode], place + 1
        if opcode in (0x90, 0x91, 0x93, 0x94, 0x95, 0x72, 0x7B):
            left, place = self.term(place + 1, frame)
            right, place = self.term(place, frame)
            value = {
                0x90: left and right,
                0x91: left or right,
                0x93: left == right,
                0x94: left > right,
                0x95: left < right,
                0x72: left + right,
                0x7B: left & right,
            }[opcode]
            return int(value), self.store(place, int(value), frame) if opcode < 0x90 else place
        if opcode == 0x92:  # LNot
            value, place = self.term(place + 1, frame)
            return int(not value), place
        if opcode == 0x70:  # Store
            value, place = self.term(place + 1, frame)
            return value, self.store(place, value, frame)
        if opcode == 0x86:  # Notify
            value, after = self.term(place + 5, frame)
            self.notified.append((self.aml[place + 1 : place + 5].decode(), value))
            return 0, after
        if opcode == 0x5B and self.aml[place + 1] in (0x23, 0x27):  # Acquire, Release
            self.held += 1 if self.aml[place + 1] == 0x23 else -1
            assert self.held in (0, 1)
            return 0, place + (8 if self.aml[place + 1] == 0x23 else 6)
        return self.name(place, frame)

    def name(self, place: int, frame: dict[int, int]) -> tuple[int, int]:
        name = self.aml[place : place + 4]
        if name in self.fields:
            self.exits += 1
            return self.read(*self.fields[name]), place + 4
        count = self.methods[name][0]
        place += 4
        arguments = []
        for _ in range(count):
            value, place = self.term(place, frame)
            arguments.append(value)
        return self.call(name, *arguments) or 0, place

    def store(self, place: int, value: int, frame: dict[int, int]) -> int:
        """Put a value into the target at ``place``; where the next term starts."""
        opcode = self.aml[place]
        if opcode == 0:
            return place + 1
        if 0x60 <= opcode <= 0x67:
            frame[opcode] = value
            return place + 1
        self.exits += 1
        self.write(*self.fields[self.aml[place : place + 4]], value)
        return place + 4
