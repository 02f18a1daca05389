"""From files to a disk image: partition table, EFI system partition, root. No loop device, no mounts.

Every tool writes into the one sparse file, at its partition's offset.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.images import layout


def make_table(image: Path) -> None:
    """A sparse file with an empty GPT."""
    with image.open("wb") as file:
        file.truncate(layout.IMAGE_SIZE)
    _run(["sfdisk", "--quiet", image], layout.partition_table().encode())


def make_esp(image: Path, contents: Mapping[str, bytes]) -> None:
    """The EFI system partition: FAT32 with these files, in this order."""
    sectors, kib = layout.ESP_START // layout.SECTOR, layout.ESP_SIZE // 1024
    # 2 KiB clusters: 65525 or more make it FAT32 (Microsoft's FAT specification, "FAT Type Determination").
    where: list[str | Path] = ["--offset", str(sectors), "-h", str(sectors), image, str(kib)]
    _run(["mkfs.vfat", "-F", "32", "-s", "4", "-n", layout.ESP_LABEL, *where])
    partition = layout.esp_in(image)
    folders: list[str] = []
    for name in contents:
        above = [str(folder) for folder in reversed(Path(name).parents) if folder.name]
        folders += [folder for folder in above if folder not in folders]
    _run(["mmd", "-i", partition, *(f"::{folder}" for folder in folders)])
    for name, data in contents.items():
        _run(["mcopy", "-i", partition, "-", f"::{name}"], data)


def make_root(image: Path, folder: Path, as_owner: list[str]) -> None:
    """The root: ext4 with the files of a folder.

    Without a journal: tests cut guests off, and what was synced is on the disk all the same. Nothing is left
    for the guest to initialize at its first boot, so the image does not grow by itself.
    """
    if as_owner:
        # Under the owner's number it is someone else's file.
        image.chmod(0o666)
    features = "^has_journal,^metadata_csum,^resize_inode"
    extended = f"offset={layout.ROOT_START},lazy_itable_init=0,root_owner=0:0"
    sized = f"{layout.ROOT_SIZE // 1024}k"
    mke2fs = [
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-N",
        "65536",
        "-m",
        "0",
        "-L",
        layout.ROOT_LABEL,
    ]
    mke2fs += ["-O", features, "-E", extended, "-d", str(folder), str(image), sized]
    _run([*as_owner, *mke2fs])


def make_sparse(image: Path) -> None:
    """Give back the blocks that hold zeros."""
    _run(["fallocate", "--dig-holes", image])


def allocated(path: Path) -> int:
    """Bytes that a file takes on the disk."""
    return os.stat(path).st_blocks * 512


def _run(command: list[str | Path], data: bytes = b"") -> None:
    """Run a tool; RuntimeError with what it said when it fails."""
    done = subprocess.run(command, input=data, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        words = " ".join(map(str, command))
        raise RuntimeError(f"{words}: status {done.returncode}\n{done.stdout.decode(errors='replace')}")
