"""The container of lzop files: a header, then blocks of LZO1X data.

Source: lzop's documentation of its format as Linux reads it (lib/decompress_unlzo.c): all numbers big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from msgspec import Struct

_MAGIC_SIZE = 9
_VERSION_WITH_LEVEL = 0x0940
_FLAG_ADLER32_PLAIN, _FLAG_ADLER32_PACKED = 0x1, 0x2
_FLAG_CRC32_PLAIN, _FLAG_CRC32_PACKED = 0x100, 0x200
_FLAG_FILTER = 0x800


class Block(Struct, frozen=True):
    """``data`` unpack to ``size`` bytes; they are stored as they are when the two sizes agree."""

    data: memoryview
    size: int


def blocks(data: memoryview) -> Iterator[Block]:
    """The blocks of an lzop file; ValueError if it is damaged."""
    reader = _Reader(data, _MAGIC_SIZE)
    flags = _header(reader)
    checksums = sum(bool(flags & bit) for bit in (_FLAG_ADLER32_PLAIN, _FLAG_CRC32_PLAIN))
    packed_checksums = sum(bool(flags & bit) for bit in (_FLAG_ADLER32_PACKED, _FLAG_CRC32_PACKED))
    while size := reader.number(4):
        length = reader.number(4)
        if not 0 < length <= size:
            raise ValueError(f"a block of {length} bytes for {size}")
        reader.take(4 * (checksums + (packed_checksums if length < size else 0)))
        yield Block(reader.take(length), size)


def _header(reader: _Reader) -> int:
    """Skip the header; its flags are returned."""
    version = reader.number(2)
    with_level = version >= _VERSION_WITH_LEVEL
    reader.take(2 + (2 if with_level else 0))  # library version, version needed to extract
    reader.take(1 + (1 if with_level else 0))  # method, level
    flags = reader.number(4)
    if flags & _FLAG_FILTER:
        reader.take(4)
    reader.take(4 + 4 + (4 if with_level else 0))  # mode, time
    reader.take(reader.number(1))  # file name
    reader.take(4)  # checksum of the header
    return flags


class _Reader:
    def __init__(self, data: memoryview, position: int) -> None:
        self._data = data
        self._position = position

    def take(self, count: int) -> memoryview:
        taken = self._data[self._position : self._position + count]
        if len(taken) != count:
            raise ValueError("they are truncated")
        self._position += count
        return taken

    def number(self, size: int) -> int:
        return int(struct.unpack({1: ">B", 2: ">H", 4: ">I"}[size], self.take(size))[0])
