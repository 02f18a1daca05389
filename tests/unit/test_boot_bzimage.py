"""bzImages: every compression, the setup header's checks, and the way of unpacking in the guest."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from chv import boot
from chv.errors import ConfigError, ImageError
from chv.memory import GuestMemory

from .boot_images import (
    LIBRARIES,
    TOOLS,
    BzImage,
    ElfFile,
    Load,
    MiB,
    bzimage,
    lz4_legacy,
    lzop,
    pack,
    pack_with_tool,
    vmlinux,
    with_size,
)

# Larger than one lz4 block, with x86 calls in it so that xz's filter has something to do.
CODE = b"\xe8\x10\x20\x00\x00\x90" * 20_000 + bytes(9 * MiB) + b"end"
BIG = ElfFile([Load(CODE)]).build()


def loaded(
    data: bytes, tmp_path: Path, size: int = 128 * MiB, cmdline: str = ""
) -> tuple[boot.EntryPoint, GuestMemory]:
    path = tmp_path / "vmlinuz"
    path.write_bytes(data)
    memory = GuestMemory(size)
    return boot.load(memory, kernel=path, cmdline=cmdline), memory


@pytest.mark.parametrize("name", LIBRARIES)
def test_compressions_by_library(tmp_path: Path, name: str) -> None:
    entry, memory = loaded(bzimage(name), tmp_path)
    assert entry == boot.EntryPoint("pvh", 0x100_0000, {"rbx": 0x6000})
    assert memory.read(0x100_0000, 8192) == bytes(range(256)) * 32
    memory.close()


@pytest.mark.parametrize("name", [name for name in TOOLS if name != "lzo"])
def test_compressions_by_the_tools_of_the_kernels_build(tmp_path: Path, name: str) -> None:
    entry, memory = loaded(BzImage(pack_with_tool(name, BIG)).build(), tmp_path)
    assert entry.protocol == "pvh"
    assert memory.read(0x100_0000, len(CODE)) == CODE
    memory.close()


def test_lzo_by_its_tool(tmp_path: Path) -> None:
    pytest.importorskip("lzo", reason="python-lzo is not installed")
    entry, memory = loaded(BzImage(pack_with_tool("lzo", BIG)).build(), tmp_path)
    assert entry.protocol == "pvh"
    memory.close()


def test_lzo_by_its_library(tmp_path: Path) -> None:
    lzo = pytest.importorskip("lzo", reason="python-lzo is not installed")
    half = len(BIG) // 2
    blocks = [(len(part), lzo.compress(part, 9, False)) for part in (BIG[:half], BIG[half:])]
    entry, memory = loaded(BzImage(with_size(lzop(blocks), len(BIG))).build(), tmp_path)
    assert entry.protocol == "pvh"
    assert memory.read(0x100_0000, len(CODE)) == CODE
    memory.close()


@pytest.mark.parametrize("flags", [0, 1, 0x101, 0x303, 0x801])
@pytest.mark.parametrize("version", [0x930, 0x1030])
def test_lzop_files_of_stored_blocks(tmp_path: Path, flags: int, version: int) -> None:
    data = vmlinux()
    packed = lzop([(1000, data[:1000]), (len(data) - 1000, data[1000:])], flags, version)
    entry, memory = loaded(BzImage(with_size(packed, len(data))).build(), tmp_path)
    assert entry.protocol == "pvh"
    memory.close()


def test_without_the_lzo_library_the_guest_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lzo", None)
    packed = with_size(lzop([(8000, b"short")]), 8000)
    entry, memory = loaded(BzImage(packed).build(), tmp_path)
    assert entry.protocol == "linux32"
    memory.close()


def test_the_guest_unpacks_a_kernel_without_a_pvh_entry(tmp_path: Path) -> None:
    data = bzimage(data=vmlinux(notes=None))
    entry, memory = loaded(data, tmp_path, cmdline="console=ttyS0")
    assert entry == boot.EntryPoint("linux32", 0x10_0000, {"rsi": 0x7000, "rsp": 0x8FF0})
    assert memory.read(0x10_0000, len(data) - 2048) == data[2048:]
    page = memory.read(0x7000, 4096)
    assert page[0x1F1:0x210] == data[0x1F1:0x210]
    assert page[0x210:0x212] == b"\xff\x01"
    assert struct.unpack_from("<I", page, 0x214) == (0x10_0000,)
    assert struct.unpack_from("<II", page, 0x218) == (0, 0)
    assert struct.unpack_from("<I", page, 0x228) == (0x2_0000,)
    assert page[0x22C:0x26C] == data[0x22C:0x26C]
    assert page[0x26C:0x2D0] == bytes(0x2D0 - 0x26C)
    assert memory.read(0x2_0000, 14) == b"console=ttyS0\0"
    memory.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 0x206},  # knows neither payload_offset nor init_size
        {"payload_length": 0},
        {"payload_length": 4},
    ],
)
def test_the_guest_unpacks_what_has_no_payload(tmp_path: Path, changes: dict[str, Any]) -> None:
    entry, memory = loaded(bzimage(**changes), tmp_path)
    assert entry.protocol == "linux32"
    memory.close()


def test_the_guest_unpacks_an_unknown_compression(tmp_path: Path) -> None:
    entry, memory = loaded(BzImage(b"new algorithm" + bytes(100)).build(), tmp_path)
    assert entry.protocol == "linux32"
    memory.close()


def test_a_32_bit_kernel_without_a_pvh_entry(tmp_path: Path) -> None:
    data = ElfFile(notes=None, bits=32, machine=3).build()
    entry, memory = loaded(bzimage(data=data), tmp_path)
    assert entry.protocol == "linux32"
    memory.close()


def test_room_to_unpack_in_the_guest(tmp_path: Path) -> None:
    data = bzimage(data=vmlinux(notes=None), init_size=50 * MiB)
    with pytest.raises(ImageError, match=r"the room to unpack itself: .* at least 66 MiB are needed"):
        loaded(data, tmp_path, size=65 * MiB)
    _, memory = loaded(data, tmp_path, size=66 * MiB)
    memory.close()


def test_setup_sectors_of_old_kernels(tmp_path: Path) -> None:
    """0 stands for 4."""
    data = bytearray(bzimage(setup_sectors=4))
    data[0x1F1] = 0
    entry, memory = loaded(bytes(data), tmp_path)
    assert entry.protocol == "pvh"
    memory.close()


def test_a_signature_behind_the_kernel(tmp_path: Path) -> None:
    entry, memory = loaded(bzimage() + b"signature" * 200, tmp_path)
    assert entry.protocol == "pvh"
    memory.close()


GOOD = vmlinux()
GZIP = pack("gzip", GOOD)


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


BAD_HEADERS = {
    "version 2.05": (bzimage(version=0x205), "boot protocol 2.05; 2.06 (Linux 2.6.22) or later is needed"),
    "zImage": (bzimage(loadflags=0), "is a zImage, which loads below 1 MiB; a bzImage is needed"),
    "no magic": (bzimage(magic=b"HdrX"), "an ELF file or a bzImage for x86-64 is needed"),
    "no boot flag": (bzimage(boot_flag=0), "an ELF file or a bzImage for x86-64 is needed"),
    "setup alone": (bzimage()[:0x280], "the file is truncated: 640 bytes hold no setup header"),
    "no code": (bzimage()[:2048], "the file is truncated"),
    "half the code": (bzimage()[:4100], "the file is truncated"),
    "syssize 0": (bzimage(syssize=0), "the file is truncated"),
    "syssize huge": (bzimage(syssize=0xFFFFFFFF), "the file is truncated: 68719478768 bytes are needed"),
    "payload offset": (bzimage(payload_offset=1 << 31), "its compressed kernel ends at 2147"),
    "payload length": (bzimage(payload_length=0xFFFFFFFF), "its compressed kernel ends at 4294971391"),
    "size 0": (BzImage(GZIP[:-4] + bytes(4)).build(), "unpacks to 0 bytes; 64 to 67108864 are possible"),
    "size 4 GiB": (BzImage(GZIP[:-4] + b"\xff" * 4).build(), "unpacks to 4294967295 bytes"),
    "size above init_size": (
        bzimage(init_size=4096),
        f"unpacks to {len(GOOD)} bytes; 64 to 4096 are possible",
    ),
    "not ELF": (bzimage(data=b"not an ELF file" * 10), "(unpacked): is not an ELF file"),
    "for Arm": (bzimage(data=vmlinux(machine=183)), "(unpacked): is an ELF file for 64-bit Arm"),
    "truncated ELF": (bzimage(data=GOOD[:2000]), "(unpacked): segment 0: the file is truncated"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(tmp_path: Path, case: str) -> None:
    data, message = BAD_HEADERS[case]
    with pytest.raises(ImageError) as caught:
        loaded(data, tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"kernel {tmp_path / 'vmlinuz'}")


def test_more_than_the_guests_memory(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="unpacks to 10 MiB, more than the guest's memory: 8 MiB"):
        loaded(BzImage(pack("gzip", BIG)).build(), tmp_path, size=8 * MiB)


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("wrong", [-1, 1, 1000])
def test_a_size_that_is_not_true(tmp_path: Path, name: str, wrong: int) -> None:
    packed = pack(name, GOOD)
    payload = packed[:-4] + struct.pack("<I", len(GOOD) + wrong)
    with pytest.raises(ImageError, match=r"unpack to|expected|damaged|incorrect"):
        loaded(BzImage(payload).build(), tmp_path)


@pytest.mark.parametrize("name", LIBRARIES)
def test_truncated_data(tmp_path: Path, name: str) -> None:
    packed = pack(name, GOOD)
    with pytest.raises(ImageError, match=r"truncated|damaged|unpack to|ends beyond"):
        loaded(BzImage(with_size(packed[: len(packed) // 2], len(GOOD))).build(), tmp_path)


@pytest.mark.parametrize("name", ["gzip", "bzip2", "xz"])  # the others have no checksum in a kernel
def test_damaged_data(tmp_path: Path, name: str) -> None:
    packed = pack(name, GOOD)
    with pytest.raises(ImageError, match="data are damaged"):
        loaded(BzImage(damaged(packed, len(packed) // 2)).build(), tmp_path)


LZO_BAD = {
    "no header": b"\x89LZO\0\r\n\x1a\n\x10",
    "larger than stored": lzop([(10, b"x" * 11)]),
    "empty block": lzop([(10, b"")]),
    "too much": lzop([(9000, bytes(9000))]),
    "too little": lzop([(100, bytes(100))]),
    "cut short": lzop([(8000, bytes(8000))])[:-20],
}


@pytest.mark.parametrize("case", LZO_BAD)
def test_damaged_lzop_files(tmp_path: Path, case: str) -> None:
    with pytest.raises(ImageError, match=r"damaged|unpack to"):
        loaded(BzImage(with_size(LZO_BAD[case], 8000)).build(), tmp_path)


def test_lz4_blocks(tmp_path: Path) -> None:
    """The magic may come again where files were concatenated; a block may not be empty or too long."""
    first, second = GOOD[:4000], GOOD[4000:]
    joined = with_size(lz4_legacy(first) + lz4_legacy(second), len(GOOD))
    entry, memory = loaded(BzImage(joined).build(), tmp_path)
    assert entry.protocol == "pvh"
    memory.close()
    for tail in (b"\1", bytes(4), b"\xff\xff\xff\x7f1234", lz4_legacy(b"more")):
        with pytest.raises(ImageError, match=r"ends beyond the data|more than the expected"):
            loaded(BzImage(with_size(lz4_legacy(GOOD) + tail, len(GOOD))).build(), tmp_path)


def test_a_zstd_frame_that_asks_for_a_large_window(tmp_path: Path) -> None:
    """A window of 1 GiB: magic, no checksum, window descriptor 20 << 3, one empty block."""
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([20 << 3]) + b"\x01\x00\x00"
    with pytest.raises(ImageError, match="its zstd data are damaged"):
        loaded(BzImage(with_size(frame, 8000)).build(), tmp_path)


def test_an_lzma_file_that_asks_for_a_large_dictionary(tmp_path: Path) -> None:
    packed = bytearray(pack("lzma", GOOD))
    packed[1:5] = b"\xff\xff\xff\xff"
    packed[1:3] = b"\0\0"  # still recognized
    with pytest.raises(ImageError, match="its lzma data are damaged"):
        loaded(BzImage(bytes(packed)).build(), tmp_path)


@pytest.mark.parametrize(("length", "fits"), [(100, True), (101, False)])
def test_the_kernels_own_limit_of_the_command_line(tmp_path: Path, length: int, fits: bool) -> None:
    data = bzimage(cmdline_size=100)
    if fits:
        _, memory = loaded(data, tmp_path, cmdline="x" * length)
        memory.close()
        return
    with pytest.raises(ConfigError, match=r"payload\.cmdline: has 101 bytes; this kernel takes 100 at most"):
        loaded(data, tmp_path, cmdline="x" * length)
