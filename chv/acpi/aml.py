r"""An encoder for AML, the byte code in ACPI tables (ACPI 6.5, chapter 20).

Every constructor has the name of the ASL operator that it encodes, takes what the ASL takes, and
returns the encoded bytes, so that nested calls read like the ASL they produce::

    Device("COM1",
        Name("_HID", EISAID("PNP0501")),
        Method("_STA", 0, False,
            Return(0x0F)))

A term that is a Python ``int`` becomes an integer in its shortest encoding, a ``str`` is a name or
path (``"\\_SB.CPUS"``, ``"^^CSCN"``; text is :func:`String`), ``bytes`` are AML already.
What cannot be encoded raises :class:`AmlError`.

The encoder is for tables of revision 2 and later, where integers have 64 bits (6.5, 19.3.5.3).
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import Final, TypeAlias

from msgspec import Struct

from ..errors import Error

Term: TypeAlias = bytes | int | str
"""AML, an integer, or a name."""
SuperName: TypeAlias = bytes | str
"""What can be written to: a name, a local or argument, a reference such as Index()."""


class AmlError(Error, ValueError):
    """A name, length or value that has no encoding in AML."""


# -- integers, strings and names (20.2.2 to 20.2.4) ----------------------------

ZERO: Final = b"\x00"
ONE: Final = b"\x01"
ONES: Final = b"\xff"
NOTHING: Final = b"\x00"  # NullName, as the target of an operator whose result is not stored

_SEGMENT = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")
_PATH = re.compile(r"(\\|\^*)(.*)", re.DOTALL)


def Integer(value: int) -> bytes:
    """The shortest encoding of an unsigned integer of up to 64 bits."""
    if value == 0:
        return ZERO
    if value == 1:
        return ONE
    if value == (1 << 64) - 1:
        return ONES
    for prefix, layout in ((0x0A, "<BB"), (0x0B, "<BH"), (0x0C, "<BI"), (0x0E, "<BQ")):
        if 0 < value < 1 << 8 * (struct.calcsize(layout) - 1):
            return struct.pack(layout, prefix, value)
    raise AmlError(f"integer {value}: not in 0..2**64-1")


def String(text: str) -> bytes:
    """A string of ASCII characters other than NUL."""
    if not text.isascii() or "\0" in text:
        raise AmlError(f"string {text!r}: only the ASCII characters 1 to 127 can be encoded")
    return b"\x0d" + text.encode("ascii") + b"\0"


@lru_cache(maxsize=1024)
def NameString(path: str) -> bytes:
    r"""A name: an optional ``\`` or any number of ``^``, then segments of 1 to 4 characters joined by dots.

    A segment has A to Z, digits and underscores, does not start with a digit, and is filled up with
    underscores. ``"\\"`` alone is the root.
    """
    match = _PATH.fullmatch(path)
    assert match is not None  # the pattern accepts every string
    prefix, rest = match.groups()
    segments = rest.split(".") if rest else []
    if not path or len(segments) > 255 or not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise AmlError(
            f"name {path!r}: not a path of segments such as _SB or CPUS "
            "(1 to 4 of A-Z, 0-9 and _, no digit first, 255 segments at most)"
        )
    body = b"".join(segment.ljust(4, "_").encode("ascii") for segment in segments)
    if not segments:
        body = b"\x00"
    elif len(segments) == 2:
        body = b"\x2e" + body
    elif len(segments) > 2:
        body = bytes((0x2F, len(segments))) + body
    return prefix.encode("ascii") + body


def _term(term: Term) -> bytes:
    if isinstance(term, bytes):
        return term
    return NameString(term) if isinstance(term, str) else Integer(term)


def _join(terms: Iterable[Term]) -> bytes:
    return b"".join(map(_term, terms))


def _byte(what: str, value: int, maximum: int = 255) -> bytes:
    if not 0 <= value <= maximum:
        raise AmlError(f"{what} {value}: not in 0..{maximum}")
    return bytes((value,))


def _pack(what: str, layout: str, *values: int) -> bytes:
    try:
        return struct.pack("<" + layout, *values)
    except struct.error as error:
        numbers = ", ".join(f"{value:#x}" for value in values)
        raise AmlError(f"{what}: {numbers} do not fit the descriptor ({error})") from error


# -- package length (20.2.4) ---------------------------------------------------


def PkgLength(length: int, *, own: bool = True) -> bytes:
    """The length in front of a package's ``length`` bytes; it counts its own bytes too if ``own``."""
    for size, limit in ((1, 1 << 6), (2, 1 << 12), (3, 1 << 20), (4, 1 << 28)):
        total = length + (size if own else 0)
        if 0 <= total < limit:
            break
    else:
        raise AmlError(f"package of {length} bytes: AML lengths end at 2**28-1")
    if size == 1:
        return bytes((total,))
    return bytes(((size - 1) << 6 | total & 0xF,)) + (total >> 4).to_bytes(size - 1, "little")


