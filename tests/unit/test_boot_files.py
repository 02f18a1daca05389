"""Files that are no kernel: the error says what they are."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import socket
from pathlib import Path

import pytest

from chv import boot
from chv.errors import ImageError

from .boot_images import MiB, lz4_legacy, lzop, vmlinux


def at(offset: int, magic: bytes, size: int = 65536) -> bytes:
    return bytes(offset) + magic + bytes(range(256)) * ((size - offset) // 256)


NOT_A_KERNEL = {
    "text": ("console=ttyS0 root=/dev/vda1 # grüße\n".encode() * 40, "is a text file"),
    "text cut within a character": (b"x" * 511 + "ä".encode() * 10, "is a text file"),
    "script": (b"#!/bin/sh\nexec true\n", "is a script"),
    "zeros": (bytes(8192), "holds only zeros at its start"),
    "noise": (bytes(range(128, 256)) * 64, "is of an unknown kind"),
    "one byte": (b"\x7f", "is of an unknown kind"),
    "vmlinux.gz": (gzip.compress(vmlinux()), "is compressed with gzip; unpack it first (gzip -d)"),
    "vmlinux.bz2": (bz2.compress(vmlinux()), "is compressed with bzip2; unpack it first (bzip2 -d)"),
    "vmlinux.xz": (lzma.compress(vmlinux()), "is compressed with xz; unpack it first (xz -d)"),
    "vmlinux.lzma": (lzma.compress(vmlinux(), lzma.FORMAT_ALONE), "is compressed with lzma; unpack it first"),
    "vmlinux.zst": (b"\x28\xb5\x2f\xfd" + bytes(100), "is compressed with zstd; unpack it first (zstd -d)"),
    "vmlinux.lz4": (lz4_legacy(vmlinux()), "is compressed with lz4; unpack it first (lz4 -d)"),
    "a modern lz4 file": (b"\x04\x22\x4d\x18" + bytes(100), "is compressed with lz4; unpack it first"),
    "vmlinux.lzo": (lzop([(5, b"12345")]), "is compressed with lzo; unpack it first (lzop -d)"),
    "arm64 Image": (b"MZ" + at(0x36, b"ARM\x64"), "is a 64-bit Arm kernel (Image)"),
    "arm zImage": (at(0x24, b"\x18\x28\x6f\x01"), "is a 32-bit Arm kernel (zImage)"),
    "riscv Image": (b"MZ" + at(0x36, b"RSC\x05"), "is a RISC-V kernel (Image)"),
    "EFI program": (b"MZ" + at(0, b"\x90"), "is an EFI or Windows program (PE) without a Linux setup header"),
    "OVMF.fd": (at(0x28, b"_FVH"), "is a UEFI firmware volume"),
    "GPT disk": (at(0x200, b"EFI PART"), "is a disk image (GPT)"),
    "MBR disk": (at(0x1FE, b"\x55\xaa"), "is a disk image (boot sector)"),
    "qcow2": (at(0, b"QFI\xfb"), "is a disk image (qcow2)"),
    "VHDX": (at(0, b"vhdxfile"), "is a disk image (VHDX)"),
    "ext4": (at(0x438, b"\x53\xef"), "is a file system image (ext2, ext3 or ext4)"),
    "squashfs": (at(0, b"hsqs"), "is a file system image (squashfs)"),
    "ISO": (at(0x8001, b"CD001"), "is a CD image (ISO 9660)"),
    "cpio": (at(0, b"070701"), "is an initramfs (cpio archive)"),
    "deb": (at(0, b"!<arch>\n"), "is an archive or a Debian package (ar)"),
    "rpm": (at(0, b"\xed\xab\xee\xdb"), "is an RPM package"),
}


@pytest.mark.parametrize("case", NOT_A_KERNEL)
@pytest.mark.parametrize("role", ["kernel", "firmware"])
def test_what_it_is_instead(tmp_path: Path, case: str, role: str) -> None:
    data, message = NOT_A_KERNEL[case]
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        boot.prepare(**{role: path})  # type: ignore[arg-type]
    text = str(caught.value)
    assert text.startswith(f"{role} {path}: {message}")
    assert text.endswith("; an ELF file or a bzImage for x86-64 is needed")


@pytest.mark.parametrize("role", ["kernel", "firmware", "initramfs"])
def test_not_a_regular_file(tmp_path: Path, role: str) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(vmlinux())
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    expected = {
        tmp_path / "directory": "is a directory; a regular file is needed",
        tmp_path / "empty": "the file is empty",
        tmp_path / "pipe": "is a pipe; a regular file is needed",
        tmp_path / "socket": "cannot be opened (No such device or address)",
        tmp_path / "missing": "cannot be opened (No such file or directory)",
        kernel / "below": "cannot be opened (Not a directory)",
        tmp_path / "loop": "cannot be opened (Too many levels of symbolic links)",
        tmp_path / ("n" * 300): "cannot be opened (File name too long)",
        Path("/dev/null"): "is a character device; a regular file is needed",
        Path("nul\0byte"): "cannot be opened (embedded null byte)",
    }
    for path, message in expected.items():
        files = {"kernel": kernel, role: path} if role == "initramfs" else {role: path}
        with pytest.raises(ImageError) as caught:
            boot.prepare(**files)  # type: ignore[arg-type]
        assert str(caught.value) == f"{role} {path}: {message}"


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so what another user would see is acted."""

    def denied(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "vmlinux"
    path.write_bytes(vmlinux())
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(ImageError) as caught:
        boot.prepare(path)
    assert str(caught.value) == f"kernel {path}: cannot be opened (Permission denied)"


def test_a_user_program() -> None:
    with pytest.raises(ImageError, match="is a program for a running Linux, not a kernel or firmware"):
        boot.prepare("/bin/true")


def test_a_large_disk_image_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(MiB << 20)  # 1 TiB, sparse
    with pytest.raises(ImageError, match="holds only zeros at its start"):
        boot.prepare(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    """Its size is known from before; what is missing is an error, not a signal."""
    from chv.boot.source import FileSource

    path = tmp_path / "vmlinux"
    path.write_bytes(bytes(8192))
    source = FileSource("kernel", path)
    os.truncate(path, 4096)
    with pytest.raises(ImageError, match="the file is truncated: 8192 bytes at 0 lie beyond its end"):
        source.copy_into(memoryview(bytearray(8192)), 0)
    with pytest.raises(ImageError, match="the file is truncated"):
        source.read(4000, 1000)
    source.close()
