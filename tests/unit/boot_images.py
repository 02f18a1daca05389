"""ELF files and bzImages made byte by byte, with every field open to be wrong. For the tests of chv.boot."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lz4.block
import pytest
import zstandard

from tests.guests.cache import cache

MiB = 1 << 20
PT_LOAD, PT_INTERP, PT_NOTE, PT_TLS = 1, 3, 4, 7
XEN_PVH, XEN_GUEST_OS = 18, 6


@dataclass
class Load:
    """One PT_LOAD: ``data`` at ``paddr``; the sizes and the offset can be made to lie."""

    data: bytes = b"\xf4" * 64
    paddr: int = 0x100_0000
    memsz: int | None = None
    filesz: int | None = None
    offset: int | None = None
    type: int = PT_LOAD


def note(kind: int, value: bytes, owner: bytes = b"Xen", align: int = 4) -> bytes:
    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % align)

    # The name follows the 12 bytes of the header; with 8-byte alignment both are padded together.
    head = padded(struct.pack("<3I", len(owner) + 1, len(value), kind) + owner + b"\0")
    return head + padded(value)


def pvh_note(entry: int, size: int = 8) -> bytes:
    return note(XEN_PVH, entry.to_bytes(size, "little"))


@dataclass
class ElfFile:
    """An ELF file of ``bits``; without ``loads``, one of 64 bytes at 16 MiB. ``notes`` is one PT_NOTE."""

    loads: Sequence[Load] = field(default_factory=lambda: [Load()])
    notes: bytes | None = field(default_factory=lambda: pvh_note(0x100_0000))
    bits: int = 64
    machine: int = 62
    type: int = 2
    entry: int = 0x100_0000
    phentsize: int | None = None
    phnum: int | None = None
    phoff: int | None = None
    note_size: int | None = None
    note_align: int = 4
    byte_order: int = 1

    def build(self) -> bytes:
        header_size, program_size = (64, 56) if self.bits == 64 else (52, 32)
        count = len(self.loads) + (self.notes is not None)
        position = header_size + count * program_size
        programs, body = [], b""
        for load in self.loads:
            offset = position + len(body) if load.offset is None else load.offset
            filesz = len(load.data) if load.filesz is None else load.filesz
            memsz = max(filesz, len(load.data)) if load.memsz is None else load.memsz
            programs.append(self._program(load.type, offset, load.paddr, filesz, memsz, 4096))
            body += load.data
        if self.notes is not None:
            size = len(self.notes) if self.note_size is None else self.note_size
            programs.append(self._program(PT_NOTE, position + len(body), 0, size, size, self.note_align))
            body += self.notes
        return self._header(header_size, program_size, count) + b"".join(programs) + body

    def _header(self, header_size: int, program_size: int, count: int) -> bytes:
        ident = b"\x7fELF" + bytes([2 if self.bits == 64 else 1, self.byte_order, 1]) + bytes(9)
        return ident + struct.pack(
            "<HHIQQQIHHHHHH" if self.bits == 64 else "<HHIIIIIHHHHHH",
            self.type,
            self.machine,
            1,
            self.entry,
            header_size if self.phoff is None else self.phoff,
            0,
            0,
            header_size,
            program_size if self.phentsize is None else self.phentsize,
            count if self.phnum is None else self.phnum,
            0,
            0,
            0,
        )

    def _program(self, kind: int, offset: int, paddr: int, filesz: int, memsz: int, align: int) -> bytes:
        if self.bits == 64:
            return struct.pack("<IIQQQQQQ", kind, 7, offset, 0xFFFFFFFF80000000, paddr, filesz, memsz, align)
        return struct.pack("<8I", kind, offset, 0xC0000000, paddr, filesz, memsz, 7, align)


def vmlinux(**changes: object) -> bytes:
    """A small kernel-like ELF file: two segments, the second with bss, a PVH note."""
    loads = [Load(bytes(range(256)) * 32), Load(b"data" * 100, paddr=0x110_0000, memsz=8192)]
    return ElfFile(**{"loads": loads, **changes}).build()  # type: ignore[arg-type]


@dataclass
class BzImage:
    """A bzImage around ``payload`` (which ends in its unpacked size), with 2 KiB of code before it."""

    payload: bytes = b""
    version: int = 0x20F
    setup_sectors: int = 3
    loadflags: int = 1
    payload_offset: int = 2048
    payload_length: int | None = None
    syssize: int | None = None
    cmdline_size: int = 2047
    initrd_addr_max: int = 0x7FFFFFFF
    pref_address: int = 0x100_0000
    init_size: int = 64 * MiB
    jump: int = 0x6A  # the byte after the jump's opcode: the header ends 0x202 + this
    magic: bytes = b"HdrS"
    boot_flag: int = 0xAA55

    def build(self) -> bytes:
        setup = bytearray((self.setup_sectors + 1) * 512)
        code = b"\x90" * 2048 + self.payload
        code += bytes(-len(code) % 16)
        syssize = len(code) // 16 if self.syssize is None else self.syssize
        length = len(self.payload) if self.payload_length is None else self.payload_length
        setup[0x1F1] = self.setup_sectors
        struct.pack_into("<I", setup, 0x1F4, syssize)
        struct.pack_into("<HBB4sH", setup, 0x1FE, self.boot_flag, 0xEB, self.jump, self.magic, self.version)
        setup[0x211] = self.loadflags
        struct.pack_into("<I", setup, 0x214, 0x100000)
        struct.pack_into("<IIB", setup, 0x22C, self.initrd_addr_max, 0x200000, 1)
        struct.pack_into("<I", setup, 0x238, self.cmdline_size)
        struct.pack_into("<II", setup, 0x248, self.payload_offset, length)
        struct.pack_into("<QI", setup, 0x258, self.pref_address, self.init_size)
        return bytes(setup) + code


def with_size(packed: bytes, size: int) -> bytes:
    """What the kernel's build does for all formats but gzip, which ends in the size by itself."""
    return packed + struct.pack("<I", size & 0xFFFFFFFF)


