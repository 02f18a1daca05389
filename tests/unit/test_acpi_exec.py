r"""The machine's AML, run by ACPICA's interpreter (acpiexec) on scripted register values.

acpiexec keeps each region in a buffer, and shows each access to one in memory, so the registers are put
in memory here. They do not act on what is written, as the real ones do: each test sets what they read.
A table of the test's own, compiled by iasl, has the methods that set them.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from chv import cpu_hotplug, layout
from chv.acpi import ged, power, tables
from chv.acpi.aml import RegionSpace
from chv.dsdt import machine_tables

from . import acpica
from .acpica import Acpiexec, accesses, notifications

CPUS = 0x10000000
GED = 0x20000000
MAXIMUM = 300
NONE = cpu_hotplug.NONE

TEST_TABLE = f"""
OperationRegion (TCPU, SystemMemory, {CPUS:#x}, {layout.CPU_HOTPLUG_SIZE:#x})
Field (TCPU, DWordAcc, NoLock, Preserve) {{ TSEL, 32, Offset (8), TNXT, 32, TEVT, 32, TOST, 32 }}
Field (TCPU, ByteAcc, NoLock, Preserve) {{ Offset (4), TFLG, 8 }}
OperationRegion (TGED, SystemMemory, {GED:#x}, {layout.GED_SIZE:#x})
Field (TGED, ByteAcc, NoLock, Preserve) {{ TGDA, 8 }}
Method (SETC, 2) {{ TNXT = Arg0 TFLG = Arg1 }}
Method (SETG, 1) {{ TGDA = Arg0 }}
Method (REST) {{ Sleep (300) }}
External (\\_SB.CPUS.CTFY, MethodObj)
Method (TALL, 1) {{ For (Local0 = 0, Local0 < {MAXIMUM}, Local0++) {{ \\_SB.CPUS.CTFY (Local0, Arg0) }} }}
Scope (\\_SB)
{{
    Device (MHPC) {{ Name (_HID, "PNP0A06") Method (MSCN) {{ Notify (MHPC, 0x91) }} }}
    Device (PHPR) {{ Name (_HID, "PNP0A06") Method (PSCN) {{ Notify (PHPR, 0x92) }} }}
}}
"""


@pytest.fixture(scope="module")
def machine_in_memory(tmp_path_factory: pytest.TempPathFactory) -> Acpiexec:
    directory = tmp_path_factory.mktemp("acpiexec")
    space = RegionSpace.SYSTEM_MEMORY
    dsdt = tables.dsdt(
        [
            power.s5_aml(),
            power.button_aml(),
            cpu_hotplug.aml(MAXIMUM, space, CPUS),
            ged.aml(memory=True, pci=True, region_space=space, base=GED),
        ]
    )
    return Acpiexec(directory, dsdt, acpica.compile_asl(TEST_TABLE, directory, signature="SSDT"))


# -- processors ------------------------------------------------------------------------


def test_sta(machine_in_memory: Acpiexec) -> None:
    cases = [(index, flags) for index in (0, 1, 254, 255, 299) for flags in (0, 7, 0xFE)]
    commands = [(f"\\SETC 0 {flags}", f"\\_SB.CPUS.C{index:03X}._STA") for index, flags in cases]
    blocks = machine_in_memory.trace(*(command for pair in commands for command in pair))[1::2]
    for (index, flags), block in zip(cases, blocks, strict=True):
        assert acpica.returned_objects("Evaluating " + block) == [0x0F if flags & 1 else 0]
        assert accesses(block) == [("w", CPUS, 4, index), ("r", CPUS + 4, 1, flags)]


def test_mat_is_the_madt_entry_but_enabled(machine_in_memory: Acpiexec) -> None:
    indices = [0, 1, 15, 253, 254, 255, 256, 299]
    found = machine_in_memory.evaluate(*(f"\\_SB.CPUS.C{index:03X}._MAT" for index in indices))
    assert found == [tables.processor_entry(index, tables.PROCESSOR_ENABLED) for index in indices]


def test_uid_is_the_apic_id(machine_in_memory: Acpiexec) -> None:
    indices = [0, 1, 254, 255, 299]
    assert machine_in_memory.evaluate(*(f"\\_SB.CPUS.C{index:03X}._UID" for index in indices)) == indices


def test_ej0(machine_in_memory: Acpiexec) -> None:
    indices = [1, 254, 255, 299]
    blocks = machine_in_memory.trace(*(f"\\_SB.CPUS.C{index:03X}._EJ0 1" for index in indices))
    for index, block in zip(indices, blocks, strict=True):
        assert accesses(block) == [("w", CPUS, 4, index), ("w", CPUS + 4, 1, cpu_hotplug.EJECT)]


def test_every_processor_but_the_first_can_be_ejected(machine_in_memory: Acpiexec) -> None:
    output = machine_in_memory("find _EJ0", "find _OST", "find _MAT")
    for method, first in (("_EJ0", 1), ("_OST", 0), ("_MAT", 0)):
        found = re.findall(rf"\\_SB\.CPUS\.C([0-9A-F]{{3}})\.{method} +Method", output)
        assert [int(index, 16) for index in found] == list(range(first, MAXIMUM))


def test_ost(machine_in_memory: Acpiexec) -> None:
    cases = [(0, 1, 0), (2, 3, 0x84), (255, 0x103, 1), (299, 3, 0x80)]
    blocks = machine_in_memory.trace(
        *(f"\\_SB.CPUS.C{index:03X}._OST {event} {status} (00)" for index, event, status in cases)
    )
    for (index, event, status), block in zip(cases, blocks, strict=True):
        assert accesses(block) == [
            ("w", CPUS, 4, index),
            ("w", CPUS + 0x0C, 4, event),
            ("w", CPUS + 0x10, 4, status),
        ]


def test_ctfy_tells_the_right_processor_for_every_index(machine_in_memory: Acpiexec) -> None:
    for value in (1, 3):
        block = "".join(machine_in_memory.trace(f"\\TALL {value}", "\\REST"))
        assert sorted(notifications(block)) == [(f"C{index:03X}", value) for index in range(MAXIMUM)]


def test_ctfy_of_a_processor_that_is_none(machine_in_memory: Acpiexec) -> None:
    commands = (f"\\_SB.CPUS.CTFY {index} 1" for index in (MAXIMUM, MAXIMUM + 1, 512, NONE))
    assert notifications("".join(machine_in_memory.trace(*commands, "\\REST"))) == []


# -- the scan ----------------------------------------------------------------------------


def scan(
    acpi: Acpiexec, *cases: tuple[int, int]
) -> tuple[list[list[acpica.MemoryAccess]], list[tuple[str, int]]]:
    """Scan once for each (next processor with news, flags) that the registers say.

    The accesses of each scan, and the notifications of all, sorted: they come on threads of their own.
    """
    commands = [(f"\\SETC {following} {flags}", "\\_SB.CPUS.CSCN") for following, flags in cases]
    blocks = acpi.trace(*(command for pair in commands for command in pair), "\\REST")
    return [accesses(block) for block in blocks[1:-1:2]], sorted(notifications("".join(blocks)))


def test_cscn(machine_in_memory: Acpiexec) -> None:
    cases = [(4, 3, 2), (5, 5, 4), (6, 7, 6), (7, 2, 2), (8, 0xF7, 6), (9, 1, 0), (10, 0, 0)]
    scans, told = scan(machine_in_memory, *((index, flags) for index, flags, _ in cases))
    for (index, flags, acknowledged), done in zip(cases, scans, strict=True):
        assert done == [
            ("w", CPUS, 4, 0),
            ("r", CPUS + 8, 4, index),
            ("w", CPUS, 4, index),
            ("r", CPUS + 4, 1, flags),
            ("w", CPUS + 4, 1, acknowledged),
            ("w", CPUS, 4, index + 1),  # and on, until there is none: the buffer's next is behind now
            ("r", CPUS + 8, 4, index),
        ]
    assert told == [
        ("C004", 1),
        ("C005", 3),
        ("C006", 1),
        ("C006", 3),
        ("C007", 1),
        ("C008", 1),
        ("C008", 3),
    ]


def test_cscn_does_not_select_again_what_is_selected(machine_in_memory: Acpiexec) -> None:
    scans, told = scan(machine_in_memory, (0, 5))
    assert scans[0][:4] == [
        ("w", CPUS, 4, 0),
        ("r", CPUS + 8, 4, 0),
        ("r", CPUS + 4, 1, 5),
        ("w", CPUS + 4, 1, 4),
    ]
    assert told == [("C000", 3)]


def test_cscn_costs_two_exits_when_there_is_no_news(machine_in_memory: Acpiexec) -> None:
    cases = [NONE, MAXIMUM, MAXIMUM + 1, 0x80000000]
    scans, told = scan(machine_in_memory, *((following, 7) for following in cases))
    assert scans == [[("w", CPUS, 4, 0), ("r", CPUS + 8, 4, following)] for following in cases]
    assert told == []


def test_cscn_ends_at_the_last_processor(machine_in_memory: Acpiexec) -> None:
    scans, told = scan(machine_in_memory, (MAXIMUM - 1, 3))
    assert len(scans[0]) == 5
    assert told == [("C12B", 1)]


@pytest.mark.parametrize("fill", [0x00, 0x01, 0x02, 0x06, 0xFF])
def test_cscn_ends_whatever_the_registers_hold(machine_in_memory: Acpiexec, fill: int) -> None:
    output = machine_in_memory(
        "evaluate \\_SB.CPUS.CSCN", "evaluate \\_SB.GED._EVT 5", options=("-fv", str(fill), "-to", "5")
    )
    assert "Evaluating \\_SB.GED._EVT" in output


# -- the event device and the rest -----------------------------------------------------------


def test_evt(machine_in_memory: Acpiexec) -> None:
    """It reads the register once and tells whom each event is about."""
    cases = [
        0,
        1,
        *[2] * 2,
        *[4] * 3,
        *[8] * 4,
        0x0F,
        0xF0,
        0xFF,
    ]  # so that each is told of in another number
    commands = [(f"\\SETG {events}", f"\\_SB.GED._EVT {layout.GED_GSI}") for events in cases]
    blocks = machine_in_memory.trace(
        "\\SETC 5 3", *(command for pair in commands for command in pair), "\\REST"
    )
    for events, block in zip(cases, blocks[2:-1:2], strict=True):
        done = accesses(block)
        assert [access for access in done if access[1] == GED] == [("r", GED, 1, events)]
        assert len(done) == (8 if events & ged.Event.CPU else 1)
    assert Counter(notifications("".join(blocks))) == {
        ("C005", 1): 3,
        ("MHPC", 0x91): 4,
        ("PHPR", 0x92): 5,
        ("PWRB", 0x80): 6,
    }


def test_evt_of_a_machine_without_memory_and_pci_hotplug(tmp_path: Path) -> None:
    space = RegionSpace.SYSTEM_MEMORY
    dsdt = tables.dsdt(
        [power.button_aml(), cpu_hotplug.aml(1, space, CPUS), ged.aml(region_space=space, base=GED)]
    )
    acpi = Acpiexec(tmp_path, dsdt, acpica.compile_asl(TEST_TABLE, tmp_path, signature="SSDT"))
    blocks = acpi.trace(f"\\SETC {NONE} 0", "\\SETG 15", "\\_SB.GED._EVT 5", "\\REST")
    assert notifications("".join(blocks)) == [("PWRB", 0x80)]


def test_s5(machine_in_memory: Acpiexec) -> None:
    value = machine_in_memory.evaluate("\\_S5")[0]
    assert isinstance(value, list)
    assert value[0] << 2 | 1 << 5 == power.SLEEP_VALUE == 0x34


DEVICES = {"MBRD", "RTC_", "COM1", "PWRB", "CPUS", "GED_"}


@pytest.mark.parametrize(
    ("maximum", "serial", "pci"),
    [(1, True, False), (8, True, True), (8, False, False), (254, True, False), (1024, True, False)],
)
def test_the_whole_dsdt_loads(maximum: int, serial: bool, pci: bool, tmp_path: Path) -> None:
    """On a hardware-reduced machine, as ours is, with registers of all ones: every processor is there."""
    dsdt = machine_tables(1, maximum, serial=serial, pci=pci).tables["DSDT"]
    acpi = Acpiexec(tmp_path, dsdt)
    last = f"\\_SB.CPUS.C{maximum - 1:03X}"
    output = acpi(
        "namespace",
        f"evaluate {last}._STA",
        f"evaluate {last}._MAT",
        "evaluate \\_SB.CPUS.CSCN",
        "evaluate \\_SB.GED._EVT 5",
        options=("-r", "-fv", "255"),
    )
    assert acpica.returned_objects(output)[0] == 0x0F
    assert acpica.returned_objects(output)[1] == tables.processor_entry(maximum - 1, 1)
    devices = set(re.findall(r"^ *\d+ +(\w{4}) Device", output, re.MULTILINE))
    expected = DEVICES | {f"C{index:03X}" for index in range(maximum)}
    assert devices - {"_SB_", "_TZ_"} == (expected if serial else expected - {"COM1"})
