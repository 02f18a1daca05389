"""What fwts says of the tables, against what docs/acpi.md explains.

fwts is not in Debian 12 or 13, so where it is missing these tests are skipped, with CI=true too.
``tools/fwts.sh --fetch`` gets it.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from chv.acpi.tables import DSDT, FADT, MADT, AcpiTables, checksum
from chv.dsdt import machine_tables

from . import acpica, fwts_dump
from .fwts_dump import Finding, Result

CONFIGS = [
    pytest.param(1, 1, True, id="1-1"),
    pytest.param(4, 8, True, id="4-8"),
    pytest.param(4, 8, False, id="4-8-no-serial"),
    pytest.param(254, 254, True, id="254-254"),
    pytest.param(1, 300, True, id="1-300"),
]
configs = pytest.mark.parametrize(("present", "maximum", "serial"), CONFIGS)

# The reasons are in docs/acpi.md. Test, kind, and the failure's label or the beginning of the text.
EXPLAINED = {
    ("fadt", "FAILED", "FADTRHWNonZero"),
    ("fadt", "FAILED", "FADTRHWFlagsNonZero"),
    ("fadt", "WARNING", "FADT revision is outdated: 6.3"),
    ("fadt", "ADVICE", "The most recent revision of the FADT defined in the ACPI specification is "),
}
UNANSWERED = re.compile(r"MADT(LAPIC|LX2APIC|LAPICNMI)UidMismatch")


@pytest.fixture(scope="module")
def fwts() -> str:
    path = fwts_dump.find()
    if path is None:
        pytest.skip("no fwts: it is not in Debian 12 or 13; tools/fwts.sh --fetch gets it")
    return path


def is_explained(finding: Finding) -> bool:
    said = finding.label or finding.text
    return any(
        (finding.test, finding.kind) == (test, kind) and said.startswith(start)
        for test, kind, start in EXPLAINED
    )


def unexplained(result: Result) -> list[Finding]:
    return [finding for finding in result.findings if not is_explained(finding)]


def with_table(built: AcpiTables, name: str, table: bytearray, *, repair: bool = True) -> AcpiTables:
    """The tables with another one in place of ``name``, its checksum put right if ``repair``."""
    if repair:
        table[9] = 0
        table[9] = checksum(table)
    return AcpiTables({**built.tables, name: bytes(table)}, built.addresses)


@configs
def test_fwts_finds_nothing_new(fwts: str, present: int, maximum: int, serial: bool, tmp_path: Path) -> None:
    """To it no processor of the real tables is there; it says so of each enabled entry and of the NMI's."""
    result = fwts_dump.run(fwts, machine_tables(present, maximum, serial=serial), tmp_path)
    unanswered = [finding for finding in result.findings if UNANSWERED.fullmatch(finding.label)]
    assert len(unanswered) == present + 1
    assert [finding for finding in unexplained(result) if finding not in unanswered] == []
    assert result.counts["aborted"] == 0
    assert result.counts["passed"] > 50 + 6 * maximum


@configs
def test_every_processor_is_found_if_the_registers_answer(
    fwts: str, present: int, maximum: int, serial: bool, tmp_path: Path
) -> None:
    built = fwts_dump.answered_tables(present, maximum, serial=serial)
    result = fwts_dump.run(fwts, built, tmp_path, ["madt"])
    assert unexplained(result) == []
    assert len(re.findall(r"PASSED: .* has matching processor UID \d+\.", result.log)) == present


def test_the_pm_timer_is_all_that_the_fadt_is_blamed_for(fwts: str, tmp_path: Path) -> None:
    if fwts_dump.NEEDS_ROOT in fwts_dump.skipped_tests():
        pytest.skip("fwts looks at the FADT only as root")
    built = machine_tables(4, 8)
    result = fwts_dump.run(fwts, built, tmp_path, ["fadt"])
    assert re.findall(r"^(\w+) is (?:a )?non-zero", result.log, re.MULTILINE) == ["X_PM_TMR_BLK"]
    facp = bytearray(built.tables[FADT])
    facp[208:220] = bytes(12)  # X_PM_TMR_BLK
    facp[113] &= ~1  # bit 8 of the flags, TMR_VAL_EXT
    without = fwts_dump.run(fwts, with_table(built, FADT, facp), tmp_path, ["fadt"])
    assert [finding.label for finding in without.findings if finding.kind == "FAILED"] == []


