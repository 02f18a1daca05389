"""The PCI root bridge in the DSDT (PCI Firmware 3.3, 4; ACPI 6.5, 6.2.13 and 6.4.3.5)."""

from __future__ import annotations

from .. import layout
from ..acpi.aml import (
    EISAID,
    IO,
    Cache,
    Device,
    DWordMemory,
    Name,
    Package,
    QWordMemory,
    ResourceTemplate,
    Scope,
    WordBusNumber,
    WordIO,
)
from .bus import intx_gsi


def aml(windows: list[tuple[int, int]]) -> bytes:
    """``\\_SB.PCI0`` with the memory ``windows`` (base, size in bytes) in its ``_CRS``."""
    config = layout.PCI_CONFIG_PORT
    last = config + layout.PCI_CONFIG_SIZE - 1
    resources = [
        WordBusNumber(0, 0),
        IO(config, config, 1, layout.PCI_CONFIG_SIZE),
        WordIO(0, config - 1),
        WordIO(last + 1, 0xFFFF),
        *(_window(base, size) for base, size in windows),
    ]
    return Scope(
        "\\_SB",
        Device(
            "PCI0",
            Name("_HID", EISAID("PNP0A08")),
            Name("_CID", EISAID("PNP0A03")),
            Name("_ADR", 0),
            Name("_SEG", 0),
            Name("_BBN", 0),
            Name("_UID", 0),
            Name("_CCA", 1),
            Name("_CRS", ResourceTemplate(*resources)),
            Name("_PRT", _routing()),
        ),
    )


def _window(base: int, size: int) -> bytes:
    end = base + size - 1
    if end >> 32:
        return QWordMemory(base, end, cache=Cache.PREFETCHABLE)
    return DWordMemory(base, end)


def _routing() -> bytes:
    """INTA of every slot leads straight to a GSI: no link device stands between."""
    return Package(*(Package(slot << 16 | 0xFFFF, 0, 0, intx_gsi(slot)) for slot in range(1, 32)))
