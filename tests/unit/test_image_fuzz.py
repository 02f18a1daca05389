"""Disk images with damage: an entry or an error of chv's own, with bounded work. Longer: tests.fuzz_image."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chv.boot import fat as fat_module
from chv.boot import uki
from chv.boot.fat_directory import Directory
from chv.boot.image import open_image
from chv.boot.loader_entries import default_pattern, parse_snippet
from chv.errors import ImageError
from tests.fuzz_image import damage, hot_blocks, put, repair_checksums, seeds, use

from .disk_images import ESP, FatImage, gpt, pe, usual_files

SEEDS = seeds()


@pytest.fixture(scope="module")
def path() -> Iterator[str]:
    fd = os.memfd_create("image")
    yield f"/proc/self/fd/{fd}"
    os.close(fd)


def store(path: str, data: bytes) -> None:
    Path(path).write_bytes(data)


def test_the_images_are_good_without_damage(path: str) -> None:
    for image in SEEDS:
        store(path, image)
        assert use(path) == "loaded"


@given(which=st.integers(0, len(SEEDS) - 1), seed=st.integers(0, 1 << 32))
def test_damage(path: str, which: int, seed: int) -> None:
    store(path, damage(SEEDS[which], random.Random(seed)))
    assert use(path) in ("loaded", "listed", "refused")


@given(
    which=st.integers(0, len(SEEDS) - 1),
    changes=st.lists(
        st.tuples(st.integers(0, 1 << 16), st.integers(0, 511), st.binary(min_size=1, max_size=8)), max_size=6
    ),
)
def test_chosen_changes(path: str, which: int, changes: list[tuple[int, int, bytes]]) -> None:
    image = bytearray(SEEDS[which])
    blocks = hot_blocks(SEEDS[which])
    for block, offset, value in changes:
        put(image, blocks[block % len(blocks)] + offset, value)
    repair_checksums(image)
    store(path, bytes(image))
    assert use(path) in ("loaded", "listed", "refused")


BACKUP = 33 * 512  # the second partition table, behind all partitions


@given(cut=st.integers(0, len(SEEDS[0])) | st.integers(len(SEEDS[0]) - 2 * BACKUP, len(SEEDS[0])))
@example(cut=len(SEEDS[0]) - BACKUP)
@example(cut=len(SEEDS[0]) - BACKUP - 1)
def test_an_image_that_is_cut_off(path: str, cut: int) -> None:
    store(path, SEEDS[0][:cut])
    assert use(path) == ("loaded" if cut >= len(SEEDS[0]) - BACKUP else "refused")


@given(head=st.binary(max_size=1200))
@example(head=b"")
def test_any_bytes(path: str, head: bytes) -> None:
    store(path, head)
    assert use(path) == "refused"


@given(values=st.lists(st.integers(0, 110), min_size=100, max_size=100), bits=st.sampled_from([12, 16, 32]))
def test_any_table(path: str, values: list[int], bits: int) -> None:
    """Chains that go anywhere: each is refused, or gives as many bytes as the file says."""
    fat = FatImage(bits=bits)
    for name, content in usual_files().items():
        fat.add(name, content)
    store(path, gpt([(ESP, fat.build(changes=dict(enumerate(values, 2))))]))
    assert use(path) in ("loaded", "listed", "refused")


@given(bpb=st.binary(min_size=40, max_size=40), magic=st.booleans())
def test_any_boot_sector(path: str, bpb: bytes, magic: bool) -> None:
    fat = FatImage(clusters=60)
    fat.bpb[11] = bpb if magic else bpb[:13] + struct.pack("<B", 0xF8) + bpb[14:]
    fat.bpb[510] = b"\x55\xaa"
    store(path, gpt([(ESP, fat.build())]))
    assert use(path) == "refused"


@given(data=st.binary(max_size=400))
def test_any_directory(data: bytes) -> None:
    for wide in (False, True):
        directory = Directory(data, wide)
        assert len(directory.nodes) <= len(data) // 32
        for node in directory.nodes:
            assert directory.find(node.name) is not None


@given(data=st.binary(max_size=400))
def test_any_text(data: bytes) -> None:
    snippet = parse_snippet(data)
    assert all(key and value and "\n" not in value for key, value in snippet.values.items())
    pattern = default_pattern(data)
    assert pattern is None or pattern


class Bytes:
    """A file of a file system."""

    name = "file"

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = data

    def read(self, offset: int, length: int) -> bytes:
        assert offset >= 0
        assert 0 <= length <= self.size - offset
        return self._data[offset : offset + length]


PE = pe([(".osrel", b"ID=x\n"), (".cmdline", b"quiet"), (".linux", b"kernel"), (".initrd", b"initrd")])


@given(
    changes=st.lists(st.tuples(st.integers(0, 520), st.binary(min_size=1, max_size=8)), max_size=4),
    cut=st.integers(0, 64),
)
def test_any_unified_kernel_image(changes: list[tuple[int, bytes]], cut: int) -> None:
    image = bytearray(PE)
    for offset, value in changes:
        put(image, offset, value)
    file = Bytes(bytes(image[: len(image) - cut * 64]))
    try:
        found = uki.parse(file)
    except ImageError:
        return
    if found is not None:
        assert all(0 < part.size <= file.size - part.offset for part in (found.linux, *found.initrds))


# -- bounded work ------------------------------------------------------------------------


class Reads:
    """Counts what is read of an image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.bytes = 0
        real = os.preadv

        def preadv(fd: int, buffers: Any, offset: int) -> int:
            count = real(fd, buffers, offset)
            self.calls += 1
            self.bytes += count
            return count

        monkeypatch.setattr(os, "preadv", preadv)


