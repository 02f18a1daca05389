"""The partitions of a disk image: GUID partition table, MBR, or a file system without a table.

UEFI Specification 2.10, chapter 5 (GUID Partition Table Disk Layout); 5.2.1 and 5.2.3 for the MBR.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from dataclasses import dataclass

from ..errors import ImageError
from . import fat, identify
from .disk import Disk, Region, printable

SECTOR_SIZES = (512, 4096)

ESP = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
"""The EFI system partition: UEFI 2.10, table 5.7."""

XBOOTLDR = uuid.UUID("bc13c2ff-59e6-4262-a352-b275fd6f7172")
"""The extended boot loader partition: Boot Loader Specification, "The Partitions"."""

MBR_ESP = 0xEF  # UEFI 2.10, 5.2.2
MBR_BOOT = 0xEA  # Boot Loader Specification, "The Partitions"
_MBR_PROTECTIVE = 0xEE

# UEFI 2.10, table 5.5: signature, revision, header size, CRC32, reserved, my LBA, alternate LBA, first and
# last usable LBA, disk GUID, LBA, number and size of the partition entries and their CRC32.
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_HEADER_CRC = 16
_SIGNATURE = b"EFI PART"
_ENTRY = struct.Struct("<16s16sQQQ72s")  # table 5.6: type, unique GUID, first and last LBA, attributes, name
_ARRAY_MAX = 1 << 20
_COUNT_MAX = 4096

_MBR_TABLE, _MBR_ENTRY = 446, struct.Struct("<B3sB3sII")


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition that boot entries may be in. ``role`` says which kind."""

    number: int
    """As Linux counts, from 1; 0 when the whole disk is one file system."""
    role: str
    region: Region


class _Broken(Exception):
    """What is wrong with one copy of the partition table."""


def boot_partitions(disk: Disk) -> list[Partition]:
    """Where boot entries are looked for, in the order of the Boot Loader Specification (``$BOOT`` first).

    At most one of each role. Raises :class:`chv.errors.ImageError` if there is none.
    """
    sector = disk.read(0, min(disk.size, 512))
    types = _mbr_types(sector)
    if (table := _read_gpt(disk, protected=_MBR_PROTECTIVE in types)) is not None:
        return _from_gpt(disk, *table)
    if fat.is_fat(sector):
        return [Partition(0, "file system", Region(disk, 0, disk.size, disk.name))]
    return _from_mbr(disk, sector, types)


# -- the GUID partition table ------------------------------------------------------------


def _read_gpt(disk: Disk, protected: bool) -> tuple[int, list[tuple[uuid.UUID, int, int]]] | None:
    """Sector size and the entries (type, first and last LBA) of the table; None if there is no table.

    The first good copy of: primary, backup; for 512-byte sectors, then for 4096-byte ones.
    """
    reasons: list[str] = []
    for size in SECTOR_SIZES:
        for lba in _header_places(disk, size):
            try:
                return size, _read_table(disk, size, lba)
            except _Broken as broken:
                kind = "primary" if lba == 1 else "backup"
                reasons.append(f"{kind} table (sector {lba} of {size} bytes): {broken}")
    if reasons:
        raise ImageError(f"{disk.name}: its GUID partition table is broken: {'; '.join(reasons)}")
    if protected:
        raise ImageError(
            f"{disk.name}: its GUID partition table is missing: the protective MBR says there is one, but "
            'neither sector 1 nor the last sector begins with "EFI PART"; is the image cut off?'
        )
    return None


def _header_places(disk: Disk, size: int) -> list[int]:
    """The sectors that begin as a header does: the primary, then its backup.

    The backup is in the last sector (UEFI 2.10, 5.3.2), unless the image has grown: then the primary header
    says where it is.
    """
    last = disk.size // size - 1
    places = []
    if last >= 1 and disk.read(size, 8) == _SIGNATURE:
        places.append(1)
        places.append(_HEADER.unpack_from(disk.read(size, _HEADER.size))[6])
    places.append(last)
    unique = dict.fromkeys(lba for lba in places if 1 <= lba <= last)
    return [lba for lba in unique if disk.read(lba * size, 8) == _SIGNATURE]


