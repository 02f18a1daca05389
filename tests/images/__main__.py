"""Build the image and print where it is: ``python -m tests.images [--output DIR]``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.guests.cache import cache
from tests.images.build import build


def main() -> int:
    """The command. Done before: takes a second, changes nothing."""
    parser = argparse.ArgumentParser(prog="python -m tests.images", description=__doc__)
    parser.add_argument("--output", type=Path, default=cache() / "images", metavar="DIR")
    folder: Path = parser.parse_args().output
    try:
        image = build(folder.absolute())
    except (LookupError, OSError, RuntimeError) as error:
        print(f"image: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        log = folder / "build.log"
        lines = log.read_text(errors="replace").splitlines()[-40:] if log.exists() else []
        print(
            "\n".join([*lines, f"image: {error.cmd[0]} failed with status {error.returncode} ({log})"]),
            file=sys.stderr,
        )
        return 1
    print(f"image: {image.path} (ssh key {image.key}, {image.user}@{image.address})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
