"""ELF kernels and firmware: their segments and the PVH entry.

Sources: System V gABI, chapters 4 (ELF header) and 5 (program headers, note section); Xen's public
headers elfnote.h (XEN_ELFNOTE_PHYS32_ENTRY is 18, XEN_ELFNOTE_GUEST_OS is 6) and its x86/HVM direct boot ABI.
Every number in the file is checked before it is used: the file may come from anywhere.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise

from msgspec import Struct

from .. import layout
from ..errors import ImageError
from .source import Source

MAGIC = b"\x7fELF"

_CLASS_32, _CLASS_64 = 1, 2
_LITTLE_ENDIAN = 1
_TYPES = {0: "no type", 1: "a relocatable object (.o)", 2: "executable", 3: "shared", 4: "a core dump"}
_LOADABLE_TYPES = (2, 3)
_EM_386, _EM_X86_64 = 3, 62
_MACHINES = {2: "SPARC", 8: "MIPS", 20: "PowerPC", 21: "PowerPC64", 22: "s390", 40: "32-bit Arm",
             183: "64-bit Arm", 243: "RISC-V", 258: "LoongArch"}  # fmt: skip

_PT_LOAD, _PT_INTERP, _PT_NOTE, _PT_TLS = 1, 3, 4, 7
_PHNUM_MAX = 1024
_NOTES_MAX = 1 * layout.MiB
_NOTE_HEADER = struct.Struct("<3I")
_XEN_GUEST_OS, _XEN_PHYS32_ENTRY = 6, 18

_ADDRESS_END = 1 << 64
_LINUX64_ENTRY_END = 1 * layout.GiB  # the page tables of the 64-bit entry map that much


class Segment(Struct, frozen=True):
    """``file_size`` bytes at ``offset`` go to guest address ``address``; zeros follow up to ``size``."""

    index: int
    offset: int
    address: int
    file_size: int
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size


class Elf(Struct, frozen=True):
    """What is needed to load an ELF file. ``pvh_entry`` is None without a PVH note."""

    segments: tuple[Segment, ...]  # by address, not overlapping
    entry: int
    pvh_entry: int | None
    is_64bit: bool
    is_program: bool  # has thread-local storage
    is_linux: bool  # says so in a note


class _Shape(Struct, frozen=True):
    """Where things are in the headers of one ELF class."""

    bits: int
    header: struct.Struct  # type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize, phnum
    program: struct.Struct
    program_fields: tuple[str, ...]


_SHAPES = {
    _CLASS_32: _Shape(
        32,
        struct.Struct("<16xHHIIIIIHHH"),
        struct.Struct("<8I"),
        ("type", "offset", "vaddr", "paddr", "filesz", "memsz", "flags", "align"),
    ),
    _CLASS_64: _Shape(
        64,
        struct.Struct("<16xHHIQQQIHHH"),
        struct.Struct("<IIQQQQQQ"),
        ("type", "flags", "offset", "vaddr", "paddr", "filesz", "memsz", "align"),
    ),
}


def parse(source: Source) -> Elf:
    """Read the headers of ``source``; :class:`chv.errors.ImageError` when it cannot be loaded."""
    shape, machine = _shape(source)
    entry, headers = _program_headers(source, shape)
    segments = _segments(source, headers)
    pvh_entry, is_linux = None, False
    for owner, kind, value in _notes(source, headers):
        if owner == b"Xen" and kind == _XEN_PHYS32_ENTRY:
            pvh_entry = _pvh_entry(source, value)
        is_linux |= owner == b"Linux" or (owner == b"Xen" and kind == _XEN_GUEST_OS and value == b"linux\0")
    if pvh_entry is not None:
        _require_loaded(source, segments, pvh_entry)
    return Elf(
        segments=segments,
        entry=entry,
        pvh_entry=pvh_entry,
        is_64bit=shape.bits == 64 and machine == _EM_X86_64,
        is_program=any(header["type"] == _PT_TLS for header in headers),
        is_linux=is_linux,
    )


def check_64bit_entry(source: Source, image: Elf) -> None:
    """Raise :class:`chv.errors.ImageError` unless ``image`` can be entered without a PVH note."""
    if image.is_program:
        raise ImageError(f"{source.name}: is a program for a running Linux, not a kernel or firmware")
    if not image.is_64bit:
        raise ImageError(f"{source.name}: has no PVH note, without which only 64-bit code can be entered")
    if image.entry >= _LINUX64_ENTRY_END:
        raise ImageError(
            f"{source.name}: has no PVH note, and its entry point {image.entry:#x} "
            f"is above {_LINUX64_ENTRY_END:#x}"
        )
    _require_loaded(source, image.segments, image.entry)


def _require_loaded(source: Source, segments: tuple[Segment, ...], entry: int) -> None:
    if not any(s.address <= entry < s.end for s in segments):
        raise ImageError(f"{source.name}: the entry point {entry:#x} lies in none of its segments")


def _shape(source: Source) -> tuple[_Shape, int]:
    """The class of the file and its machine type, both among those that can be loaded."""
    if source.size < 20:
        raise ImageError(f"{source.name}: the file is truncated: {source.size} bytes hold no ELF header")
    ident = source.read(0, 20)
    if ident[:4] != MAGIC:
        raise ImageError(f"{source.name}: is not an ELF file")
    kind, machine = struct.unpack_from("<HH", ident, 16)
    shape = _SHAPES.get(ident[4])
    if shape is None or ident[5] != _LITTLE_ENDIAN:
        raise ImageError(
            f"{source.name}: ELF class {ident[4]}, byte order {ident[5]}; a little-endian x86 file is needed"
        )
    if machine not in (_EM_386, _EM_X86_64):
        name = _MACHINES.get(machine, f"machine type {machine}")
        raise ImageError(f"{source.name}: is an ELF file for {name}; x86 (3) or x86-64 (62) is needed")
    if kind not in _LOADABLE_TYPES:
        name = _TYPES.get(kind, f"of type {kind}")
        raise ImageError(f"{source.name}: is an ELF file, but {name}; an executable is needed")
    return shape, machine


def _program_headers(source: Source, shape: _Shape) -> tuple[int, list[dict[str, int]]]:
    """The entry point and the program headers by field name."""
    if source.size < shape.header.size:
        raise ImageError(f"{source.name}: the file is truncated within its ELF header")
    fields = shape.header.unpack(source.read(0, shape.header.size))
    entry, offset, entry_size, count = fields[3], fields[4], fields[8], fields[9]
    if not 0 < count <= _PHNUM_MAX:
        raise ImageError(f"{source.name}: has {count} program headers; 1 to {_PHNUM_MAX} are allowed")
    if entry_size != shape.program.size:
        raise ImageError(
            f"{source.name}: program headers of {entry_size} bytes; "
            f"in this ELF class they have {shape.program.size}"
        )
    if offset + count * entry_size > source.size:
        raise ImageError(f"{source.name}: the file is truncated: its program headers lie beyond its end")
    table = source.read(offset, count * entry_size)
    return entry, [
        dict(zip(shape.program_fields, row, strict=True)) for row in shape.program.iter_unpack(table)
    ]


def _segments(source: Source, headers: list[dict[str, int]]) -> tuple[Segment, ...]:
    if any(header["type"] == _PT_INTERP for header in headers):
        raise ImageError(f"{source.name}: is a program for a running Linux, not a kernel or firmware")
    segments = [
        _segment(source, index, header)
        for index, header in enumerate(headers)
        if header["type"] == _PT_LOAD and (header["memsz"] or header["filesz"])
    ]
    if not segments:
        raise ImageError(f"{source.name}: has no segment to load (PT_LOAD)")
    segments.sort(key=lambda segment: segment.address)
    for lower, upper in pairwise(segments):
        if lower.end > upper.address:
            raise ImageError(
                f"{source.name}: segments {lower.index} and {upper.index} overlap at {upper.address:#x}"
            )
    return tuple(segments)


def _segment(source: Source, index: int, header: dict[str, int]) -> Segment:
    segment = Segment(index, header["offset"], header["paddr"], header["filesz"], header["memsz"])
    where = f"{source.name}: segment {index}"
    if segment.file_size > segment.size:
        raise ImageError(f"{where}: {segment.file_size:#x} bytes in the file, {segment.size:#x} in memory")
    if segment.file_size and segment.offset + segment.file_size > source.size:
        raise ImageError(
            f"{where}: the file is truncated: bytes {segment.offset:#x} to "
            f"{segment.offset + segment.file_size:#x} of {source.size:#x} are needed"
        )
    if segment.end > _ADDRESS_END:
        raise ImageError(f"{where}: {segment.size:#x} bytes at {segment.address:#x} wrap around")
    if segment.address < layout.HIGH_RAM:
        raise ImageError(
            f"{where}: loads at {segment.address:#x}; below {layout.HIGH_RAM:#x} are the boot structures"
        )
    return segment


def _notes(source: Source, headers: list[dict[str, int]]) -> Iterator[tuple[bytes, int, bytes]]:
    """(owner, type, descriptor) of each note."""
    for index, header in enumerate(headers):
        if header["type"] != _PT_NOTE or not header["filesz"]:
            continue
        size = header["filesz"]
        if size > _NOTES_MAX or header["offset"] + size > source.size:
            raise ImageError(
                f"{source.name}: note segment {index} has {size} bytes; at most {_NOTES_MAX} that lie in the "
                "file are allowed"
            )
        data = source.read(header["offset"], size)
        yield from _split_notes(
            f"{source.name}: note segment {index}", data, 8 if header["align"] == 8 else 4
        )


def _split_notes(where: str, data: bytes, align: int) -> Iterator[tuple[bytes, int, bytes]]:
    position = 0
    while position + _NOTE_HEADER.size <= len(data):
        name_size, value_size, kind = _NOTE_HEADER.unpack_from(data, position)
        name = position + _NOTE_HEADER.size
        value = _align(name + name_size, align)
        if value + value_size > len(data):
            raise ImageError(f"{where}: the note at {position} ends beyond the segment")
        yield data[name : name + name_size].rstrip(b"\0"), kind, data[value : value + value_size]
        position = _align(value + value_size, align)


def _align(value: int, to: int) -> int:
    return -(-value // to) * to


def _pvh_entry(source: Source, value: bytes) -> int:
    if len(value) not in (4, 8):
        raise ImageError(f"{source.name}: the PVH note has {len(value)} bytes; 4 or 8 are allowed")
    entry = int.from_bytes(value, "little")
    if entry >= layout.RAM_64BIT:
        raise ImageError(
            f"{source.name}: the PVH entry {entry:#x} is above 4 GiB; it is entered in 32-bit mode"
        )
    return entry
