"""Guest memory: what is RAM, where the host has it, and checked access to it."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator

from msgspec import Struct

from . import layout
from ._bus import buffer_address
from .errors import ConfigError, GuestMemoryError

MAP_NORESERVE = 0x4000  # linux/mman.h; in the mmap module from Python 3.13 on


class Region(Struct, frozen=True):
    """One flat run of guest RAM: ``[base, base + size)``, kept at ``address`` in this process."""

    base: int
    size: int
    address: int
    mapping: mmap.mmap

    @property
    def end(self) -> int:
        return self.base + self.size


class GuestMemory:
    """``size`` bytes of RAM, split around the hole below 4 GiB.

    Addresses are guest-physical. Every access is checked: one that does not lie wholly in one
    region raises :class:`chv.errors.GuestMemoryError`.
    """

    def __init__(self, size: int, *, thp: bool = True) -> None:
        if size <= 0 or size % layout.PAGE_SIZE:
            raise ConfigError(f"memory.size: {size} is not a positive multiple of {layout.PAGE_SIZE} bytes")
        self.size = size
        self.regions: list[Region] = []
        try:
            for base, length in layout.ram_spans(size):
                self.regions.append(_allocate(base, length, thp))
        except BaseException:
            self.close()
            raise

    def find(self, address: int, length: int) -> Region:
        """The region that holds ``[address, address + length)``."""
        for region in self.regions:
            if region.base <= address and length >= 0 and address + length <= region.end:
                return region
        raise GuestMemoryError(
            f"{length} bytes at guest address {address:#x} are not in RAM "
            f"({', '.join(f'{r.base:#x}-{r.end - 1:#x}' for r in self.regions)})"
        )

    def view(self, address: int, length: int) -> memoryview:
        """A writable view of guest memory; release it before :meth:`close`."""
        region = self.find(address, length)
        start = address - region.base
        return memoryview(region.mapping)[start : start + length]

    def read(self, address: int, length: int) -> bytes:
        region = self.find(address, length)
        start = address - region.base
        return region.mapping[start : start + length]

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        with memoryview(data).cast("B") as source:
            region = self.find(address, len(source))
            start = address - region.base
            region.mapping[start : start + len(source)] = source

    def clear(self) -> None:
        """Make all of it read as zeros again, giving the pages back to the host."""
        for region in self.regions:
            region.mapping.madvise(mmap.MADV_DONTNEED)

    def memory_map(self) -> Iterator[tuple[int, int]]:
        """(base, size) of what the guest may use as RAM: conventional memory, then from 1 MiB up."""
        for region in self.regions:
            if region.base == 0:
                yield 0, min(region.size, layout.LOW_RAM_END)
                if region.size > layout.HIGH_RAM:
                    yield layout.HIGH_RAM, region.size - layout.HIGH_RAM
            else:
                yield region.base, region.size

    def close(self) -> None:
        for region in self.regions:
            region.mapping.close()
        self.regions = []


def _allocate(base: int, size: int, thp: bool) -> Region:
    try:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:
        raise ConfigError(f"memory.size: the host cannot map {size} bytes ({error.strerror})") from error
    # Huge pages where the host has them to give: placing a kernel is four times as fast, and so are
    # the guest's first touches. Cloud Hypervisor's memory option thp=on, its default.
    if thp:
        with contextlib.suppress(OSError):  # a host kernel without them: the memory works all the same
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return Region(base, size, buffer_address(mapping), mapping)
