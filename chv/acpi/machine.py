"""The whole machine's DSDT: where the AML of the parts comes together."""

from __future__ import annotations

from collections.abc import Iterable

from .. import cpu_hotplug, layout
from . import ged, power, tables
from .aml import (
    EISAID,
    IO,
    Device,
    Interrupt,
    Memory32Fixed,
    Name,
    ResourceTemplate,
    Scope,
    String,
)


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
    parts = [power.s5_aml(), motherboard_aml(pci=pci), rtc_aml()]
    if serial:
        parts.append(com1_aml())
    return [*parts, power.button_aml(), cpu_hotplug.aml(maximum), ged.aml()]


def com1_aml() -> bytes:
    return Scope(
        "\\_SB",
        Device(
            "COM1",
            Name("_HID", EISAID("PNP0501")),
            Name("_UID", 0),
            Name("_DDN", String("COM1")),
            Name(
                "_CRS",
                ResourceTemplate(
                    IO(layout.COM1_PORT, layout.COM1_PORT, 0, layout.COM1_SIZE),
                    Interrupt(layout.COM1_GSI, edge=True),
                ),
            ),
        ),
    )


def rtc_aml() -> bytes:
    return Scope(
        "\\_SB",
        Device(
            "RTC",
            Name("_HID", EISAID("PNP0B00")),
            Name(
                "_CRS",
                ResourceTemplate(
                    IO(layout.CMOS_PORT, layout.CMOS_PORT, 0, layout.CMOS_SIZE),
                    Interrupt(layout.RTC_GSI, edge=True),
                ),
            ),
        ),
    )


def motherboard_aml(*, pci: bool = False) -> bytes:
    """The ports (and with ``pci`` the configuration space) that drivers should not take for free."""
    ports = [
        (layout.DEBUG_PORT, layout.DEBUG_PORT_SIZE),
        (layout.POWER_PORT, layout.POWER_SIZE),
        (layout.PM_TIMER_PORT, layout.PM_TIMER_SIZE),
        (layout.CPU_HOTPLUG_PORT, layout.CPU_HOTPLUG_SIZE),
        (layout.GED_PORT, layout.GED_SIZE),
    ]
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
