"""An entropy device (virtio 1.2, 5.4): /dev/hwrng and the guest's own random numbers."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, Final

from ..config import RngConfig
from ..errors import ConfigError
from ._rng import Source
from .device import F_VERSION_1, VirtioDevice

if TYPE_CHECKING:
    from .._virtqueue import Queue

QUEUE_SIZE: Final = 256


class Rng(VirtioDevice):
    """Gives the guest what the descriptor ``fd`` has to read, which it owns.

    A regular file is read once, from its beginning, over all reboots: random numbers that come twice are
    none. When it has ended, and while a pipe or a device has nothing, the guest waits.
    """

    ID = 4

    def __init__(self, name: str, fd: int) -> None:
        super().__init__(name, F_VERSION_1, (QUEUE_SIZE,))
        self._fd = fd
        self._source = Source(fd)

    @classmethod
    def open(cls, config: RngConfig, field: str, name: str) -> Rng:
        """Open ``config.src``. Raises :class:`chv.errors.ConfigError`, with ``field`` in its message."""
        check(config, field, 1)
        fd = _open(config.src, f"{field}.src")
        try:
            return cls(name, fd)
        except BaseException:
            os.close(fd)
            raise

    def work(self, queue: Queue) -> None:
        self._source.serve(queue)

    def counters(self) -> dict[str, int]:
        """See :attr:`chv.virtio._rng.Source.counters`."""
        return self._source.counters

    def close(self) -> None:
        """Close the source; once or more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open(path: str, field: str) -> int:
    try:
        fd = _open_non_blocking(path)
    except OSError as error:
        raise ConfigError(f"{field}: cannot read {path!r}: {error.strerror}") from None
    try:
        _check_kind(os.fstat(fd), path, field)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_non_blocking(path: str) -> int:
    """So that a source that has nothing cannot keep the worker.

    A FIFO that we could write to ourselves has no end: writers may come and go.
    """
    flags = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    if stat.S_ISFIFO(os.stat(path).st_mode):
        with contextlib.suppress(PermissionError):
            return os.open(path, flags | os.O_RDWR)
    return os.open(path, flags | os.O_RDONLY)


def _check_kind(found: os.stat_result, path: str, field: str) -> None:
    mode = found.st_mode
    if stat.S_ISDIR(mode):
        raise ConfigError(f"{field}: cannot read {path!r}: {os.strerror(errno.EISDIR)}")
    if stat.S_ISREG(mode) and found.st_size == 0:
        raise ConfigError(f"{field}: {path!r} is empty; /dev/urandom never ends")


def check(config: RngConfig, field: str, boot_vcpus: int) -> None:
    """What can be said about ``config`` without opening anything: raises :class:`chv.errors.ConfigError`."""
    if not config.src:
        raise ConfigError(f"{field}.src: empty; it is the path of a source of random numbers: /dev/urandom")
    if "\0" in config.src:
        raise ConfigError(f"{field}.src: it contains a NUL character")
