"""Files that are loaded into a guest, read in pieces and copied straight into its memory.

A file is read with ``preadv`` and not mapped: whoever truncates a mapped file under a running VM
kills the VMM with SIGBUS, while a short read is an error like any other.
"""

from __future__ import annotations

import os
import stat
import weakref
from typing import Protocol

from ..errors import ImageError

StrPath = str | os.PathLike[str]
Buffer = bytes | bytearray | memoryview

# A copy holds the GIL; other threads get their turn between two pieces (about 0.5 ms each).
_COPY_PIECE = 1 << 20

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


class Source(Protocol):
    """Bytes that can be read anywhere. ``name`` says in messages what they are, for example ``kernel /x``."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes, or :class:`chv.errors.ImageError`."""

    def copy_into(self, target: memoryview, offset: int) -> None:
        """Fill ``target`` with the bytes from ``offset`` on, or raise :class:`chv.errors.ImageError`."""

    def require_unchanged(self) -> None:
        """Raise :class:`chv.errors.ImageError` if the bytes may differ from those read before."""

    def close(self) -> None:
        """Give back what is held open; nothing can be read afterwards."""


class FileSource:
    """A regular file, kept open so that later reads see the same file although it is replaced by another."""

    def __init__(self, role: str, path: StrPath, name: str | None = None) -> None:
        """``role`` is what the file is for: kernel, firmware, initramfs; ``name`` replaces role and path."""
        self.path = os.fspath(path)
        self.name = name or f"{role} {self.path}"
        try:
            # O_NONBLOCK: opening a pipe must not wait for its writer.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = error.strerror if isinstance(error, OSError) else "embedded null byte"
            raise ImageError(f"{self.name}: cannot be opened ({reason})") from error
        self._close = weakref.finalize(self, os.close, fd)
        self._fd = fd
        self._stamp = status = os.fstat(fd)
        self.size = status.st_size
        try:
            self._require_regular(status.st_mode)
        except ImageError:
            self.close()
            raise

    def _require_regular(self, mode: int) -> None:
        if not stat.S_ISREG(mode):
            kind = next((name for test, name in _KINDS if test(mode)), "not a regular file")
            raise ImageError(f"{self.name}: is {kind}; a regular file is needed")
        if not self.size:
            raise ImageError(f"{self.name}: the file is empty")

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise self._short(offset, length)
        parts: list[bytes] = []
        while length:
            try:
                part = os.pread(self._fd, length, offset)
            except OSError as error:
                raise ImageError(f"{self.name}: cannot be read ({error.strerror})") from error
            if not part:
                raise self._short(offset, length)
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def copy_into(self, target: memoryview, offset: int) -> None:
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._fd, [target[done:]], offset + done)
            except OSError as error:
                raise ImageError(f"{self.name}: cannot be read ({error.strerror})") from error
            if not count:
                raise self._short(offset, len(target))
            done += count

    def require_unchanged(self) -> None:
        """Raise :class:`chv.errors.ImageError` if the file was written to since it was opened."""
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._stamp.st_size, self._stamp.st_mtime_ns):
            raise ImageError(
                f"{self.name}: the file was changed since it was read; boot the VM anew to use it"
            )

    def _short(self, offset: int, length: int) -> ImageError:
        return ImageError(
            f"{self.name}: the file is truncated: {length} bytes at {offset} lie beyond its end"
        )

    def close(self) -> None:
        self._close()


class BytesSource:
    """Bytes in memory: an unpacked kernel."""

    def __init__(self, name: str, data: Buffer) -> None:
        self.name = name
        self._data = memoryview(data)
        self.size = len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._slice(offset, length))

    def copy_into(self, target: memoryview, offset: int) -> None:
        source = self._slice(offset, len(target))
        for start in range(0, len(target), _COPY_PIECE):
            end = start + _COPY_PIECE
            target[start:end] = source[start:end]

    def require_unchanged(self) -> None:
        """Bytes in memory stay as they are."""

    def _slice(self, offset: int, length: int) -> memoryview:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ImageError(f"{self.name}: is truncated: {length} bytes at {offset} lie beyond its end")
        return self._data[offset : offset + length]

    def close(self) -> None:
        """Nothing is held open."""
