"""Files that somebody damaged on purpose: an error of chv's own, in bounded time and memory, or a boot."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chv import boot
from chv.boot import decompress, identify
from chv.errors import ConfigError, GuestMemoryError, ImageError
from chv.memory import GuestMemory

from .boot_images import LIBRARIES, BzImage, ElfFile, Load, MiB, bzimage, pack, vmlinux, with_size

ALLOWED = (ImageError, ConfigError, GuestMemoryError)
MEMORY = 32 * MiB
ROOT = Path(__file__).parents[2]

ELF32 = ElfFile(bits=32, machine=3).build()
ELF64 = vmlinux()
IN_GUEST = bzimage(data=vmlinux(notes=None))
PACKED = {name: pack(name, vmlinux()) for name in LIBRARIES}

INTERESTING = st.sampled_from(
    [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1]
)
NUMBERS = INTERESTING | st.integers(0, (1 << 64) - 1)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.memory.close()
    place.folder.cleanup()


class Place:
    """A folder and one guest's memory for all examples."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "file"
        self.memory = GuestMemory(MEMORY)

    def boot(self, data: bytes) -> boot.EntryPoint | None:
        self.path.write_bytes(data)
        self.memory.clear()
        try:
            return boot.load(self.memory, kernel=self.path, cmdline="quiet")
        except ALLOWED as error:
            message = str(error)
        assert str(self.path) in message or message.startswith("payload.cmdline: ")
        return None


def patched(data: bytes, changes: list[tuple[int, int, int]]) -> bytes:
    """``changes`` are (offset, log2 of the width, value)."""
    changed = bytearray(data)
    for offset, width, value in changes:
        size = 1 << width
        part = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        offset %= max(len(changed) - size, 1)
        changed[offset : offset + size] = part
    return bytes(changed)


def changes_within(end: int) -> st.SearchStrategy[list[tuple[int, int, int]]]:
    return st.lists(st.tuples(st.integers(0, end - 1), st.integers(0, 3), NUMBERS), min_size=1, max_size=4)


@given(data=st.sampled_from([ELF32, ELF64]), changes=changes_within(64 + 3 * 56), cut=st.integers(0, 200))
def test_elf_headers(place: Place, data: bytes, changes: list[tuple[int, int, int]], cut: int) -> None:
    place.boot(patched(data, changes)[: len(data) - cut])


NOTES = len(ElfFile(notes=None).build()) + 56  # where the notes of the file begin


@given(changes=st.lists(st.tuples(st.integers(0, 23), st.integers(0, 3), NUMBERS), min_size=1, max_size=3))
def test_elf_notes(place: Place, changes: list[tuple[int, int, int]]) -> None:
    place.boot(
        patched(ElfFile().build(), [(NOTES + offset, width, value) for offset, width, value in changes])
    )


@given(
    loads=st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=5),
    entry=NUMBERS,
)
def test_elf_segments(place: Place, loads: list[tuple[int, int, int, int]], entry: int) -> None:
    segments = [Load(paddr=p, filesz=f, memsz=m, offset=o) for p, f, m, o in loads]
    place.boot(ElfFile([Load(), *segments], entry=entry).build())


@given(data=st.sampled_from([bzimage(), IN_GUEST]), changes=changes_within(0x80), cut=st.integers(0, 100))
def test_setup_headers(place: Place, data: bytes, changes: list[tuple[int, int, int]], cut: int) -> None:
    header = [(0x1F1 + offset, width, value) for offset, width, value in changes]
    place.boot(patched(data, header)[: len(data) - cut])


@pytest.mark.parametrize("name", LIBRARIES)
@given(data=st.data())
@settings(max_examples=60)
def test_compressed_data(place: Place, name: str, data: st.DataObject) -> None:
    payload = PACKED[name]
    payload = patched(payload, data.draw(changes_within(min(len(payload), 400))))
    place.boot(BzImage(payload[: data.draw(st.integers(0, len(payload)))] + payload[-4:]).build())


@given(data=st.binary(max_size=600))
@example(data=b"\x89LZO\0\r\n\x1a\n" + bytes(60))
def test_anything_behind_a_magic_number(data: bytes) -> None:
    for magic, name in decompress._MAGICS:
        with memoryview(magic + data) as view:
            try:
                unpacked = decompress.unpack(view, name, 4096)
            except (decompress.UnpackError, decompress.NoLibrary):
                continue
        assert len(unpacked) == 4096


@given(data=st.binary(max_size=1000))
def test_any_file(place: Place, data: bytes) -> None:
    assert identify.describe(data)
    place.boot(data)
    place.boot(b"\x7fELF" + data)


# A process of its own: the high-water mark of this one's memory has been raised by other tests.
BOMB_SQUAD = """
import resource, sys
from chv import boot, errors
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
try:
    boot.prepare(sys.argv[1])
except errors.ImageError as error:
    print(peak() - before, error)
"""


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_bomb_stays_small(tmp_path: Path, name: str) -> None:
    """64 MiB of zeros behind a size field that says 8 MiB: no more than that is unpacked."""
    packed, claimed = LIBRARIES[name](bytes(64 * MiB)), 8 * MiB
    payload = packed[:-4] + struct.pack("<I", claimed) if name == "gzip" else with_size(packed, claimed)
    path = tmp_path / "vmlinuz"
    path.write_bytes(BzImage(payload).build())
    child = subprocess.run(
        [sys.executable, "-c", BOMB_SQUAD, path], capture_output=True, text=True, check=True, cwd=ROOT
    )
    mib, message = child.stdout.split(maxsplit=1)
    assert int(mib) < 40
    assert re.search(r"more than the expected|damaged", message)
