"""ELF files: what is loaded where, and every way in which one can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from chv import boot
from chv.boot.elf import Elf, parse
from chv.boot.source import BytesSource
from chv.errors import ImageError
from chv.memory import GuestMemory

from .boot_images import (
    PT_INTERP,
    PT_TLS,
    XEN_GUEST_OS,
    ElfFile,
    Load,
    MiB,
    note,
    pvh_note,
    vmlinux,
)

GiB = 1024 * MiB


def parsed(data: bytes) -> Elf:
    return parse(BytesSource("kernel x", data))


def test_segments_and_bss_are_placed(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(vmlinux())
    memory = GuestMemory(32 * MiB)
    memory.write(0x110_0000, b"\xff" * 16384)
    entry = boot.load(memory, kernel=tmp_path / "vmlinux")
    assert entry == boot.EntryPoint("pvh", 0x100_0000, {"rbx": 0x6000})
    assert memory.read(0x100_0000, 8192) == bytes(range(256)) * 32
    assert memory.read(0x110_0000, 400) == b"data" * 100
    assert memory.read(0x110_0000 + 400, 8192 - 400) == bytes(8192 - 400)
    assert memory.read(0x110_0000 + 8192, 8192) == b"\xff" * 8192  # nothing beyond its end
    memory.close()


def test_a_segment_of_zeros_alone_is_cleared(tmp_path: Path) -> None:
    loads = [Load(), Load(b"", paddr=0x110_0000, memsz=3 * MiB + 5, offset=1 << 60)]
    (tmp_path / "vmlinux").write_bytes(ElfFile(loads).build())
    memory = GuestMemory(32 * MiB)
    memory.write(0x110_0000, b"\xff" * (4 * MiB))
    boot.load(memory, kernel=tmp_path / "vmlinux")
    assert memory.read(0x110_0000, 3 * MiB + 5) == bytes(3 * MiB + 5)
    assert memory.read(0x110_0000 + 3 * MiB + 5, 1) == b"\xff"
    memory.close()


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize(("bits", "machine"), [(64, 62), (64, 3), (32, 3)])
def test_pvh_entry(bits: int, machine: int, size: int) -> None:
    image = parsed(ElfFile(bits=bits, machine=machine, notes=pvh_note(0x100_0010, size)).build())
    assert image.pvh_entry == 0x100_0010


def test_the_pvh_note_is_found_among_others() -> None:
    notes = (
        note(1, b"abc", b"GNU")
        + note(18, b"not it", b"NotXen")
        + note(5, b"xen-3.0\0")
        + pvh_note(0x100_0020)
    )
    image = parsed(ElfFile(notes=notes).build())
    assert image.pvh_entry == 0x100_0020
    assert not image.is_linux


def test_notes_aligned_to_8() -> None:
    notes = note(5, b"12345", b"GNU", align=8) + note(18, bytes.fromhex("2000000100000000"), align=8)
    assert parsed(ElfFile(notes=notes, note_align=8).build()).pvh_entry == 0x100_0020


@pytest.mark.parametrize("extra", [note(XEN_GUEST_OS, b"linux\0"), note(257, bytes(4), b"Linux")])
def test_linux_is_recognized_by_its_notes(extra: bytes) -> None:
    assert parsed(ElfFile(notes=extra + pvh_note(0x100_0000)).build()).is_linux


def test_an_efi_firmware_like_edk2() -> None:
    """ELF64 with machine type EM_386, the whole file in one segment, a 4-byte PVH entry."""
    firmware = ElfFile(
        [Load(bytes(4 * MiB), paddr=0x10_0000)], notes=pvh_note(0x4F_FFD0, 4), machine=3, entry=0x4F_FFD0
    )
    image = parsed(firmware.build())
    assert (image.segments[0].address, image.segments[0].end) == (0x10_0000, 0x50_0000)
    assert image.pvh_entry == 0x4F_FFD0


def test_without_a_note_it_is_entered_the_64_bit_way(tmp_path: Path) -> None:
    (tmp_path / "fw").write_bytes(ElfFile([Load(paddr=0x10_0000)], notes=None, entry=0x10_0008).build())
    memory = GuestMemory(16 * MiB)
    entry = boot.load(memory, kernel=None, firmware=tmp_path / "fw")
    assert entry == boot.EntryPoint("linux64", 0x10_0008, {"rsi": 0x7000, "rsp": 0x8FF0, "rbp": 0x8FF0})
    memory.close()


TOO_HIGH = pvh_note(1 << 32)
BAD_FILES = {
    "no header": (vmlinux()[:19], "truncated: 19 bytes hold no ELF header"),
    "half a header": (vmlinux()[:57], "truncated within its ELF header"),
    "not ELF": (b"\x7fELG" + bytes(60), "is not an ELF file"),
    "big-endian": (vmlinux(byte_order=2), "byte order 2; a little-endian x86 file is needed"),
    "no class": (vmlinux()[:4] + b"\3" + vmlinux()[5:], "ELF class 3"),
    "arm64": (vmlinux(machine=183), "for 64-bit Arm; x86 (3) or x86-64 (62) is needed"),
    "unknown machine": (vmlinux(machine=9999), "for machine type 9999"),
    "object": (vmlinux(type=1), "a relocatable object (.o); an executable is needed"),
    "core dump": (vmlinux(type=4), "a core dump"),
    "type 77": (vmlinux(type=77), "of type 77"),
    "no program headers": (vmlinux(phnum=0), "has 0 program headers; 1 to 1024 are allowed"),
    "too many headers": (vmlinux(phnum=0xFFFF), "has 65535 program headers"),
    "header size": (vmlinux(phentsize=32), "program headers of 32 bytes; in this ELF class they have 56"),
    "headers beyond the end": (vmlinux(phoff=1 << 40), "its program headers lie beyond its end"),
    "headers wrap": (vmlinux(phoff=(1 << 64) - 8), "its program headers lie beyond its end"),
    "nothing to load": (ElfFile([]).build(), "has no segment to load (PT_LOAD)"),
    "empty segments": (ElfFile([Load(b"")]).build(), "has no segment to load"),
    "program": (ElfFile([Load(), Load(type=PT_INTERP)]).build(), "is a program for a running Linux"),
    "static program": (
        ElfFile([Load(), Load(b"", type=PT_TLS)], notes=None).build(),
        "is a program for a running Linux",
    ),
    "filesz > memsz": (
        ElfFile([Load(bytes(100), memsz=50)]).build(),
        "segment 0: 0x64 bytes in the file, 0x32 in memory",
    ),
    "truncated segment": (ElfFile([Load(filesz=5000)]).build(), "segment 0: the file is truncated: bytes"),
    "offset beyond": (ElfFile([Load(offset=1 << 63)]).build(), "segment 0: the file is truncated"),
    "offset wraps": (ElfFile([Load(offset=(1 << 64) - 16)]).build(), "segment 0: the file is truncated"),
    "address wraps": (
        ElfFile([Load(), Load(paddr=(1 << 64) - 32)]).build(),
        "segment 1: 0x40 bytes at 0xffffffffffffffe0 wrap around",
    ),
    "low memory": (
        ElfFile([Load(paddr=0x8000)]).build(),
        "loads at 0x8000; below 0x100000 are the boot structures",
    ),
    "reaches from low": (ElfFile([Load(paddr=0xF_FFFF)]).build(), "loads at 0xfffff; below 0x100000"),
    "overlap": (ElfFile([Load(), Load(paddr=0x100_003F)]).build(), "segments 0 and 1 overlap at 0x100003f"),
    "same place": (ElfFile([Load(), Load()]).build(), "segments 0 and 1 overlap"),
    "note too long": (ElfFile(note_size=1 << 40).build(), "note segment 1 has 1099511627776 bytes"),
    "note beyond the end": (ElfFile(note_size=4096).build(), "note segment 1 has 4096 bytes"),
    "note name": (
        ElfFile(notes=b"\xff\xff\xff\xff" + pvh_note(0)[4:]).build(),
        "note segment 1: the note at 0 ends beyond the segment",
    ),
    "note value": (
        ElfFile(notes=pvh_note(0)[:4] + b"\xff\xff\xff\xff" + pvh_note(0)[8:]).build(),
        "the note at 0 ends beyond the segment",
    ),
    "PVH note of 3 bytes": (
        ElfFile(notes=pvh_note(0, 3)).build(),
        "the PVH note has 3 bytes; 4 or 8 are allowed",
    ),
    "PVH entry above 4 GiB": (ElfFile(notes=TOO_HIGH).build(), "the PVH entry 0x100000000 is above 4 GiB"),
    "PVH entry elsewhere": (
        ElfFile(notes=pvh_note(0x200_0000)).build(),
        "the entry point 0x2000000 lies in none of its segments",
    ),
    "entry elsewhere": (
        ElfFile(notes=None, entry=0x200_0000).build(),
        "the entry point 0x2000000 lies in none of its segments",
    ),
    "entry above the page tables": (
        ElfFile([Load(paddr=1 << 30)], notes=None, entry=1 << 30).build(),
        "has no PVH note, and its entry point 0x40000000 is above 0x40000000",
    ),
    "32-bit without a note": (
        ElfFile(notes=None, bits=32, machine=3).build(),
        "has no PVH note, without which only 64-bit code can be entered",
    ),
    "i386 in ELF64 without a note": (ElfFile(notes=None, machine=3).build(), "has no PVH note"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path: Path, case: str) -> None:
    data, message = BAD_FILES[case]
    path = tmp_path / "vmlinux"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        boot.prepare(path)
    if case != "not ELF":  # found out before the ELF reader sees it
        assert message in str(caught.value)
    assert str(caught.value).startswith(f"kernel {path}: ")


PLACES = {
    "above the RAM": (
        Load(paddr=40 * MiB, memsz=2 * MiB + 1),
        "segment 1: takes guest memory 0x2800000 to 0x2a00000, but there are 32 MiB; "
        "at least 43 MiB are needed (memory.size)",
    ),
    "across the end": (Load(paddr=32 * MiB - 16), "at least 33 MiB are needed (memory.size)"),
    "in the hole": (Load(paddr=0xC000_0000), "RAM ends at 0xc0000000, devices follow up to 4 GiB"),
    "from low into high": (Load(paddr=0xBFFF_FFF0), "RAM ends at 0xc0000000"),
    "over the hole": (Load(b"", paddr=0xBFFF_0000, memsz=2 * GiB), "RAM ends at 0xc0000000"),
    "beyond 4 GiB": (Load(paddr=1 << 40), "which is beyond the 32 MiB of the guest"),
}


@pytest.mark.parametrize("case", PLACES)
def test_segments_outside_ram(tmp_path: Path, case: str) -> None:
    load, message = PLACES[case]
    path = tmp_path / "vmlinux"
    path.write_bytes(ElfFile([Load(), load]).build())
    memory = GuestMemory(32 * MiB)
    with boot.prepare(path) as payload, pytest.raises(ImageError) as caught:
        payload.place(memory)
    assert message in str(caught.value)
    assert memory.read(0, 32 * MiB) == bytes(32 * MiB)  # nothing was written
    memory.close()


def test_a_segment_above_4_gib(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(ElfFile([Load(), Load(b"high", paddr=4 * GiB + 4096, memsz=8)]).build())
    memory = GuestMemory(4 * GiB)
    boot.load(memory, kernel=path)
    assert memory.read(4 * GiB + 4096, 8) == b"high\0\0\0\0"
    memory.close()
