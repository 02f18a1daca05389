"""Disk images that cannot be booted, and exactly what the person who gave them reads."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from chv.boot.image import open_image
from chv.errors import ImageError

from .disk_images import (
    ENTRY,
    ESP,
    KERNEL,
    LINUX,
    XBOOTLDR,
    FatImage,
    disk,
    esp,
    gpt,
    mbr,
    pe,
    unified,
    usual_files,
)

GUID = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
KINDS = "a GUID partition table, an MBR or a FAT file system is needed"
P1 = "partition 1 (EFI system partition): "


def entry(text: str, **files: bytes) -> bytes:
    """A disk whose only entry is ``text``, with the usual kernel."""
    named = {name.replace("__", "/"): data for name, data in files.items()}
    return gpt([(ESP, esp({"loader/entries/a.conf": text.encode(), "k": KERNEL, **named}))])


def fat(change: Callable[[FatImage], dict[int, int] | None], bits: int = 32, clusters: int = 0) -> bytes:
    """A disk with the usual files, one cluster after the other, after ``change``."""
    built = FatImage(bits=bits, clusters=clusters)
    for path, data in usual_files().items():
        built.add(path, data)
    changes = change(built)
    return gpt([(ESP, built.build(changes=changes))])


def lie(fat: FatImage, path: str, *, size: int | None = None, cluster: int | None = None) -> None:
    """Change the directory entry of ``path``."""
    folder = path.rpartition("/")[0]
    entries = fat.folders[folder]
    first = fat.first[path]
    at = next(
        n for n, e in enumerate(entries) if e[11] != 0x0F and int.from_bytes(e[26:28], "little") == first
    )
    raw = bytearray(entries[at])
    if size is not None:
        raw[28:32] = size.to_bytes(4, "little")
    if cluster is not None:
        raw[20:22], raw[26:28] = (
            (cluster >> 16).to_bytes(2, "little"),
            (cluster & 0xFFFF).to_bytes(2, "little"),
        )
    entries[at] = bytes(raw)


def patched(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


def both_headers(data: bytes, offset: int, new: bytes) -> bytes:
    return patched(patched(data, 512 + offset, new), len(data) - 512 + offset, new)


def broken(why: str) -> re.Pattern[str]:
    start = "its GUID partition table is broken: primary table (sector 1 of 512 bytes): "
    return re.compile(re.escape(start) + why)


GOOD = disk()

# -- what is wrong -> the message behind "disk image PATH: " -----------------------------

OPENING: dict[str, tuple[bytes, str | re.Pattern[str]]] = {
    "empty": (b"", "is empty"),
    "a byte": (
        b"\0",
        f"is not a disk image that can be booted from: it holds only zeros at its start; {KINDS}",
    ),
    "text": (b"hello\n", f"is not a disk image that can be booted from: it is a text file; {KINDS}"),
    "zeros": (
        bytes(1 << 20),
        f"is not a disk image that can be booted from: it holds only zeros at its start; {KINDS}",
    ),
    "compressed": (
        b"\xfd7zXZ\0" + bytes(range(256)) * 9,
        "is not a disk image that can be booted from: it is compressed with xz; unpack it first (xz -d); "
        f"{KINDS}",
    ),
    "ext4": (
        bytes(0x438) + b"\x53\xef" + bytes(4096),
        "is not a disk image that can be booted from: it is a file system image (ext2, ext3 or ext4); "
        f"{KINDS}",
    ),
    "no ESP": (
        gpt([(LINUX, b"x" * 1024), (LINUX, b"x")]),
        f"has no EFI system partition: none of its 2 partitions has the type {GUID}",
    ),
    "no partitions": (
        gpt([]),
        f"has no EFI system partition: none of its 0 partitions has the type {GUID}",
    ),
    "MBR without an ESP": (
        mbr([(0x83, 1, 100), (0x82, 101, 100)]) + bytes(1 << 20),
        "has no EFI system partition: the types in its partition table (MBR) are 82, 83; ef or ea is needed",
    ),
    "MBR partition beyond the end": (
        mbr([(0xEF, 1, 1 << 20)]) + bytes(4096),
        f"{P1}ends at byte 536871424, beyond the end of the image (4608); is it cut off?",
    ),
    "MBR partition on the MBR": (
        mbr([(0xEF, 0, 4)]) + bytes(4096),
        f"{P1}begins at byte 0 and has 2048 bytes, which cannot be",
    ),
    "GPT is gone": (
        patched(GOOD[:-512], 512, bytes(8)),
        "its GUID partition table is missing: the protective MBR says there is one, but neither sector 1 nor "
        'the last sector begins with "EFI PART"; is the image cut off?',
    ),
    "no room for a GPT": (
        GOOD[:512],
        "its GUID partition table is missing: the protective MBR says there is one, but neither sector 1 nor "
        'the last sector begins with "EFI PART"; is the image cut off?',
    ),
    "entries are cut off": (
        GOOD[:4096],
        "its GUID partition table is broken: primary table (sector 1 of 512 bytes): the entries, 16384 bytes "
        "from sector 2 on, lie outside the image",
    ),
    "entries with a wrong CRC": (
        gpt([(ESP, esp())], array_crc=0x12345678),
        broken(r"the CRC32 of the entries is [0-9a-f]{8}, not 12345678; backup table .*: the CRC32 .*"),
    ),
    "headers with a wrong CRC": (
        both_headers(GOOD, 16, b"\x78\x56\x34\x12"),
        broken(r"the header's CRC32 is [0-9a-f]{8}, not 12345678; backup table .*"),
    ),
    "a header that is elsewhere": (
        gpt([(ESP, esp())], mine=7),
        broken(r"the header says that it is in sector 7; backup .*"),
    ),
    "a header of a strange size": (
        gpt([(ESP, esp())], length=513),
        broken(r"the header's size is 513; allowed is 92 to 512; backup .*"),
    ),
    "too many entries": (
        gpt([(ESP, esp())], count=0xFFFFFFFF),
        broken(
            r"4294967295 entries of 128 bytes; allowed are 4096 entries of 128 bytes or more, 1048576 bytes "
            "in all; backup .*"
        ),
    ),
    "entries of no size": (
        gpt([(ESP, esp())], entry_size=0),
        broken(r"128 entries of 0 bytes; allowed are .*"),
    ),
    "partition cut off": (
        GOOD[:30000],
        re.compile(
            r"partition 2 .*: ends at byte [0-9]+, beyond the end of the image \(30000\); is it cut off\?"
        ),
    ),
    "not FAT": (
        gpt([(ESP, b"x" * 4096)]),
        f"{P1}has no FAT boot sector; a FAT12, FAT16 or FAT32 file system is needed",
    ),
    "exFAT": (
        gpt([(ESP, (b"\xeb\x76\x90EXFAT   ".ljust(510, b"\0") + b"\x55\xaa").ljust(4096, b"\0"))]),
        f"{P1}is an exFAT file system; a FAT12, FAT16 or FAT32 file system is needed",
    ),
    "ext4 in the ESP": (
        gpt([(ESP, bytes(0x438) + b"\x53\xef" + bytes(4096))]),
        f"{P1}is an ext2, ext3 or ext4 file system; a FAT12, FAT16 or FAT32 file system is needed",
    ),
    "FAT larger than its partition": (
        gpt([(ESP, esp()[:-1024])]),
        re.compile(r"partition 1 .*: its FAT file system has [0-9]+ bytes, but there are only [0-9]+"),
    ),
    "FAT without room for data": (
        fat(lambda f: f.bpb.update({36: struct.pack("<I", 1 << 30)})),
        f"{P1}its FAT boot sector makes no sense: no room for tables and data",
    ),
    "FAT16 with too many clusters": (
        gpt([(ESP, FatImage(bits=16, clusters=70000).build())]),
        f"{P1}its FAT16 file system has 70000 clusters; 65524 are possible",
    ),
    "no entries": (
        gpt([(ESP, esp({"a": b"b"}))]),
        "has no boot entries: neither /loader/entries/*.conf nor /EFI/Linux/*.efi",
    ),
    "only a boot loader": (
        gpt([(ESP, esp({"EFI/BOOT/BOOTX64.EFI": b"MZ"}))]),
        "has no boot entries: neither /loader/entries/*.conf nor /EFI/Linux/*.efi; it has "
        "/EFI/BOOT/BOOTX64.EFI, which needs firmware to boot",
    ),
    "entries where they cannot be read": (
        gpt([(ESP, esp({"a": b"b"})), (XBOOTLDR, bytes(0x438) + b"\x53\xef" + bytes(4096))]),
        "has no boot entries: neither /loader/entries/*.conf nor /EFI/Linux/*.efi; partition 2 (XBOOTLDR): "
        "is an ext2, ext3 or ext4 file system; a FAT12, FAT16 or FAT32 file system is needed",
    ),
    "too many files": (
        gpt([(ESP, esp({f"loader/entries/{n}.conf": b"" for n in range(257)}, clusters=4000))]),
        f"{P1}/loader/entries has 257 boot entries; 256 are allowed at most",
    ),
    "cyclic root directory": (
        fat(lambda f: {f.first[""]: f.first[""]}),
        f"{P1}a directory of /loader/entries: its chain of clusters is cyclic: it comes back to cluster 2",
    ),
    "directory without end": (
        fat(lambda f: {n: n + 1 for n in range(f.first["EFI"], 4200)}, clusters=4300),
        f"{P1}a directory of /EFI/Linux: it has more than 2097152 bytes; no directory may have",
    ),
    "directory without a cluster": (
        fat(lambda f: lie(f, "loader", cluster=99999)),
        f"{P1}a directory of /loader/entries: its first cluster is 99999; there are 2 to 601",
    ),
}


@pytest.mark.parametrize(("data", "message"), OPENING.values(), ids=OPENING)
def test_an_image_that_cannot_be_opened(tmp_path: Path, data: bytes, message: str | re.Pattern[str]) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert_says(caught.value, path, message)


def assert_says(error: ImageError, path: Path, message: str | re.Pattern[str]) -> None:
    start = f"disk image {path}: "
    said = str(error)
    assert said.startswith(start)
    if isinstance(message, str):
        assert said[len(start) :] == message
    else:
        assert message.fullmatch(said[len(start) :]), said


@pytest.mark.parametrize(
    ("magic", "name"), [(b"QFI\xfb", "qcow2"), (b"vhdxfile", "VHDX"), (b"KDMV", "VMDK"), (b"conectix", "VHD")]
)
def test_an_image_in_a_container(tmp_path: Path, magic: bytes, name: str) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(magic + bytes(4096))
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert_says(
        caught.value,
        path,
        f"is a disk image ({name}); only raw images can be read: convert it with "
        f"qemu-img convert -O raw {path} disk.raw",
    )


def test_files_that_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "gone", "cannot be opened (No such file or directory)"),
        (tmp_path, "is a directory; a raw disk image or a block device is needed"),
        (tmp_path / "pipe", "is neither a regular file nor a block device"),
        (Path("/dev/null"), "is neither a regular file nor a block device"),
    ):
        with pytest.raises(ImageError) as caught:
            open_image(path)
        assert_says(caught.value, path, message)
    with pytest.raises(ImageError, match=r"^disk image a\\x00b: cannot be opened \(embedded null byte\)$"):
        open_image("a\0b")


# -- entries that cannot be booted -------------------------------------------------------

UNBOOTABLE: dict[str, tuple[bytes, str]] = {
    "no kernel named": (entry("title T\n"), "it names no kernel; the key linux is needed"),
    "empty": (entry(""), "it names no kernel; the key linux is needed"),
    "from the network": (
        entry("uki-url https://example.org/x.efi\n"),
        "it names an image in the network; the key linux is needed",
    ),
    "kernel missing": (entry("linux /no/such\n"), "its kernel /no/such is missing"),
    "kernel below a file": (entry("linux /k/x\n"), "its kernel /k/x is missing"),
    "kernel is a directory": (entry("linux /loader\n"), "its kernel /loader is a directory"),
    "initrd missing": (entry("linux /k\ninitrd /k\ninitrd /gone\n"), "its initrd /gone is missing"),
    "upwards": (entry("linux /loader/../k\n"), "the path /loader/../k contains .."),
    "deep": (
        entry(f"linux {'/a' * 65}\n"),
        f"the path {'/a' * 65} has more than 64 names",
    ),
    "control characters": (entry("linux /\x1b[2J\n"), "its kernel /\\x1b[2J is missing"),
    "long": (entry(f"linux /{'x' * 5000}\n"), f"its kernel /{'x' * 196}... is missing"),
    "other architecture": (
        entry("linux /k\narchitecture AA64\n"),
        "it is for the architecture AA64, not for x64",
    ),
    "many initrds": (entry("linux /k\n" + "initrd /k\n" * 33), "it has 33 initrds; 32 are allowed at most"),
    "NUL in the options": (entry("linux /k\noptions a\0b\n"), "its options contain a NUL"),
    "EFI program": (
        entry("efi /e\n", e=pe([(".text", b"x")])),
        "it starts the EFI program /e, which is no unified kernel image: that needs firmware",
    ),
    "EFI program missing": (entry("efi /gone.efi\n"), "its kernel /gone.efi is missing"),
    "large file": (
        entry("# " + "x" * 65536),
        "/loader/entries/a.conf: has 65538 bytes; 65536 are allowed at most",
    ),
    "UKI for another processor": (
        disk({"EFI/Linux/a.efi": pe([(".linux", b"x")], machine=0xAA64)}),
        "/EFI/Linux/a.efi: is for another processor (PE machine aa64), not for x86-64",
    ),
    "UKI without a kernel": (
        disk({"EFI/Linux/a.efi": pe([(".osrel", b"x")])}),
        "it is no unified kernel image: it has no PE section .linux",
    ),
    "UKI that is none": (
        disk({"EFI/Linux/a.efi": b"MZ"}),
        "it is no unified kernel image: it has no PE section .linux",
    ),
    "UKI with an empty kernel": (
        disk({"EFI/Linux/a.efi": pe([(".linux", b"")])}),
        "/EFI/Linux/a.efi: its section .linux is empty",
    ),
    "UKI cut off": (
        disk({"EFI/Linux/a.efi": unified(KERNEL)[:-600]}),
        "/EFI/Linux/a.efi: its PE section .linux lies beyond its end",
    ),
    "UKI with too many sections": (
        disk({"EFI/Linux/a.efi": patched(unified(KERNEL), 70, b"\xff\xff")}),
        "/EFI/Linux/a.efi: has 65535 PE sections; 512 are allowed at most",
    ),
    "UKI with sections beyond its end": (
        disk({"EFI/Linux/a.efi": patched(unified(KERNEL), 84, b"\xff\xff")}),
        "/EFI/Linux/a.efi: its table of PE sections lies beyond its end",
    ),
    "UKI with a large command line": (
        disk({"EFI/Linux/a.efi": unified(KERNEL, cmdline=b"x" * 65537)}),
        "/EFI/Linux/a.efi: its section .cmdline has 65537 bytes; 65536 at most",
    ),
}


@pytest.mark.parametrize(("data", "message"), UNBOOTABLE.values(), ids=UNBOOTABLE)
def test_an_entry_that_cannot_be_booted(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(data)
    with open_image(path) as image:
        (only,) = image.entries
        assert only.problem == message
        with pytest.raises(ImageError) as caught:
            _ = image.default
        assert_says(caught.value, path, f"none of its boot entries can be booted: {only.id}: {message}")
        for use in (lambda: image.select(only.id), lambda: image.load(only)):
            with pytest.raises(ImageError) as caught:
                use()
            assert_says(caught.value, path, f"boot entry {only.id}: {message}")


# -- what shows only when it is loaded ---------------------------------------------------

K = "EFI/debian/kernel-6.12"
INITRD_PATH = "EFI/debian/initrd-6.12"

LOADING: dict[str, tuple[bytes, str]] = {
    "cyclic": (
        fat(lambda f: {f.first[K] + 2: f.first[K]}),
        f"{P1}/{K}: its chain of clusters is cyclic: it comes back to cluster CYCLE",
    ),
    "cyclic at once": (
        fat(lambda f: {f.first[K]: f.first[K]}, bits=12),
        f"{P1}/{K}: its chain of clusters is cyclic: it comes back to cluster CYCLE",
    ),
    "cyclic at its end": (
        fat(lambda f: {f.first[K] + 3: f.first[K] + 3}, bits=16),
        f"{P1}/{K}: its chain of clusters is cyclic: it comes back to cluster CYCLE",
    ),
    "ends early": (
        fat(lambda f: {f.first[K] + 1: 0x0FFFFFF8}),
        f"{P1}/{K}: its chain ends after 2 of 5 clusters",
    ),
    "bad cluster": (
        fat(lambda f: {f.first[K]: 0xFF7}, bits=12),
        f"{P1}/{K}: cluster FIRST is followed by one that is marked bad",
    ),
    "free cluster": (
        fat(lambda f: {f.first[K]: 0}, bits=16),
        f"{P1}/{K}: cluster FIRST is free, so its chain has no end",
    ),
    "cluster outside": (
        fat(lambda f: {f.first[K]: 602}),
        f"{P1}/{K}: cluster FIRST is followed by 602; there are 2 to 601",
    ),
    "first cluster outside": (
        fat(lambda f: lie(f, K, cluster=1)),
        f"{P1}/{K}: its first cluster is 1; there are 2 to 601",
    ),
    "more than the file system": (
        fat(lambda f: lie(f, K, size=1 << 20)),
        f"{P1}/{K}: has 2048 clusters, more than there are (600)",
    ),
    "kernel too large": (
        fat(lambda f: lie(f, K, size=(1 << 30) + 1)),
        f"{P1}/{K}: has 1073741825 bytes; 1073741824 are allowed at most",
    ),
    "initrd too large": (
        fat(lambda f: lie(f, INITRD_PATH, size=0xFFFFFFFF)),
        f"{P1}/{INITRD_PATH}: has 4294967295 bytes; 1073741824 are allowed at most",
    ),
    "kernel empty": (
        entry("linux /e\n", e=b""),
        "boot entry a.conf: its kernel is empty",
    ),
    "initrd empty": (
        entry("linux /k\ninitrd /e\n", e=b""),
        "boot entry a.conf: its initrd is empty",
    ),
}


@pytest.mark.parametrize(("data", "message"), LOADING.values(), ids=LOADING)
def test_a_file_that_cannot_be_read(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(data)
    with open_image(path) as image, pytest.raises(ImageError) as caught:
        image.load()
    pattern = re.escape(message).replace("CYCLE", "[0-9]+").replace("FIRST", "[0-9]+")
    assert_says(caught.value, path, re.compile(pattern))


def test_initrds_that_are_too_large_together(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(entry("linux /k\ninitrd /i\ninitrd /i\n", i=b"i" * 2101))
    with open_image(path, max_file_size=4204) as image, pytest.raises(ImageError) as caught:
        image.load()
    assert_says(
        caught.value,
        path,
        "boot entry a.conf: its initrds have 4205 bytes together; 4204 are allowed at most",
    )
    with open_image(path, max_file_size=4205) as image, image.load() as loaded:
        assert loaded.initramfs is not None
        assert loaded.initramfs.size == 4205


def test_an_image_that_is_cut_off_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(disk())
    with open_image(path) as image:
        os.truncate(path, 1024)
        with pytest.raises(ImageError, match=r": is truncated: [0-9]+ bytes at [0-9]+ lie beyond its end$"):
            image.load()


# -- choosing ----------------------------------------------------------------------------


def test_an_entry_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(disk({**usual_files(), "loader/entries/debian-6.1.conf": ENTRY}))
    with open_image(path) as image:
        for name in ("6.12", "debian-6", "[", "", "x\n*"):
            with pytest.raises(ImageError) as caught:
                image.select(name)
            shown = name.replace("\n", "\\n")
            assert_says(
                caught.value, path, f"has no boot entry {shown}; it has debian-6.12.conf, debian-6.1.conf"
            )


def test_a_long_list_of_entries_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(disk({"k": b"k", **{f"loader/entries/{n:02}.conf": b"linux /k\n" for n in range(23)}}))
    with open_image(path) as image, pytest.raises(ImageError, match=r" 03\.conf and 3 more$"):
        image.select("x")


# -- a good copy in place of a broken one ------------------------------------------------


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("damage", ["signature", "header", "entries", "MBR"])
def test_the_backup_of_the_partition_table(tmp_path: Path, sector: int, damage: str) -> None:
    data = disk(sector=sector)
    offset = {"signature": sector, "header": sector + 24, "entries": 2 * sector + 40, "MBR": 446}[damage]
    path = tmp_path / "disk.img"
    path.write_bytes(patched(data, offset, b"\x77" * 8))
    with open_image(path) as image, image.load() as loaded:
        assert loaded.kernel.size == len(KERNEL)


def test_the_backup_of_an_image_that_has_grown(tmp_path: Path) -> None:
    """Its place is in the primary header, where only the entries are broken."""
    path = tmp_path / "disk.img"
    path.write_bytes(patched(disk(), 1024 + 40, b"\x77" * 8) + bytes(1 << 20))
    with open_image(path) as image:
        assert image.default.id == "debian-6.12.conf"


def test_a_loader_conf_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(disk({**usual_files(), "loader/loader.conf": b"#" * 65537}))
    with open_image(path) as image:
        assert image.default.id == "debian-6.12.conf"


def test_a_chain_that_is_longer_than_its_file_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(fat(lambda f: lie(f, K, size=700)))
    with open_image(path) as image, image.load() as loaded:
        assert os.pread(loaded.kernel.fileno(), 5000, 0) == KERNEL[:700]
