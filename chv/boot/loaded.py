"""What was read out of a disk image: files that are in memory alone, but that can be opened by a path."""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Callable
from types import TracebackType

from ..errors import ImageError
from .loader_entries import BootEntry

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class LoadedFile:
    """A file out of an image, in memory that nobody can change. It is a path for whoever opens it.

    It may be closed once it has been opened; what was opened stays valid.
    """

    def __init__(self, name: str, fill: Callable[[int], None]) -> None:
        """``fill`` writes the content to the file descriptor that it is given."""
        self.name = name
        """What it is and where it comes from."""
        try:
            self._fd = os.memfd_create("chv-boot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self._close = weakref.finalize(self, os.close, self._fd)
            self._fill(fill)
        except OSError as error:
            raise ImageError(f"{name}: cannot be kept in memory ({error.strerror})") from error
        self.size = os.fstat(self._fd).st_size

    def _fill(self, fill: Callable[[int], None]) -> None:
        try:
            fill(self._fd)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> str:
        """A path by which this process can open it, for as long as it is not closed."""
        return f"/proc/self/fd/{self._fd}"

    def __fspath__(self) -> str:
        return self.path

    def fileno(self) -> int:
        """The file descriptor; ``os.pread`` reads from it."""
        return self._fd

    def close(self) -> None:
        """Give the file back. Closing again does nothing."""
        self._close()


class LoadedEntry:
    """What a boot entry boots, as :func:`chv.boot.prepare` takes it. A context manager."""

    def __init__(
        self, entry: BootEntry, kernel: LoadedFile, initramfs: LoadedFile | None, cmdline: str
    ) -> None:
        self.entry = entry
        self.kernel = kernel
        self.initramfs = initramfs
        """All initrds of the entry behind each other; None if it has none."""
        self.cmdline = cmdline

    def close(self) -> None:
        """Give the memory back. Closing again does nothing."""
        self.kernel.close()
        if self.initramfs is not None:
            self.initramfs.close()

    def __enter__(self) -> LoadedEntry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