def _package(opcode: bytes, body: bytes) -> bytes:
    return opcode + PkgLength(len(body)) + body


# -- data objects (20.2.3, 20.2.5.4) ---------------------------------------------


@lru_cache(maxsize=64)
def EISAID(identifier: str) -> bytes:
    """An EISA id such as ``"PNP0501"``: three capital letters and four hexadecimal digits (19.3.4)."""
    if not re.fullmatch(r"[A-Z]{3}[0-9A-Fa-f]{4}", identifier):
        raise AmlError(f"EISA id {identifier!r}: not three letters A-Z and four hexadecimal digits")
    first, second, third = (ord(letter) - 0x40 for letter in identifier[:3])
    compressed = first << 26 | second << 21 | third << 16 | int(identifier[3:], 16)
    return b"\x0c" + compressed.to_bytes(4, "big")


def Buffer(data: bytes, size: Term | None = None) -> bytes:
    """``Buffer (size) { data }``; the size is that of the data if not given."""
    return _package(b"\x11", _term(len(data) if size is None else size) + data)


def ToUUID(text: str) -> bytes:
    """The buffer of a UUID in its mixed byte order (19.6.142)."""
    try:
        import uuid

        return Buffer(uuid.UUID(text).bytes_le)
    except ValueError as error:
        raise AmlError(f"UUID {text!r}: {error}") from error


def Package(*elements: Term) -> bytes:
    """``Package () { elements }`` with 255 elements at most."""
    return _package(b"\x12", _byte("package elements", len(elements)) + _join(elements))


def VarPackage(size: Term, *elements: Term) -> bytes:
    """``Package (size) { elements }`` where the size may be known at run time only, or more than 255."""
    return _package(b"\x13", _term(size) + _join(elements))


# -- name space (20.2.5.1, 20.2.5.2) -----------------------------------------------


class RegionSpace(enum.IntEnum):
    """Address spaces of operation regions (5.5.2.4)."""

    SYSTEM_MEMORY = 0
    SYSTEM_IO = 1
    PCI_CONFIG = 2
    EMBEDDED_CONTROL = 3
    SMBUS = 4
    SYSTEM_CMOS = 5
    PCI_BAR_TARGET = 6
    IPMI = 7
    GENERAL_PURPOSE_IO = 8
    GENERIC_SERIAL_BUS = 9
    PCC = 10


class Access(enum.IntEnum):
    """Access types of a Field (19.6.48)."""

    ANY = 0
    BYTE = 1
    WORD = 2
    DWORD = 3
    QWORD = 4
    BUFFER = 5


class Update(enum.IntEnum):
    """What a write to a part of an access unit does to the rest of it (19.6.48)."""

    PRESERVE = 0
    WRITE_AS_ONES = 1
    WRITE_AS_ZEROS = 2


class Bits(Struct, frozen=True):
    """``NAME, width``: a named unit of a Field, its width in bits."""

    name: str
    width: int


class Skip(Struct, frozen=True):
    """``, width``: unnamed bits of a Field."""

    width: int


class Offset(Struct, frozen=True):
    """``Offset (byte)``: the next unit of the Field starts at this byte of the region."""

    byte: int


def Alias(source: str, name: str) -> bytes:
    return b"\x06" + NameString(source) + NameString(name)


def Name(name: str, value: Term) -> bytes:
    return b"\x08" + NameString(name) + _term(value)


def Scope(name: str, *body: Term) -> bytes:
    return _package(b"\x10", NameString(name) + _join(body))


def Device(name: str, *body: Term) -> bytes:
    return _package(b"\x5b\x82", NameString(name) + _join(body))


def External(name: str, object_type: int = 0, arguments: int = 0) -> bytes:
    """A name that another table defines; ``object_type`` as ObjectType numbers it (19.6.97)."""
    kind = _byte("object type", object_type) + _byte("external arguments", arguments, 7)
    return b"\x15" + NameString(name) + kind