def test_directories_that_share_their_clusters_are_read_within_bounds(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each entry names another directory, whose chain is the rest of one long chain: 4000 clusters each."""
    fat = FatImage(clusters=5000)
    chain = fat.allocate(4090)
    folder = fat.folder("loader/entries")
    for number in range(60):
        fat.folders["loader/entries"] = folder
        fat.add(f"loader/entries/{number}.conf", f"linux /D{number}/x\n".encode())
        fat.folders[f"D{number}"] = []
        fat.first[f"D{number}"] = chain[number]
        fat.root.append(b"D%-10d" % number + b"\x10" + bytes(14) + struct.pack("<HI", chain[number], 0))
    built = fat.build(changes=dict(zip(chain, [*chain[1:], fat.end], strict=True)))
    store(path, gpt([(ESP, built)]))
    reads = Reads(monkeypatch)
    with open_image(path) as image:
        problems = {entry.problem for entry in image.entries}
    assert any("its directories are too large" in problem for problem in problems)
    assert reads.bytes < 2 * fat_module.DIRECTORIES_MAX


def test_chains_are_followed_within_bounds(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fat_module, "CLUSTERS_MAX", 40)
    fat = FatImage()
    for name, content in usual_files().items():
        fat.add(name, content)
    store(path, gpt([(ESP, fat.build())]))
    with open_image(path) as image:
        image.load().close()
        image.load().close()  # what was followed once is not followed again
    monkeypatch.setattr(fat_module, "CLUSTERS_MAX", 12)
    with open_image(path) as image, pytest.raises(ImageError, match="would have to be followed in all"):
        image.load()


def test_a_large_cycle_is_found_without_reading_the_file(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fat = FatImage(clusters=3000)
    for name, content in usual_files().items():
        fat.add(name, content)
    fat.add("k", bytes(2000 * 512))
    fat.add("loader/entries/z.conf", b"linux /k\n")
    last = fat.first["k"] + 1999
    store(path, gpt([(ESP, fat.build(changes={last: fat.first["k"]}))]))
    with open_image(path) as image:
        reads = Reads(monkeypatch)
        with pytest.raises(ImageError, match="cyclic"):
            image.load(image.select("z"))
        assert reads.bytes <= 4 * 4096