def lz4_legacy(data: bytes, block: int = 8 * MiB) -> bytes:
    packed = [lz4.block.compress(data[i : i + block], store_size=False) for i in range(0, len(data), block)]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(p)) + p for p in packed)


def lzop(blocks: Sequence[tuple[int, bytes]], flags: int = 1, version: int = 0x1030) -> bytes:
    """An lzop file: ``blocks`` are (unpacked size, data), followed by the closing zero."""
    new = version >= 0x940
    head = struct.pack(">HH", version, 0x20A0) + (struct.pack(">H", 0x940) if new else b"")
    head += bytes([3, 9]) if new else bytes([3])
    head += struct.pack(">I", flags) + (bytes(4) if flags & 0x800 else b"")
    head += struct.pack(">II", 0o644, 0) + (bytes(4) if new else b"")
    head += bytes([4]) + b"name" + bytes(4)
    body = b""
    for size, data in blocks:
        sums = bin(flags & 0x101).count("1") + (bin(flags & 0x202).count("1") if len(data) < size else 0)
        body += struct.pack(">II", size, len(data)) + bytes(4 * sums) + data
    return b"\x89LZO\0\r\n\x1a\n" + head + body + bytes(4)


def _xz(data: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 32 * MiB}]
    return lzma.compress(data, lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)


LIBRARIES: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 9),
    "bzip2": bz2.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "xz": _xz,
    "lz4": lz4_legacy,
    "zstd": lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(data),
}

# As the kernel's build calls them (scripts/Makefile.lib).
TOOLS = {
    "gzip": ["gzip", "-n", "-f", "-9"],
    "bzip2": ["bzip2", "-9"],
    "lzma": ["lzma", "-9"],
    "xz": ["xz", "--check=crc32", "--x86", "--lzma2=,dict=32MiB"],
    "lz4": ["lz4", "-l", "-9", "-", "-"],
    "zstd": ["zstd", "-22", "--ultra"],
    "lzo": ["lzop", "-9"],
}


def pack(name: str, data: bytes) -> bytes:
    """The payload of a bzImage with ``data``, by a Python library."""
    packed = LIBRARIES[name](data)
    return packed if name == "gzip" else with_size(packed, len(data))


def pack_with_tool(name: str, data: bytes) -> bytes:
    """The payload of a bzImage with ``data``, by the program that the kernel's build uses."""
    command = TOOLS[name]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    packed = subprocess.run(command, input=data, capture_output=True, check=True).stdout
    return packed if name == "gzip" else with_size(packed, len(data))


def bzimage(name: str = "gzip", data: bytes | None = None, **changes: object) -> bytes:
    payload = pack(name, vmlinux() if data is None else data)
    return BzImage(payload, **changes).build()  # type: ignore[arg-type]


def real_kernels() -> list[Path]:
    """Debian's cloud kernels (vmlinuz-*) in $CHV_TEST_KERNELS, by default among what make setup fetched."""
    folder = Path(os.environ.get("CHV_TEST_KERNELS") or cache() / "kernels")
    return sorted(folder.glob("vmlinuz-*"))


def require_kernels() -> list[Path]:
    kernels = real_kernels()
    if not kernels:
        reason = f"no vmlinuz-* in {cache() / 'kernels'} or CHV_TEST_KERNELS: run make setup"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return kernels
