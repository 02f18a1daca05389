"""Where a benchmark with Linux guests runs: right here, or in the testbed if /dev/kvm cannot run Linux."""

from __future__ import annotations

import compileall
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.testbed import needed

ROOT = Path(__file__).resolve().parents[2]
MODULES = "tun"


def enter(module: str, arguments: Sequence[str], json: Path | None) -> int | None:
    """Run ``python -m MODULE ARGUMENTS`` in the testbed, if Linux guests need it here; its exit status.

    None if they do not: the caller goes on itself. What ``--json`` asks for comes out of the testbed
    through a folder of its own and is then put where it was asked for.
    """
    if not needed():
        return None
    compile_ahead()
    with tempfile.TemporaryDirectory(prefix="chv-bench-") as folder:
        inside = Path(folder) / "result.json"
        command = [sys.executable, "-m", "tests.testbed", "--results", folder, "--modules", MODULES, "--"]
        command += [sys.executable, "-u", "-m", module, *without_json(arguments), "--json", str(inside)]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if json is not None and inside.exists():
            json.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(inside, json)
    return status


def compile_ahead() -> None:
    """Write the bytecode of all modules, as an installation does.

    In the testbed it would be lost; with PYTHONDONTWRITEBYTECODE set, every process would compile again.
    """
    for package in ("chv", "tests", "benchmarks"):
        compileall.compile_dir(ROOT / package, quiet=2)


def without_json(arguments: Sequence[str]) -> list[str]:
    """The arguments without ``--json FILE`` in any spelling."""
    kept = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--json":
            skip = True
        elif not argument.startswith("--json="):
            kept.append(argument)
    return kept
