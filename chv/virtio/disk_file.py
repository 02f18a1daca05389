"""The file or block device behind a disk: opened, measured, and locked against a second writer."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..config.schema import DiskConfig, ImageType, LockGranularity
from ..errors import ConfigError
from . import disk_format, disk_lock
from ._block import direct_alignment, punch_hole

SECTOR: Final = 512  # the unit of a disk's capacity (virtio 1.2, 5.2.4)
_MAX_BLOCK: Final = 1 << 16  # what is said to be larger is not believed
_MAX_MEMORY_ALIGN: Final = 4096  # that of _block_sync.pxd's own buffer

# linux/fs.h: what a block device tells about itself
_BLKSSZGET: Final = 0x1268
_BLKIOMIN: Final = 0x1278
_BLKIOOPT: Final = 0x1279
_BLKALIGNOFF: Final = 0x127A
_BLKPBSZGET: Final = 0x127B


@dataclass(frozen=True, slots=True)
class Geometry:
    """In bytes. ``optimal`` is 0 where nothing is; ``alignment``: where the first physical block starts."""

    logical: int
    physical: int
    minimum: int
    optimal: int
    alignment: int
    discard: int  #: what discards should be multiples of


class DiskFile:
    """An open disk, locked until :meth:`close`.

    ``size`` is in bytes, as it was when last looked at. ``memory_align`` and ``offset_align`` are what direct
    I/O needs, in bytes; 0 without ``direct``. ``plain_fd`` is the same disk without O_DIRECT: -1 unless
    requests can be for parts of its blocks.
    """

    def __init__(self, config: DiskConfig, field: str) -> None:
        self.field = field
        self.path = _given_path(config.path, field)
        self.readonly = config.readonly
        self.memory_align = self.offset_align = 0
        self.plain_fd = -1
        self._whole = config.lock_granularity == LockGranularity.FULL
        self.fd = _open(self.path, self.readonly, field)
        try:
            self.device = stat.S_ISBLK(os.fstat(self.fd).st_mode)
            self.size = self.measure()
            if self.size < SECTOR:
                raise ConfigError(
                    f"{field}.path: {self.path} has {self.size} bytes, less than one sector ({SECTOR})"
                )
            if config.image_type == ImageType.UNKNOWN:
                disk_format.check_content(self.fd, self.size, self.path, field)
            if config.direct:
                self._go_direct()
            self._lock(self.size)
            self.geometry = _device_geometry(self.fd) if self.device else _file_geometry(self.fd)
            self.punches_holes = not self.readonly and self._punches_holes()
        except BaseException:
            self.close()
            raise

    @property
    def direct(self) -> bool:
        return self.offset_align > 0

    def measure(self) -> int:
        """The size in bytes that the file or device has now."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def resized(self, size: int) -> None:
        """It has ``size`` bytes now, and the lock reaches so far. ConfigError if somebody is there."""
        if size > self.size:
            self._lock(size)
        self.size = size

    def close(self) -> None:
        """Unlock and close it; a second time it does nothing."""
        if self.fd >= 0:
            disk_lock.unlock(self.fd)
            os.close(self.fd)
        if self.plain_fd >= 0:
            os.close(self.plain_fd)
        self.fd = self.plain_fd = -1

    def _lock(self, size: int) -> None:
        length = 0 if self._whole else size
        disk_lock.lock(self.fd, self.path, length, readonly=self.readonly, field=f"{self.field}.path")

    def _go_direct(self) -> None:
        """Have it open with O_DIRECT, and learn what that asks for."""
        try:
            direct = os.open(f"/proc/self/fd/{self.fd}", _flags(self.readonly) | os.O_DIRECT)
        except OSError as error:
            raise ConfigError(f"{self.field}.direct: {_no_direct(self.path, error)}") from error
        self.plain_fd, self.fd = self.fd, direct
        self.memory_align, self.offset_align = self._direct_alignment()
        if self.offset_align <= SECTOR:
            os.close(self.plain_fd)
            self.plain_fd = -1

    def _direct_alignment(self) -> tuple[int, int]:
        told = direct_alignment(self.fd)
        if told is None:  # before Linux 6.1, or a file system that does not say
            block = _ask(self.fd, _BLKSSZGET) if self.device else os.fstat(self.fd).st_blksize
            block = _power_of_two(block, 4096)
            return block, block
        memory, offset = told
        if not (0 < memory <= _MAX_MEMORY_ALIGN and _power_of_two(offset, 0)):
            raise ConfigError(f"{self.field}.direct: {_no_direct(self.path)}")
        return told

    def _punches_holes(self) -> bool:
        if self.device:
            return _discard_limit(self.fd, "discard_max_bytes") > 0
        return punch_hole(self.fd, self.size, self.geometry.discard) == 0  # behind the end: nothing is lost


