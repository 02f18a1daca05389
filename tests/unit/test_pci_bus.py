"""PCI as a guest sees it: configuration space by ports and by memory, BARs, MSI-X."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chv import layout
from chv.errors import ConfigError
from chv.interrupts import GsiRoutes
from chv.pci.bus import PciBus
from chv.pci.function import PciFunction
from chv.pci.msix import Msix

from .pci_machine import Echo, FakeVm, PciMachine

BAR = 0x10
COMMAND = 0x04
ECAM_SLOT = 1 << 15


@pytest.fixture
def machine() -> Iterator[PciMachine]:
    machine = PciMachine(Echo(), Echo())
    yield machine
    machine.close()


def test_the_host_bridge_is_cloud_hypervisors(machine: PciMachine) -> None:
    assert machine.read(0, 0) == 0x0D57_8086
    assert machine.read(0, 8) >> 8 == 0x060000


def test_ports_and_memory_show_the_same_space(machine: PciMachine) -> None:
    for register in range(0, 256, 4):
        assert machine.mmio.read(layout.ECAM + ECAM_SLOT + register, 4) == machine.read(1, register)
    machine.mmio.write(layout.ECAM + ECAM_SLOT + 0x3C, 1, 0x5A)
    assert machine.read(1, 0x3C, 1) == 0x5A
    assert machine.mmio.read(layout.ECAM + ECAM_SLOT + 0x100, 4) == 0, "no extended capabilities"


def test_what_is_not_there_reads_as_ones(machine: PciMachine) -> None:
    assert machine.read(3, 0) == 0xFFFF_FFFF
    for address in (1 << 31 | 1 << 16, 1 << 31 | 1 << 8, 0):  # bus 1, function 1, not enabled
        machine.pio.write(0xCF8, 4, address)
        assert machine.pio.read(0xCFC, 4) == 0xFFFF_FFFF
        machine.pio.write(0xCFC, 4, 0)
    assert machine.mmio.read(layout.ECAM + (1 << 20), 4) == 0xFFFF_FFFF
    assert machine.mmio.read(layout.ECAM + (1 << 12), 4) == 0xFFFF_FFFF
    machine.mmio.write(layout.ECAM + 31 * ECAM_SLOT, 4, 0)


def test_parts_of_a_register_at_the_data_port(machine: PciMachine) -> None:
    machine.pio.write(0xCF8, 4, 1 << 31)
    assert [machine.pio.read(0xCFC + byte, 1) for byte in range(4)] == [0x86, 0x80, 0x57, 0x0D]
    assert machine.pio.read(0xCFE, 2) == 0x0D57
    assert machine.pio.read(0xCFE, 4) == 0xFFFF_FFFF, "beyond the register"
    assert machine.pio.read(0xCF8, 4) == 1 << 31
    assert machine.pio.read(0xCF8, 1) == 0xFF, "the address register has one width"


def test_port_0xcf9_resets(machine: PciMachine) -> None:
    machine.pio.write(0xCF9, 1, 2)
    assert machine.resets == 0
    machine.pio.write(0xCF9, 1, 6)
    machine.pio.write(0xCF9, 1, 0xE)
    assert machine.resets == 2


def test_bars_are_placed_below_4_gib_and_decode_from_the_start(machine: PciMachine) -> None:
    for slot in (1, 2):
        address = machine.read(slot, BAR) & ~0xF | machine.read(slot, BAR + 4) << 32
        assert layout.DEVICES_32BIT <= address < layout.ECAM
        assert address % 0x80000 == 0
        assert machine.read(slot, COMMAND, 2) & 2
        assert machine.mmio.read(address + 0x4000, 4) == int.from_bytes(b"abcd", "little")


def test_a_bar_is_sized_and_restored_with_decoding_on(machine: PciMachine) -> None:
    before = machine.read(1, BAR)
    machine.write(1, BAR, 0xFFFF_FFFF)
    assert machine.read(1, BAR) == (~0x7FFFF | 4) & 0xFFFF_FFFF
    machine.write(1, BAR, before)
    machine.write(1, BAR + 4, 0xFFFF_FFFF)
    assert machine.read(1, BAR + 4) == 0xFFFF_FFFF
    machine.write(1, BAR + 4, 0)
    assert machine.read(1, BAR) == before
    assert machine.mmio.read((before & ~0xF) + 0x4000, 1) == ord("a")


def test_a_bar_moves_with_its_notifications(machine: PciMachine) -> None:
    old = machine.read(1, BAR) & ~0xF
    new = 1 << 40
    machine.write(1, COMMAND, 0, 2)
    assert machine.mmio.read(old + 0x4000, 1) == 0xFF, "decoding is off"
    machine.write(1, BAR, new & 0xFFFF_FFFF)
    machine.write(1, BAR + 4, new >> 32)
    machine.write(1, COMMAND, 6, 2)
    assert machine.mmio.read(old + 0x4000, 1) == 0xFF
    assert machine.mmio.read(new + 0x4000, 1) == ord("a")
    assert {new + 0x6000, new + 0x6004} <= set(machine.vm.ioeventfds)
    assert old + 0x6000 not in machine.vm.ioeventfds


@pytest.mark.parametrize(
    "address",
    [
        0,
        0x100000,
        layout.ECAM,
        layout.KVM_TSS & ~0x7FFFF,
        layout.IOAPIC & ~0x7FFFF,
        layout.LOCAL_APIC & ~0x7FFFF,
        layout.RAM_32BIT_END - 0x80000,
        1 << 46,
        (1 << 64) - 0x80000,
    ],
)
def test_a_bar_outside_of_the_windows_has_no_effect_but_keeps_its_value(
    machine: PciMachine, address: int
) -> None:
    machine.write(1, BAR, address & 0xFFFF_FFFF)
    machine.write(1, BAR + 4, address >> 32)
    assert machine.read(1, BAR) & ~0xF | machine.read(1, BAR + 4) << 32 == address
    assert machine.transports[0].bar_address(0) is None
    assert len(machine.vm.ioeventfds) == 2, "those of the other device"


def test_bars_over_each_other_are_harmless(machine: PciMachine) -> None:
    other = machine.read(2, BAR) & ~0xF
    machine.write(1, BAR, other)
    assert machine.mmio.read(other + 0x4000, 1) == ord("a")
    machine.write(2, COMMAND, 0, 2)
    machine.write(1, BAR, other + 0x80000)
    machine.write(2, COMMAND, 2, 2)
    assert other + 0x80000 + 0x6000 in machine.vm.ioeventfds
    assert other + 0x6000 in machine.vm.ioeventfds


def test_too_many_bars_for_the_window_are_refused() -> None:
    bus = PciBus(layout.pci_windows(1 << 20, 46), lambda: None)
    for slot in (1, 2):
        function = PciFunction(1, 2, 3)
        function.add_bar(0, 256 << 20)
        bus.add(function, slot)
    last = PciFunction(1, 2, 3)
    last.add_bar(0, 256 << 20, bits=32)
    with pytest.raises(ConfigError, match="PCI slot 3: there is no room"):
        bus.add(last, 3)


access = st.tuples(st.integers(0, 8191), st.sampled_from((1, 2, 4, 8)), st.integers(0, (1 << 64) - 1))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(("ports", "ecam", "bar")), access), max_size=60))
def test_nothing_that_a_guest_does_to_pci_raises(steps: list[tuple[str, tuple[int, int, int]]]) -> None:
    machine = PciMachine(Echo())
    try:
        for where, (offset, size, value) in steps:
            if where == "ports":
                machine.pio.write(0xCF8, 4, 1 << 31 | offset & 0x8FF)
                machine.pio.write(0xCFC + offset % 4, min(size, 4), value)
                machine.pio.read(0xCFC + offset % 4, min(size, 4))
            elif where == "ecam":
                machine.mmio.write(layout.ECAM + ECAM_SLOT * (offset & 1) + offset, size, value)
                machine.mmio.read(layout.ECAM + ECAM_SLOT * (offset & 1) + offset, size)
            else:
                machine.transports[0].bar_write(offset * 64 % 0x80000, size, value & (1 << 8 * size) - 1)
                machine.transports[0].bar_read(offset * 64 % 0x80000, size)
        assert machine.read(0, 0) == 0x0D57_8086
    finally:
        machine.close()
    assert machine.vm.ioeventfds == {}
    assert machine.vm.irqfds == {}


# -- MSI-X ---------------------------------------------------------------------------------


@pytest.fixture
def vectors() -> Iterator[tuple[Msix, FakeVm]]:
    vm = FakeVm()
    msix = Msix(3, GsiRoutes(vm, 24))  # type: ignore[arg-type]
    yield msix, vm
    msix.close()


def program(msix: Msix, vector: int, address: int, data: int, control: int = 0) -> None:
    for place, value in enumerate((address & 0xFFFF_FFFF, address >> 32, data, control)):
        msix.table_write(16 * vector + 4 * place, 4, value)


def test_a_vector_is_connected_while_it_is_enabled_and_unmasked(vectors: tuple[Msix, FakeVm]) -> None:
    msix, vm = vectors
    program(msix, 1, 0xFEE0_1000, 0x41)
    assert not vm.irqfds
    msix.set_control(0x8000)
    assert list(vm.irqfds.values()) == [msix.fd(1)]
    assert list(vm.routes.values()) == [(0xFEE0_1000, 0x41)]
    msix.set_control(0xC000)  # function mask
    assert not vm.irqfds
    os.eventfd_write(msix.fd(1), 1)
    assert msix.pending_read(0, 8) == 0b10
    msix.set_control(0x8000)
    assert vm.irqfds
    assert msix.pending_read(0, 8) == 0, "KVM has delivered it"
    msix.table_write(16 + 12, 4, 1)
    assert not vm.irqfds
    msix.table_write(16 + 8, 4, 0x42)
    msix.table_write(16 + 12, 4, 0)
    assert list(vm.routes.values()) == [(0xFEE0_1000, 0x42)]


def test_odd_accesses_to_the_table_are_ignored(vectors: tuple[Msix, FakeVm]) -> None:
    msix, _ = vectors
    for offset, size in ((0, 1), (0, 2), (2, 4), (4, 8), (48, 4), (0x3FFF0, 4)):
        msix.table_write(offset, size, (1 << 8 * size) - 1)
        assert msix.table_read(offset, size) == 0
    msix.table_write(0, 8, 0x1234_5678_9ABC_DEF0)
    assert msix.table_read(4, 4) == 0x1234_5678
    msix.table_write(12, 4, 0xFFFF_FFFF)
    assert msix.table_read(12, 4) == 1, "only the mask bit of the control word"


def test_a_message_that_kvm_would_refuse_is_made_one_that_it_takes(vectors: tuple[Msix, FakeVm]) -> None:
    msix, vm = vectors
    program(msix, 0, 0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF)
    msix.set_control(0x8000)
    ((address, data),) = (message for message in vm.routes.values() if message[1])
    assert address == 0xFFFF_FF00_FFFF_FFFF
    assert data == 0xFFFF_FFFF


def test_more_vectors_than_kvm_has_gsis_are_refused() -> None:
    routes = GsiRoutes(FakeVm(), 24)  # type: ignore[arg-type]
    Msix(2048, routes)
    Msix(2024, routes)
    with pytest.raises(ConfigError, match="KVM has GSIs for 4072"):
        Msix(1, routes)
