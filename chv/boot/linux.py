"""Linux's own boot protocol: the setup header of a bzImage and the zero page.

Source: Linux, Documentation/arch/x86/boot.rst (names, offsets and versions of the setup header) and
Documentation/arch/x86/zero-page.rst (the rest of boot_params); struct boot_e820_entry has 20 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .. import layout
from ..errors import ConfigError
from ..memory import GuestMemory

HEADER = 0x1F1  # the setup header: the same offset in the bzImage and in the zero page
HEADER_MAX_END = 0x290  # what follows it in the zero page is used by others
DEFAULT_INITRD_ADDR_MAX = 0x7FFFFFFF  # what 64-bit kernels state
COMMAND_LINE_MAX = 2047  # COMMAND_LINE_SIZE on x86 is 2048 with the NUL

_ACPI_RSDP_ADDR = 0x70
_E820_ENTRIES = 0x1E8
_BOOT_FLAG = 0x1FE
_MAGIC = 0x202
_VERSION = 0x206
_TYPE_OF_LOADER = 0x210
_LOADFLAGS = 0x211
_CODE32_START = 0x214
_RAMDISK_IMAGE = 0x218  # followed by its size
_CMD_LINE_PTR = 0x228
_INITRD_ADDR_MAX = 0x22C
_KERNEL_ALIGNMENT = 0x230
_CMDLINE_SIZE = 0x238
_E820_TABLE = 0x2D0

_LOADER_UNDEFINED = 0xFF
_LOADED_HIGH = 1 << 0
_E820_ENTRY = struct.Struct("<QQI")
_E820_MAX = 128


def default_header() -> bytes:
    """A setup header, from offset 0x1f1 on, for a kernel that has none: an ELF file without a PVH note."""
    page = bytearray(0x26C)
    struct.pack_into("<H", page, _BOOT_FLAG, 0xAA55)
    struct.pack_into("<4sH", page, _MAGIC, b"HdrS", 0x20C)
    page[_LOADFLAGS] = _LOADED_HIGH
    struct.pack_into("<I", page, _INITRD_ADDR_MAX, DEFAULT_INITRD_ADDR_MAX)
    struct.pack_into("<I", page, _KERNEL_ALIGNMENT, 0x1000000)
    struct.pack_into("<I", page, _CMDLINE_SIZE, COMMAND_LINE_MAX)
    return bytes(page[HEADER:])


def with_code_at(header: bytes, address: int) -> bytes:
    """``header``, the setup header from 0x1f1 on, saying that the 32-bit code was loaded at ``address``."""
    changed = bytearray(header)
    struct.pack_into("<I", changed, _CODE32_START - HEADER, address)
    return bytes(changed)


def write(
    memory: GuestMemory,
    header: bytes,
    memory_map: Sequence[tuple[int, int, int]],
    rsdp: int,
    initramfs: tuple[int, int] | None,
) -> int:
    """Write the zero page; its guest address is returned.

    ``header`` is the kernel's setup header from 0x1f1 on, ``memory_map`` has (base, size, type),
    ``initramfs`` is (address, size).
    """
    if len(memory_map) > _E820_MAX:
        raise ConfigError(f"memory map: has {len(memory_map)} entries; {_E820_MAX} have room")
    page = bytearray(layout.PAGE_SIZE)
    header = header[: HEADER_MAX_END - HEADER]
    page[HEADER : HEADER + len(header)] = header
    page[_TYPE_OF_LOADER] = _LOADER_UNDEFINED
    struct.pack_into("<Q", page, _ACPI_RSDP_ADDR, rsdp)
    struct.pack_into("<I", page, _CMD_LINE_PTR, layout.CMDLINE)
    struct.pack_into("<II", page, _RAMDISK_IMAGE, *(initramfs or (0, 0)))
    page[_E820_ENTRIES] = len(memory_map)
    for index, entry in enumerate(memory_map):
        _E820_ENTRY.pack_into(page, _E820_TABLE + index * _E820_ENTRY.size, *entry)
    memory.write(layout.ZERO_PAGE, page)
    return layout.ZERO_PAGE