def _given_path(path: str | None, field: str) -> str:
    if not path:
        raise ConfigError(f"{field}.path: required, but missing")
    if "\0" in path:
        raise ConfigError(f"{field}.path: it contains a NUL character")
    return path


def _flags(readonly: bool) -> int:
    return (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC


def _open(path: str, readonly: bool, field: str) -> int:
    try:
        mode = os.stat(path).st_mode  # before opening it, which waits if it is a FIFO
        if stat.S_ISDIR(mode):
            raise ConfigError(f"{field}.path: {path} is a directory, not a disk image or a block device")
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ConfigError(f"{field}.path: {path} is neither a file nor a block device")
        return os.open(path, _flags(readonly))
    except FileNotFoundError:
        raise ConfigError(f"{field}.path: {path} does not exist") from None
    except OSError as error:
        if not readonly and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ConfigError(
                f"{field}.path: {path} cannot be opened for writing ({error.strerror}): "
                "change its permissions, or use readonly=on"
            ) from error
        raise ConfigError(f"{field}.path: {path} cannot be opened: {error.strerror}") from error


def _no_direct(path: str, error: OSError | None = None) -> str:
    if error is None or error.errno == errno.EINVAL:
        return f"the file system of {path} has no direct I/O: use direct=off"
    return f"{path} cannot be opened for direct I/O: {error.strerror}"


# -- sizes ---------------------------------------------------------------------------------


def _power_of_two(value: int, default: int) -> int:
    """``value`` if it can be the size of a block, else ``default``."""
    return value if SECTOR <= value <= _MAX_BLOCK and value & (value - 1) == 0 else default


def _file_geometry(fd: int) -> Geometry:
    """Sectors of 512 bytes, which partition tables in images are made for; larger blocks are only a hint."""
    block = _power_of_two(os.fstat(fd).st_blksize, 4096)
    return Geometry(SECTOR, block, minimum=block, optimal=0, alignment=0, discard=block)


def _device_geometry(fd: int) -> Geometry:
    logical = _power_of_two(_ask(fd, _BLKSSZGET), SECTOR)
    physical = max(logical, _power_of_two(_ask(fd, _BLKPBSZGET), logical))
    return Geometry(
        logical,
        physical,
        minimum=max(logical, _ask(fd, _BLKIOMIN)),
        optimal=max(0, _ask(fd, _BLKIOOPT)),
        alignment=max(0, _ask(fd, _BLKALIGNOFF)),
        discard=max(logical, _discard_limit(fd, "discard_granularity")),
    )


def _ask(fd: int, request: int) -> int:
    """The int that an ioctl of a block device gives; 0 if it has none to give."""
    try:
        return int.from_bytes(fcntl.ioctl(fd, request, bytes(4)), "little", signed=True)
    except OSError:
        return 0


def _discard_limit(fd: int, name: str) -> int:
    """One of the numbers in sysfs (ABI/stable/sysfs-block); a partition's are its disk's."""
    number = os.fstat(fd).st_rdev
    folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    for queue in (folder / "queue", folder.parent / "queue"):
        try:
            return int((queue / name).read_text())
        except (OSError, ValueError):
            continue
    return 0
