"""Unified kernel images: kernel, initrd and command line as sections of a PE file.

UAPI group, Unified Kernel Image (UKI specification), "UKI Components" and "Multi-Profile UKIs". Of several
profiles the first one, ``@0``, is used, as the boot stub does when nobody chooses. Layout of the PE file:
Microsoft PE Format, "MS-DOS Stub", "COFF File Header" and "Section Table".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

from ..errors import ImageError
from .disk import printable

_MACHINE_X64 = 0x8664
_SECTIONS_MAX = 512
_TEXT_MAX = 64 << 10

_COFF = struct.Struct("<4sHHIIIHH")
_SECTION = struct.Struct("<8sIIII16x")  # name, virtual size, virtual address, size and offset of raw data


class Readable(Protocol):
    """What is needed of a file."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes, or :class:`chv.errors.ImageError`."""


@dataclass(frozen=True, slots=True)
class Section:
    """Where the content of a section is in the file, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Uki:
    """What a unified kernel image consists of."""

    linux: Section
    initrds: tuple[Section, ...]
    """Microcode first, in the order in which the kernel is to get them."""
    cmdline: str
    os_release: dict[str, str]


def parse(file: Readable) -> Uki | None:
    """The parts of a unified kernel image; None for a file that is none.

    Raises :class:`chv.errors.ImageError` for one that is damaged or made for another kind of processor.
    """
    head = file.read(0, min(file.size, 64))
    if len(head) < 64 or head[:2] != b"MZ":
        return None
    coff = int.from_bytes(head[60:64], "little")
    if coff + _COFF.size > file.size:
        return None
    magic, machine, count, _, _, _, optional_size, _ = _COFF.unpack(file.read(coff, _COFF.size))
    if magic != b"PE\0\0":
        return None
    if count > _SECTIONS_MAX:
        raise ImageError(f"{file.name}: has {count} PE sections; {_SECTIONS_MAX} are allowed at most")
    table = coff + _COFF.size + optional_size
    if table + count * _SECTION.size > file.size:
        raise ImageError(f"{file.name}: its table of PE sections lies beyond its end")
    sections = _sections(file, file.read(table, count * _SECTION.size))
    linux = sections.get(".linux")
    if linux is None:
        return None
    if machine != _MACHINE_X64:
        raise ImageError(f"{file.name}: is for another processor (PE machine {machine:04x}), not for x86-64")
    if not linux.size:
        raise ImageError(f"{file.name}: its section .linux is empty")
    initrds = (sections.get(name) for name in (".ucode", ".initrd"))
    return Uki(
        linux,
        tuple(section for section in initrds if section is not None and section.size),
        _command_line(_text(file, sections, ".cmdline")),
        parse_os_release(_text(file, sections, ".osrel")),
    )


def _sections(file: Readable, table: bytes) -> dict[str, Section]:
    """The sections of the base profile, and those of profile 0 in their place."""
    found: dict[str, Section] = {}
    profiles = 0
    own: set[str] = set()  # of the current profile
    for raw_name, virtual_size, _, raw_size, offset in _SECTION.iter_unpack(table):
        name = raw_name.rstrip(b"\0").decode("ascii", "replace")
        if name == ".profile":
            profiles += 1
            own.clear()
            if profiles > 1:
                break
        if name in own:  # the specification allows one; the stub takes the first
            continue
        # Raw data is padded to the alignment of the file; what there is of it counts.
        size = min(virtual_size, raw_size) if virtual_size else raw_size
        if offset + size > file.size:
            raise ImageError(f"{file.name}: its PE section {printable(name)} lies beyond its end")
        own.add(name)
        found[name] = Section(offset, size)
    return found


def _text(file: Readable, sections: dict[str, Section], name: str) -> str:
    section = sections.get(name)
    if section is None:
        return ""
    if section.size > _TEXT_MAX:
        raise ImageError(f"{file.name}: its section {name} has {section.size} bytes; {_TEXT_MAX} at most")
    data = file.read(section.offset, section.size)
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _command_line(text: str) -> str:
    return "".join(" " if character < " " else character for character in text).strip()


def parse_os_release(text: str) -> dict[str, str]:
    """The assignments of an os-release file: ``NAME=value``, ``NAME="value"`` (os-release(5))."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        key, equals, value = line.strip().partition("=")
        if not equals or key.startswith("#"):
            continue
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        values[key] = value
    return values
