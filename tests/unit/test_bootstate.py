"""The boot vCPU's first state: descriptors agree with the segments, page tables with addresses."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, cast

import pytest

from chv import bootstate, layout
from chv.boot.entry import EntryPoint
from chv.memory import GuestMemory
from chv.vcpu import Vcpu


class FakeKvm:
    """Remembers what it is set to; starts with a processor's reset values where they matter."""

    def __init__(self) -> None:
        segment = {
            "base": 0xFFFF0000, "limit": 0xFFFF, "selector": 0xF000, "type": 0xB, "present": 1, "dpl": 0,
            "db": 0, "s": 1, "l": 0, "g": 0, "avl": 0, "unusable": 0,
        }  # fmt: skip
        self.special: dict[str, Any] = {
            name: dict(segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
        }
        self.special.update(
            gdt={"base": 0, "limit": 0xFFFF}, idt={"base": 0, "limit": 0xFFFF},
            cr0=0x60000010, cr2=0, cr3=0, cr4=0, cr8=0, efer=0, apic_base=0xFEE00900,
        )  # fmt: skip
        self.general: dict[str, int] = {}
        self.state = ""

    def special_registers(self) -> dict[str, Any]:
        return dict(self.special)

    def set_special_registers(self, values: dict[str, Any]) -> None:
        self.special = values

    def set_registers(self, values: dict[str, int]) -> None:
        self.general = values

    def set_mp_state(self, name: str) -> None:
        self.state = name


class FakeVcpu:
    def __init__(self) -> None:
        self.kvm = FakeKvm()


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(2 * layout.MiB)
    yield memory
    memory.close()


def entered(memory: GuestMemory, protocol: str, **registers: int) -> FakeKvm:
    vcpu = FakeVcpu()
    entry = EntryPoint(cast(Any, protocol), 0x100000, registers)
    bootstate.enter(cast(Vcpu, vcpu), memory, entry)
    return vcpu.kvm


def loaded(descriptor: int) -> dict[str, int]:
    """The segment that a processor loads from a descriptor (Intel SDM vol. 3A, figure 3-8)."""
    limit = descriptor & 0xFFFF | (descriptor >> 48 & 0xF) << 16
    g = descriptor >> 55 & 1
    return {
        "base": descriptor >> 16 & 0xFFFFFF | (descriptor >> 56) << 24,
        "limit": (limit << 12 | 0xFFF) if g else limit,
        "type": descriptor >> 40 & 0xF,
        "s": descriptor >> 44 & 1,
        "dpl": descriptor >> 45 & 3,
        "present": descriptor >> 47 & 1,
        "avl": descriptor >> 52 & 1,
        "l": descriptor >> 53 & 1,
        "db": descriptor >> 54 & 1,
        "g": g,
    }


PROTOCOLS = ("pvh", "linux32", "linux64")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_descriptors_in_memory_load_as_the_segments_that_are_set(memory: GuestMemory, protocol: str) -> None:
    special = entered(memory, protocol).special
    gdt = special["gdt"]
    assert gdt["base"] == layout.BOOT_GDT
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr"):
        segment = special[name]
        selector = segment["selector"]
        assert selector % 8 == 0
        assert selector > 0
        assert selector + 7 <= gdt["limit"]
        (descriptor,) = struct.unpack("<Q", memory.read(gdt["base"] + selector, 8))
        fields = loaded(descriptor)
        assert fields == {key: segment[key] for key in fields}
    assert memory.read(gdt["base"], 8) == bytes(8)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_segments_are_flat(memory: GuestMemory, protocol: str) -> None:
    special = entered(memory, protocol).special
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        assert (special[name]["base"], special[name]["limit"], special[name]["unusable"]) == (
            0,
            0xFFFFFFFF,
            0,
        )
    assert (special["cs"]["l"], special["cs"]["db"]) == ((1, 0) if protocol == "linux64" else (0, 1))


def test_the_linux_protocol_has_its_selectors(memory: GuestMemory) -> None:
    # Linux's boot.rst, 32-bit boot protocol: __BOOT_CS is 0x10, __BOOT_DS is 0x18.
    special = entered(memory, "linux32").special
    assert special["cs"]["selector"] == 0x10
    assert {special[name]["selector"] for name in ("ds", "es", "ss")} == {0x18}


@pytest.mark.parametrize("protocol", ["pvh", "linux32"])
def test_32_bit_entries_have_protection_on_and_paging_off(memory: GuestMemory, protocol: str) -> None:
    special = entered(memory, protocol).special
    assert special["cr0"] & 1
    assert not special["cr0"] & 1 << 31
    assert special["cr4"] == special["efer"] == 0


def translate(memory: GuestMemory, cr3: int, address: int) -> int | None:
    """A walk through 4-level page tables (Intel SDM vol. 3A, 4.5)."""
    table = cr3 & ~0xFFF
    for shift in (39, 30, 21, 12):
        (entry,) = struct.unpack("<Q", memory.read(table + 8 * (address >> shift & 0x1FF), 8))
        if not entry & 1:
            return None
        assert entry & 2, "writable"
        base = int(entry & 0x000F_FFFF_FFFF_F000)
        if shift == 12 or entry & 0x80:
            return base & ~((1 << shift) - 1) | address & (1 << shift) - 1
        table = base
    raise AssertionError


def test_64_bit_entry_maps_the_first_gib_to_itself(memory: GuestMemory) -> None:
    special = entered(memory, "linux64").special
    assert special["cr0"] & 1
    assert special["cr0"] & 1 << 31
    assert special["cr4"] & 1 << 5
    assert special["efer"] & 0x500 == 0x500
    for address in (0, 0x1FFFFF, 0x200000, 0x12345678, layout.GiB - 1):
        assert translate(memory, special["cr3"], address) == address
    for address in (layout.GiB, 4 * layout.GiB, 1 << 39, 1 << 47):
        assert translate(memory, special["cr3"], address) is None


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_registers_are_the_entrys_and_the_rest_is_zero(memory: GuestMemory, protocol: str) -> None:
    kvm = entered(memory, protocol, rbx=0x6000, rsi=0x7000)
    assert kvm.general == {"rip": 0x100000, "rflags": 2, "rbx": 0x6000, "rsi": 0x7000}
    assert kvm.state == "runnable"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_written_lies_where_the_layout_says(memory: GuestMemory, protocol: str) -> None:
    entered(memory, protocol)
    content = memory.read(0, layout.LOW_RAM_END)
    used = {address for address, byte in enumerate(content) if byte}
    gdt = set(range(layout.BOOT_GDT, layout.BOOT_IDT + 16))
    tables = set(range(layout.PML4, layout.PDPT + 2 * layout.PAGE_SIZE)) if protocol == "linux64" else set()
    assert used <= gdt | tables


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_descriptor_table_ends_before_the_interrupt_table(memory: GuestMemory, protocol: str) -> None:
    special = entered(memory, protocol).special
    gdt, idt = special["gdt"], special["idt"]
    assert gdt["base"] + gdt["limit"] < idt["base"], "the two tables overlap"


def test_nothing_in_the_apic_or_cr8_changes(memory: GuestMemory) -> None:
    special = entered(memory, "pvh").special
    assert (special["apic_base"], special["cr8"]) == (0xFEE00900, 0)
