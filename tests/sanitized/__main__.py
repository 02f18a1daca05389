"""``python -m tests.sanitized KIND -- MODULE ARGUMENT...``: a Python module with an instrumented build."""

from __future__ import annotations

import argparse
import subprocess
import sys

from tests.sanitized.build import FLAGS, build, environment


def main() -> int:
    """The module's exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.sanitized", description=__doc__)
    parser.add_argument("kind", choices=sorted(FLAGS))
    parser.add_argument("command", nargs="+", metavar="MODULE", help="a module and its arguments")
    options = parser.parse_args()
    try:
        folder = build(options.kind)
    except subprocess.CalledProcessError as error:
        print(error.stdout.decode(errors="replace")[-5000:], file=sys.stderr)
        return 1
    command = [sys.executable, "-m", *options.command]
    return subprocess.run(command, cwd=folder, env=environment(options.kind, folder), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