# -- that the above can fail -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "offset", "value", "repair", "label"),
    [
        pytest.param(MADT, 9, 0, False, "SPECMADTChecksum", id="checksum"),
        pytest.param(MADT, 40, 0xFF, True, "MADTFlagsNonZero", id="madt-reserved-flags"),
        pytest.param(MADT, 46, 99, True, "MADTLAPICUidMismatch", id="madt-uid"),
    ],
)
def test_a_fault_is_a_new_finding(
    fwts: str, name: str, offset: int, value: int, repair: bool, label: str, tmp_path: Path
) -> None:
    built = fwts_dump.answered_tables(4, 8)
    table = bytearray(built.tables[name])
    table[offset] = value
    result = fwts_dump.run(fwts, with_table(built, name, table, repair=repair), tmp_path, ["madt"])
    assert [finding.label for finding in unexplained(result)] == [label]


def test_no_end_is_an_error(fwts: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no summary"):
        fwts_dump.run(fwts, machine_tables(1, 1), tmp_path, ["no-such-test"])


# -- the dump and the log, without fwts --------------------------------------------------


@configs
def test_acpixtract_reads_the_dump(present: int, maximum: int, serial: bool, tmp_path: Path) -> None:
    built = machine_tables(present, maximum, serial=serial)
    (tmp_path / "acpi.dump").write_text(fwts_dump.dump(built))
    subprocess.run(
        [acpica.tool("acpixtract"), "-a", "acpi.dump"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=60,
    )
    found = {path.stem.upper(): path.read_bytes() for path in tmp_path.glob("*.dat")}
    assert found == built.tables


def test_a_line_of_the_dump() -> None:
    lines = fwts_dump.dump(AcpiTables({DSDT: bytes(range(0x30, 0x42))}, {DSDT: 0xA0030})).splitlines()
    assert lines == [
        "DSDT @ 0x00000000000A0030",
        "  0000: 30 31 32 33 34 35 36 37 38 39 3A 3B 3C 3D 3E 3F  0123456789:;<=>?",
        "  0010: 40 41                                            @A",
        "",
    ]


def test_a_log_is_understood() -> None:
    line = "-" * 80
    log = f"""Results generated by fwts.

madt: MADT test.
{line}
Test 1 of 1: MADT checksum test.
PASSED: Test 1, fine
FAILED [HIGH] SomeLabel: Test 1, It is wrong: badly
1 passed, 1 failed, 0 warning, 0 aborted, 0 skipped, 0 info only.

fadt: FADT test.
{line}
WARNING: Test 3, FADT revision is outdated: 6.3
ADVICE: Get a new one.
0 passed, 0 failed, 1 warning, 0 aborted, 2 skipped, 3 info only.

1 passed, 1 failed, 1 warning, 0 aborted, 2 skipped, 3 info only.

Test Failure Summary
"""
    result = fwts_dump.parse(log)
    assert result.findings == [
        Finding("madt", "FAILED", "SomeLabel", "It is wrong: badly"),
        Finding("fadt", "WARNING", "", "FADT revision is outdated: 6.3"),
        Finding("fadt", "ADVICE", "", "Get a new one."),
    ]
    assert result.counts == {
        "passed": 1,
        "failed": 1,
        "warnings": 1,
        "aborted": 0,
        "skipped": 2,
        "information": 3,
    }


def test_fwts_is_looked_for_in_path_and_then_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = [tmp_path / "bin" / "fwts", tmp_path / "cache" / "fwts" / "fwts"]
    monkeypatch.setenv("PATH", str(programs[0].parent))
    monkeypatch.setenv("CHV_CACHE", str(tmp_path / "cache"))
    assert fwts_dump.find() is None
    for program in reversed(programs):
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        assert fwts_dump.find() == str(program)
