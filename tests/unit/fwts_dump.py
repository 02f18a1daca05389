"""chv's ACPI tables for fwts, the Firmware Test Suite: as a dump that it can read, and what it says of them.

``python -m tests.unit.fwts_dump --cpus boot=4,max=8`` runs it and prints the findings; see ``docs/acpi.md``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from unittest import mock

from chv import cpu_hotplug
from chv.acpi.__main__ import cpus
from chv.acpi.aml import Arg0, If, LLess, Method, Return
from chv.acpi.tables import AcpiTables
from chv.dsdt import machine_tables

ALL: Final = ("--acpitests", "--acpicompliance", "apicedge", "osilinux", "syntaxcheck", "uniqueid")
NOT_ABOUT_THE_TABLES: Final = {
    "acpiinfo": "says what there is, judges nothing",
    "cstates": "looks at the processors of the machine that fwts runs on",
    "dmar": "looks at the kernel's log of the machine that fwts runs on",
    "facs": "looks at a FACS that fwts made up: a hardware-reduced machine needs none",
    "hpet": "looks at the kernel's log of the machine that fwts runs on",
    "mcfg": "compares with the memory map of the machine that fwts runs on",
    "pcc": "is about a driver of the machine that fwts runs on",
    "rsdt": "looks at an RSDT that fwts made up: this machine has an XSDT",
}
# It asks for access to I/O ports before it looks; what it would read there, a hardware-reduced machine lacks.
NEEDS_ROOT: Final = "fadt"

# The log line of a finding: what, how bad, fwts's name for it, and in words.
_FINDING = re.compile(
    r"^(FAILED|WARNING|ADVICE|ABORTED)(?: \[(\w+)\] (\w+))?: (?:Test \d+, )?(.*)$", re.MULTILINE
)
_SECTION = re.compile(r"^(\w+): .*\n-{40,}$", re.MULTILINE)
_COUNTS = re.compile(
    r"^(\d+) passed, (\d+) failed, (\d+) warnings?, (\d+) aborted, (\d+) skipped, (\d+) info only\.$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """``label`` is fwts's own name of a failure; warnings and advice have none."""

    test: str
    kind: str
    label: str
    text: str


@dataclass(frozen=True, slots=True)
class Result:
    counts: dict[str, int]
    findings: list[Finding]
    log: str


# -- the dump ----------------------------------------------------------------------------


def dump(built: AcpiTables) -> str:
    """The tables in the text form of ``acpidump``: 16 bytes a line, a blank line behind each table."""
    lines: list[str] = []
    for name, table in built.tables.items():
        lines.append(f"{name} @ 0x{built.addresses[name]:016X}")
        for offset in range(0, len(table), 16):
            row = table[offset : offset + 16]
            text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
            lines.append(f"  {offset:04X}: {row.hex(' ').upper():<47}  {text}")
        lines.append("")
    return "\n".join(lines) + "\n"


def answered_tables(present: int, maximum: int, *, serial: bool = True) -> AcpiTables:
    """The machine's tables, but _STA does not ask the registers: it knows what they would say at power-on.

    fwts has no registers. It reads 0 from every one, so that to it no processor of the real tables is there.
    """
    known = Method("CSTA", 1, False, If(LLess(Arg0, present), Return(0x0F)), Return(0))
    with mock.patch.object(cpu_hotplug, "_status_method", return_value=known):
        return machine_tables(present, maximum, serial=serial)


# -- running fwts ------------------------------------------------------------------------


def find() -> str | None:
    """fwts in PATH, or where ``tools/fwts.sh`` puts it."""
    cache = Path(os.environ.get("CHV_CACHE") or Path(__file__).parents[2] / ".cache")
    return shutil.which("fwts") or shutil.which(str(cache / "fwts" / "fwts"))


def skipped_tests() -> list[str]:
    return [*NOT_ABOUT_THE_TABLES, *([] if os.geteuid() == 0 else [NEEDS_ROOT])]


def command(fwts: str, dump_file: Path, log: Path, tests: Sequence[str]) -> list[str]:
    return [
        fwts,
        "--quiet",
        "--force-clean",
        "--log-width=1000",
        f"--dumpfile={dump_file}",
        f"--results-output={log}",
        f"--skip-test={','.join(skipped_tests())}",
        *tests,
    ]


def run(fwts: str, built: AcpiTables, directory: Path, tests: Sequence[str] = ALL) -> Result:
    """Run fwts's ``tests`` on the tables; raises :class:`RuntimeError` if fwts did not get to its end."""
    dump_file, log = directory / "acpi.dump", directory / "fwts.log"
    dump_file.write_text(dump(built))
    log.unlink(missing_ok=True)
    done = subprocess.run(
        command(fwts, dump_file, log, tests), cwd=directory, capture_output=True, text=True, timeout=300
    )
    text = log.read_text(errors="replace") if log.exists() else ""
    if "Test Failure Summary" not in text:
        said = f"{done.stdout}{done.stderr}{text}"
        raise RuntimeError(f"fwts ended with {done.returncode} and no summary\n{said}")
    return parse(text)


def parse(log: str) -> Result:
    """What a log of fwts's, with unwrapped lines, says."""
    body = log.partition("Test Failure Summary")[0]
    totals = _COUNTS.findall(body)[-1]
    names = ("passed", "failed", "warnings", "aborted", "skipped", "information")
    sections = [(match.start(), match[1]) for match in _SECTION.finditer(body)]
    findings = []
    for match in _FINDING.finditer(body):
        test = [name for start, name in sections if start < match.start()][-1]
        findings.append(Finding(test, match[1], match[3] or "", match[4].strip()))
    return Result(dict(zip(names, map(int, totals), strict=True)), findings, log)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run fwts on the ACPI tables of a machine.")
    parser.add_argument("--cpus", type=cpus, default=(4, 8), metavar="boot=N,max=M")
    parser.add_argument("--serial", choices=("on", "off"), default="on", help="whether there is a COM1")
    parser.add_argument("--answered", action="store_true", help="as if the CPU registers answered fwts")
    parser.add_argument("--log", type=Path, help="keep fwts's log in this file")
    options = parser.parse_args(arguments)
    fwts = find()
    if fwts is None:
        print("no fwts: see tools/fwts.sh", file=sys.stderr)
        return 1
    build = answered_tables if options.answered else machine_tables
    with tempfile.TemporaryDirectory() as directory:
        result = run(fwts, build(*options.cpus, serial=options.serial == "on"), Path(directory))
    if options.log:
        options.log.write_text(result.log)
    if os.geteuid() != 0:
        print(f"not run, as it asks for root: {NEEDS_ROOT}")
    for finding in result.findings:
        print(f"{finding.test}: {finding.kind} {finding.label}: {finding.text}".replace(" :", ":"))
    print(", ".join(f"{count} {name}" for name, count in result.counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
