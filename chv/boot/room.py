"""Where things go in guest memory: the guest's memory map, and gaps beside the kernel."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from .. import layout
from ..errors import ConfigError, GuestMemoryError, ImageError
from ..memory import GuestMemory

# Types of the memory map, the same in PVH and E820 (ACPI 6.5, table 15.4).
RAM, RESERVED = 1, 2

Entry = tuple[int, int, int]  # base, size, type
_MEMORY_MIN = 2 * layout.MiB
_ADDRESS_END = 1 << 64


def memory_map(memory: GuestMemory, reserved: Iterable[tuple[int, int]]) -> list[Entry]:
    """What the guest is told about its addresses, in order: RAM, and the ``reserved`` (base, size)."""
    if memory.regions[0].end < _MEMORY_MIN:
        raise ConfigError(f"memory.size: {memory.size} bytes; booting takes at least {_MEMORY_MIN}")
    entries = [(base, size, RAM) for base, size in memory.memory_map()]
    entries += [(base, size, RESERVED) for base, size in reserved]
    entries.sort()
    for base, size, _ in entries:
        if base < 0 or size <= 0 or base + size > _ADDRESS_END:
            raise ConfigError(f"memory map: {size:#x} bytes at {base:#x} are no range of addresses")
    for (base, size, _), (following, _, _) in pairwise(entries):
        if base + size > following:
            raise ConfigError(f"memory map: the ranges at {base:#x} and {following:#x} overlap")
    return entries


def require_ram(memory: GuestMemory, start: int, end: int, what: str) -> None:
    """Raise :class:`chv.errors.ImageError` unless ``[start, end)`` is RAM; ``what`` is to be loaded there."""
    try:
        memory.find(start, end - start)
    except GuestMemoryError as error:
        raise ImageError(f"{what}: {_outside(memory, start, end)}") from error


def _outside(memory: GuestMemory, start: int, end: int) -> str:
    where = f"{start:#x} to {end - 1:#x}"
    has = f"{memory.size // layout.MiB} MiB"
    if end <= layout.RAM_32BIT_END:
        return (
            f"takes guest memory {where}, but there are {has}; "
            f"at least {mib(end)} MiB are needed (memory.size)"
        )
    if start < layout.RAM_64BIT:
        return (
            f"takes guest memory {where}; RAM ends at {layout.RAM_32BIT_END:#x}, devices follow up to 4 GiB"
        )
    return f"takes guest memory {where}, which is beyond the {has} of the guest"


def highest_gap(spans: Iterable[tuple[int, int]], size: int, limit: int) -> int | None:
    """The highest page-aligned address with ``size`` free bytes below ``limit``, from 1 MiB up.

    ``spans`` are the (start, end) that are taken; they may overlap. None if there is no such gap.
    """
    top = limit
    for start, end in sorted(spans, key=lambda span: span[1], reverse=True):
        address = _page_down(top - size)
        if address >= max(end, layout.HIGH_RAM):
            return address
        top = min(top, start)
    address = _page_down(top - size)
    return address if address >= layout.HIGH_RAM else None


def why_no_gap(spans: Iterable[tuple[int, int]], size: int, limit: int) -> str:
    """What to say when :func:`highest_gap` found nothing although the memory could be larger."""
    limit = min(limit, layout.RAM_32BIT_END)
    end = max((_page_up(end) for _, end in spans if end <= limit), default=layout.HIGH_RAM)
    needed = end + _page_up(size)
    if needed > limit:
        return f"has {mib(size)} MiB; beside this kernel {(limit - end) // layout.MiB} MiB are possible"
    return (
        f"has {mib(size)} MiB and does not fit beside the kernel; "
        f"at least {mib(needed)} MiB of memory are needed (memory.size)"
    )


def mib(size: int) -> int:
    """``size`` in MiB, rounded up."""
    return -(-size // layout.MiB)


def _page_down(address: int) -> int:
    return address - address % layout.PAGE_SIZE


def _page_up(address: int) -> int:
    return _page_down(address + layout.PAGE_SIZE - 1)
