"""Locks on disk images, so that no second VM writes to one (OFD locks, fcntl(2)).

They hold between processes and within one, go with the open file, and are advisory: another program is kept
away only if it asks, as Cloud Hypervisor and QEMU do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ..errors import ConfigError
from ..logs import Logger

_LOG = Logger(__name__)

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_OWNERS_MAX: Final = 3  # named in a message


def lock(fd: int, path: str, length: int, *, readonly: bool, field: str) -> None:
    """Lock the first ``length`` bytes (0: all, however long it gets), shared if ``readonly``, else alone.

    ConfigError with the likely owner if somebody else has it. Where there are no locks (some network
    file systems) it only warns.
    """
    kind = fcntl.F_RDLCK if readonly else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, length, 0))
    except OSError as error:
        if error.errno in _NO_LOCKS:
            _LOG.warning("%s: %s cannot be locked: %s", field, path, error.strerror)
            return
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise ConfigError(f"{field}: {path} cannot be locked: {error.strerror}") from error
        owners = ", ".join(_owners(fd)) or "perhaps a process of another user"
        way_out = (
            "stop what writes to it"
            if readonly
            else "a disk is written by one VM alone, or read with readonly=on"
        )
        raise ConfigError(f"{field}: {path} is in use ({owners}): {way_out}") from error


def unlock(fd: int) -> None:
    """Give the lock back. Closing may not: a ring of io_uring that was closed just now holds the file on."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))


def _owners(fd: int) -> list[str]:
    """The processes that hold locks on the file, as far as /proc shows us: ``qemu-system-x86 (1234)``."""
    wanted = _identity(os.fstat(fd))
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and any(_holds(process, name, wanted) for name in _open_files(process)):
            found.append(_describe(process))
            if len(found) == _OWNERS_MAX:
                break
    return found


def _open_files(process: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):  # it ended, or is not ours to look at
        yield from os.listdir(process / "fd")


def _holds(process: Path, name: str, wanted: tuple[int, int]) -> bool:
    try:
        if _identity(os.stat(process / "fd" / name)) != wanted:
            return False
        return "\nlock:" in (process / "fdinfo" / name).read_text()
    except OSError:
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    if stat.S_ISBLK(status.st_mode):
        return -1, status.st_rdev
    return status.st_dev, status.st_ino


def _describe(process: Path) -> str:
    if process.name == str(os.getpid()):
        return "another disk of this process"
    try:
        command = (process / "comm").read_text().strip()
    except OSError:
        command = "a process"
    return f"{command}, process {process.name}"
