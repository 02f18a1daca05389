"""The whole machine's DSDT: where the AML of the parts comes together."""

from __future__ import annotations

from collections.abc import Iterable

from . import cpu_hotplug, layout
from .acpi import ged, power, tables
from .acpi.aml import (
    EISAID,
    IO,
    Device,
    Memory32Fixed,
    Name,
    ResourceTemplate,
    Scope,
)
from .devices import cmos
from .devices import serial as com1
from .ranges import PORTS


def machine_tables(
    present: int, maximum: int, *, serial: bool = True, pci: bool = False, extra: Iterable[bytes] = ()
) -> tables.AcpiTables:
    """The tables of a machine with ``present`` of ``maximum`` vCPUs and, if ``serial``, COM1.

    ``extra`` is AML of further devices, ``pci`` adds the MCFG.
    Raises :class:`ConfigError` if the counts are impossible.
    """
    return tables.build(
        present,
        maximum,
        [*bodies(maximum, serial=serial, pci=pci), *extra],
        pci=pci,
        serial=serial,
    )


def bodies(maximum: int, *, serial: bool = True, pci: bool = False) -> list[bytes]:
    """The AML of every part of the machine."""
    parts = [power.s5_aml(), motherboard_aml(pci=pci), cmos.aml()]
    if serial:
        parts.append(com1.aml())
    return [*parts, power.button_aml(), cpu_hotplug.aml(maximum), ged.aml()]


def motherboard_aml(*, pci: bool = False) -> bytes:
    """The ports (and with ``pci`` the configuration space) that drivers should not take for free."""
    ports = [PORTS[name] for name in ("debug-port", "acpi-power", "pm-timer", "cpu-hotplug", "ged")]
    descriptors = [IO(port, port, 0, size) for port, size in ports]
    if pci:
        descriptors.append(Memory32Fixed(layout.ECAM, layout.ECAM_SIZE))
    return Scope(
        "\\_SB",
        Device(
            "MBRD",
            Name("_HID", EISAID("PNP0C02")),
            Name("_UID", 0),
            Name("_CRS", ResourceTemplate(*descriptors)),
        ),
    )
