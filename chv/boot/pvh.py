"""PVH: start info, module list and memory map, as Xen's x86/HVM direct boot ABI has them.

Source: Xen's xen/include/public/arch-x86/hvm/start_info.h, version 1 of the structure.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .. import layout
from ..errors import ConfigError
from ..memory import GuestMemory

MAGIC = 0x336EC578
_VERSION = 1
_START_INFO = struct.Struct("<4I4QII")  # magic, version, flags, modules, then addresses, entries, reserved
_MODULE = struct.Struct("<4Q")  # address, size, command line, reserved
_ENTRY = struct.Struct("<QQII")  # address, size, type, reserved
_ENTRIES_MAX = layout.PAGE_SIZE // _ENTRY.size


def write(
    memory: GuestMemory,
    memory_map: Sequence[tuple[int, int, int]],
    rsdp: int,
    module: tuple[int, int] | None,
) -> int:
    """Write the start info and what it points to; its guest address is returned.

    ``memory_map`` has (base, size, type), ``module`` is the (address, size) of the initramfs.
    """
    if len(memory_map) > _ENTRIES_MAX:
        raise ConfigError(f"memory map: has {len(memory_map)} entries; {_ENTRIES_MAX} have room")
    if module:
        memory.write(layout.PVH_MODLIST, _MODULE.pack(*module, 0, 0))
    memory.write(layout.PVH_MEMMAP, b"".join(_ENTRY.pack(*entry, 0) for entry in memory_map))
    start_info = _START_INFO.pack(
        MAGIC,
        _VERSION,
        0,
        1 if module else 0,
        layout.PVH_MODLIST if module else 0,
        layout.CMDLINE,
        rsdp,
        layout.PVH_MEMMAP,
        len(memory_map),
        0,
    )
    memory.write(layout.PVH_START_INFO, start_info)
    return layout.PVH_START_INFO
