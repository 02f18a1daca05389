"""The image's initrd: busybox, the modules that a disk needs, and the program that finds the root."""

from __future__ import annotations

import gzip
from pathlib import Path

from tests.guests.cpio import Archive
from tests.guests.initramfs import add_busybox, add_modules
from tests.guests.kernels import Kernel

MODULES = ("virtio_pci", "virtio_blk", "virtio_console")
"""ext4 is built into both kernels; the console, so that hvc0 is there when systemd looks for terminals."""

INIT = Path(__file__).with_name("initrd")


def initrd(kernel: Kernel) -> bytes:
    """The initrd for a kernel; the same content gives the same bytes."""
    archive = Archive()
    for folder in ("dev", "proc", "sys", "root"):
        archive.folder(folder)
    # The kernel opens /dev/console before /init can mount a devtmpfs there.
    archive.device("dev/console", 5, 1)
    archive.file("init", INIT.read_bytes(), 0o755)
    add_busybox(archive)
    add_modules(archive, kernel, MODULES)
    return gzip.compress(archive.data(), mtime=0)
