"""What a virtio-blk device answers (virtio 1.2, 5.2.6), on a bytearray: slow, obvious, no I/O errors."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
SECTOR = 512
MAX_RANGES = 64
MAX_RANGE = 1 << 22
RANGE = struct.Struct("<QII")


@dataclass(frozen=True)
class Answer:
    """``status`` None: there is no room for one. ``data`` is written from the first writable byte on."""

    status: int | None
    data: bytes = b""

    @property
    def used(self) -> int:
        return 0 if self.status is None else len(self.data) + 1


@dataclass(frozen=True)
class Touched:
    """Sectors that a request is about, and whether it changes them."""

    start: int
    end: int
    changes: bool

    def conflicts(self, other: Touched) -> bool:
        return (self.changes or other.changes) and self.start < other.end and other.start < self.end


class Model:
    """``note`` is told of each decision that is made."""

    def __init__(
        self, content: bytes, *, readonly: bool, ranges: bool, serial: bytes, note: Callable[[str], None]
    ) -> None:
        self.content = bytearray(content)
        self.readonly = readonly
        self.ranges = ranges
        self.serial = serial
        self._note = note

    def answer(self, readable: bytes, writable: int) -> tuple[Answer, list[Touched]]:
        """The answer to a request in a chain with these bytes to read and that many to write."""
        if writable == 0:
            self._note("no status")
            return Answer(None), []
        if len(readable) < 16:
            return self._error("short header"), []
        kind, _, sector = struct.unpack_from("<IIQ", readable)
        if kind == IN:
            return self._read(sector, writable - 1)
        if kind == OUT:
            return self._write(sector, readable[16:])
        if kind == FLUSH:
            return self._done("flush"), []
        if kind == GET_ID:
            self._note("id")
            return Answer(OK, self.serial.ljust(20, b"\0")[: writable - 1]), []
        if kind in (DISCARD, WRITE_ZEROES):
            return self._clear(kind, readable[16:])
        self._note("unknown")
        return Answer(UNSUPP), []

    def _done(self, branch: str) -> Answer:
        self._note(branch)
        return Answer(OK)

    def _error(self, branch: str) -> Answer:
        self._note(branch)
        return Answer(IOERR)

    def _there(self, sector: int, sectors: int) -> bool:
        return sector + sectors <= len(self.content) // SECTOR

    def _read(self, sector: int, length: int) -> tuple[Answer, list[Touched]]:
        if length % SECTOR or not self._there(sector, length // SECTOR):
            return self._error("read of odd length" if length % SECTOR else "read behind the end"), []
        self._note(f"read {min(length // SECTOR, 9)}")
        start = sector * SECTOR
        touched = Touched(sector, sector + length // SECTOR, False)
        return Answer(OK, bytes(self.content[start : start + length])), [touched]

    def _write(self, sector: int, data: bytes) -> tuple[Answer, list[Touched]]:
        if self.readonly:
            return self._error("write to a readonly disk"), []
        if len(data) % SECTOR or not self._there(sector, len(data) // SECTOR):
            return self._error("write of odd length" if len(data) % SECTOR else "write behind the end"), []
        self._note(f"write {min(len(data) // SECTOR, 9)}")
        self.content[sector * SECTOR : sector * SECTOR + len(data)] = data
        return Answer(OK), [Touched(sector, sector + len(data) // SECTOR, True)]

    def _clear(self, kind: int, data: bytes) -> tuple[Answer, list[Touched]]:
        if self.readonly:
            return self._error("ranges of a readonly disk"), []
        if not self.ranges:
            self._note("ranges not offered")
            return Answer(UNSUPP), []
        if not data or len(data) % RANGE.size or len(data) > MAX_RANGES * RANGE.size:
            return self._error("ranges of odd length"), []
        parts = list(RANGE.iter_unpack(data))
        if any(flags & ~(1 if kind == WRITE_ZEROES else 0) for _, _, flags in parts):
            self._note("flags")
            return Answer(UNSUPP), []
        if any(count > MAX_RANGE or not self._there(sector, count) for sector, count, _ in parts):
            return self._error("range behind the end"), []
        for sector, count, flags in parts:
            self._note(f"range {kind} {flags} {min(count, 2)}")
            self.content[sector * SECTOR : (sector + count) * SECTOR] = bytes(count * SECTOR)
        return Answer(OK), [Touched(sector, sector + count, True) for sector, count, _ in parts]
