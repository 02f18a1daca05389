"""Unpacking what a bzImage carries, on the host, into exactly the size that the kernel's build recorded.

Sources: Linux, scripts/Makefile.lib (each compressed payload ends in the unpacked size, 4 bytes
little-endian, which is gzip's own trailer and is appended for the others) and boot.rst,
``payload_offset`` (magic numbers); lz4's doc/lz4_Frame_format.md, "Legacy frame".

Each library is imported when there is something for it to unpack: an ELF kernel needs none.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from typing import Protocol

from .. import layout
from . import lzop
from .source import Buffer

_XZ_MEMORY_MAX = 512 * layout.MiB
_ZSTD_WINDOW_MAX = 128 * layout.MiB  # what zstd --ultra -22 uses, and all that a kernel can unpack itself
_LZ4_MAGIC = b"\x02\x21\x4c\x18"
_LZ4_BLOCK = 8 * layout.MiB
_ANY_FORMAT = (OSError, EOFError, ValueError)


class UnpackError(Exception):
    """The data are damaged, or not of the expected size; the caller knows which file it was."""


class NoLibrary(Exception):
    """The format is known, but the library for it is not installed."""


class _Stream(Protocol):
    """What the decompressor objects of lzma and bz2 have in common."""

    @property
    def eof(self) -> bool: ...

    def decompress(self, data: Buffer, max_length: int = -1) -> bytes: ...


def format_of(data: Buffer) -> str | None:
    """The name of the compression that ``data`` starts with, None if unknown."""
    head = bytes(data[:9])
    return next((name for magic, name in _MAGICS if head.startswith(magic)), None)


def unpack(data: memoryview, name: str, size: int) -> Buffer:
    """Unpack ``data``, which is in format ``name``, to exactly ``size`` bytes (1 or more).

    Raises :class:`UnpackError` when it is damaged, shorter or longer, and :class:`NoLibrary`.
    No more than ``size`` bytes of output and a fixed working memory are used, whatever the data.
    """
    try:
        unpacked = _FORMATS[name](data, size)
    except _errors_of(name) as error:
        raise UnpackError(f"its {name} data are damaged ({error})") from error
    if len(unpacked) != size:
        raise UnpackError(f"its {name} data unpack to {len(unpacked)} bytes; {size} are expected")
    return unpacked


def _errors_of(name: str) -> tuple[type[Exception], ...]:
    """What the library for format ``name`` raises for damaged data."""
    if name == "gzip":
        import zlib

        return (*_ANY_FORMAT, zlib.error)
    if name in ("xz", "lzma"):
        import lzma

        return (*_ANY_FORMAT, lzma.LZMAError)
    if name == "zstd":
        import zstandard

        return (*_ANY_FORMAT, zstandard.ZstdError)
    if name == "lz4":
        import lz4.block

        return (*_ANY_FORMAT, lz4.block.LZ4BlockError)
    return _ANY_FORMAT


def _too_long(size: int) -> UnpackError:
    return UnpackError(f"its data unpack to more than the expected {size} bytes")


def _gzip(data: memoryview, size: int) -> Buffer:
    import zlib

    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    unpacked = stream.decompress(data, size)
    while not stream.eof:
        tail = stream.unconsumed_tail
        if stream.decompress(tail, 1):
            raise _too_long(size)
        if not stream.eof and stream.unconsumed_tail == tail:
            raise UnpackError("its gzip data are truncated")
    return unpacked


def _drain(stream: _Stream, data: memoryview, size: int) -> Buffer:
    unpacked = stream.decompress(data, size)
    # The end marker and checksum may be left unread when the size is reached.
    if not stream.eof and stream.decompress(b"", 1):
        raise _too_long(size)
    if not stream.eof:
        raise UnpackError("its data are truncated")
    return unpacked


def _xz(data: memoryview, size: int) -> Buffer:
    import lzma

    return _drain(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_MAX), data, size)


def _lzma(data: memoryview, size: int) -> Buffer:
    import lzma

    return _drain(lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_XZ_MEMORY_MAX), data, size)


def _bzip2(data: memoryview, size: int) -> Buffer:
    import bz2

    return _drain(bz2.BZ2Decompressor(), data, size)


def _zstd(data: memoryview, size: int) -> Buffer:
    import zstandard

    unpacked = _room(size)
    done = 0
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)
    with decompressor.stream_reader(data) as stream:
        while count := stream.readinto(unpacked[done:]):
            done += count
        if done == size and stream.read(1):
            raise _too_long(size)
    return unpacked[:done]


def _lz4(data: memoryview, size: int) -> Buffer:
    import lz4.block

    unpacked = _room(size)
    done = 0
    for block in _lz4_blocks(data):
        room = min(_LZ4_BLOCK, size - done)
        if not room:
            raise _too_long(size)
        piece = lz4.block.decompress(block, uncompressed_size=room)
        unpacked[done : done + len(piece)] = piece
        done += len(piece)
    return unpacked[:done]


def _room(size: int) -> memoryview:
    """``size`` bytes to write into, in huge pages where the host has them: that halves the time."""
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapping)


def _lz4_blocks(data: memoryview) -> Iterator[memoryview]:
    """The compressed blocks; each unpacks to 8 MiB at most."""
    position = 0
    while position < len(data):
        head = data[position : position + 4]
        position += 4
        if head == _LZ4_MAGIC:
            continue
        length = int.from_bytes(head, "little")
        if len(head) < 4 or not length or length > len(data) - position:
            raise UnpackError(f"its lz4 block at {position} ends beyond the data")
        yield data[position : position + length]
        position += length


def _lzo(data: memoryview, size: int) -> Buffer:
    unpacked = bytearray()
    for block in lzop.blocks(data):
        if block.size > size - len(unpacked):
            raise _too_long(size)
        if block.size == len(block.data):
            unpacked += block.data
            continue
        unpacked += _lzo_block(block)
    return unpacked


def _lzo_block(block: lzop.Block) -> bytes:
    try:
        import lzo  # type: ignore[import-not-found, unused-ignore]  # python-lzo: optional, seldom installed
    except ImportError as error:
        raise NoLibrary("python-lzo is not installed") from error
    try:
        unpacked: bytes = lzo.decompress(bytes(block.data), False, block.size)
    except lzo.error as error:
        raise UnpackError(f"its lzo data are damaged ({error})") from error
    return unpacked


_FORMATS: dict[str, Callable[[memoryview, int], Buffer]] = {
    "gzip": _gzip,
    "bzip2": _bzip2,
    "lzma": _lzma,
    "xz": _xz,
    "lzo": _lzo,
    "lz4": _lz4,
    "zstd": _zstd,
}

_MAGICS = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\x5d\x00\x00", "lzma"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x89LZO\0\r\n\x1a\n", "lzo"),
    (_LZ4_MAGIC, "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)
