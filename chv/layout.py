"""The guest-physical address map and the I/O ports, one table.

The addresses are Cloud Hypervisor's (its ``arch/src/x86_64/layout.rs`` and
``vmm/src/device_manager.rs``; the hotplug ports are those of v0.5.0), so that
kernels and firmware made for it find what they expect.
All values are bytes or byte addresses unless a comment says otherwise.
"""

from __future__ import annotations

from typing import Final

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30

PAGE_SIZE: Final = 4 * KiB

# -- low memory ----------------------------------------------------------------
BOOT_GDT: Final = 0x500
BOOT_IDT: Final = 0x520
PVH_START_INFO: Final = 0x6000
PVH_MODLIST: Final = 0x6040
PVH_MEMMAP: Final = 0x7000  # shared with ZERO_PAGE: a boot uses one of the two
ZERO_PAGE: Final = 0x7000
BOOT_STACK: Final = 0x8FF0
PML4: Final = 0x9000  # 64-bit entry only: firmware made before PVH
PDPT: Final = 0xA000
CMDLINE: Final = 0x20000
CMDLINE_MAX: Final = 0x10000  # with the terminating NUL
LOW_RAM_END: Final = 0xA0000  # end of conventional memory in the guest's memory map
RSDP: Final = 0xA0000  # the other ACPI tables follow it
ACPI_END: Final = 0xF0000
SMBIOS: Final = 0xF0000
HIGH_RAM: Final = 0x100000  # kernels load here or above

# -- the hole below 4 GiB ------------------------------------------------------
RAM_32BIT_END: Final = 0xC0000000
DEVICES_32BIT: Final = 0xC0000000
DEVICES_32BIT_SIZE: Final = 640 * MiB
ECAM: Final = 0xE8000000
ECAM_SIZE: Final = 256 * MiB
KVM_TSS: Final = 0xF8000000  # three pages, Intel hosts only
KVM_IDENTITY_MAP: Final = 0xF8003000
IOAPIC: Final = 0xFEC00000
LOCAL_APIC: Final = 0xFEE00000
RAM_64BIT: Final = 0x1_0000_0000

# -- I/O ports -----------------------------------------------------------------
COM1_PORT: Final = 0x3F8
COM1_SIZE: Final = 8
I8042_PORT: Final = 0x61
I8042_SIZE: Final = 4
CMOS_PORT: Final = 0x70
CMOS_SIZE: Final = 2
DEBUG_PORT: Final = 0x80
DEBUG_PORT_SIZE: Final = 1
POWER_PORT: Final = 0x600  # ACPI sleep control, sleep status and reset register
POWER_SIZE: Final = 4
PM_TIMER_PORT: Final = 0x608
PM_TIMER_SIZE: Final = 4
CPU_HOTPLUG_PORT: Final = 0xCD8
CPU_HOTPLUG_SIZE: Final = 0x14
MEMORY_HOTPLUG_PORT: Final = 0xA00
MEMORY_HOTPLUG_SIZE: Final = 0x18
GED_PORT: Final = 0xB000
GED_SIZE: Final = 1
PCI_CONFIG_PORT: Final = 0xCF8
PCI_CONFIG_SIZE: Final = 8

# -- interrupts (global system interrupts) ---------------------------------------
COM1_GSI: Final = 4
RTC_GSI: Final = 8
GED_GSI: Final = 5
IOAPIC_PINS: Final = 24


# The 64-bit area for BARs begins at such a multiple, above RAM.
PCI_64BIT_ALIGNMENT: Final = 128 * MiB
# From KVM's own pages to the I/O APIC: EDK2 puts 32-bit BARs up to 0xfc000000.
_AFTER_KVM_PAGES: Final = 0xF8010000


def pci_windows(memory_size: int, phys_bits: int) -> list[tuple[int, int]]:
    """(base, size) of what is not RAM and where a BAR may be, with ``phys_bits`` bits of address.

    Below 4 GiB around the configuration space and KVM's pages; above, from the end of RAM to the last.
    """
    end = max(base + size for base, size in [*ram_spans(memory_size), (RAM_64BIT, 0)])
    start = -(-end // PCI_64BIT_ALIGNMENT) * PCI_64BIT_ALIGNMENT
    windows = [(DEVICES_32BIT, DEVICES_32BIT_SIZE), (_AFTER_KVM_PAGES, IOAPIC - _AFTER_KVM_PAGES)]
    if start < 1 << phys_bits:
        windows.append((start, (1 << phys_bits) - start))
    return windows


def ram_spans(size: int) -> list[tuple[int, int]]:
    """(base, size) of each run of RAM of a machine with ``size`` bytes: below the hole, then above it."""
    low = min(size, RAM_32BIT_END)
    return [(0, low), (RAM_64BIT, size - low)] if size > low else [(0, low)]
