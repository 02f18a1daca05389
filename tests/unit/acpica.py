"""Runs ACPICA's iasl and acpiexec (Debian: acpica-tools) for the tests of AML and of the tables."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TypeAlias

import pytest

HEADER = 36

MemoryAccess: TypeAlias = tuple[str, int, int, int]
"""("r" or "w", address, bytes, value)"""


def tool(name: str) -> str:
    """The path of a tool; without it the test is skipped, or fails where everything should be installed."""
    path = shutil.which(name)
    if path is None:
        missing = f"{name} is not installed (Debian: acpica-tools)"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return path


def compile_asl(
    source: str, directory: Path, *, signature: str = "DSDT", options: tuple[str, ...] = ()
) -> bytes:
    """The whole table that iasl makes of the ``source`` of a definition block's inside."""
    asl = directory / "source.asl"
    asl.write_text(f'DefinitionBlock ("", "{signature}", 2, "CHV", "TEST", 1)\n{{\n{source}\n}}\n')
    run = subprocess.run(
        [tool("iasl"), *options, "-p", str(directory / "compiled"), str(asl)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stdout + run.stderr + source
    return (directory / "compiled.aml").read_bytes()


def recompile(table: bytes, directory: Path) -> tuple[bytes, str]:
    """Disassemble a table and compile the result: what comes out, and everything that iasl had to say."""
    original = directory / "original.aml"
    original.write_bytes(table)
    said = ""
    for command in (
        ["-d", str(original)],
        ["-oa", "-p", str(directory / "again"), str(directory / "original.dsl")],
    ):
        run = subprocess.run([tool("iasl"), *command], capture_output=True, text=True, timeout=120)
        said += run.stdout + run.stderr
        assert run.returncode == 0, said
    return (directory / "again.aml").read_bytes(), said


class Acpiexec:
    """Tables to load, and commands for ACPICA's debugger on them."""

    def __init__(self, directory: Path, *tables: bytes) -> None:
        self.files = []
        for number, table in enumerate(tables):
            path = directory / f"table{number}.aml"
            path.write_bytes(table)
            self.files.append(str(path))

    def __call__(self, *commands: str, options: tuple[str, ...] = ()) -> str:
        """What acpiexec printed, which had no error in it. It takes 1023 characters of commands.

        -dt: the tracking of allocations would take most of its time.
        """
        run = subprocess.run(
            [tool("acpiexec"), "-dt", *options, "-b", ";".join(commands), *self.files],
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        output = run.stdout + run.stderr
        assert run.returncode == 0, output
        assert not re.search(r"ACPI (BIOS )?(Error|Warning)|AE_[A-Z_]+|Could not", output), output
        return output

    def trace(self, *commands: str) -> list[str]:
        """What was printed for each of the objects evaluated, accesses to memory included."""
        output = self(*(f"evaluate {command}" for command in commands), options=("-di", "-vr", "-to", "5"))
        blocks = output.split("\nEvaluating ")[1:]
        assert len(blocks) == len(commands), output
        return blocks

    def evaluate(self, *commands: str) -> list[int | bytes | list[int]]:
        """The objects that the commands returned, in order: integers, buffers, packages of integers."""
        return returned_objects(self(*(f"evaluate {command}" for command in commands)))


def returned_objects(output: str) -> list[int | bytes | list[int]]:
    objects: list[int | bytes | list[int]] = []
    for block in re.split(r"Evaluation of \S+ returned object", output)[1:]:
        block = re.split(r"\nEvaluating |\nACPI: No outstanding", block)[0]
        integers = [int(value, 16) for value in re.findall(r"\[Integer\] = ([0-9A-F]+)", block)]
        if "[Package]" in block:
            objects.append(integers)
        elif "[Buffer]" in block:
            lines = re.findall(r"[0-9A-F]{4}: ((?:[0-9A-F]{2} )+)", block)
            objects.append(bytes.fromhex("".join(lines)))
        else:
            objects.append(integers[0])
    return objects


def notifications(output: str) -> list[tuple[str, int]]:
    """(device, value) of each Notify that ran."""
    found = re.findall(r"Received a (?:System|Device) Notify on \[(\w+)\] \S+ Value 0x([0-9A-F]+)", output)
    return [(device, int(value, 16)) for device, value in found]


def accesses(output: str) -> list[MemoryAccess]:
    """Each access to memory that ``-vr`` printed, in order."""
    found = re.findall(
        r"SystemMemory (Read |Write): Val ([0-9A-F]+) Addr ([0-9A-F]+) BitWidth ([0-9A-F]+)", output
    )
    return [
        (kind[0].lower(), int(at, 16), int(bits, 16) // 8, int(value, 16)) for kind, value, at, bits in found
    ]
