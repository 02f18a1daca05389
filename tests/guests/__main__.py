"""Fetch the guest kernels and build what the tests boot: ``python -m tests.guests``."""

from __future__ import annotations

import subprocess
import sys

from tests.guests.cache import cache, link
from tests.guests.initramfs import initramfs
from tests.guests.kernels import SERIES, fetch


def main() -> int:
    """Make ``.cache/guests/SERIES/`` with bzImage, vmlinux and initramfs for each series."""
    missing = []
    for series in SERIES:
        try:
            kernel = fetch(series)
        except (LookupError, subprocess.CalledProcessError) as error:
            missing.append(f"{series}: {error}")
            continue
        folder = cache() / "guests" / series
        folder.mkdir(parents=True, exist_ok=True)
        link(folder / "bzImage", kernel.bzimage)
        link(folder / "vmlinux", kernel.vmlinux)
        link(folder / "initramfs", initramfs(kernel))
        print(f"guest kernel {kernel.release}: {folder}")
    for problem in missing:
        print(f"no guest kernel {problem}", file=sys.stderr)
    # Without the first series there is no testbed either; without the others fewer guests are tested.
    return 1 if SERIES[0] in "".join(missing).split(":")[0:1] or len(missing) == len(SERIES) else 0


if __name__ == "__main__":
    sys.exit(main())
