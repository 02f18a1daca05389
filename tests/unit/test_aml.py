r"""The AML encoder: the bytes by the specification, and the bytes that iasl makes of the same ASL."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chv.acpi import aml
from chv.acpi.aml import Access, AmlError, RegionSpace, Update

from . import acpica

# -- by the specification ------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a 02"),
        (0xFF, "0a ff"),
        (0x100, "0b 00 01"),
        (0xFFFF, "0b ff ff"),
        (0x10000, "0c 00 00 01 00"),
        (0xFFFFFFFF, "0c ff ff ff ff"),
        (0x1_0000_0000, "0e 00 00 00 00 01 00 00 00"),
        (2**64 - 2, "0e fe ff ff ff ff ff ff ff"),
        (2**64 - 1, "ff"),
    ],
)
def test_integers(value: int, encoded: str) -> None:
    assert aml.Integer(value) == bytes.fromhex(encoded)


@given(st.integers(2, 2**64 - 2))
def test_integers_are_read_back(value: int) -> None:
    encoded = aml.Integer(value)
    size = {0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}[encoded[0]]
    assert len(encoded) == 1 + size
    assert int.from_bytes(encoded[1:], "little") == value
    assert size == 1 or value >> 8 * (size // 2)  # a shorter one would not do


@pytest.mark.parametrize("value", [-1, 2**64, 2**70])
def test_integers_out_of_range(value: int) -> None:
    with pytest.raises(AmlError, match=str(value)):
        aml.Integer(value)


def read_length(encoded: bytes) -> tuple[int, int]:
    """(length, bytes it takes), as 20.2.4 says to read it."""
    extra = encoded[0] >> 6
    if not extra:
        return encoded[0] & 0x3F, 1
    assert not encoded[0] & 0x30
    return encoded[0] & 0xF | int.from_bytes(encoded[1 : 1 + extra], "little") << 4, 1 + extra


@pytest.mark.parametrize(
    ("length", "encoded"),
    [
        (0, "01"),
        (62, "3f"),
        (63, "41 04"),
        (4093, "4f ff"),
        (4094, "81 00 01"),
        (0xFFFFC, "8f ff ff"),
        (0xFFFFD, "c1 00 00 01"),
        (0xFFFFFFB, "cf ff ff ff"),
    ],
)
def test_package_length_at_its_boundaries(length: int, encoded: str) -> None:
    assert aml.PkgLength(length) == bytes.fromhex(encoded)


@given(st.integers(0, 2**28 - 5), st.booleans())
def test_package_lengths_are_read_back(length: int, own: bool) -> None:
    encoded = aml.PkgLength(length, own=own)
    value, size = read_length(encoded)
    assert size == len(encoded)
    assert value == length + (size if own else 0)
    assert size == 1 or value - (own and 1) > (0x3F, 0xFFF, 0xFFFFF)[size - 2]  # the shortest


def test_package_too_long() -> None:
    with pytest.raises(AmlError, match="2\\*\\*28"):
        aml.PkgLength(2**28 - 4)


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("\\", b"\\\0"),
        ("^", b"^\0"),
        ("X", b"X___"),
        ("_SB", b"_SB_"),
        ("\\_SB", b"\\_SB_"),
        ("^^CSCN", b"^^CSCN"),
        ("_SB.PCI0", b"\x2e_SB_PCI0"),
        ("\\_SB.CPUS.CSCN", b"\\\x2f\x03_SB_CPUSCSCN"),
        ("^A.B.C.D", b"^\x2f\x04A___B___C___D___"),
        (".".join(["ABCD"] * 255), b"\x2f\xff" + b"ABCD" * 255),
    ],
)
def test_names(path: str, encoded: bytes) -> None:
    assert aml.NameString(path) == encoded


SEGMENT = st.from_regex(r"[A-Z_][A-Z0-9_]{0,3}", fullmatch=True)


@given(st.sampled_from(["", "\\", "^", "^^^"]), st.lists(SEGMENT, min_size=1, max_size=255))
def test_names_are_read_back(prefix: str, segments: list[str]) -> None:
    encoded = aml.NameString(prefix + ".".join(segments))
    assert encoded.startswith(prefix.encode())
    rest = encoded[len(prefix) :]
    if rest[0] == 0x2E:
        count, rest = 2, rest[1:]
    elif rest[0] == 0x2F:
        count, rest = rest[1], rest[2:]
    else:
        count = 1
    found = [rest[4 * n : 4 * n + 4].decode() for n in range(count)]
    assert len(rest) == 4 * count
    assert found == [segment.ljust(4, "_") for segment in segments]


@pytest.mark.parametrize(
    "path",
    ["", "a", "1A", "ABCDE", "A.", ".A", "A..B", "A.^B", "\\^A", "Å", "A\n", "A B", ".".join(["A"] * 256)],
)
def test_names_that_are_none(path: str) -> None:
    with pytest.raises(AmlError, match="name"):
        aml.NameString(path)


@given(st.text())
def test_any_text_is_a_name_or_an_error(path: str) -> None:
    try:
        encoded = aml.NameString(path)
    except AmlError:
        return
    assert len(encoded) <= 2 * len(path) + 4


def test_the_checksum_of_a_resource_template() -> None:
    template = aml.ResourceTemplate(aml.IO(0x3F8, 0x3F8, 0, 8), aml.Interrupt(4))
    descriptors = template[4:]  # opcode, length, size
    assert template[3] == len(descriptors)
    assert descriptors[-2] == 0x79
    assert sum(descriptors) & 0xFF == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: aml.String("é"),
        lambda: aml.String("a\0b"),
        lambda: aml.EISAID("PNP501"),
        lambda: aml.EISAID("pnp0501"),
        lambda: aml.ToUUID("123"),
        lambda: aml.Package(*range(256)),
        lambda: aml.Method("ABCD", 8, False),
        lambda: aml.Method("ABCD", 0, True, sync_level=16),
        lambda: aml.Mutex("ABCD", 16),
        lambda: aml.Acquire("ABCD", 0x10000),
        lambda: aml.IO(0x10000, 0x10000, 0, 1),
        lambda: aml.IRQNoFlags(16),
        lambda: aml.Interrupt(-1),
        lambda: aml.Memory32Fixed(1 << 32, 1),
        lambda: aml.WordBusNumber(2, 1),
        lambda: aml.WordBusNumber(0, 0xFFFF),  # its length has 17 bits
        lambda: aml.Field("REGN", Access.BYTE, False, Update.PRESERVE, aml.Bits("A.B", 1)),
        lambda: aml.Field("REGN", Access.BYTE, False, Update.PRESERVE, aml.Bits("ABCD", 0)),
        lambda: aml.Field("REGN", Access.BYTE, False, Update.PRESERVE, aml.Bits("ABCD", 9), aml.Offset(1)),
    ],
)
def test_what_cannot_be_encoded(make: object) -> None:
    assert callable(make)
    with pytest.raises(AmlError):
        make()


# -- beside iasl -----------------------------------------------------------------

# A case's ASL, its AML by this encoder, and (for those worth showing) the bytes.
NAMES = "Name (ABCD, 5) Name (BUFF, Buffer (16) {})"
NAMES_AML = aml.Name("ABCD", 5) + aml.Name("BUFF", aml.Buffer(b"", 16))


def in_method(*body: aml.Term) -> bytes:
    return aml.Method("TEST", 2, False, *body)


CASES: list[tuple[str, bytes, str]] = [
    ("Name (ABCD, 0)", aml.Name("ABCD", 0), "08 41424344 00"),
    ("Name (ABCD, 0xCAFE)", aml.Name("ABCD", 0xCAFE), "08 41424344 0b feca"),
    ("Name (ABCD, 0xFFFFFFFFFFFFFFFF)", aml.Name("ABCD", 2**64 - 1), "08 41424344 ff"),
    (
        'Name (_HID, "ACPI0010")',
        aml.Name("_HID", aml.String("ACPI0010")),
        "08 5f484944 0d 414350493030313000",
    ),
    ('Name (_HID, EISAID ("PNP0501"))', aml.Name("_HID", aml.EISAID("PNP0501")), "08 5f484944 0c 41d00501"),
    ('Name (_HID, EISAID ("INT3F0D"))', aml.Name("_HID", aml.EISAID("INT3F0D")), ""),
    (
        "Name (ABCD, Buffer () {1, 2, 3})",
        aml.Name("ABCD", aml.Buffer(b"\1\2\3")),
        "08 41424344 11 06 0a03 010203",
    ),
    ("Name (ABCD, Buffer (16) {1, 2})", aml.Name("ABCD", aml.Buffer(b"\1\2", 16)), ""),
    (
        'Name (ABCD, ToUUID ("33DB4D5B-1FF7-401C-9657-7441C03DD766"))',
        aml.Name("ABCD", aml.ToUUID("33DB4D5B-1FF7-401C-9657-7441C03DD766")),
        "08 41424344 11 13 0a10 5b4ddb33 f71f 1c40 9657 7441c03dd766",
    ),
    (
        "Name (ABCD, Package () {0, 1, 0x55})",
        aml.Name("ABCD", aml.Package(0, 1, 0x55)),
        "08 41424344 12 06 03 00 01 0a55",
    ),
    (
        'Name (ABCD, Package () {"A", Package () {}, Buffer () {7, 8}})',
        aml.Name("ABCD", aml.Package(aml.String("A"), aml.Package(), aml.Buffer(b"\7\x08"))),
        "",
    ),
    (
        "Name (ABCD, 2) Method (TEST, 1) {Return (Package (Arg0) {ABCD, 2})}",
        aml.Name("ABCD", 2) + aml.Method("TEST", 1, False, aml.Return(aml.VarPackage(aml.Arg0, "ABCD", 2))),
        "",
    ),
    (
        "Scope (\\_SB) {Device (COM1) {Name (_UID, 1)}}",
        aml.Scope("\\_SB", aml.Device("COM1", aml.Name("_UID", 1))),
        "10 13 5c5f53425f 5b82 0b 434f4d31 08 5f554944 01",
    ),
    ("Name (ABCD, 3) Alias (ABCD, EFGH)", aml.Name("ABCD", 3) + aml.Alias("ABCD", "EFGH"), ""),
    ("Method (ABCD) {}", aml.Method("ABCD", 0, False), "14 06 41424344 00"),
    ("Method (ABCD, 2, Serialized, 3) {Noop}", aml.Method("ABCD", 2, True, aml.Noop, sync_level=3), ""),
    (
        "OperationRegion (PRST, SystemIO, 0xCD8, 0x14)\n"
        "Field (PRST, ByteAcc, NoLock, WriteAsZeros) "
        "{Offset (4), CPEN, 1, CINS, 1, CRMV, 1, CEJ0, 1, , 4, CCMD, 8}",
        aml.OperationRegion("PRST", RegionSpace.SYSTEM_IO, 0xCD8, 0x14)
        + aml.Field(
            "PRST",
            Access.BYTE,
            False,
            Update.WRITE_AS_ZEROS,
            aml.Offset(4),
            aml.Bits("CPEN", 1),
            aml.Bits("CINS", 1),
            aml.Bits("CRMV", 1),
            aml.Bits("CEJ0", 1),
            aml.Skip(4),
            aml.Bits("CCMD", 8),
        ),
        "5b80 50525354 01 0b d80c 0a 14"
        "5b81 23 50525354 41 00 20 4350454e 01 43494e53 01 43524d56 01 43454a30 01 00 04 43434d44 08",
    ),
    (
        "OperationRegion (MEMR, SystemMemory, 0x100000000, 0x1000)\n"
        "Field (MEMR, QWordAcc, Lock, Preserve) {BASE, 64, Offset (16), , 7, WIDE, 4096}\n"
        "Field (MEMR, AnyAcc, NoLock, WriteAsOnes) {LOWW, 16}",
        aml.OperationRegion("MEMR", RegionSpace.SYSTEM_MEMORY, 1 << 32, 0x1000)
        + aml.Field(
            "MEMR",
            Access.QWORD,
            True,
            Update.PRESERVE,
            aml.Bits("BASE", 64),
            aml.Offset(16),
            aml.Skip(7),
            aml.Bits("WIDE", 4096),
        )
        + aml.Field("MEMR", Access.ANY, False, Update.WRITE_AS_ONES, aml.Bits("LOWW", 16)),
        "",
    ),
    (
        "Mutex (MTX1, 2) Method (TEST) {Acquire (MTX1, 0xFFFF) Release (MTX1)}",
        aml.Mutex("MTX1", 2) + aml.Method("TEST", 0, False, aml.Acquire("MTX1"), aml.Release("MTX1")),
        "5b01 4d545831 02 14 14 54455354 00 5b23 4d545831 ffff 5b27 4d545831",
    ),
    (
        "External (\\_SB.PCI0, DeviceObj) External (\\ABCD, MethodObj, IntObj, {IntObj, IntObj})\n"
        "Method (TEST) {\\ABCD (1, 2)}",
        aml.If(0, aml.External("\\_SB.PCI0", 6), aml.External("\\ABCD", 8, 2))  # as iasl has it
        + aml.Method("TEST", 0, False, aml.Call("\\ABCD", 1, 2)),
        "",
    ),
    (
        NAMES
        + "Method (TEST, 2) {If (LEqual (Arg0, 1)) {Return (2)} Else {Store (Arg1, ABCD)} Return (ABCD)}",
        NAMES_AML
        + in_method(
            aml.If(aml.LEqual(aml.Arg0, 1), aml.Return(2)),
            aml.Else(aml.Store(aml.Arg1, "ABCD")),
            aml.Return("ABCD"),
        ),
        "",
    ),
    (
        "Method (TEST, 2) {Store (0, Local0) While (LLess (Local0, 10)) {"
        "Increment (Local0) If (Arg0) {Break} Continue}}",
        in_method(
            aml.Store(0, aml.Local0),
            aml.While(
                aml.LLess(aml.Local0, 10),
                aml.Increment(aml.Local0),
                aml.If(aml.Arg0, aml.Break),
                aml.Continue,
            ),
        ),
        "14 16 54455354 02 70 00 60 a2 0c 95 60 0a0a 75 60 a0 03 68 a5 9f",
    ),
    (
        "Method (TEST, 2) {Local0 = LNotEqual (Arg0, Arg1) Local0 = LGreater (Arg0, 1)"
        " Local0 = LGreaterEqual (Arg0, 1)"
        " Local0 = LLessEqual (Arg0, 1) Local0 = LNot (Arg0) Local0 = LAnd (Arg0, Arg1)"
        " Local0 = LOr (Arg0, Arg1)}",
        in_method(
            aml.Store(aml.LNotEqual(aml.Arg0, aml.Arg1), aml.Local0),
            aml.Store(aml.LGreater(aml.Arg0, 1), aml.Local0),
            aml.Store(aml.LGreaterEqual(aml.Arg0, 1), aml.Local0),
            aml.Store(aml.LLessEqual(aml.Arg0, 1), aml.Local0),
            aml.Store(aml.LNot(aml.Arg0), aml.Local0),
            aml.Store(aml.LAnd(aml.Arg0, aml.Arg1), aml.Local0),
            aml.Store(aml.LOr(aml.Arg0, aml.Arg1), aml.Local0),
        ),
        "",
    ),
    (
        "Method (TEST, 2) {Add (Arg0, 2, Local7) Subtract (Arg0, Arg1, Local0) Multiply (Arg0, 3, Local0)"
        " Divide (Arg0, 4, Local0, Local1) Mod (Arg0, 5, Local0) ShiftLeft (Arg0, 6, Local0)"
        " ShiftRight (Arg0, 7, Local0) And (Arg0, 8, Local0) NAnd (Arg0, 9, Local0) Or (Arg0, 10, Local0)"
        " NOr (Arg0, 11, Local0) XOr (Arg0, 12, Local0) Not (Arg0, Local0) FindSetLeftBit (Arg0, Local0)"
        " FindSetRightBit (Arg0, Local0) Decrement (Local0)}",
        in_method(
            aml.Add(aml.Arg0, 2, aml.Local7),
            aml.Subtract(aml.Arg0, aml.Arg1, aml.Local0),
            aml.Multiply(aml.Arg0, 3, aml.Local0),
            aml.Divide(aml.Arg0, 4, aml.Local0, aml.Local1),
            aml.Mod(aml.Arg0, 5, aml.Local0),
            aml.ShiftLeft(aml.Arg0, 6, aml.Local0),
            aml.ShiftRight(aml.Arg0, 7, aml.Local0),
            aml.And(aml.Arg0, 8, aml.Local0),
            aml.NAnd(aml.Arg0, 9, aml.Local0),
            aml.Or(aml.Arg0, 10, aml.Local0),
            aml.NOr(aml.Arg0, 11, aml.Local0),
            aml.XOr(aml.Arg0, 12, aml.Local0),
            aml.Not(aml.Arg0, aml.Local0),
            aml.FindSetLeftBit(aml.Arg0, aml.Local0),
            aml.FindSetRightBit(aml.Arg0, aml.Local0),
            aml.Decrement(aml.Local0),
        ),
        "",
    ),
    (
        "Method (TEST, 2) {Store (DerefOf (Index (Arg0, 2)), Local0) Store (Arg1, Index (Arg0, 3, Local1))"
        " Store (SizeOf (Arg0), Local0) Store (ObjectType (Arg0), Local0) Store (RefOf (Arg0), Local2)"
        " Store (CondRefOf (Arg1, Local3), Local0) CopyObject (Arg0, Local4)}",
        in_method(
            aml.Store(aml.DerefOf(aml.Index(aml.Arg0, 2)), aml.Local0),
            aml.Store(aml.Arg1, aml.Index(aml.Arg0, 3, aml.Local1)),
            aml.Store(aml.SizeOf(aml.Arg0), aml.Local0),
            aml.Store(aml.ObjectType(aml.Arg0), aml.Local0),
            aml.Store(aml.RefOf(aml.Arg0), aml.Local2),
            aml.Store(aml.CondRefOf(aml.Arg1, aml.Local3), aml.Local0),
            aml.CopyObject(aml.Arg0, aml.Local4),
        ),
        "",
    ),
    (
        NAMES + "Method (TEST, 2, Serialized) {CreateBitField (BUFF, 1, FBIT) CreateByteField (BUFF, 2, FBYT)"
        " CreateWordField (BUFF, 3, FWRD) CreateDWordField (BUFF, 4, FDWD) CreateQWordField (BUFF, 5, FQWD)"
        " CreateField (BUFF, 6, 7, FBTS)}",
        NAMES_AML
        + aml.Method(
            "TEST",
            2,
            True,
            aml.CreateBitField("BUFF", 1, "FBIT"),
            aml.CreateByteField("BUFF", 2, "FBYT"),
            aml.CreateWordField("BUFF", 3, "FWRD"),
            aml.CreateDWordField("BUFF", 4, "FDWD"),
            aml.CreateQWordField("BUFF", 5, "FQWD"),
            aml.CreateField("BUFF", 6, 7, "FBTS"),
        ),
        "",
    ),
    (
        "Method (TEST, 2) {Concatenate (Arg0, Arg1, Local0) ConcatenateResTemplate (Arg0, Arg1, Local0)"
        " Mid (Arg0, 1, 2, Local0) ToBuffer (Arg0, Local0) ToInteger (Arg0, Local0)"
        " ToHexString (Arg0, Local0)"
        " Sleep (5) Stall (6) Store (Timer, Debug)}",
        in_method(
            aml.Concatenate(aml.Arg0, aml.Arg1, aml.Local0),
            aml.ConcatenateResTemplate(aml.Arg0, aml.Arg1, aml.Local0),
            aml.Mid(aml.Arg0, 1, 2, aml.Local0),
            aml.ToBuffer(aml.Arg0, aml.Local0),
            aml.ToInteger(aml.Arg0, aml.Local0),
            aml.ToHexString(aml.Arg0, aml.Local0),
            aml.Sleep(5),
            aml.Stall(6),
            aml.Store(aml.Timer, aml.Debug),
        ),
        "",
    ),
    (
        "Device (C000) {} Method (TEST, 2) {Notify (C000, Arg1) Notify (\\C000, 0x80)}",
        aml.Device("C000") + in_method(aml.Notify("C000", aml.Arg1), aml.Notify("\\C000", 0x80)),
        "5b82 05 43303030 14 14 54455354 02 86 43303030 69 86 5c43303030 0a80",
    ),
    (
        "Name (_CRS, ResourceTemplate () {IO (Decode16, 0x3F8, 0x3F8, 0, 8) IRQNoFlags () {4}\n"
        "IRQ (Level, ActiveLow, Shared) {5, 10}\n"
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {5}\n"
        "Interrupt (ResourceProducer, Level, ActiveLow, Shared) {16, 17, 18}\n"
        "Memory32Fixed (ReadWrite, 0xE8000000, 0x10000000) Memory32Fixed (ReadOnly, 0xFED40000, 0x1000)})",
        aml.Name(
            "_CRS",
            aml.ResourceTemplate(
                aml.IO(0x3F8, 0x3F8, 0, 8),
                aml.IRQNoFlags(4),
                aml.IRQ(5, 10, edge=False, active_low=True, shared=True),
                aml.Interrupt(5),
                aml.Interrupt(16, 17, 18, edge=False, active_low=True, shared=True, consumer=False),
                aml.Memory32Fixed(0xE8000000, 0x10000000),
                aml.Memory32Fixed(0xFED40000, 0x1000, read_write=False),
            ),
        ),
        "",
    ),
    (
        "Name (_CRS, ResourceTemplate () {\n"
        "WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, 0, 0, 0xFF, 0, 0x100)\n"
        "WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange, 0, 0xD00, 0xFFFF, 0, 0xF300)\n"
        "DWordIO (ResourceConsumer, MinFixed, MaxFixed, PosDecode, EntireRange,"
        " 0, 0, 0xFFFF, 0x1000, 0x10000)\n"
        "QWordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange, 0, 0, 0xFFFF, 0, 0x10000)\n"
        "DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,"
        " 0, 0xC0000000, 0xE7FFFFFF, 0, 0x28000000)\n"
        "QWordMemory (ResourceConsumer, PosDecode, MinFixed, MaxFixed, Cacheable, ReadOnly,"
        " 0, 0x100000000, 0x1FFFFFFFF, 0, 0x100000000)\n"
        "QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, Prefetchable, ReadWrite,"
        " 0, 0x4000000000, 0x7FFFFFFFFF, 0, 0x4000000000)})",
        aml.Name(
            "_CRS",
            aml.ResourceTemplate(
                aml.WordBusNumber(0, 0xFF),
                aml.WordIO(0xD00, 0xFFFF),
                aml.DWordIO(0, 0xFFFF, translation=0x1000, consumer=True),
                aml.QWordIO(0, 0xFFFF),
                aml.DWordMemory(0xC0000000, 0xE7FFFFFF),
                aml.QWordMemory(
                    1 << 32, (2 << 32) - 1, cache=aml.Cache.CACHEABLE, read_write=False, consumer=True
                ),
                aml.QWordMemory(0x4000000000, 0x7FFFFFFFFF, cache=aml.Cache.PREFETCHABLE),
            ),
        ),
        "",
    ),
]


@pytest.mark.parametrize(("asl", "encoded", "expected"), CASES, ids=[case[0][:60] for case in CASES])
def test_asl(asl: str, encoded: bytes, expected: str, tmp_path: Path) -> None:
    if expected:
        assert encoded == bytes.fromhex(expected)
    # No folding of constants and no shortening of paths: the encoder does neither.
    compiled = bytearray(acpica.compile_asl(asl, tmp_path, options=("-of", "-on")))[acpica.HEADER :]
    if "ResourceTemplate ()" in asl:
        assert compiled[-2:] == b"\x79\0"  # iasl leaves the checksum out, which is allowed too
        compiled[-1] = encoded[-1]
    assert encoded.hex(" ") == compiled.hex(" ")


@pytest.mark.parametrize("size", [1, 50, 56, 57, 58, 4000, 4085, 4086, 4087, 4090, 70000])
def test_lengths_beside_iasl(size: int, tmp_path: Path) -> None:
    """Name (ABCD, Buffer (size) {0x5A, ...}) in a Scope, across the boundaries of the length's encoding."""
    asl = f"Scope (\\_SB) {{Name (ABCD, Buffer ({size}) {{{', '.join(['0x5A'] * size)}}})}}"
    compiled = acpica.compile_asl(asl, tmp_path, options=("-on",))[acpica.HEADER :]
    ours = aml.Scope("\\_SB", aml.Name("ABCD", aml.Buffer(b"\x5a" * size)))
    assert ours == compiled
