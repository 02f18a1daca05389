"""Debian's own kernels: unpacked, read, and compared with what binutils and the kernel's headers say."""

from __future__ import annotations

import mmap
import re
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from chv import boot
from chv.errors import ImageError
from chv.memory import GuestMemory

from .boot_images import MiB, require_kernels


@pytest.fixture(scope="module")
def kernels() -> list[Path]:
    return require_kernels()


def unpacked(kernel: Path, folder: Path) -> Path:
    """The vmlinux in ``kernel``, as the cache keeps it."""
    boot.prepare(kernel, cache_dir=folder).close()
    (path,) = folder.iterdir()
    return path


def test_the_pvh_entry_is_that_of_readelf(kernels: list[Path], tmp_path: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    memory = GuestMemory(256 * MiB)
    for kernel in kernels:
        vmlinux = unpacked(kernel, tmp_path / kernel.name)
        notes = subprocess.run(["readelf", "-nW", vmlinux], capture_output=True, text=True, check=True).stdout
        match = re.search(r"\(0x00000012\)\s+description data: ((?:[0-9a-f]{2} ?)+)", notes)
        assert match
        expected = int.from_bytes(bytes.fromhex(match[1]), "little")
        for file in (kernel, vmlinux):
            memory.clear()
            entry = boot.load(memory, kernel=file)
            assert entry == boot.EntryPoint("pvh", expected, {"rbx": 0x6000})
    memory.close()


def test_each_segment_is_in_memory(kernels: list[Path], tmp_path: Path) -> None:
    memory = GuestMemory(256 * MiB)
    for kernel in kernels:
        vmlinux = unpacked(kernel, tmp_path / kernel.name)
        memory.clear()
        boot.load(memory, kernel=kernel)
        with vmlinux.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            loads = [s.header for s in ELFFile(file).iter_segments("PT_LOAD")]
            assert len(loads) >= 3
            for load in loads:
                expected = data[load.p_offset : load.p_offset + load.p_filesz]
                assert memory.read(load.p_paddr, load.p_filesz) == expected
    memory.close()


def test_the_smallest_memory(kernels: list[Path]) -> None:
    """The message names a size, and with that size it fits."""
    for kernel in kernels:
        memory = GuestMemory(60 * MiB)
        with boot.prepare(kernel) as payload:
            with pytest.raises(ImageError) as caught:
                payload.place(memory)
            memory.close()
            match = re.search(r"at least (\d+) MiB are needed \(memory.size\)", str(caught.value))
            assert match
            memory = GuestMemory(int(match[1]) * MiB)
            payload.place(memory)
            memory.close()


def test_damaged_and_truncated(kernels: list[Path], tmp_path: Path) -> None:
    for kernel in kernels:
        data = bytearray(kernel.read_bytes())
        path = tmp_path / "vmlinuz"
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(ImageError, match="the file is truncated"):
            boot.prepare(path)
        (offset,) = struct.unpack_from("<I", data, 0x248)
        # Behind the magic number. lz4 has no checksum: damage farther on could pass for other data.
        start = (data[0x1F1] + 1) * 512 + offset + 4
        data[start : start + 64] = b"\xff" * 64
        path.write_bytes(data)
        with pytest.raises(ImageError, match=r"data are damaged|ends beyond the data"):
            boot.prepare(path)


def test_a_vmlinux_is_read_in_milliseconds(kernels: list[Path], tmp_path: Path) -> None:
    """Only headers and notes are read before the segments are copied; 50 ms is for a slow machine."""
    for kernel in kernels:
        vmlinux = unpacked(kernel, tmp_path / kernel.name)
        start = time.perf_counter()
        boot.prepare(vmlinux).close()
        assert time.perf_counter() - start < 0.05
