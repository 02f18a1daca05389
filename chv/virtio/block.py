"""virtio-blk: disks (virtio 1.2, 5.2). The data path is _block.pyx."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from ..config.schema import DiskConfig
from ..errors import ConfigError, NotSupportedYet
from . import disk_format
from ._block import RANGE_MAX, RANGES_MAX, SEGMENTS_MAX, BlockDisk, BlockQueue, io_uring_error
from .device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice
from .disk_file import SECTOR, DiskFile

if TYPE_CHECKING:
    from .._virtqueue import Queue

# Feature bits (virtio 1.2, 5.2.3)
F_SEG_MAX: Final = 1 << 2
F_RO: Final = 1 << 5
F_BLK_SIZE: Final = 1 << 6
F_FLUSH: Final = 1 << 9
F_TOPOLOGY: Final = 1 << 10
F_CONFIG_WCE: Final = 1 << 11
F_MQ: Final = 1 << 12
F_DISCARD: Final = 1 << 13
F_WRITE_ZEROES: Final = 1 << 14

# struct virtio_blk_config up to write_zeroes_may_unmap (virtio 1.2, 5.2.4): capacity, size_max, seg_max,
# cylinders, heads, sectors, blk_size, the topology's four, writeback, num_queues, three of discard, three of
# write zeroes
_CONFIG: Final = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")
_WRITEBACK: Final = 32  # its offset

_SERIAL_MAX: Final = 20  # bytes (virtio 1.2, 5.2.6: VIRTIO_BLK_ID_BYTES)
_QUEUE_SIZE_MAX: Final = 32768
_QUEUE_SIZE_MIN: Final = 4  # a power of two above 2: a header, data and a status do not fit into less

# Fields of a disk that chv has not built: refused unless they ask for nothing.
_NOT_BUILT: Final = {
    "vhost_user": "disks in another process (vhost-user)",
    "vhost_socket": "disks in another process (vhost-user)",
    "rate_limit_group": "rate limits",
    "rate_limiter_config": "rate limits",
    "iommu": "the virtual IOMMU",
    "backing_files": "images that lie on others",
}


def check(config: DiskConfig, field: str, boot_vcpus: int) -> None:
    """What can be said about ``config`` without opening anything: ConfigError, or NotSupportedYet.

    ``field`` is what messages start with, for example ``disks[0]``.
    """
    for name, what in _NOT_BUILT.items():
        if getattr(config, name):
            raise NotSupportedYet(f"{field}.{name}: {what}: chv does not support this yet")
    if not config.path:
        raise ConfigError(f"{field}.path: required, but missing")
    disk_format.check_type(config.image_type, field)
    if not 1 <= config.num_queues <= boot_vcpus:
        raise ConfigError(
            f"{field}.num_queues: {config.num_queues} is not in 1..{boot_vcpus}: "
            "there are at most as many queues as cpus.boot_vcpus"
        )
    size = config.queue_size
    if not _QUEUE_SIZE_MIN <= size <= _QUEUE_SIZE_MAX or size & (size - 1):
        raise ConfigError(
            f"{field}.queue_size: {size} is not a power of two from {_QUEUE_SIZE_MIN} to {_QUEUE_SIZE_MAX}"
        )
    _check_serial(config.serial, field)
    _check_affinity(config, field)


def _check_serial(serial: str | None, field: str) -> None:
    if serial is None:
        return
    length = len(serial.encode(errors="surrogateescape"))
    if length > _SERIAL_MAX:
        raise ConfigError(f"{field}.serial: {length} bytes long, at most {_SERIAL_MAX} are possible")
    if "\0" in serial:
        raise ConfigError(f"{field}.serial: it contains a NUL character")


def _check_affinity(config: DiskConfig, field: str) -> None:
    seen = set()
    for entry in config.queue_affinity or ():
        where = f"{field}.queue_affinity"
        if entry.queue_index >= config.num_queues:
            raise ConfigError(
                f"{where}: there is no queue {entry.queue_index} ({field}.num_queues: {config.num_queues})"
            )
        if entry.queue_index in seen:
            raise ConfigError(f"{where}: queue {entry.queue_index} is named twice")
        if not entry.host_cpus:
            raise ConfigError(f"{where}: queue {entry.queue_index} is given no host CPU")
        seen.add(entry.queue_index)


class Block(VirtioDevice):
    """A disk on a file or a block device of the host.

    ``engine`` is how it is read and written: "io_uring", or "sync" (preadv2 and pwritev2) where the kernel
    has no io_uring for us or the configuration says ``disable_io_uring``.
    """

    ID: ClassVar[int] = 2
    PCI_CLASS: ClassVar[int] = 0x018000  # mass storage, other

    def __init__(self, name: str, config: DiskConfig, file: DiskFile) -> None:
        """``file`` is closed by :meth:`close`."""
        self.file = file
        self.serial = _serial(config.serial, file.path)
        self.engine = "sync" if config.disable_io_uring or io_uring_error() else "io_uring"
        self._sparse = config.sparse and file.punches_holes
        self._zeroes = not file.readonly and (file.device or file.punches_holes)
        super().__init__(
            name,
            self._offered(config.num_queues),
            [config.queue_size] * config.num_queues,
        )
        self._disk = BlockDisk(
            file.fd,
            file.size // SECTOR,
            plain_fd=file.plain_fd,
            readonly=file.readonly,
            device=file.device,
            memory_align=file.memory_align,
            offset_align=file.offset_align,
            discard=bool(self.features & F_DISCARD),
            zeroes=bool(self.features & F_WRITE_ZEROES),
            unmap=self._may_unmap,
            serial=self.serial,
        )
        self._queues = [BlockQueue(self._disk) for _ in self.queue_sizes]
        self._affinity = {entry.queue_index: entry.host_cpus for entry in config.queue_affinity or ()}
        self._writeback: bool | None = None  # what the driver wrote, if it did

    @classmethod
    def open(cls, config: DiskConfig, field: str, name: str) -> Block:
        """Open and lock what ``config`` names; ConfigError, starting with ``field``, if that cannot be.

        ``config`` has passed :func:`check`.
        """
        _check_cpus(config, field)
        file = DiskFile(config, field)
        try:
            return cls(name, config, file)
        except BaseException:
            file.close()
            raise

    def _offered(self, num_queues: int) -> int:
        features = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY
        features |= F_FLUSH | F_CONFIG_WCE
        for feature, there in (
            (F_RO, self.file.readonly),
            (F_MQ, num_queues > 1),
            (F_DISCARD, self._sparse),
            (F_WRITE_ZEROES, self._zeroes),
        ):
            features |= feature if there else 0
        return features

    @property
    def _may_unmap(self) -> bool:
        # Of a block device, zeroing is left to the kernel, which keeps the blocks.
        return self._sparse and not self.file.device

    # -- the driver's side

    @property
    def capacity(self) -> int:
        """Bytes that the guest sees: whole sectors of 512."""
        return self._disk.sectors * SECTOR

    def config(self) -> bytes:
        """struct virtio_blk_config (virtio 1.2, 5.2.4)."""
        geometry = self.file.geometry
        logical = geometry.logical
        segments = min(self.queue_sizes[0] - 2, SEGMENTS_MAX)
        discard, zeroes = self.features & F_DISCARD, self.features & F_WRITE_ZEROES
        return _CONFIG.pack(
            self._disk.sectors,
            0,
            segments,
            *(0, 0, 0),
            logical,
            (geometry.physical // logical).bit_length() - 1,
            geometry.alignment // logical % 256,
            min(geometry.minimum // logical, 0xFFFF),
            min(geometry.optimal // logical, 0xFFFF_FFFF),
            not self._disk.writethrough,
            len(self.queue_sizes),
            *((RANGE_MAX, RANGES_MAX, geometry.discard // SECTOR) if discard else (0, 0, 0)),
            *((RANGE_MAX, RANGES_MAX, self._may_unmap) if zeroes else (0, 0, False)),
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """``writeback`` can be written: 0 makes a write complete only when it is on stable storage."""
        if offset <= _WRITEBACK < offset + len(data):
            self._writeback = data[_WRITEBACK - offset] != 0
            self._disk.writethrough = not self._writeback

    def start(self, queues: Mapping[int, Queue], features: int) -> None:
        # Without FLUSH a driver cannot ask for what it wrote to be made safe (virtio 1.2, 5.2.5.2, 5.2.6.2).
        toggle = self._writeback if features & F_CONFIG_WCE else None
        self._disk.writethrough = not (bool(features & F_FLUSH) if toggle is None else toggle)
        super().start(queues, features)

    def work(self, queue: Queue) -> None:
        cpus = self._affinity.get(queue.index)
        if cpus:
            with contextlib.suppress(OSError):  # they went away since open() looked at them
                os.sched_setaffinity(0, cpus)
        self._queues[queue.index].serve(queue, self.engine == "io_uring")

    def reset(self) -> None:
        super().reset()
        self._writeback = None
        self._disk.writethrough = False

    # -- the host's side

    def refresh(self) -> bool:
        """Look at the size of the file or device again, and tell the guest if its capacity is another one.

        ConfigError if it grew into what somebody else has locked.
        """
        size = self.file.measure()
        self.file.resized(size)
        if size // SECTOR == self._disk.sectors:
            return False
        self._disk.sectors = size // SECTOR
        self.config_changed()
        return True

    def counters(self) -> dict[str, int]:
        """Cloud Hypervisor's, latencies in microseconds (0: none yet), and ``io_errors``: failed requests."""
        statistics = [queue.statistics() for queue in self._queues]
        reads = _sum([each["reads"] for each in statistics])
        writes = _sum([each["writes"] for each in statistics])
        return {
            "read_bytes": reads["bytes"],
            "write_bytes": writes["bytes"],
            "read_ops": reads["operations"],
            "write_ops": writes["operations"],
            **{f"read_latency_{name}": reads[name] for name in ("min", "max", "avg")},
            **{f"write_latency_{name}": writes[name] for name in ("min", "max", "avg")},
            "io_errors": sum(queue.errors for queue in self._queues),
        }

    def save(self) -> dict[str, Any]:
        return {**super().save(), "writeback": self._writeback}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._writeback = state["writeback"]

    def close(self) -> None:
        """Unlock and close the disk; called stopped."""
        self.file.close()


