"""The ACPI tables but for what the DSDT holds (ACPI 6.5, chapter 5.2)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final, Protocol

from msgspec import Struct

from .. import layout
from ..errors import ConfigError
from .power import RESET_VALUE

OEM_ID: Final = b"CHV   "
OEM_TABLE_ID: Final = b"CHVTABLE"
OEM_REVISION: Final = 1
CREATOR_ID: Final = b"CHV "
CREATOR_REVISION: Final = 1
HYPERVISOR_ID: Final = b"CHV\0\0\0\0\0"

ALIGNMENT: Final = 16
HEADER_SIZE: Final = 36
XSDT, DSDT, FADT, MADT, MCFG = "XSDT", "DSDT", "FACP", "APIC", "MCFG"
RSDP: Final = "RSDP"


class Memory(Protocol):
    def write(self, address: int, data: bytes) -> object: ...


class AcpiTables(Struct, frozen=True):
    """Tables by signature (the FADT's is FACP, the MADT's APIC), and where each belongs in guest memory."""

    tables: dict[str, bytes]
    addresses: dict[str, int]

    @property
    def rsdp(self) -> int:
        """The guest-physical address to give to the guest."""
        return self.addresses[RSDP]

    @property
    def end(self) -> int:
        """The first address behind the tables."""
        return max(self.addresses[name] + len(table) for name, table in self.tables.items())

    def write(self, memory: Memory) -> None:
        for name, table in self.tables.items():
            memory.write(self.addresses[name], table)


def build(
    present: int,
    maximum: int,
    dsdt_bodies: Iterable[bytes],
    *,
    pci: bool = False,
    serial: bool = True,
    base: int = layout.RSDP,
    end: int = layout.ACPI_END,
) -> AcpiTables:
    """The tables of a machine with ``present`` of ``maximum`` vCPUs; the DSDT holds ``dsdt_bodies``.

    ``pci`` adds the MCFG, ``serial`` says that there are devices on the ISA bus. The RSDP is at ``base``,
    the others follow it at multiples of 16. Raises :class:`ConfigError` if they do not end by ``end``.
    """
    if not 1 <= present <= maximum:
        raise ConfigError(f"cpus.boot_vcpus: {present} is not in 1..{maximum} (cpus.max_vcpus)")
    tables: dict[str, bytes] = {RSDP: bytes(36)}
    addresses: dict[str, int] = {RSDP: base}
    place = base + 36

    def add(name: str, table: bytes) -> None:
        nonlocal place
        addresses[name] = place = -(-place // ALIGNMENT) * ALIGNMENT
        tables[name] = table
        place += len(table)

    add(DSDT, dsdt(dsdt_bodies))
    add(FADT, fadt(addresses[DSDT], serial=serial))
    add(MADT, madt(present, maximum))
    if pci:
        add(MCFG, mcfg())
    add(XSDT, xsdt(address for name, address in addresses.items() if name not in (RSDP, DSDT)))
    tables[RSDP] = rsdp(addresses[XSDT])
    if place > end:
        raise ConfigError(
            f"cpus.max_vcpus: the ACPI tables of {maximum} vCPUs take {place - base} bytes, "
            f"and there is room for {end - base} between {base:#x} and {end:#x}"
        )
    return AcpiTables(tables, addresses)


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of all bytes a multiple of 256."""
    return -sum(data) & 0xFF


def table(signature: str, revision: int, body: bytes) -> bytes:
    """A table: the header that all but the RSDP have (5.2.6), then ``body``."""
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        signature.encode("ascii"),
        HEADER_SIZE + len(body),
        revision,
        0,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        CREATOR_ID,
        CREATOR_REVISION,
    )
    data = bytearray(header + body)
    data[9] = checksum(data)
    return bytes(data)


def rsdp(xsdt_address: int) -> bytes:
    """The root pointer, revision 2, with no RSDT (5.2.5.3)."""
    data = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, 0, 36, xsdt_address, 0))
    data[8] = checksum(data[:20])
    data[32] = checksum(data)
    return bytes(data)


def xsdt(addresses: Iterable[int]) -> bytes:
    """The list of the other tables (5.2.8)."""
    return table(XSDT, 1, b"".join(struct.pack("<Q", address) for address in addresses))


def dsdt(bodies: Iterable[bytes]) -> bytes:
    """Revision 2: integers have 64 bits (5.2.11.1)."""
    return table(DSDT, 2, b"".join(bodies))


