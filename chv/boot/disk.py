"""A disk image as bytes that can be read anywhere, and the parts of it that hold something.

The image is read with ``pread`` and never mapped: a file that is cut off meanwhile is an error, not a signal.
"""

from __future__ import annotations

import os
import stat
import weakref
from dataclasses import dataclass

from ..errors import ImageError
from . import identify
from .source import StrPath

_TEXT_MAX = 200

# Formats with their own container, that only a conversion makes readable: what identify.describe() says.
_CONTAINERS = ("qcow2", "VHDX", "VHD", "VMDK")


class Disk:
    """A raw disk image or a block device, open for reading. ``name`` begins every message about it."""

    def __init__(self, path: StrPath) -> None:
        """Raises :class:`chv.errors.ImageError` unless ``path`` is a file or block device that has bytes."""
        self.path = os.fspath(path)
        self.name = f"disk image {printable(self.path)}"
        try:
            # O_NONBLOCK: opening a pipe must not wait for its writer.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = error.strerror if isinstance(error, OSError) else "embedded null byte"
            raise ImageError(f"{self.name}: cannot be opened ({reason})") from error
        self._close = weakref.finalize(self, os.close, fd)
        self._fd = fd
        try:
            self.size = self._measure()
        except ImageError:
            self.close()
            raise

    def _measure(self) -> int:
        mode = os.fstat(self._fd).st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"{self.name}: is a directory; a raw disk image or a block device is needed")
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ImageError(f"{self.name}: is neither a regular file nor a block device")
        size = os.lseek(self._fd, 0, os.SEEK_END)  # a block device has no st_size
        if not size:
            raise ImageError(f"{self.name}: is empty")
        return size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes, or :class:`chv.errors.ImageError`."""
        data = bytearray(length)
        with memoryview(data) as target:
            self.read_into(target, offset)
        return bytes(data)

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill ``target`` with the bytes from ``offset`` on, or raise :class:`chv.errors.ImageError`."""
        length, done = len(target), 0
        if offset < 0 or offset + length > self.size:
            raise self._short(offset, length)
        while done < length:
            try:
                count = os.preadv(self._fd, [target[done:]], offset + done)
            except OSError as error:
                raise ImageError(f"{self.name}: cannot be read ({error.strerror})") from error
            if not count:
                raise self._short(offset, length)
            done += count

    def _short(self, offset: int, length: int) -> ImageError:
        return ImageError(f"{self.name}: is truncated: {length} bytes at {offset} lie beyond its end")

    def require_raw(self) -> None:
        """Raise :class:`chv.errors.ImageError` for an image in a container (qcow2, ...), with the way out."""
        kind = identify.describe(self.read(0, min(self.size, identify.HEAD)))
        container = next((name for name in _CONTAINERS if kind == f"is a disk image ({name})"), None)
        if container is not None:
            raise ImageError(
                f"{self.name}: {kind}; only raw images can be read: convert it with "
                f"qemu-img convert -O raw {printable(self.path)} disk.raw"
            )

    def close(self) -> None:
        """Close the file; nothing can be read afterwards. Closing again does nothing."""
        self._close()


@dataclass(frozen=True, slots=True)
class Region:
    """A run of bytes of a disk, a partition for example, that cannot be left by reading."""

    disk: Disk
    offset: int
    size: int
    name: str
    """The disk's name and what this part of it is."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes, or :class:`chv.errors.ImageError`."""
        self._require(offset, length)
        return self.disk.read(self.offset + offset, length)

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill ``target`` with the bytes from ``offset`` on, or raise :class:`chv.errors.ImageError`."""
        self._require(offset, len(target))
        self.disk.read_into(target, self.offset + offset)

    def _require(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ImageError(f"{self.name}: {length} bytes at {offset} lie beyond its end ({self.size})")


def printable(text: str) -> str:
    """``text`` out of an image, safe to show: no control characters, not without end."""
    cut = text if len(text) <= _TEXT_MAX else f"{text[: _TEXT_MAX - 3]}..."
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
