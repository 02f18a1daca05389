"""File systems and partition tables that mkfs.vfat, mcopy and sfdisk made, not the tests' own builder."""

from __future__ import annotations

import os
import random
import shutil
import string
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chv.boot.disk import Disk, Region
from chv.boot.fat import Fat
from chv.boot.image import open_image
from tests.support import require

from .disk_images import ENTRY, INITRD, KERNEL

SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
MIB = 1 << 20

# Size in MiB and arguments of mkfs.vfat. mtools cannot write to a FAT32 with less than 65525 clusters.
FAT12 = (8, "-F 12 -S 512 -s 8")
FAT16 = (36, "-F 16 -S 512 -s 4")
FAT32 = (36, "-F 32 -S 512 -s 1")
FORMATS = [
    FAT12,
    FAT16,
    (36, "-F 16 -S 2048 -s 2"),
    FAT32,
    (36, "-F 32 -S 512 -s 1 -f 1 -n LABEL"),
    (300, "-F 32 -S 512 -s 8"),
    (300, "-F 32 -S 4096 -s 1"),
]


def tool(name: str, *arguments: str | Path, data: bytes | None = None) -> bytes:
    path = shutil.which(name, path=SBIN)
    require(path, f"{name} (Debian: dosfstools, mtools, fdisk)")
    assert path is not None
    environment = {**os.environ, "MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C.UTF-8"}
    done = subprocess.run([path, *arguments], input=data, capture_output=True, check=True, env=environment)
    return done.stdout


def make(path: Path, form: tuple[int, str]) -> None:
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, form[0] * MIB)
    tool("mkfs.vfat", *form[1].split(), path)


def copy(source: Path, target: Path, mib: int) -> None:
    """Put one file into the other, leaving holes."""
    os.truncate(target, source.stat().st_size + (mib + 1) * MIB)
    tool("dd", f"if={source}", f"of={target}", "bs=1M", f"seek={mib}", "conv=notrunc,sparse")


def put(path: Path, name: str, data: bytes) -> None:
    tool("mcopy", "-o", "-i", path, "-", f"::{name}", data=data)


def put_usual(path: Path, initrd: bytes) -> None:
    """What an entry needs."""
    for folder in ("loader", "loader/entries", "EFI", "EFI/debian"):
        tool("mmd", "-i", path, f"::{folder}")
    put(path, "loader/entries/debian-6.12.conf", ENTRY)
    put(path, "EFI/debian/kernel-6.12", KERNEL)
    put(path, "EFI/debian/initrd-6.12", initrd)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form[1])
def test_an_image_made_by_tools(tmp_path: Path, form: tuple[int, str]) -> None:
    path, filesystem = tmp_path / "disk.img", tmp_path / "esp"
    make(filesystem, form)
    put_usual(filesystem, INITRD * 1000)
    path.touch()
    copy(filesystem, path, 2)
    tool("sfdisk", "--quiet", path, data=f"label: gpt\nsize=1MiB\nsize={form[0]}MiB, type=U\n".encode())
    with open_image(path) as image, image.load() as loaded:
        assert image.default.source == "partition 2: /loader/entries/debian-6.12.conf"
        assert os.pread(loaded.kernel.fileno(), MIB, 0) == KERNEL
        assert loaded.initramfs is not None
        assert os.pread(loaded.initramfs.fileno(), 4 * MIB, 0) == INITRD * 1000


def test_a_partition_table_of_an_mbr(tmp_path: Path) -> None:
    path, filesystem = tmp_path / "disk.img", tmp_path / "esp"
    make(filesystem, FAT16)
    put_usual(filesystem, INITRD)
    path.touch()
    copy(filesystem, path, 1)
    tool("sfdisk", "--quiet", path, data=f"label: dos\nstart=2048, size={FAT16[0]}MiB, type=ef\n".encode())
    with open_image(path) as image:
        assert image.default.source == "partition 1: /loader/entries/debian-6.12.conf"


def test_files_in_fragments(tmp_path: Path) -> None:
    """Every second file is deleted, and a large one takes their place."""
    path = tmp_path / "fat"
    make(path, (5, "-F 16 -S 512 -s 1"))
    for number in range(120):
        put(path, f"file{number}", bytes([number]) * 3000)
    for number in range(0, 120, 2):
        tool("mdel", "-i", path, f"::file{number}")
    free = random.Random(1).randbytes(4 * MIB)
    put(path, "big", free)
    disk = Disk(path)
    fat = Fat(Region(disk, 0, disk.size, "fat"))
    chain = fat.open("big")._chain
    assert chain is not None
    assert len(chain.starts) > 20
    assert fat.open("BIG").read(0, 4 * MIB) == free
    assert fat.open("big").read(1234567, 999999) == free[1234567 : 1234567 + 999999]
    assert fat.open("/file7").read(0, 3000) == bytes([7]) * 3000
    assert fat.find("file8") is None
    disk.close()


# Not the names of devices, which mtools refuses (LPT1), nor characters beyond 16 bits, which it cuts off.
NAME = st.builds("f{}f".format, st.text(string.ascii_letters + string.digits + " .-_+()é漢ß", max_size=60))


@given(names=st.lists(NAME, min_size=1, max_size=8, unique_by=str.casefold))
@settings(max_examples=8, deadline=None)
def test_names_as_mtools_writes_them(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fat"
        make(path, (2, "-F 12 -S 512 -s 1"))
        for number, name in enumerate(names):
            put(path, name, f"content {number}".encode())
        disk = Disk(path)
        fat = Fat(Region(disk, 0, disk.size, "fat"))
        assert sorted(node.name for node in fat.list("/")) == sorted(names)
        for number, name in enumerate(names):
            expected = f"content {number}".encode()
            assert fat.open(name.swapcase()).read(0, len(expected)) == expected
        disk.close()
