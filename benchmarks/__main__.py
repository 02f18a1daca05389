"""Run benchmarks one after the other and keep their results: ``python -m benchmarks [NAME...]``.

Results go to ``--output`` (JSON), pictures of them beside them. A benchmark that fails is named at the
end and does not keep the others from running.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ALL = ("exits", "dispatch", "pci", "contention", "startup", "boot", "resize", "io")


def main(arguments: list[str] | None = None) -> int:
    """The number of benchmarks that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(ALL)}")
    parser.add_argument("--output", type=Path, default=Path(".work/bench"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="a look, not a result")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in ALL:
            parser.error(f"there is no benchmark {name!r}, only {', '.join(ALL)}")
    failed = [name for name in options.names or ALL if not run(name, options.output, options.quick)]
    results = sorted(str(path) for path in options.output.glob("*.json"))
    if results:
        plots = [sys.executable, "-m", "benchmarks.plots", *results, "--output", str(options.output)]
        if subprocess.run(plots, check=False).returncode:
            failed.append("plots")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def run(name: str, output: Path, quick: bool) -> bool:
    """One benchmark in a process of its own; whether it succeeded."""
    print(f"\n===== {name} =====", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(output / f"{name}.json")]
    return subprocess.run([*command, *(["--quick"] if quick else [])], check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
