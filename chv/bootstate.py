"""The state in which the boot vCPU enters a kernel.

Sources: Xen's x86/HVM direct boot ABI (PVH), Linux's Documentation/arch/x86/boot.rst (32-bit and 64-bit
boot protocol), Intel SDM vol. 3A 3.4.5 (segment descriptors) and 4.5 (4-level paging).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from . import layout

if TYPE_CHECKING:
    from .boot import EntryPoint
    from .memory import GuestMemory
    from .vcpu import Vcpu

_CR0_PE = 1 << 0
_CR0_PG = 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME = 1 << 8
_EFER_LMA = 1 << 10
_RFLAGS_RESERVED = 1 << 1

# type, s, l, db of the descriptors; selectors are 8 times the index.
_CODE32 = {"type": 0xB, "s": 1, "l": 0, "db": 1}
_CODE64 = {"type": 0xB, "s": 1, "l": 1, "db": 0}
_DATA = {"type": 0x3, "s": 1, "l": 0, "db": 1}
_TSS = {"type": 0xB, "s": 0, "l": 0, "db": 0}

_PAGE_PRESENT_WRITABLE = 0x3
_PAGE_HUGE = 0x80


def enter(vcpu: Vcpu, memory: GuestMemory, entry: EntryPoint) -> None:
    """Make ``vcpu`` start at ``entry``: registers, segments, for 64-bit entry page tables in ``memory``."""
    long_mode = entry.protocol == "linux64"
    # The 32-bit Linux protocol wants its segments at 0x10 and 0x18; the others take any.
    first = 2 if entry.protocol == "linux32" else 1
    code = _segment(first, 0xFFFFFFFF, _CODE64 if long_mode else _CODE32)
    data = _segment(first + 1, 0xFFFFFFFF, _DATA)
    task = _segment(first + 2, 0x67, _TSS)
    gdt = [0] * first + [_descriptor(code), _descriptor(data), _descriptor(task)]
    memory.write(layout.BOOT_GDT, struct.pack(f"<{len(gdt)}Q", *gdt))
    idt = max(layout.BOOT_IDT, layout.BOOT_GDT + 8 * len(gdt))
    memory.write(idt, bytes(8))

    special = vcpu.kvm.special_registers()
    special.update(cs=code, ds=data, es=data, fs=data, gs=data, ss=data, tr=task)
    special["gdt"] = {"base": layout.BOOT_GDT, "limit": 8 * len(gdt) - 1}
    special["idt"] = {"base": idt, "limit": 7}
    special.update(cr0=_CR0_PE, cr4=0, efer=0)
    if long_mode:
        _write_page_tables(memory)
        special.update(cr0=_CR0_PE | _CR0_PG, cr3=layout.PML4, cr4=_CR4_PAE, efer=_EFER_LME | _EFER_LMA)
    vcpu.kvm.set_special_registers(special)
    vcpu.kvm.set_registers({"rip": entry.rip, "rflags": _RFLAGS_RESERVED, **entry.registers})
    vcpu.kvm.set_mp_state("runnable")


def _segment(index: int, limit: int, kind: dict[str, int]) -> dict[str, int]:
    return {
        "base": 0,
        "limit": limit,
        "selector": index * 8,
        "present": 1,
        "dpl": 0,
        "g": 1 if limit > 0xFFFFF else 0,
        "avl": 0,
        "unusable": 0,
        **kind,
    }


def _descriptor(segment: dict[str, int]) -> int:
    """The 8 bytes of the GDT that load as ``segment``."""
    limit = segment["limit"] >> 12 if segment["g"] else segment["limit"]
    access = segment["type"] | segment["s"] << 4 | segment["dpl"] << 5 | segment["present"] << 7
    flags = segment["avl"] | segment["l"] << 1 | segment["db"] << 2 | segment["g"] << 3
    base = segment["base"]
    return (
        limit & 0xFFFF
        | (base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (base >> 24 & 0xFF) << 56
    )


def _write_page_tables(memory: GuestMemory) -> None:
    """The first GiB mapped to itself in pages of 2 MiB, at the addresses that old firmware counts on."""
    directory = layout.PDPT + layout.PAGE_SIZE
    memory.write(layout.PML4, struct.pack("<Q", layout.PDPT | _PAGE_PRESENT_WRITABLE))
    memory.write(layout.PDPT, struct.pack("<Q", directory | _PAGE_PRESENT_WRITABLE))
    pages = [i << 21 | _PAGE_HUGE | _PAGE_PRESENT_WRITABLE for i in range(512)]
    memory.write(directory, struct.pack("<512Q", *pages))
