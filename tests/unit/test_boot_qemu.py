"""What was placed is entered by a real kernel: QEMU (without KVM) runs guest memory as chv left it.

A ROM of a few instructions brings QEMU's processor into the state that chv gives its boot vCPU, so that
all three boot protocols run on a machine without /dev/kvm. A program in the initramfs writes a line and
reboots.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chv import boot, bootstate
from chv.memory import GuestMemory

from .boot_images import MiB, require_kernels

MEMORY = 512 * MiB
STUB = 0x1000  # in guest memory that chv leaves alone
CMDLINE = "console=ttyS0 earlyprintk=serial panic=-1 reboot=t nokaslr lpj=1000000 greeting=hello"
GREETING = b"init of the test runs\n"


def init_program() -> bytes:
    """A static x86-64 program: write(1, GREETING), then reboot(RESTART)."""
    base, code_at = 0x400000, 0x78
    code = b"".join(
        [
            b"\xbf\x01\x00\x00\x00",  # mov edi, 1
            b"\x48\x8d\x35\x2d\x00\x00\x00",  # lea rsi, [rip + 0x2d]
            b"\xba" + struct.pack("<I", len(GREETING)),  # mov edx, length
            b"\xb8\x01\x00\x00\x00\x0f\x05",  # write
            b"\xbf\xad\xde\xe1\xfe\xbe\x69\x19\x12\x28\xba\x67\x45\x23\x01",  # the magic numbers, RESTART
            b"\xb8\xa9\x00\x00\x00\x0f\x05",  # reboot
            b"\xeb\xfe",
        ]
    )
    code = code.ljust(12 + 0x2D, b"\x90") + GREETING
    size = code_at + len(code)
    header = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, base + code_at, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096) + code


def cpio(name: str, data: bytes) -> bytes:
    """An initramfs with one executable file (newc: Linux, early-userspace/buffer-format.rst)."""

    def entry(name: str, mode: int, data: bytes) -> bytes:
        fields = [1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        return head.ljust(-(-len(head) // 4) * 4, b"\0") + data.ljust(-(-len(data) // 4) * 4, b"\0")

    return entry(name, 0o100755, data) + entry("TRAILER!!!", 0, b"")


class RecordingVcpu:
    """Takes the registers that chv.bootstate sets."""

    def __init__(self) -> None:
        self.kvm = self
        self.special: dict[str, Any] = {}
        self.general: dict[str, int] = {}

    def special_registers(self) -> dict[str, Any]:
        return {}

    def set_special_registers(self, values: dict[str, Any]) -> None:
        self.special = values

    def set_registers(self, values: dict[str, int]) -> None:
        self.general = values

    def set_mp_state(self, state: str) -> None:
        assert state == "runnable"


def stub(vcpu: RecordingVcpu) -> bytes:
    """32-bit code that loads the recorded registers, last of all CS and RIP."""
    special, general = vcpu.special, vcpu.general
    table_at = STUB + 0x200
    code = b"\x0f\x01\x15" + struct.pack("<I", table_at)  # lgdt
    code += b"\x66\xb8" + struct.pack("<H", special["ds"]["selector"])
    code += b"".join(
        b"\x8e" + bytes([0xC0 | register << 3]) for register in (0, 2, 3, 4, 5)
    )  # es ss ds fs gs
    code += b"\xb8" + struct.pack("<I", special["cr4"]) + b"\x0f\x22\xe0"
    if special["efer"]:
        code += b"\xb8" + struct.pack("<I", special["cr3"]) + b"\x0f\x22\xd8"
        # LMA is set by the processor.
        code += (
            b"\xb9\x80\x00\x00\xc0\x31\xd2\xb8" + struct.pack("<I", special["efer"] & ~0x400) + b"\x0f\x30"
        )
    code += b"\xb8" + struct.pack("<I", special["cr0"] | 0x10) + b"\x0f\x22\xc0"
    for number, name in enumerate(["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"]):
        code += bytes([0xB8 + number]) + struct.pack("<I", general.get(name, 0))
    code += b"\xea" + struct.pack("<IH", general["rip"], special["cs"]["selector"])  # jmp far
    table = struct.pack("<HI", special["gdt"]["limit"], special["gdt"]["base"])
    return code.ljust(0x200, b"\x90") + table


def rom() -> bytes:
    """From the reset vector into flat 32-bit mode, then to the stub."""
    size, start, table = 65536, 0xF000, 0xF100
    code = b"\xfa"  # cli
    code += b"\x2e\x66\x0f\x01\x16" + struct.pack("<H", table)  # lgdt cs:[table], 32-bit base
    code += b"\x0f\x20\xc0\x66\x83\xc8\x01\x0f\x22\xc0"  # cr0 |= 1
    code += b"\x66\xea" + struct.pack("<IH", (1 << 32) - size + start + 0x40, 8)
    flat = b"\x66\xb8\x10\x00\x8e\xd8\xb8" + struct.pack("<I", STUB) + b"\xff\xe0"  # ds = 0x10, jmp STUB
    descriptors = struct.pack("<3Q", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)
    image = bytearray(size)
    image[start : start + len(code)] = code
    image[start + 0x40 : start + 0x40 + len(flat)] = flat
    image[table : table + 6] = struct.pack("<HI", 23, (1 << 32) - size + table + 8)
    image[table + 8 : table + 8 + 24] = descriptors
    image[0xFFF0:0xFFF3] = b"\xe9" + struct.pack("<H", (start - 0xFFF3) & 0xFFFF)
    return bytes(image)


def run(payload: boot.Payload, folder: Path, protocol: str) -> str:
    """Boot ``payload`` in QEMU until it reboots; what it wrote to its serial line."""
    memory, vcpu = GuestMemory(MEMORY), RecordingVcpu()
    entry = payload.place(memory, rsdp=0)
    assert entry.protocol == protocol
    bootstate.enter(vcpu, memory, entry)  # type: ignore[arg-type]
    memory.write(STUB, stub(vcpu))
    with (folder / "ram").open("wb") as file:
        file.truncate(MEMORY)
        for start in range(0, MEMORY, MiB):
            if (piece := memory.read(start, MiB)) != bytes(MiB):
                os.pwrite(file.fileno(), piece, start)
    memory.close()
    (folder / "rom").write_bytes(rom())
    backend = f"memory-backend-file,id=ram,size={MEMORY},share=on,mem-path={folder / 'ram'}"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", str(MEMORY // MiB), "-no-reboot"]
    command += ["-object", backend, "-machine", "pc,memory-backend=ram", "-bios", str(folder / "rom")]
    command += ["-nodefaults", "-display", "none", "-serial", "stdio"]
    with (folder / "log").open("w+b") as log:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=120, check=True)
        log.seek(0)
        return log.read().decode(errors="replace")


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed")
@pytest.mark.parametrize(("protocol", "which"), [("pvh", 0), ("pvh", -1), ("linux32", -1), ("linux64", -1)])
def test_a_kernel_reads_what_was_placed(tmp_path: Path, protocol: str, which: int) -> None:
    kernel = require_kernels()[which]
    initramfs = tmp_path / "initramfs"
    initramfs.write_bytes(cpio("init", init_program()))
    if protocol == "linux32":
        kernel = in_guest(kernel, tmp_path)
    elif protocol == "linux64":
        kernel = without_pvh_note(kernel, tmp_path)
    with boot.prepare(kernel, initramfs=initramfs, cmdline=CMDLINE) as payload:
        log = run(payload, tmp_path, protocol)
    address = MEMORY - 4096
    assert f"Command line: {CMDLINE}" in log
    assert "[mem 0x0000000000000000-0x000000000009ffff] usable" in log
    assert f"[mem 0x0000000000100000-{MEMORY - 1:#018x}] usable" in log
    assert f"RAMDISK: [mem {address:#010x}-" in log
    assert GREETING.decode().strip() in log


def in_guest(kernel: Path, folder: Path) -> Path:
    """A bzImage that says that it has no payload, so that chv lets it unpack itself."""
    data = bytearray(kernel.read_bytes())
    data[0x248:0x250] = bytes(8)
    path = folder / "vmlinuz"
    path.write_bytes(data)
    return path


def without_pvh_note(kernel: Path, folder: Path) -> Path:
    """The vmlinux in a bzImage, its PVH note made into one that means nothing."""
    boot.prepare(kernel, cache_dir=folder / "cache").close()
    (path,) = (folder / "cache").iterdir()
    data = path.read_bytes()
    head = struct.pack("<3I", 4, 8, 18) + b"Xen\0"
    assert data.count(head) == 1
    path.write_bytes(data.replace(head, struct.pack("<3I", 4, 8, 0x7777) + b"Xen\0"))
    return path
