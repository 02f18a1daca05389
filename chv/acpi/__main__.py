"""``python -m chv.acpi --cpus boot=4,max=8 DIR``: write a machine's ACPI tables, one .aml file each."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ..dsdt import machine_tables
from ..errors import ConfigError


def cpus(text: str) -> tuple[int, int]:
    """``boot=N[,max=M]`` as (boot, max)."""
    match = re.fullmatch(r"boot=(\d+)(?:,max=(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form boot=N or boot=N,max=M")
    boot = int(match[1])
    return boot, int(match[2] or boot)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m chv.acpi", description="Write a machine's ACPI tables.")
    parser.add_argument("--cpus", type=cpus, default=(1, 1), metavar="boot=N,max=M")
    parser.add_argument("--serial", choices=("on", "off"), default="on", help="whether there is a COM1")
    parser.add_argument("directory", type=Path, metavar="DIR", help="made if it does not exist")
    options = parser.parse_args(arguments)
    try:
        built = machine_tables(*options.cpus, serial=options.serial == "on")
        options.directory.mkdir(parents=True, exist_ok=True)
        for name, table in built.tables.items():
            path = options.directory / f"{name.lower()}.aml"
            path.write_bytes(table)
            print(f"{path}: {len(table)} bytes, at {built.addresses[name]:#x}")
    except (ConfigError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