def _serial(given: str | None, path: str) -> bytes:
    """What the guest reads as the disk's id: by default 20 digits that stay the same for the same path."""
    if given is not None:
        return given.encode(errors="surrogateescape")
    name = os.path.realpath(path).encode(errors="surrogateescape")
    return hashlib.sha256(name).hexdigest()[:_SERIAL_MAX].encode()


def _check_cpus(config: DiskConfig, field: str) -> None:
    usable = os.sched_getaffinity(0)
    for entry in config.queue_affinity or ():
        missing = sorted(set(entry.host_cpus) - usable)
        if missing:
            raise ConfigError(
                f"{field}.queue_affinity: host CPU {missing[0]} is not one that this process may use "
                f"({', '.join(map(str, sorted(usable)))})"
            )


def _sum(parts: list[dict[str, int]]) -> dict[str, int]:
    """All queues' operations of one kind; latencies become microseconds."""
    busy = [part for part in parts if part["operations"]]
    operations = sum(part["operations"] for part in busy)
    return {
        "operations": operations,
        "bytes": sum(part["bytes"] for part in busy),
        "min": min((part["latency_min"] for part in busy), default=0) // 1000,
        "max": max((part["latency_max"] for part in busy), default=0) // 1000,
        "avg": sum(part["latency_sum"] for part in busy) // max(1, operations) // 1000,
    }
