"""Kernels of a few instructions for chv.VM: an ELF file with the PVH note around machine code."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chv
from tests.unit.boot_images import ElfFile, Load, pvh_note

from .guest import machine_code

ENTRY = 0x100000
SCRATCH = 0x200000  # RAM that nothing else uses
MEMORY = 16 << 20

POWER_OFF = """
    b0 34           ; mov al, 0x34
    66 ba 00 06     ; mov dx, 0x600
    ee              ; out dx, al
"""
RESET = """
    b0 01           ; mov al, 1
    66 ba 00 06     ; mov dx, 0x600
    ee              ; out dx, al
"""
FOREVER = "eb fe    ; jmp $"
HALT = """
    fa              ; cli
    f4              ; hlt
"""
# Counts for ever in SCRATCH.
COUNT = f"""
    ff 05 {SCRATCH.to_bytes(4, "little").hex()}  ; again: inc dword [SCRATCH]
    eb f8                                        ; jmp again
"""


def kernel_bytes(code: str) -> bytes:
    return ElfFile(loads=[Load(machine_code(code), paddr=ENTRY)], notes=pvh_note(ENTRY), entry=ENTRY).build()


@contextlib.contextmanager
def tiny_vm(code: str, **parts: Any) -> Iterator[chv.VM]:
    """A VM whose kernel is ``code``, not booted yet; deleted at the end."""
    with tempfile.TemporaryDirectory() as folder:
        kernel = Path(folder, "kernel")
        kernel.write_bytes(kernel_bytes(code))
        settings = {"kernel": str(kernel), "memory": MEMORY, "serial": "null", **parts}
        with chv.VM(**settings) as vm:
            yield vm


@contextlib.contextmanager
def booted_vm(code: str, **parts: Any) -> Iterator[chv.VM]:
    with tiny_vm(code, **parts) as vm:
        vm.boot()
        yield vm


def counter(vm: chv.VM, address: int = SCRATCH, size: int = 4) -> int:
    assert vm.memory is not None
    return int.from_bytes(vm.memory.read(address, size), "little")