def Method(name: str, arguments: int, serialized: bool, *body: Term, sync_level: int = 0) -> bytes:
    """``Method (name, arguments, Serialized or NotSerialized, sync_level) { body }``."""
    flags = _byte("method arguments", arguments, 7)[0] | _byte("sync level", sync_level, 15)[0] << 4
    return _package(b"\x14", NameString(name) + bytes((flags | serialized << 3,)) + _join(body))


def OperationRegion(name: str, space: RegionSpace, offset: Term, length: Term) -> bytes:
    return b"\x5b\x80" + NameString(name) + bytes((space,)) + _term(offset) + _term(length)


def Field(
    region: str,
    access: Access,
    lock: bool,
    update: Update,
    *units: Bits | Skip | Offset,
) -> bytes:
    """``Field (region, access, Lock or NoLock, update) { units }``; units follow one another from bit 0."""
    body = NameString(region) + bytes((access | lock << 4 | update << 5,))
    position = 0
    for unit in units:
        if isinstance(unit, Bits):
            name, width = NameString(unit.name), unit.width
        else:
            name, width = b"\x00", unit.width if isinstance(unit, Skip) else 8 * unit.byte - position
        if width < 0 or len(name) not in (1, 4) or (width == 0 and isinstance(unit, Bits)):
            raise AmlError(f"field in region {region}: {unit} cannot follow {position} bits")
        if width or isinstance(unit, Bits):
            body += name + PkgLength(width, own=False)
        position += width
    return _package(b"\x5b\x81", body)


def Mutex(name: str, sync_level: int = 0) -> bytes:
    return b"\x5b\x01" + NameString(name) + _byte("sync level", sync_level, 15)


def CreateBitField(source: Term, bit: Term, name: str) -> bytes:
    return b"\x8d" + _join((source, bit, name))


def CreateByteField(source: Term, byte: Term, name: str) -> bytes:
    return b"\x8c" + _join((source, byte, name))


def CreateWordField(source: Term, byte: Term, name: str) -> bytes:
    return b"\x8b" + _join((source, byte, name))


def CreateDWordField(source: Term, byte: Term, name: str) -> bytes:
    return b"\x8a" + _join((source, byte, name))


def CreateQWordField(source: Term, byte: Term, name: str) -> bytes:
    return b"\x8f" + _join((source, byte, name))


def CreateField(source: Term, bit: Term, bits: Term, name: str) -> bytes:
    return b"\x5b\x13" + _join((source, bit, bits, name))


# -- statements (20.2.5.3) -----------------------------------------------------------

Break: Final = b"\xa5"
Continue: Final = b"\x9f"
Noop: Final = b"\xa3"
FOREVER: Final = 0xFFFF  # a timeout of Acquire


def If(condition: Term, *body: Term) -> bytes:
    return _package(b"\xa0", _term(condition) + _join(body))


def Else(*body: Term) -> bytes:
    """The branch of the If right before it."""
    return _package(b"\xa1", _join(body))


def While(condition: Term, *body: Term) -> bytes:
    return _package(b"\xa2", _term(condition) + _join(body))


def Return(value: Term = 0) -> bytes:
    return b"\xa4" + _term(value)


def Notify(target: SuperName, value: Term) -> bytes:
    return b"\x86" + _join((target, value))


def Release(mutex: SuperName) -> bytes:
    return b"\x5b\x27" + _term(mutex)


def Sleep(milliseconds: Term) -> bytes:
    return b"\x5b\x22" + _term(milliseconds)


def Stall(microseconds: Term) -> bytes:
    return b"\x5b\x21" + _term(microseconds)


# -- expressions (20.2.5.4) ----------------------------------------------------------

Local0, Local1, Local2, Local3, Local4, Local5, Local6, Local7 = (bytes((0x60 + n,)) for n in range(8))
Arg0, Arg1, Arg2, Arg3, Arg4, Arg5, Arg6 = (bytes((0x68 + n,)) for n in range(7))
Debug: Final = b"\x5b\x31"
Timer: Final = b"\x5b\x33"


def Call(method: str, *arguments: Term) -> bytes:
    """``METHOD (arguments)``; the interpreter knows their number from the method."""
    return NameString(method) + _join(arguments)


def Acquire(mutex: SuperName, timeout: int = FOREVER) -> bytes:
    """Take a mutex within ``timeout`` milliseconds; true if that failed. 0xFFFF waits for ever."""
    return b"\x5b\x23" + _term(mutex) + _pack("Acquire timeout", "H", timeout)


