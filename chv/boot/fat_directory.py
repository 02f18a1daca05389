"""The entries of a FAT directory: short names, and the long ones of VFAT.

Microsoft FAT Specification (August 30 2005), sections 6 (directory structure) and 7 (long file names).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

ENTRY_SIZE = 32

# Section 6: name, attributes, NTRes, 1 + 2 + 2 + 2 bytes of times, cluster high, 2 + 2 bytes of times,
# cluster low, size.
_ENTRY = struct.Struct("<11sBB7xH4xHI")
_LONG = struct.Struct("<B10sBBB12sH4s")  # section 7: order, name, attributes, type, checksum, name, 0, name

_DIRECTORY, _VOLUME_ID, _LONG_NAME, _LONG_MASK = 0x10, 0x08, 0x0F, 0x3F
_DELETED, _END, _KANJI = 0xE5, 0x00, 0x05
_LAST_LONG, _ORDER_MASK = 0x40, 0x3F
_LONG_ENTRIES_MAX = 20  # 255 characters, 13 an entry
# NTRes: the base or the extension of an 8.3 name is in lower case (not in the specification; Windows NT on).
_LOWER_BASE, _LOWER_EXTENSION = 0x08, 0x10


@dataclass(frozen=True, slots=True)
class Node:
    """A file or directory as its directory entry describes it; nothing in it has been checked."""

    name: str
    is_directory: bool
    cluster: int
    size: int


class Directory:
    """The entries of one directory by name, without regard to case."""

    def __init__(self, data: bytes, wide: bool) -> None:
        """``data`` is the directory's content; ``wide``: first clusters have 32 bits, not 16 (FAT32)."""
        self.nodes: list[Node] = []
        """In the order of the directory, without ``.``, ``..``, the volume label and what was deleted."""
        self._by_name: dict[str, Node] = {}
        short_names: list[tuple[str, Node]] = []
        for short, node in _entries(data, wide):
            self.nodes.append(node)
            self._by_name.setdefault(node.name.casefold(), node)
            short_names.append((short, node))
        for short, node in short_names:  # a long name wins over a short one that is the same
            self._by_name.setdefault(short.casefold(), node)

    def find(self, name: str) -> Node | None:
        """The entry with that long or short name; the first of several."""
        return self._by_name.get(name.casefold())


def _entries(data: bytes, wide: bool) -> list[tuple[str, Node]]:
    """(short name, entry) of all files and directories."""
    found = []
    long = _LongName()
    for start in range(0, len(data) - ENTRY_SIZE + 1, ENTRY_SIZE):
        first = data[start]
        if first == _END:
            break
        if first == _DELETED:
            long.forget()
            continue
        if data[start + 11] & _LONG_MASK == _LONG_NAME:
            long.add(data[start : start + ENTRY_SIZE])
            continue
        raw, attributes, case, high, low, size = _ENTRY.unpack_from(data, start)
        name = long.take(raw)
        if attributes & _VOLUME_ID or raw[:1] == b".":
            continue
        short = _short_name(raw, case)
        cluster = low | high << 16 if wide else low
        found.append((short, Node(name or short, bool(attributes & _DIRECTORY), cluster, size)))
    return found


class _LongName:
    """Collects the entries of a long name, which stand before the short one, the last part first."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._order = 0
        self._checksum = 0

    def forget(self) -> None:
        self._parts.clear()
        self._order = 0

    def add(self, entry: bytes) -> None:
        order, first, _, kind, checksum, second, _, third = _LONG.unpack(entry)
        number = order & _ORDER_MASK
        if order & _LAST_LONG:
            self._parts.clear()
            self._order, self._checksum = number + 1, checksum
        expected = number == self._order - 1 and checksum == self._checksum and not kind
        if not expected or not 1 <= number <= _LONG_ENTRIES_MAX:
            self.forget()
            return
        self._order = number
        self._parts.append(first + second + third)

    def take(self, short: bytes) -> str:
        """The long name that belongs to this short one, and forget it; empty if there is none."""
        complete = self._order == 1 and self._checksum == checksum(short)
        raw = b"".join(reversed(self._parts)) if complete else b""
        self.forget()
        return raw.decode("utf-16-le", "replace").partition("\0")[0]


def checksum(short: bytes) -> int:
    """What the entries of a long name keep of their short one (section 7.2)."""
    total = 0
    for byte in short:
        total = ((total >> 1 | total << 7) + byte) & 0xFF
    return total


def _short_name(raw: bytes, case: int) -> str:
    if raw[0] == _KANJI:
        raw = bytes([_DELETED]) + raw[1:]
    base = raw[:8].decode("cp437").rstrip(" ")
    extension = raw[8:].decode("cp437").rstrip(" ")
    if case & _LOWER_BASE:
        base = base.lower()
    if case & _LOWER_EXTENSION:
        extension = extension.lower()
    return f"{base}.{extension}" if extension else base