def _read_table(disk: Disk, size: int, lba: int) -> list[tuple[uuid.UUID, int, int]]:
    sector = disk.read(lba * size, size)
    header = _HEADER.unpack_from(sector)
    _, _, length, crc, _, mine, _, _, _, _, entries, count, entry_size, array_crc = header
    if not _HEADER.size <= length <= size:
        raise _Broken(f"the header's size is {length}; allowed is {_HEADER.size} to {size}")
    zeroed = sector[:_HEADER_CRC] + bytes(4) + sector[_HEADER_CRC + 4 : length]
    if (actual := zlib.crc32(zeroed)) != crc:
        raise _Broken(f"the header's CRC32 is {actual:08x}, not {crc:08x}")
    if mine != lba:
        raise _Broken(f"the header says that it is in sector {mine}")
    if entry_size < 128 or entry_size % 8 or count > _COUNT_MAX or count * entry_size > _ARRAY_MAX:
        raise _Broken(
            f"{count} entries of {entry_size} bytes; allowed are {_COUNT_MAX} entries of 128 bytes or more, "
            f"{_ARRAY_MAX} bytes in all"
        )
    if entries < 2 or entries * size + count * entry_size > disk.size:
        raise _Broken(
            f"the entries, {count * entry_size} bytes from sector {entries} on, lie outside the image"
        )
    array = disk.read(entries * size, count * entry_size)
    if (actual := zlib.crc32(array)) != array_crc:
        raise _Broken(f"the CRC32 of the entries is {actual:08x}, not {array_crc:08x}")
    found = []
    for start in range(0, len(array), entry_size):
        kind, _, first, last, _, _ = _ENTRY.unpack_from(array, start)
        found.append((uuid.UUID(bytes_le=kind), first, last))
    return found


def _from_gpt(disk: Disk, size: int, table: list[tuple[uuid.UUID, int, int]]) -> list[Partition]:
    found = []
    for kind, role in ((XBOOTLDR, "XBOOTLDR"), (ESP, "EFI system partition")):
        for number, (other, first, last) in enumerate(table, 1):
            if other == kind:
                found.append(_partition(disk, number, role, first * size, (last - first + 1) * size))
                break
    if found:
        return found
    used = sum(bool(kind.int) for kind, _, _ in table)
    listed = "1 partition" if used == 1 else f"{used} partitions"
    raise ImageError(f"{disk.name}: has no EFI system partition: none of its {listed} has the type {ESP}")


# -- the MBR -----------------------------------------------------------------------------


def _mbr_rows(sector: bytes) -> list[tuple[int, int, int]]:
    """(type, first sector, sectors) of the four primary partitions."""
    if len(sector) < 512 or sector[510:512] != b"\x55\xaa":
        return []
    rows = _MBR_ENTRY.iter_unpack(sector[_MBR_TABLE:510])
    return [(kind, first, count) for _, _, kind, _, first, count in rows]


def _mbr_types(sector: bytes) -> set[int]:
    return {kind for kind, _, count in _mbr_rows(sector) if kind and count}


def _from_mbr(disk: Disk, sector: bytes, types: set[int]) -> list[Partition]:
    found = []
    for wanted, role in ((MBR_BOOT, "boot partition"), (MBR_ESP, "EFI system partition")):
        for number, (kind, first, count) in enumerate(_mbr_rows(sector), 1):
            if kind == wanted:
                found.append(_partition(disk, number, role, first * 512, count * 512))
                break
    if found:
        return found
    disk.require_raw()
    head = disk.read(0, min(disk.size, identify.HEAD))
    what = identify.describe(head)
    if what == "is a disk image (boot sector)" and types:
        listed = ", ".join(f"{kind:02x}" for kind in sorted(types))
        raise ImageError(
            f"{disk.name}: has no EFI system partition: the types in its partition table (MBR) are {listed}; "
            f"{MBR_ESP:02x} or {MBR_BOOT:02x} is needed"
        )
    raise ImageError(
        f"{disk.name}: is not a disk image that can be booted from: it {what}; "
        "a GUID partition table, an MBR or a FAT file system is needed"
    )


def _partition(disk: Disk, number: int, role: str, offset: int, size: int) -> Partition:
    name = f"{disk.name}: partition {number} ({printable(role)})"
    if offset <= 0 or size <= 0:
        raise ImageError(f"{name}: begins at byte {offset} and has {size} bytes, which cannot be")
    if offset + size > disk.size:
        raise ImageError(
            f"{name}: ends at byte {offset + size}, beyond the end of the image ({disk.size}); is it cut off?"
        )
    return Partition(number, role, Region(disk, offset, size, name))