# -- FADT (5.2.9) ------------------------------------------------------------------

_TMR_VAL_EXT = 1 << 8
_RESET_REG_SUP = 1 << 10
_HW_REDUCED_ACPI = 1 << 20
_LEGACY_DEVICES = 1 << 0  # IA-PC boot architecture flags, table 5.11
_VGA_NOT_PRESENT = 1 << 2
_SYSTEM_IO = 1
_ACCESS_BYTE, _ACCESS_DWORD = 1, 3


def _io_register(port: int, bits: int, access: int) -> bytes:
    """A generic address structure (5.2.3.2)."""
    return struct.pack("<BBBBQ", _SYSTEM_IO, bits, 0, access, port)


def fadt(dsdt_address: int, *, serial: bool = True) -> bytes:
    """Revision 6.3: a hardware-reduced machine with reset and sleep registers and a PM timer.

    The boot flags keep Linux from looking for VGA and for an 8042 (there is only its reset line),
    and leave it the CMOS clock. The DSDT's address is in its 64-bit field alone, as one of the two should be.
    """
    power = _io_register(layout.POWER_PORT, 8, _ACCESS_BYTE)
    fields: dict[int, bytes] = {
        109: struct.pack("<H", _VGA_NOT_PRESENT | (_LEGACY_DEVICES if serial else 0)),
        112: struct.pack("<I", _HW_REDUCED_ACPI | _RESET_REG_SUP | _TMR_VAL_EXT),
        116: power,  # RESET_REG
        128: bytes((RESET_VALUE,)),
        131: bytes((3,)),  # minor version
        140: struct.pack("<Q", dsdt_address),
        208: _io_register(layout.PM_TIMER_PORT, 32, _ACCESS_DWORD),
        244: power,  # SLEEP_CONTROL_REG
        256: power,  # SLEEP_STATUS_REG
        268: HYPERVISOR_ID,
    }
    data = bytearray(276)
    for offset, value in fields.items():
        data[offset : offset + len(value)] = value
    return table(FADT, 6, bytes(data[HEADER_SIZE:]))


# -- MADT (5.2.12) -----------------------------------------------------------------

X2APIC_FIRST: Final = 255  # APIC ids from here on do not fit the local APIC entry (5.2.12.12)
PROCESSOR_ENABLED: Final = 1 << 0
PROCESSOR_ONLINE_CAPABLE: Final = 1 << 1
_EDGE_HIGH = 0b01 | 0b01 << 2  # MPS INTI flags (table 5.26)
_ALL_8, _ALL_32 = 0xFF, 0xFFFFFFFF


def processor_entry(index: int, flags: int) -> bytes:
    """A vCPU's entry, with its index as APIC id and processor UID: local APIC, or x2APIC from 255 on."""
    if index < X2APIC_FIRST:
        return struct.pack("<BBBBI", 0, 8, index, index, flags)
    return struct.pack("<BBHIII", 9, 16, 0, index, flags, index)


def madt(present: int, maximum: int) -> bytes:
    """The interrupt controllers, with one entry for each vCPU that there may ever be."""
    entries = [
        processor_entry(index, PROCESSOR_ENABLED if index < present else PROCESSOR_ONLINE_CAPABLE)
        for index in range(maximum)
    ]
    entries.append(struct.pack("<BBBBII", 1, 12, 0, 0, layout.IOAPIC, 0))
    entries.append(struct.pack("<BBBBIH", 2, 10, 0, layout.COM1_GSI, layout.COM1_GSI, _EDGE_HIGH))
    entries.append(struct.pack("<BBBHB", 4, 6, _ALL_8, 0, 1))  # NMI on LINT1
    if maximum > X2APIC_FIRST:
        entries.append(struct.pack("<BBHIB3x", 0x0A, 12, 0, _ALL_32, 1))
    # No PCAT_COMPAT: the 8259 pair is not part of a hardware-reduced machine.
    return table(MADT, 5, struct.pack("<II", layout.LOCAL_APIC, 0) + b"".join(entries))


def mcfg(last_bus: int = 0) -> bytes:
    """Where PCI configuration space is: segment 0, buses 0 to ``last_bus`` (PCI firmware 3.3, 4.1)."""
    return table(MCFG, 1, bytes(8) + struct.pack("<QHBB4x", layout.ECAM, 0, 0, last_bus))
