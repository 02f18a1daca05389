"""The guests: Debian's kernels, with an initramfs that does nothing but say that it runs."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tests.guests.cache import cache, digest, write_whole
from tests.guests.cpio import Archive

INIT = Path(__file__).with_name("init.c")
HEADER = Path(__file__).with_name("mark.h")
CPUS_INIT = Path(__file__).with_name("cpus.c")
MARK_PORT = 0xE9
"""Where init.c writes: Bochs' debug console."""

BEGIN = b"\x02"
"""What init.c writes first. What comes before is from a kernel with something to say on its serial port."""

END = b"\x04"
"""What init.c writes last."""


def compiled(source: Path) -> bytes:
    """A C program, linked statically. subprocess.CalledProcessError if the compiler refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program"
        subprocess.run(["gcc", "-O2", "-Wall", "-static", "-s", "-o", program, source], check=True)
        return program.read_bytes()


def initramfs(init: Path = INIT) -> Path:
    """An initramfs with a C program alone, built unless it is there.

    It lies beside the kernels; where that cannot be written (in the testbed) it must have been built before.
    """
    path = cache() / "guests" / f"initramfs-bench-{digest([init.read_bytes(), HEADER.read_bytes()])}.cpio"
    if not path.exists():
        archive = Archive()
        archive.folder("sys")
        archive.device("dev/console", 5, 1)
        archive.device("dev/ttyS0", 4, 64)
        archive.file("init", compiled(init), 0o755)
        write_whole(path, archive.data())
    return path
