"""FAT file systems: names in all their spellings, and bytes from wherever they are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chv.boot.disk import Disk, Region, printable
from chv.boot.fat import Fat, is_fat
from chv.boot.fat_directory import Directory, checksum
from chv.errors import ImageError

from .disk_images import FatImage, directory_entries, long_entries, short_entry

SHORT = b"F00000~1   "


@contextmanager
def opened(data: bytes) -> Iterator[Fat]:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        disk = Disk(file.name)
        yield Fat(Region(disk, 0, disk.size, "fat"))
        disk.close()


def names(*entries: bytes) -> list[str]:
    return [node.name for node in Directory(b"".join(entries), True).nodes]


# -- names -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "case", "name"),
    [
        (b"KERNEL     ", 0, "KERNEL"),
        (b"KERNEL  IMG", 0, "KERNEL.IMG"),
        (b"KERNEL  IMG", 0x08, "kernel.IMG"),
        (b"KERNEL  IMG", 0x10, "KERNEL.img"),
        (b"KERNEL  IMG", 0x18, "kernel.img"),
        (b"\x05BC     D  ", 0, "σBC.D"),
        (b"A B     C  ", 0, "A B.C"),
        (b"\x81BER    TXT", 0, "üBER.TXT"),
    ],
)
def test_short_names(raw: bytes, case: int, name: str) -> None:
    assert names(short_entry(raw, 0x20, 5, 6, case)) == [name]


@given(
    name=st.text(st.characters(codec="utf-16-le", exclude_characters="\0/"), min_size=1, max_size=255).filter(
        lambda text: len(text.encode("utf-16-le")) <= 510
    )
)
def test_long_names(name: str) -> None:
    entries = directory_entries(name, 0x20, 70000, 5, 0)
    (node,) = Directory(b"".join(entries), True).nodes
    assert node.name == name
    assert (node.cluster, node.size, node.is_directory) == (70000, 5, False)


def test_a_file_by_both_of_its_names_without_regard_to_case() -> None:
    directory = Directory(b"".join(directory_entries("Vmlinuz-6.12 é", 0x20, 5, 6, 0)), False)
    for name in ("Vmlinuz-6.12 é", "VMLINUZ-6.12 É", "vmlinuz-6.12 é", "F00000~1", "f00000~1"):
        node = directory.find(name)
        assert node is not None
        assert node.name == "Vmlinuz-6.12 é"
    assert directory.find("vmlinuz") is None


def test_a_long_name_wins_over_the_short_one_of_another_file() -> None:
    other = b"F00001~1   "
    first = [*long_entries("some kernel", SHORT), short_entry(SHORT, 0x20, 5, 1)]
    second = [*long_entries("F00000~1", other), short_entry(other, 0x20, 6, 2)]
    directory = Directory(b"".join([*first, *second]), False)
    found = [directory.find(name) for name in ("f00000~1", "f00001~1", "some kernel")]
    assert [node.cluster for node in found if node is not None] == [6, 6, 5]


def test_the_first_of_two_files_with_one_name() -> None:
    second = [*long_entries("initrd", SHORT), short_entry(SHORT, 0x20, 6, 2)]
    node = Directory(b"".join([short_entry(b"INITRD     ", 0x20, 5, 1), *second]), False).find("initrd")
    assert node is not None
    assert node.cluster == 5


LONG = long_entries("a long name of three entries, or so", SHORT)


@pytest.mark.parametrize(
    "entries",
    [
        long_entries("a long name", SHORT, total=checksum(SHORT) ^ 1),
        LONG[1:],
        LONG[:-1],
        LONG[::-1],
        [LONG[0], LONG[2], LONG[1]],
        [LONG[0], LONG[1], LONG[1], LONG[2]],
        [*LONG, b"\xe5" + bytes(31)],
        [*LONG, short_entry(b"VOLUME     ", 0x08, 0, 0)],
        [bytes([LONG[0][0] & ~0x40]) + LONG[0][1:], *LONG[1:]],
        [LONG[0][:12] + b"\1" + LONG[0][13:], *LONG[1:]],
        [b"\x40" + LONG[2][1:]],
        [b"\x7f" + LONG[2][1:]],
    ],
    ids=range(12),
)
def test_a_long_name_that_does_not_fit_is_ignored(entries: list[bytes]) -> None:
    assert names(*entries, short_entry(SHORT, 0x20, 5, 6)) == ["F00000~1"]


def test_what_is_no_file() -> None:
    file = short_entry(b"FILE       ", 0x20, 5, 6)
    assert names(
        short_entry(b".          ", 0x10, 5, 0),
        short_entry(b"..         ", 0x10, 0, 0),
        short_entry(b"LABEL      ", 0x08, 0, 0),
        b"\xe5" + file[1:],
        file,
        bytes(32),
        short_entry(b"BEHIND     ", 0x20, 5, 6),
    ) == ["FILE"]


def test_the_upper_half_of_a_cluster_number_counts_in_fat32_only() -> None:
    entry = short_entry(b"FILE       ", 0x20, 0x50005, 6)
    assert [Directory(entry, wide).nodes[0].cluster for wide in (True, False)] == [0x50005, 5]


# -- paths -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/EFI/Debian/Kernel.img", "efi/debian/kernel.img", "\\EFI\\debian//./KERNEL.IMG"]
)
def test_paths(path: str) -> None:
    fat = FatImage()
    fat.add("EFI/Debian/Kernel.img", b"data")
    with opened(fat.build()) as volume:
        assert volume.open(path).read(0, 4) == b"data"
        assert [node.name for node in volume.list("/efi")] == ["Debian"]
        assert [node.name for node in volume.list("/")] == ["EFI"]
        assert volume.list("/EFI/Debian/Kernel.img") == []
        assert volume.list("/nothing") == []
        assert volume.find("/EFI/Debian/Kernel.img/x") is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/gone", "fat: /gone: there is no such file"),
        ("/EFI", "fat: /EFI: is a directory"),
        ("/", "fat: /: is a directory"),
        ("/EFI/../EFI/f", "fat: the path /EFI/../EFI/f contains .."),
    ],
)
def test_paths_that_name_no_file(path: str, message: str) -> None:
    fat = FatImage()
    fat.add("EFI/f", b"data")
    with opened(fat.build()) as volume, pytest.raises(ImageError) as caught:
        volume.open(path)
    assert str(caught.value) == message


# -- contents ----------------------------------------------------------------------------


@given(
    bits=st.sampled_from([12, 16, 32]),
    stride=st.integers(1, 4),
    per_cluster=st.sampled_from([1, 4]),
    size=st.integers(0, 5000),
    ranges=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000)), max_size=4),
)
def test_any_stretch_of_a_file(
    bits: int, stride: int, per_cluster: int, size: int, ranges: list[tuple[int, int]]
) -> None:
    content = bytes(n * 7 + (n >> 8) & 0xFF for n in range(size))
    fat = FatImage(bits=bits, stride=stride, per_cluster=per_cluster)
    fat.add("before", b"x" * 600)
    fat.add("file", content)
    with opened(fat.build()) as volume:
        file = volume.open("file")
        assert file.size == size
        assert file.read(0, size) == content
        for offset, length in ranges:
            if offset + length <= size:
                assert file.read(offset, length) == content[offset : offset + length]
            else:
                with pytest.raises(ImageError, match="lie beyond its end"):
                    file.read(offset, length)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (5, 0), (0, 5)])
def test_a_stretch_that_is_no_part_of_a_file(offset: int, length: int) -> None:
    fat = FatImage()
    fat.add("file", b"data")
    with opened(fat.build()) as volume, pytest.raises(ImageError, match="lie beyond its end"):
        volume.open("file").copy_to(-1, offset, length)


def test_copies_are_made_in_pieces(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 3000)
    fat = FatImage(clusters=4000, stride=7)
    fat.add("file", content)
    target = os.open(tmp_path / "copy", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    with opened(fat.build()) as volume:
        volume.open("file").copy_to(target)
    os.close(target)
    assert (tmp_path / "copy").read_bytes() == content


def test_a_large_directory() -> None:
    fat = FatImage(clusters=3000)
    for number in range(900):
        fat.add(f"folder/file number {number}", b"%d" % number)
    with opened(fat.build()) as volume:
        assert len(volume.list("folder")) == 900
        assert volume.open("folder/file number 777").read(0, 3) == b"777"


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"\0"),
        (11, b"\0\1"),
        (11, b"\0\0"),
        (13, b"\3"),
        (13, b"\0"),
        (14, b"\0\0"),
        (16, b"\0"),
        (21, b"\1"),
    ],
)
def test_a_boot_sector_that_is_not_fat(offset: int, value: bytes) -> None:
    fat = FatImage()
    assert is_fat(fat.build()[:512])
    fat.bpb[offset] = value
    assert not is_fat(fat.build()[:512])


# -- what is shown -----------------------------------------------------------------------


@given(text=st.text(st.characters(), max_size=400) | st.text(st.characters(categories=["Cs"]), max_size=9))
def test_text_of_an_image_is_safe_to_show(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode("utf-8")
    if text.isprintable() and len(text) <= 200:
        assert shown == text