def Store(source: Term, target: SuperName) -> bytes:
    return b"\x70" + _join((source, target))


def CopyObject(source: Term, target: SuperName) -> bytes:
    return b"\x9d" + _join((source, target))


def RefOf(source: SuperName) -> bytes:
    return b"\x71" + _term(source)


def CondRefOf(source: SuperName, target: SuperName = NOTHING) -> bytes:
    return b"\x5b\x12" + _join((source, target))


def DerefOf(source: Term) -> bytes:
    return b"\x83" + _term(source)


def Index(source: Term, index: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x88" + _join((source, index, target))


def SizeOf(source: SuperName) -> bytes:
    return b"\x87" + _term(source)


def ObjectType(source: SuperName) -> bytes:
    return b"\x8e" + _term(source)


def Increment(target: SuperName) -> bytes:
    return b"\x75" + _term(target)


def Decrement(target: SuperName) -> bytes:
    return b"\x76" + _term(target)


def Add(left: Term, right: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x72" + _join((left, right, target))


def Subtract(left: Term, right: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x74" + _join((left, right, target))


def Multiply(left: Term, right: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x77" + _join((left, right, target))


def Divide(
    dividend: Term, divisor: Term, remainder: SuperName = NOTHING, quotient: SuperName = NOTHING
) -> bytes:
    return b"\x78" + _join((dividend, divisor, remainder, quotient))


def Mod(dividend: Term, divisor: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x85" + _join((dividend, divisor, target))


def ShiftLeft(value: Term, count: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x79" + _join((value, count, target))


def ShiftRight(value: Term, count: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x7a" + _join((value, count, target))


def And(left: Term, right: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x7b" + _join((left, right, target))


def NAnd(left: Term, right: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x7c" + _join((left, right, target))


def Or(left: Term, right: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x7d" + _join((left, right, target))


def NOr(left: Term, right: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x7e" + _join((left, right, target))


def XOr(left: Term, right: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x7f" + _join((left, right, target))


def Not(value: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x80" + _join((value, target))


def FindSetLeftBit(value: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x81" + _join((value, target))


def FindSetRightBit(value: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x82" + _join((value, target))


def Concatenate(left: Term, right: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x73" + _join((left, right, target))


def ConcatenateResTemplate(left: Term, right: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x84" + _join((left, right, target))


def Mid(source: Term, index: Term, length: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x9e" + _join((source, index, length, target))


def ToBuffer(value: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x96" + _join((value, target))


def ToInteger(value: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x99" + _join((value, target))


def ToHexString(value: Term, target: SuperName = NOTHING) -> bytes:
    return b"\x98" + _join((value, target))


def LAnd(left: Term, right: Term) -> bytes:
    return b"\x90" + _join((left, right))


def LOr(left: Term, right: Term) -> bytes:
    return b"\x91" + _join((left, right))


def LNot(value: Term) -> bytes:
    return b"\x92" + _term(value)


def LEqual(left: Term, right: Term) -> bytes:
    return b"\x93" + _join((left, right))


def LNotEqual(left: Term, right: Term) -> bytes:
    return LNot(LEqual(left, right))


def LGreater(left: Term, right: Term) -> bytes:
    return b"\x94" + _join((left, right))


def LLess(left: Term, right: Term) -> bytes:
    return b"\x95" + _join((left, right))


def LGreaterEqual(left: Term, right: Term) -> bytes:
    return LNot(LLess(left, right))


def LLessEqual(left: Term, right: Term) -> bytes:
    return LNot(LGreater(left, right))


# -- resource descriptors (6.4) --------------------------------------------------------


class Cache(enum.IntEnum):
    """Memory attributes of an address space descriptor (table 6.52)."""

    NON_CACHEABLE = 0
    CACHEABLE = 1
    WRITE_COMBINING = 2
    PREFETCHABLE = 3


def ResourceTemplate(*descriptors: bytes) -> bytes:
    """The buffer of the descriptors and the end tag, with the checksum over all of them (6.4.2.9)."""
    body = b"".join(descriptors) + b"\x79"
    return Buffer(body + bytes((-sum(body) & 0xFF,)))


def IO(minimum: int, maximum: int, alignment: int, length: int) -> bytes:
    """``IO (Decode16, minimum, maximum, alignment, length)`` (6.4.2.5)."""
    return _pack("IO", "BBHHBB", 0x47, 1, minimum, maximum, alignment, length)


def IRQNoFlags(*lines: int) -> bytes:
    """Edge-triggered, active-high, exclusive lines of the 8259 pair, 0 to 15 (6.4.2.1)."""
    return b"\x22" + _pack("IRQ", "H", _line_mask(lines))


def IRQ(*lines: int, edge: bool = True, active_low: bool = False, shared: bool = False) -> bytes:
    """``IRQ (mode, polarity, sharing) { lines }`` for lines 0 to 15 (6.4.2.1)."""
    return b"\x23" + _pack("IRQ", "HB", _line_mask(lines), edge | active_low << 3 | shared << 4)


def _line_mask(lines: Iterable[int]) -> int:
    mask = 0
    for line in lines:
        mask |= 1 << _byte("IRQ line", line, 15)[0]
    return mask


def Interrupt(
    *gsis: int, edge: bool = True, active_low: bool = False, shared: bool = False, consumer: bool = True
) -> bytes:
    """``Interrupt (usage, mode, polarity, sharing) { gsis }``, global system interrupts (6.4.3.6)."""
    flags = consumer | edge << 1 | active_low << 2 | shared << 3
    count = len(gsis)
    return _pack("Interrupt", f"BHBB{count}I", 0x89, 2 + 4 * count, flags, count, *gsis)


def Memory32Fixed(base: int, length: int, *, read_write: bool = True) -> bytes:
    """``Memory32Fixed (ReadWrite or ReadOnly, base, length)`` (6.4.3.4)."""
    return _pack("Memory32Fixed", "BHBII", 0x86, 9, read_write, base, length)


_MEMORY_RANGE, _IO_RANGE, _BUS_RANGE = 0, 1, 2
_ENTIRE_RANGE = 3  # _RNG: ISA and other addresses alike (table 6.53)


def _address_space(
    layout: str, kind: int, flags: int, minimum: int, maximum: int, translation: int, consumer: bool
) -> bytes:
    """A word, dword or qword descriptor of one fixed range, ``maximum`` included (6.4.3.5)."""
    if maximum < minimum:
        raise AmlError(f"address range {minimum:#x}..{maximum:#x}: it ends before it starts")
    tag = {"H": 0x88, "I": 0x87, "Q": 0x8A}[layout]
    body = _pack("address range", f"5{layout}", 0, minimum, maximum, translation, maximum - minimum + 1)
    fixed = 1 << 2 | 1 << 3
    return struct.pack("<BHBBB", tag, 3 + len(body), kind, consumer | fixed, flags) + body


def WordBusNumber(minimum: int, maximum: int, *, translation: int = 0, consumer: bool = False) -> bytes:
    """``WordBusNumber (usage, MinFixed, MaxFixed, PosDecode, 0, minimum, maximum, translation, length)``."""
    return _address_space("H", _BUS_RANGE, 0, minimum, maximum, translation, consumer)


def WordIO(minimum: int, maximum: int, *, translation: int = 0, consumer: bool = False) -> bytes:
    """``WordIO (usage, MinFixed, MaxFixed, PosDecode, EntireRange, 0, minimum, maximum, ...)``."""
    return _address_space("H", _IO_RANGE, _ENTIRE_RANGE, minimum, maximum, translation, consumer)


def DWordIO(minimum: int, maximum: int, *, translation: int = 0, consumer: bool = False) -> bytes:
    return _address_space("I", _IO_RANGE, _ENTIRE_RANGE, minimum, maximum, translation, consumer)


def QWordIO(minimum: int, maximum: int, *, translation: int = 0, consumer: bool = False) -> bytes:
    return _address_space("Q", _IO_RANGE, _ENTIRE_RANGE, minimum, maximum, translation, consumer)


def DWordMemory(
    minimum: int,
    maximum: int,
    *,
    cache: Cache = Cache.NON_CACHEABLE,
    read_write: bool = True,
    translation: int = 0,
    consumer: bool = False,
) -> bytes:
    """``DWordMemory (usage, PosDecode, MinFixed, MaxFixed, cache, ReadWrite, 0, minimum, maximum, ...)``."""
    flags = read_write | cache << 1
    return _address_space("I", _MEMORY_RANGE, flags, minimum, maximum, translation, consumer)


def QWordMemory(
    minimum: int,
    maximum: int,
    *,
    cache: Cache = Cache.NON_CACHEABLE,
    read_write: bool = True,
    translation: int = 0,
    consumer: bool = False,
) -> bytes:
    flags = read_write | cache << 1
    return _address_space("Q", _MEMORY_RANGE, flags, minimum, maximum, translation, consumer)
