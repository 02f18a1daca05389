"""The generic event device: one interrupt, and one byte that says what it was for (ACPI 6.5, 5.6.9).

The byte is the device's only register. Reading it gives the events since the last reading and clears them.
"""

from __future__ import annotations

import enum
import threading
from typing import Any, Final, Protocol

from .. import layout
from .aml import (
    Access,
    And,
    Bits,
    Call,
    Device,
    Field,
    If,
    Interrupt,
    Local0,
    Method,
    Name,
    Notify,
    OperationRegion,
    RegionSpace,
    ResourceTemplate,
    Scope,
    Store,
    String,
    Update,
)
from .power import BUTTON

CPU_SCAN: Final = "\\_SB.CPUS.CSCN"
MEMORY_SCAN: Final = "\\_SB.MHPC.MSCN"
PCI_SCAN: Final = "\\_SB.PHPR.PSCN"
NOTIFY_BUTTON_PRESSED: Final = 0x80  # 4.8.3.1.2


class Event(enum.IntFlag):
    """Bits of the register."""

    CPU = 1 << 0
    MEMORY = 1 << 1
    PCI = 1 << 2
    POWER_BUTTON = 1 << 3


class Interrupter(Protocol):
    def pulse(self) -> object: ...


class Ged:
    """``irq.pulse()`` raises the (edge-triggered) interrupt. All methods may be called from any thread."""

    def __init__(self, irq: Interrupter) -> None:
        self._irq = irq
        self._lock = threading.Lock()
        self._pending = Event(0)

    def notify(self, events: Event | int) -> None:
        """Tell the guest of ``events``; those that it has not read yet stay."""
        with self._lock:
            self._pending |= Event(events)
        self._irq.pulse()

    def repeat(self) -> bool:
        """Raise the interrupt again if there are events that the guest has not read; whether there are.

        An edge that comes while the guest has the interrupt masked, for example while it boots, is lost.
        """
        with self._lock:
            pending = bool(self._pending)
        if pending:
            self._irq.pulse()
        return pending

    def read(self, offset: int, size: int) -> int:
        if (offset, size) != (0, 1):
            return 0
        with self._lock:
            pending, self._pending = self._pending, Event(0)
        return int(pending)

    def write(self, offset: int, size: int, value: int) -> None:
        """The register is read-only: writes have no effect."""

    def reset(self) -> None:
        with self._lock:
            self._pending = Event(0)

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {"pending": int(self._pending)}

    def load(self, state: dict[str, Any]) -> None:
        with self._lock:
            self._pending = Event(state["pending"])

    def aml(self) -> bytes:
        """``\\_SB.GED`` for a machine with CPU hotplug and a power button: see :func:`aml`."""
        return aml()


def aml(
    *,
    memory: bool = False,
    pci: bool = False,
    region_space: RegionSpace = RegionSpace.SYSTEM_IO,
    base: int = layout.GED_PORT,
    gsi: int = layout.GED_GSI,
) -> bytes:
    """The device, and an _EVT that hands each event on to the part of the machine that it is about.

    It reads the register once, as reading clears it. ``memory`` and ``pci`` say whether the machine has
    the methods :data:`MEMORY_SCAN` and :data:`PCI_SCAN`.
    """
    handlers = [If(And(Local0, Event.CPU), Call(CPU_SCAN))]
    if memory:
        handlers.append(If(And(Local0, Event.MEMORY), Call(MEMORY_SCAN)))
    if pci:
        handlers.append(If(And(Local0, Event.PCI), Call(PCI_SCAN)))
    handlers.append(If(And(Local0, Event.POWER_BUTTON), Notify(BUTTON, NOTIFY_BUTTON_PRESSED)))
    return Scope(
        "\\_SB",
        Device(
            "GED",
            Name("_HID", String("ACPI0013")),
            Name("_UID", 0),
            Name("_CRS", ResourceTemplate(Interrupt(gsi, edge=True))),
            OperationRegion("GDST", region_space, base, layout.GED_SIZE),
            Field("GDST", Access.BYTE, False, Update.WRITE_AS_ZEROS, Bits("GDAT", 8)),
            Method("_EVT", 1, True, Store("GDAT", Local0), *handlers),
        ),
    )
