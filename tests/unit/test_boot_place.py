"""What lies where in guest memory: initramfs, command line, start info, memory map, zero page."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chv import boot, layout
from chv.boot import room
from chv.errors import ConfigError, ImageError
from chv.memory import GuestMemory

from .boot_images import XEN_GUEST_OS, ElfFile, Load, MiB, bzimage, note, pvh_note, vmlinux

GiB = 1024 * MiB


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinux"
    path.write_bytes(vmlinux())
    return path


def initrd(tmp_path: Path, size: int) -> Path:
    path = tmp_path / "initrd"
    path.write_bytes((b"070701" + os.urandom(250)) * (size // 256) + b"x" * (size % 256))
    return path


def start_info(memory: GuestMemory) -> tuple[int, ...]:
    """magic, version, flags, modules, list of modules, command line, RSDP, memory map, entries, reserved."""
    return struct.unpack("<4I4QII", memory.read(0x6000, 56))


def memory_map(memory: GuestMemory) -> list[tuple[int, int, int, int]]:
    info = start_info(memory)
    return list(struct.iter_unpack("<QQII", memory.read(info[7], 24 * info[8])))


def zero_page_map(memory: GuestMemory) -> list[tuple[int, int, int]]:
    page = memory.read(0x7000, 4096)
    return list(struct.iter_unpack("<QQI", page[0x2D0 : 0x2D0 + 20 * page[0x1E8]]))


def test_start_info(kernel: Path, tmp_path: Path) -> None:
    size = 100_001
    data = initrd(tmp_path, size).read_bytes()
    memory = GuestMemory(64 * MiB)
    entry = boot.load(memory, kernel=kernel, initramfs=tmp_path / "initrd", cmdline="quiet äö", rsdp=0xA1230)
    assert entry.registers == {"rbx": 0x6000}
    address = 64 * MiB - 102_400
    assert start_info(memory) == (0x336EC578, 1, 0, 1, 0x6040, 0x20000, 0xA1230, 0x7000, 2, 0)
    assert struct.unpack("<4Q", memory.read(0x6040, 32)) == (address, size, 0, 0)
    assert memory_map(memory) == [(0, 0xA0000, 1, 0), (MiB, 63 * MiB, 1, 0)]
    assert memory.read(0x20000, 11) == "quiet äö\0".encode()
    assert memory.read(address, size) == data
    memory.close()


def test_start_info_without_an_initramfs(kernel: Path) -> None:
    memory = GuestMemory(64 * MiB)
    boot.load(memory, kernel=kernel)
    assert start_info(memory) == (0x336EC578, 1, 0, 0, 0, 0x20000, 0xA0000, 0x7000, 2, 0)
    assert memory.read(0x20000, 1) == b"\0"
    memory.close()


def test_memory_above_the_hole_and_reserved_ranges(kernel: Path) -> None:
    memory = GuestMemory(6 * GiB)
    boot.load(memory, kernel=kernel, reserved=[(0xE800_0000, 256 * MiB), (0xFEC0_0000, 4096)])
    assert memory_map(memory) == [
        (0, 0xA0000, 1, 0),
        (MiB, 3 * GiB - MiB, 1, 0),
        (0xE800_0000, 256 * MiB, 2, 0),
        (0xFEC0_0000, 4096, 2, 0),
        (4 * GiB, 3 * GiB, 1, 0),
    ]
    memory.close()


def test_zero_page(tmp_path: Path) -> None:
    path = tmp_path / "fw"
    path.write_bytes(ElfFile(notes=None).build())
    memory = GuestMemory(4 * GiB)
    size = initrd(tmp_path, 5000).stat().st_size
    boot.load(
        memory, kernel=path, initramfs=tmp_path / "initrd", rsdp=0xA0010, reserved=[(0xE800_0000, 256 * MiB)]
    )
    page = memory.read(0x7000, 4096)
    assert struct.unpack_from("<Q", page, 0x70) == (0xA0010,)
    assert page[0x1FE:0x200] == b"\x55\xaa"
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x210:0x212] == b"\xff\x01"
    assert struct.unpack_from("<II", page, 0x218) == (2 * GiB - 8192, size)
    assert struct.unpack_from("<I", page, 0x228) == (0x20000,)
    assert zero_page_map(memory) == [
        (0, 0xA0000, 1),
        (MiB, 3 * GiB - MiB, 1),
        (0xE800_0000, 256 * MiB, 2),
        (4 * GiB, GiB, 1),
    ]
    memory.close()


def test_a_payload_is_placed_again_after_a_reboot(kernel: Path, tmp_path: Path) -> None:
    memory = GuestMemory(64 * MiB)
    with boot.prepare(kernel, initramfs=initrd(tmp_path, 300_000), cmdline="one") as payload:
        first = payload.place(memory)
        before = memory.read(0, 64 * MiB)
        memory.clear()
        assert payload.place(memory) == first
        assert memory.read(0, 64 * MiB) == before
        other = GuestMemory(128 * MiB)  # another VM
        assert payload.place(other) == first
        other.close()
    memory.close()


def test_a_file_that_is_replaced_does_not_matter(kernel: Path) -> None:
    memory = GuestMemory(64 * MiB)
    with boot.prepare(kernel) as payload:
        new = kernel.with_name("new")
        new.write_bytes(b"x")
        new.rename(kernel)
        payload.place(memory)
    assert memory.read(0x100_0000, 256) == bytes(range(256))
    memory.close()


@pytest.mark.parametrize("which", ["vmlinux", "initrd"])
def test_a_file_that_is_written_to_is_refused(kernel: Path, tmp_path: Path, which: str) -> None:
    memory = GuestMemory(64 * MiB)
    with boot.prepare(kernel, initramfs=initrd(tmp_path, 4096)) as payload:
        payload.place(memory)
        path = tmp_path / which
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(ImageError, match=f"{which}: the file was changed since it was read"):
            payload.place(memory)
    memory.close()


def test_an_unpacked_kernel_needs_its_file_no_more(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage())
    memory = GuestMemory(64 * MiB)
    with boot.prepare(path) as payload:
        path.write_bytes(b"")
        assert payload.place(memory).protocol == "pvh"
    memory.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_files_are_closed(kernel: Path, tmp_path: Path) -> None:
    before = open_files()
    payload = boot.prepare(kernel, initramfs=initrd(tmp_path, 4096))
    assert open_files() == before + 2
    payload.close()
    payload.close()
    assert open_files() == before
    for wrong in ({"initramfs": tmp_path / "none"}, {"cmdline": "x" * 70_000}, {"initramfs": tmp_path}):
        with pytest.raises((ImageError, ConfigError)):
            boot.prepare(kernel, **wrong)
        assert open_files() == before
    payload = boot.prepare(kernel)
    del payload  # not closed, but not leaked either
    assert open_files() == before


# -- initramfs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["elf", "bzimage"])
def test_an_initramfs_that_does_not_fit(kernel: Path, tmp_path: Path, form: str) -> None:
    """The kernel ends at 0x1102000 (ELF), its room to unpack at 0x5000000 (bzImage)."""
    if form == "bzimage":
        kernel.write_bytes(bzimage(data=vmlinux(notes=None)))
    path = initrd(tmp_path, 20 * MiB)
    needed = {"elf": 38, "bzimage": 100}[form]
    memory = GuestMemory((needed - 1) * MiB)
    with boot.prepare(kernel, initramfs=path) as payload:
        with pytest.raises(ImageError) as caught:
            payload.place(memory)
        assert str(caught.value) == (
            f"initramfs {path}: has 20 MiB and does not fit beside the kernel; "
            f"at least {needed} MiB of memory are needed (memory.size)"
        )
        memory.close()
        memory = GuestMemory(needed * MiB)
        payload.place(memory)
        memory.close()


def test_an_initramfs_stays_below_the_kernels_limit(kernel: Path, tmp_path: Path) -> None:
    kernel.write_bytes(bzimage(data=vmlinux(notes=None), initrd_addr_max=0x5FF_FFFF))
    memory = GuestMemory(128 * MiB)
    boot.load(memory, kernel=kernel, initramfs=initrd(tmp_path, 4097))
    assert struct.unpack_from("<II", memory.read(0x7000, 4096), 0x218) == (0x600_0000 - 8192, 4097)
    memory.close()


def test_an_initramfs_that_no_memory_is_enough_for(kernel: Path, tmp_path: Path) -> None:
    kernel.write_bytes(bzimage(data=vmlinux(notes=None), initrd_addr_max=0x5FF_FFFF))
    path = tmp_path / "initrd"
    with path.open("wb") as file:
        file.truncate(20 * MiB)
    memory = GuestMemory(128 * MiB)
    with pytest.raises(ImageError, match="has 20 MiB; beside this kernel 16 MiB are possible"):
        boot.load(memory, kernel=kernel, initramfs=path)
    with path.open("wb") as file:
        file.truncate(5 * GiB)
    kernel.write_bytes(vmlinux())
    with pytest.raises(ImageError, match="has 5120 MiB; beside this kernel 3054 MiB are possible"):
        boot.load(memory, kernel=kernel, initramfs=path)
    memory.close()


def test_an_initramfs_below_a_kernel_that_sits_high(kernel: Path, tmp_path: Path) -> None:
    kernel.write_bytes(ElfFile([Load(), Load(paddr=64 * MiB - 4096)]).build())
    memory = GuestMemory(64 * MiB)
    boot.load(memory, kernel=kernel, initramfs=initrd(tmp_path, 5000))
    assert struct.unpack("<2Q", memory.read(0x6040, 16)) == (64 * MiB - 3 * 4096, 5000)
    memory.close()


PAGES = st.integers(0, 64)


@given(
    spans=st.lists(st.tuples(PAGES, PAGES).map(lambda pair: (min(pair), max(pair))), max_size=6),
    size=st.integers(1, 8 * 4096),
    limit=st.integers(0, 64),
)
def test_highest_gap_is_free_and_highest(spans: list[tuple[int, int]], size: int, limit: int) -> None:
    base, page = layout.HIGH_RAM, 4096
    taken = [(base + start * page, base + end * page) for start, end in spans]
    end = base + limit * page

    def free(address: int) -> bool:
        return address + size <= end and all(
            address + size <= low or high <= address for low, high in taken if low < high
        )

    expected = [address for address in range(base, end + 1, page) if free(address)]
    found = room.highest_gap([(low, high) for low, high in taken if low < high], size, end)
    assert found == (expected[-1] if expected else None)


# -- command line --------------------------------------------------------------------------------


def test_command_line_limits(kernel: Path) -> None:
    memory = GuestMemory(64 * MiB)
    boot.load(memory, kernel=kernel, cmdline="x" * 65535)
    assert memory.read(0x20000, 65536) == b"x" * 65535 + b"\0"
    with pytest.raises(ConfigError, match="cmdline: has 65536 bytes; there is room for 65535 at most"):
        boot.load(memory, kernel=kernel, cmdline="ä" * 32768)
    kernel.write_bytes(vmlinux(notes=note(XEN_GUEST_OS, b"linux\0") + pvh_note(0x100_0000)))
    boot.load(memory, kernel=kernel, cmdline="x" * 2047)
    with pytest.raises(ConfigError, match="cmdline: has 2048 bytes; this kernel takes 2047 at most"):
        boot.load(memory, kernel=kernel, cmdline="x" * 2048)
    memory.close()


def test_command_line_bytes(kernel: Path) -> None:
    memory = GuestMemory(64 * MiB)
    boot.load(memory, kernel=kernel, cmdline=os.fsdecode(b"caf\xe9"))  # an argument in Latin-1
    assert memory.read(0x20000, 5) == b"caf\xe9\0"
    with pytest.raises(ConfigError, match=r"payload\.cmdline: has a NUL at byte 3; none is allowed"):
        boot.load(memory, kernel=kernel, cmdline="abc\0def")
    with pytest.raises(ConfigError, match=r"payload\.cmdline: cannot be written as UTF-8"):
        boot.load(memory, kernel=kernel, cmdline="\ud800")
    memory.close()


# -- arguments -----------------------------------------------------------------------------------


def test_kernel_or_firmware(kernel: Path) -> None:
    memory = GuestMemory(64 * MiB)
    with pytest.raises(ConfigError, match="payload: nothing to boot; give a kernel or a firmware"):
        boot.load(memory, kernel=None)
    with pytest.raises(ConfigError, match="payload: kernel and firmware are both given"):
        boot.load(memory, kernel=kernel, firmware=kernel)
    assert boot.load(memory, kernel=None, firmware=kernel).protocol == "pvh"
    memory.close()


def test_too_little_memory(kernel: Path) -> None:
    memory = GuestMemory(MiB)
    with pytest.raises(ConfigError, match=r"memory\.size: 1048576 bytes; booting takes at least 2097152"):
        boot.load(memory, kernel=kernel)
    memory.close()


BAD_RESERVED = {
    "overlaps RAM": ((0xBFFF_F000, 8192), "the ranges at 0x100000 and 0xbffff000 overlap"),
    "empty": ((0xE800_0000, 0), "0x0 bytes at 0xe8000000 are no range of addresses"),
    "negative": ((-4096, 4096), "are no range of addresses"),
    "wraps": (((1 << 64) - 4096, 8192), "are no range of addresses"),
}


@pytest.mark.parametrize("case", BAD_RESERVED)
def test_reserved_ranges(kernel: Path, case: str) -> None:
    span, message = BAD_RESERVED[case]
    memory = GuestMemory(3 * GiB)
    with pytest.raises(ConfigError) as caught:
        boot.load(memory, kernel=kernel, reserved=[span])
    assert message in str(caught.value)
    memory.close()


@pytest.mark.parametrize(("notes", "most"), [(pvh_note(0x100_0000), 170), (None, 128)])
def test_as_many_ranges_as_there_is_room_for(kernel: Path, notes: bytes | None, most: int) -> None:
    kernel.write_bytes(vmlinux(notes=notes))
    memory = GuestMemory(64 * MiB)
    ranges = [(0xC000_0000 + i * 4096, 4096) for i in range(most - 1)]
    boot.load(memory, kernel=kernel, reserved=ranges[:-1])
    found = memory_map(memory) if notes else zero_page_map(memory)
    assert len(found) == most
    with pytest.raises(ConfigError, match=f"has {most + 1} entries; {most} have room"):
        boot.load(memory, kernel=kernel, reserved=ranges)
    memory.close()
