"""The ACPI tables: their bytes by the specification, and what ACPICA's compiler makes of them.

What fwts says of them is in test_acpi_fwts.py. As not every machine has fwts, what its FADT test looks at
(reserved fields, fields that mean nothing on a hardware-reduced machine, pointers, register widths) is
tested here too; so is what it does not see in a dump: the RSDP's checksums and where pointers lead.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chv import dsdt, layout
from chv.acpi import tables
from chv.acpi.__main__ import main
from chv.acpi.tables import AcpiTables
from chv.dsdt import machine_tables
from chv.errors import ConfigError

from . import acpica

MATRIX = [
    pytest.param(1, 1, True, False, id="1-1"),
    pytest.param(4, 8, True, False, id="4-8"),
    pytest.param(4, 8, False, False, id="4-8-no-serial"),
    pytest.param(4, 8, True, True, id="4-8-pci"),
    pytest.param(254, 254, True, False, id="254-254"),
    pytest.param(256, 256, True, False, id="256-256"),
    pytest.param(1, 300, True, False, id="1-300"),
]
matrix = pytest.mark.parametrize(("present", "maximum", "serial", "pci"), MATRIX)


class Memory:
    """Guest memory from address 0 to ``layout.SMBIOS``."""

    def __init__(self) -> None:
        self.data = bytearray(layout.SMBIOS)

    def write(self, address: int, data: bytes) -> None:
        self.data[address : address + len(data)] = data


def walk(memory: bytearray, rsdp: int) -> dict[str, bytes]:
    """The tables as an operating system finds them."""
    root = memory[rsdp : rsdp + 36]
    assert root[:8] == b"RSD PTR "
    assert root[15] == 2
    assert sum(root[:20]) & 0xFF == 0
    assert sum(root) & 0xFF == 0
    length, xsdt = struct.unpack_from("<IQ", root, 20)
    assert length == 36
    found: dict[str, bytes] = {}

    def take(address: int) -> bytes:
        signature, size = struct.unpack_from("<4sI", memory, address)
        table = bytes(memory[address : address + size])
        assert sum(table) & 0xFF == 0
        found[signature.decode()] = table
        return table

    for (address,) in struct.iter_unpack("<Q", take(xsdt)[36:]):
        take(address)
    assert struct.unpack_from("<I", found["FACP"], 40) == (0,)
    take(*struct.unpack_from("<Q", found["FACP"], 140))
    return found


@matrix
def test_the_guest_finds_every_table(present: int, maximum: int, serial: bool, pci: bool) -> None:
    built = machine_tables(present, maximum, serial=serial, pci=pci)
    assert built.rsdp == layout.RSDP
    memory = Memory()
    built.write(memory)
    found = walk(memory.data, built.rsdp)
    assert found == {name: table for name, table in built.tables.items() if name != "RSDP"}
    assert set(found) == {"XSDT", "DSDT", "FACP", "APIC"} | ({"MCFG"} if pci else set())


@matrix
def test_places(present: int, maximum: int, serial: bool, pci: bool) -> None:
    built = machine_tables(present, maximum, serial=serial, pci=pci)
    spans = sorted((built.addresses[name], len(table)) for name, table in built.tables.items())
    end = layout.RSDP
    for address, size in spans:
        assert address % 16 == 0
        assert end <= address < end + 16
        end = address + size
    assert spans[0][0] == layout.RSDP
    assert end == built.end <= layout.ACPI_END


def test_headers() -> None:
    built = machine_tables(4, 8, pci=True)
    for name, revision in (("XSDT", 1), ("DSDT", 2), ("FACP", 6), ("APIC", 5), ("MCFG", 1)):
        table = built.tables[name]
        assert table[:4].decode() == name
        assert struct.unpack_from("<I", table, 4) == (len(table),)
        assert table[8] == revision
        assert table[10:24] == b"CHV   CHVTABLE"


def test_too_many_for_the_room() -> None:
    with pytest.raises(ConfigError, match=r"cpus\.max_vcpus: .* 4096 vCPUs take \d+ bytes.* room for 327680"):
        machine_tables(1, 4096)
    assert machine_tables(1, 1024).tables["DSDT"]  # and many more than KVM runs do fit


def test_the_last_byte_counts() -> None:
    bodies = dsdt.bodies(1)
    end = tables.build(1, 1, bodies).end
    assert tables.build(1, 1, bodies, end=end).end == end
    with pytest.raises(ConfigError, match="ACPI tables"):
        tables.build(1, 1, bodies, end=end - 1)


@pytest.mark.parametrize(("present", "maximum"), [(0, 1), (-1, 1), (2, 1), (9, 8)])
def test_counts_that_cannot_be(present: int, maximum: int) -> None:
    with pytest.raises(ConfigError, match=rf"cpus\.boot_vcpus: {present} is not in 1\.\.{maximum}"):
        machine_tables(present, maximum)


# -- FADT --------------------------------------------------------------------------


def fadt(*, serial: bool = True) -> bytes:
    return machine_tables(1, 1, serial=serial).tables["FACP"]


def gas(table: bytes, offset: int) -> tuple[int, ...]:
    """(space, bits, bit offset, access size, address)."""
    return struct.unpack_from("<BBBBQ", table, offset)


def test_fadt() -> None:
    table = fadt()
    assert len(table) == 276
    assert table[131] == 3  # 6.3
    flags = struct.unpack_from("<I", table, 112)[0]
    assert flags == 1 << 20 | 1 << 10 | 1 << 8
    assert gas(table, 116) == (1, 8, 0, 1, 0x600)
    assert table[128] == 1
    assert gas(table, 208) == (1, 32, 0, 3, 0x608)
    assert gas(table, 244) == (1, 8, 0, 1, 0x600)
    assert gas(table, 256) == (1, 8, 0, 1, 0x600)


@pytest.mark.parametrize(("serial", "arch"), [(True, 0x05), (False, 0x04)])
def test_fadt_boot_architecture(serial: bool, arch: int) -> None:
    """No VGA, no 8042 (bit 1), but a CMOS clock (bit 5 would deny it)."""
    assert struct.unpack_from("<H", fadt(serial=serial), 109) == (arch,)


def test_fadt_has_zeros_elsewhere() -> None:
    table = bytearray(fadt())
    for offset, size in (
        (0, 36),
        (109, 2),
        (112, 4),
        (116, 13),  # RESET_REG, RESET_VALUE
        (131, 1),
        (140, 8),  # X_DSDT
        (208, 12),  # X_PM_TMR_BLK
        (244, 32),
    ):
        table[offset : offset + size] = bytes(size)
    assert not any(table)


# -- MADT and MCFG -------------------------------------------------------------------


def madt_entries(table: bytes) -> list[tuple[int, bytes]]:
    entries = []
    place = 44
    while place < len(table):
        kind, size = table[place], table[place + 1]
        assert size >= 2
        entries.append((kind, table[place : place + size]))
        place += size
    assert place == len(table)
    return entries


LENGTHS = {0: 8, 1: 12, 2: 10, 4: 6, 9: 16, 10: 12}  # ACPI 6.5, 5.2.12.2 and on


@given(st.integers(1, 400).flatmap(lambda maximum: st.tuples(st.integers(1, maximum), st.just(maximum))))
def test_madt(counts: tuple[int, int]) -> None:
    present, maximum = counts
    table = tables.madt(present, maximum)
    assert struct.unpack_from("<II", table, 36) == (0xFEE00000, 0)
    processors = []
    rest = []
    for kind, entry in madt_entries(table):
        assert len(entry) == LENGTHS[kind]
        if kind == 0:
            processors.append(struct.unpack_from("<BBI", entry, 2))
            assert processors[-1][1] < 255
        elif kind == 9:
            apic, flags, uid = struct.unpack_from("<III", entry, 4)
            assert entry[2:4] == b"\0\0"
            assert apic >= 255
            processors.append((uid, apic, flags))
        else:
            rest.append(entry)
    assert processors == [(n, n, 1 if n < present else 2) for n in range(maximum)]
    expected = [
        struct.pack("<BBBBII", 1, 12, 0, 0, 0xFEC00000, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 4, 4, 5),
        struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1),
    ]
    if maximum > 255:
        expected.append(struct.pack("<BBHIB3x", 10, 12, 0, 0xFFFFFFFF, 1))
    assert rest == expected


def test_mcfg() -> None:
    table = machine_tables(1, 1, pci=True).tables["MCFG"]
    assert len(table) == 60
    assert struct.unpack_from("<QHBBI", table, 44) == (0xE8000000, 0, 0, 0, 0)


# -- beside iasl -----------------------------------------------------------------------


def comparable(table: bytes) -> bytes:
    """A table without what iasl makes anew (checksum, creator) or cannot keep.

    iasl 20200925 does not know the online-capable flag of x2APIC entries, though that of local APIC entries.
    """
    data = bytearray(table[:9] + b"\0" + table[10:28] + bytes(8) + table[36:])
    if table[:4] == b"APIC":
        place = 44
        for kind, entry in madt_entries(table):
            if kind == 9:
                data[place + 8] &= tables.PROCESSOR_ENABLED
            place += len(entry)
    return bytes(data)


@matrix
def test_iasl_reads_and_rebuilds_every_table(
    present: int, maximum: int, serial: bool, pci: bool, tmp_path: Path
) -> None:
    """Disassembled and compiled again, each table is what it was, and iasl has nothing to remark on."""
    built = machine_tables(present, maximum, serial=serial, pci=pci)
    for name, table in built.tables.items():
        if name == "RSDP":
            continue  # it has no header, so iasl takes it for no table: see test_iasl_builds_our_rsdp
        again, said = acpica.recompile(table, tmp_path)
        assert "0 Errors, 0 Warnings, 0 Remarks" in said
        assert "Error" not in said.replace("0 Errors", "")
        assert "Warning" not in said.replace("0 Warnings", "")
        ours, theirs = comparable(table), comparable(again)
        if name == "DSDT":
            assert len(ours) == len(theirs)
            different = [n for n in range(len(ours)) if ours[n] != theirs[n]]
            # iasl leaves 0 for the checksum of a resource template's end tag.
            assert all(ours[n - 1] == 0x79 and theirs[n] == 0 for n in different)
            assert len(different) == ours.count(b"_CRS")
        else:
            assert ours == theirs


def test_iasl_builds_our_rsdp(tmp_path: Path) -> None:
    built = machine_tables(4, 8)
    (tmp_path / "rsdp.asl").write_text(
        '[0008] Signature : "RSD PTR "\n'
        "[0001] Checksum : 00\n"
        '[0006] Oem ID : "CHV   "\n'
        "[0001] Revision : 02\n"
        "[0004] RSDT Address : 00000000\n"
        "[0004] Length : 00000024\n"
        f"[0008] XSDT Address : {built.addresses['XSDT']:016X}\n"
        "[0001] Extended Checksum : 00\n"
        "[0003] Reserved : 000000\n"
    )
    run = subprocess.run(
        [acpica.tool("iasl"), "-p", str(tmp_path / "rsdp"), str(tmp_path / "rsdp.asl")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "rsdp.aml").read_bytes() == built.tables["RSDP"]


# -- python -m chv.acpi ------------------------------------------------------------------


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def expected_files(built: AcpiTables) -> dict[str, bytes]:
    return {f"{name.lower()}.aml": table for name, table in built.tables.items()}


def test_the_command_writes_the_tables(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "chv.acpi", "--cpus", "boot=4,max=8", str(tmp_path / "a" / "b")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    assert files(tmp_path / "a" / "b") == expected_files(machine_tables(4, 8))
    assert f"{tmp_path / 'a' / 'b' / 'rsdp.aml'}: 36 bytes, at 0xa0000" in run.stdout


@pytest.mark.parametrize(
    ("options", "counts", "serial"),
    [
        ([], (1, 1), True),
        (["--cpus", "boot=3"], (3, 3), True),
        (["--cpus", "boot=1,max=300", "--serial", "off"], (1, 300), False),
    ],
)
def test_the_commands_options(
    options: list[str], counts: tuple[int, int], serial: bool, tmp_path: Path
) -> None:
    assert main([*options, str(tmp_path)]) == 0
    assert files(tmp_path) == expected_files(machine_tables(*counts, serial=serial))


@pytest.mark.parametrize(
    "text", ["4", "boot=", "boot=x", "max=4", "boot=1,max=", "boot=-1", "boot=1,max=2,x=3"]
)
def test_cpus_that_cannot_be_read(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--cpus", text, str(tmp_path)])
    assert caught.value.code == 2
    assert "boot=N,max=M" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("boot=0", "cpus.max_vcpus: 0 is not in 1..4096"),
        ("boot=0,max=1", "cpus.boot_vcpus: 0 is not in 1..1"),
        ("boot=1,max=99999", "cpus.max_vcpus: 99999 is not in 1..4096"),
        ("boot=2,max=1", "2 is not in 1..1"),
        ("boot=1,max=4096", "cpus.max_vcpus"),
    ],
)
def test_cpus_that_cannot_be(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--cpus", text, str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
