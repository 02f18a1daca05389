"""Disk images made in memory for tests: FAT file systems, partition tables, unified kernel images.

Written from the specifications without a look at what reads them: Microsoft FAT Specification, UEFI 2.10
chapter 5, Microsoft PE Format. Fields can be set to what no tool would write.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ESP = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
XBOOTLDR = uuid.UUID("bc13c2ff-59e6-4262-a352-b275fd6f7172")
LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")

SHORT_OK = set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'()-@^_`{}~")
DEFAULT_CLUSTERS = {12: 500, 16: 4200, 32: 600}


@dataclass
class FatImage:
    """A FAT file system; :meth:`add` files, change what is to be wrong, then :meth:`build`."""

    bits: int = 32
    sector: int = 512
    per_cluster: int = 1
    clusters: int = 0
    stride: int = 1
    """Every how many-th cluster is taken for a file: above 1, files are in fragments."""
    fats: int = 2
    reserved: int = 0
    active: int | None = None
    """FAT32 without mirroring: the copy that counts; the others hold garbage."""
    table: dict[int, int] = field(default_factory=dict)
    content: dict[int, bytes] = field(default_factory=dict)
    root: list[bytes] = field(default_factory=list)
    bpb: dict[int, bytes] = field(default_factory=dict)
    """What is written over the boot sector, by offset."""

    def __post_init__(self) -> None:
        self.clusters = self.clusters or DEFAULT_CLUSTERS[self.bits]
        self.reserved = self.reserved or (32 if self.bits == 32 else 1)
        self.root_entries = 0 if self.bits == 32 else 512
        self.end = {12: 0xFFF, 16: 0xFFFF, 32: 0x0FFFFFFF}[self.bits]
        self._free = [
            n for start in range(self.stride) for n in range(2 + start, 2 + self.clusters, self.stride)
        ]
        self._free.reverse()
        self.folders: dict[str, list[bytes]] = {"": self.root}
        self.first: dict[str, int] = {}
        """The first cluster of each file and directory by path."""
        if self.bits == 32:
            self.first[""] = self.allocate(1)[0]

    @property
    def cluster_size(self) -> int:
        return self.sector * self.per_cluster

    def allocate(self, count: int) -> list[int]:
        """A chain of free clusters."""
        chain = [self._free.pop() for _ in range(count)]
        for cluster, after in zip(chain, [*chain[1:], self.end], strict=True):
            self.table[cluster] = after
        return chain

    def put(self, data: bytes) -> int:
        """Store ``data``; its first cluster, 0 for no data."""
        size = self.cluster_size
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        chain = self.allocate(len(pieces)) if pieces else []
        self.content.update(zip(chain, pieces, strict=True))
        return chain[0] if chain else 0

    def add(self, path: str, data: bytes, *, size: int | None = None, cluster: int | None = None) -> None:
        """A file, and the directories on the way. ``size`` and ``cluster`` lie about it."""
        folder, _, name = path.strip("/").rpartition("/")
        entries = self.folder(folder)
        first = self.put(data) if cluster is None else cluster
        self.first[path.strip("/")] = first
        entries.extend(
            directory_entries(name, 0x20, first, len(data) if size is None else size, len(entries))
        )

    def folder(self, path: str) -> list[bytes]:
        """The entries of a directory, which is made if need be."""
        if path not in self.folders:
            above, _, name = path.rpartition("/")
            entries = self.folder(above)
            self.first[path] = first = self.allocate(1)[0]
            entries.extend(directory_entries(name, 0x10, first, 0, len(entries)))
            dots = [short_entry(b".          ", 0x10, first, 0), short_entry(b"..         ", 0x10, 0, 0)]
            self.folders[path] = dots
        return self.folders[path]

    def _store_folders(self) -> None:
        for path, entries in self.folders.items():
            if not path and self.bits != 32:
                continue
            data, first, size = b"".join(entries), self.first[path], self.cluster_size
            pieces = [data[start : start + size] for start in range(0, len(data), size)] or [b""]
            chain = [first, *self.allocate(len(pieces) - 1)] if len(pieces) > 1 else [first]
            if len(chain) > 1:
                self.table[first] = chain[1]
            self.content.update(zip(chain, pieces, strict=True))

    def build(self, *, changes: Mapping[int, int] | None = None) -> bytes:
        """The file system; ``changes`` are written into the table last: cluster -> the one after it."""
        self._store_folders()
        self.table.update(changes or {})
        table = self._table()
        root = b"".join(self.root) if self.bits != 32 else b""
        root = root.ljust(self.root_entries * 32, b"\0")
        copies = [table] * self.fats
        if self.active is not None:
            copies = [table if n == self.active else b"\x5a" * len(table) for n in range(self.fats)]
        data = bytearray(self.clusters * self.cluster_size)
        for cluster, piece in self.content.items():
            start = (cluster - 2) * self.cluster_size
            data[start : start + len(piece)] = piece
        reserved = self._boot_sector(len(table)).ljust(self.reserved * self.sector, b"\0")
        return b"".join((reserved, *copies, root, data))

    def _table(self) -> bytes:
        values = [self.table.get(number, 0) for number in range(self.clusters + 2)]
        values[0], values[1] = self.end & ~7 | 0, self.end
        if self.bits == 12:
            packed = sum(value << 12 * number for number, value in enumerate(values))
            raw = packed.to_bytes(len(values) * 3 // 2 + 1, "little")
        else:
            raw = struct.pack(f"<{len(values)}{'I' if self.bits == 32 else 'H'}", *values)
        return raw.ljust(-(-len(raw) // self.sector) * self.sector, b"\0")

    def _boot_sector(self, table_size: int) -> bytes:
        sectors = self.reserved + (self.fats * table_size + self.root_entries * 32) // self.sector
        sectors += self.clusters * self.per_cluster
        small = sectors if sectors < 65536 and self.bits != 32 else 0
        per_fat = table_size // self.sector
        head = struct.pack(
            "<3s8sHBHBHHBHHHII",
            b"\xeb\x58\x90",
            b"TESTS   ",
            self.sector,
            self.per_cluster,
            self.reserved,
            self.fats,
            self.root_entries,
            small,
            0xF8,
            0 if self.bits == 32 else per_fat,
            63,
            255,
            0,
            0 if small else sectors,
        )
        if self.bits == 32:
            flags = 0 if self.active is None else 0x80 | self.active
            head += struct.pack("<IHHI", per_fat, flags, 0, self.first[""])
        raw = bytearray(head.ljust(510, b"\0") + b"\x55\xaa")
        for offset, value in self.bpb.items():
            raw[offset : offset + len(value)] = value
        return bytes(raw)


def short_entry(name: bytes, attributes: int, cluster: int, size: int, case: int = 0) -> bytes:
    """A directory entry with an 8.3 name of 11 bytes."""
    high, low = cluster >> 16, cluster & 0xFFFF
    return struct.pack("<11sBB7xH4xHI", name, attributes, case, high, low, size)


def directory_entries(name: str, attributes: int, cluster: int, size: int, number: int) -> list[bytes]:
    """The entries of a file: those of its long name, if it needs one, and the short one."""
    base, _, extension = name.partition(".")
    if len(base) <= 8 and len(extension) <= 3 and set(base + extension) <= SHORT_OK and base:
        short = f"{base:8}{extension:3}".encode("ascii")
        return [short_entry(short, attributes, cluster, size)]
    short = f"F{number:05}~1   ".encode("ascii")
    return [*long_entries(name, short), short_entry(short, attributes, cluster, size)]


def long_entries(name: str, short: bytes, total: int | None = None) -> list[bytes]:
    """The entries of a long name; ``total`` is a checksum that is wrong."""
    raw = name.encode("utf-16-le")
    if len(raw) % 26:
        raw = (raw + b"\0\0").ljust(-(-len(raw) // 26) * 26, b"\xff")
    checksum = 0
    for byte in short:
        checksum = ((checksum & 1) << 7 | checksum >> 1) + byte & 0xFF
    checksum = checksum if total is None else total
    pieces = [raw[start : start + 26] for start in range(0, len(raw), 26)]
    entries = [
        struct.pack("<B10sBBB12sH4s", number, piece[:10], 0x0F, 0, checksum, piece[10:22], 0, piece[22:])
        for number, piece in enumerate(pieces, 1)
    ]
    entries[-1] = bytes([entries[-1][0] | 0x40]) + entries[-1][1:]
    return entries[::-1]


# -- partition tables --------------------------------------------------------------------


def mbr(rows: Sequence[tuple[int, int, int]]) -> bytes:
    """A master boot record; rows are (type, first sector, sectors)."""
    table = b"".join(struct.pack("<B3sB3sII", 0, b"", kind, b"", first, count) for kind, first, count in rows)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def gpt_header(lba: int, other: int, last: int, table: int, entries: bytes, **lies: int) -> bytes:
    """A header with its checksum. ``lies``: count, entry_size, array_crc, length, mine."""
    fields = struct.pack(
        "<8sIIIIQQQQ16sQIII",
        b"EFI PART",
        0x10000,
        lies.get("length", 92),
        0,
        0,
        lies.get("mine", lba),
        other,
        34,
        last,
        bytes(16),
        lies.get("table", table),
        lies.get("count", len(entries) // 128),
        lies.get("entry_size", 128),
        lies.get("array_crc", zlib.crc32(entries)),
    )
    return fields[:16] + struct.pack("<I", zlib.crc32(fields)) + fields[20:]


def gpt(parts: Sequence[tuple[uuid.UUID, bytes]], sector: int = 512, slots: int = 128, **lies: int) -> bytes:
    """A disk with these partitions (type, content). ``lies`` go into both headers."""
    table_sectors = -(-slots * 128 // sector)
    position = 2 + table_sectors
    entries, body = b"", b""
    for number, (kind, content) in enumerate(parts):
        count = -(-len(content) // sector)
        ident = uuid.UUID(int=number + 1)
        name = f"part {number}".encode("utf-16-le")
        entries += struct.pack(
            "<16s16sQQQ72s", kind.bytes_le, ident.bytes_le, position, position + count - 1, 0, name
        )
        body += content.ljust(count * sector, b"\0")
        position += count
    entries = entries.ljust(slots * 128, b"\0")
    table = entries.ljust(table_sectors * sector, b"\0")
    last = position + table_sectors
    primary = gpt_header(1, last, position - 1, 2, entries, **lies).ljust(sector, b"\0")
    backup = gpt_header(last, 1, position - 1, position, entries, **lies).ljust(sector, b"\0")
    protective = mbr([(0xEE, 1, min(last, 0xFFFFFFFF))]).ljust(sector, b"\0")
    return b"".join((protective, primary, table, body, table, backup))


# -- unified kernel images ---------------------------------------------------------------


def pe(sections: Sequence[tuple[str, bytes]], machine: int = 0x8664, optional: int = 240) -> bytes:
    """A PE file with these sections, padded to 512 bytes as tools do."""
    start = 64 + 24 + optional + 40 * len(sections)
    offset = -(-start // 512) * 512
    table, body = b"", b""
    for name, content in sections:
        raw = content.ljust(-(-len(content) // 512) * 512, b"\0")
        table += struct.pack("<8sIIII16x", name.encode(), len(content), 0x1000, len(raw), offset + len(body))
        body += raw
    dos = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64)
    coff = struct.pack("<4sHHIIIHH", b"PE\0\0", machine, len(sections), 0, 0, 0, optional, 0x22)
    return (dos + coff + bytes(optional) + table).ljust(offset, b"\0") + body


OS_RELEASE = b'ID=debian\nNAME="Debian GNU/Linux"\nPRETTY_NAME="Debian 12"\nVERSION_ID="12"\n'


def unified(kernel: bytes, **sections: bytes) -> bytes:
    """A unified kernel image; keywords are further sections without their dot."""
    parts = {"osrel": OS_RELEASE, "cmdline": b"root=/dev/vda2 quiet\n\0", **sections}
    return pe([(".text", b"\x90" * 16), *((f".{k}", v) for k, v in parts.items()), (".linux", kernel)])


# -- a usual image -----------------------------------------------------------------------

KERNEL = b"kernel " * 300
INITRD = b"initrd " * 500
ENTRY = (
    b"title Debian\nversion 6.12\nlinux /EFI/debian/kernel-6.12\ninitrd /EFI/debian/initrd-6.12\n"
    b"options root=LABEL=root ro\noptions quiet\n"
)


def usual_files() -> dict[str, bytes]:
    """What a usual EFI system partition has."""
    return {
        "loader/loader.conf": b"timeout 3\ndefault debian-*\n",
        "loader/entries/debian-6.12.conf": ENTRY,
        "EFI/debian/kernel-6.12": KERNEL,
        "EFI/debian/initrd-6.12": INITRD,
    }


def esp(files: Mapping[str, bytes] | None = None, **geometry: Any) -> bytes:
    """A FAT file system with ``files`` (the usual ones if None)."""
    fat = FatImage(**geometry)
    for path, data in (usual_files() if files is None else files).items():
        fat.add(path, data)
    return fat.build()


def disk(files: Mapping[str, bytes] | None = None, **geometry: Any) -> bytes:
    """A GPT disk with an EFI system partition and a root."""
    sector = geometry.get("sector", 512)
    return gpt([(LINUX, b"root" * 128), (ESP, esp(files, **geometry))], sector if sector == 4096 else 512)
