"""Which device has which ports and addresses: the machine's own, the kernel's, the user's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from . import layout
from ._bus import Bus, SlotNames
from .errors import DeviceError

if TYPE_CHECKING:
    from ._bus import Handler

PIO_LIMIT: Final = 0x10000
NO_LIMIT: Final = 0

#: The machine's own ports: name -> (first port, how many).
PORTS: Final = {
    "serial": (layout.COM1_PORT, layout.COM1_SIZE),
    "i8042": (layout.I8042_PORT, layout.I8042_SIZE),
    "cmos": (layout.CMOS_PORT, layout.CMOS_SIZE),
    "debug-port": (layout.DEBUG_PORT, layout.DEBUG_PORT_SIZE),
    "acpi-power": (layout.POWER_PORT, layout.POWER_SIZE),
    "pm-timer": (layout.PM_TIMER_PORT, layout.PM_TIMER_SIZE),
    "cpu-hotplug": (layout.CPU_HOTPLUG_PORT, layout.CPU_HOTPLUG_SIZE),
    "ged": (layout.GED_PORT, layout.GED_SIZE),
    "pci-config": (layout.PCI_CONFIG_PORT, layout.PCI_CONFIG_SIZE),
}

# What KVM answers itself, so that no access would ever come to a handler (its interrupt controllers:
# the two PICs with their ELCR ports, I/O APIC, local APIC).
_KERNEL_PORTS: Final = ((0x20, 2), (0xA0, 2), (0x4D0, 2))
_KERNEL_ADDRESSES: Final = ((layout.IOAPIC, layout.PAGE_SIZE), (layout.LOCAL_APIC, layout.PAGE_SIZE))


class Range(Struct, frozen=True):
    """A device of the user's on one of the buses."""

    space: str  # "pio" or "mmio"
    base: int
    size: int
    handler: Handler
    name: str


class _Taken:
    """Stands for what is there already."""

    def read(self, offset: int, size: int) -> int:
        raise AssertionError("only a plan")

    def write(self, offset: int, size: int, value: int) -> None:
        raise AssertionError("only a plan")


def described(ranges: Iterable[Range]) -> list[bytes]:
    """The AML of the handlers that have some (a method ``aml() -> bytes``), once each.

    Raises :class:`chv.errors.DeviceError` for one that gives anything but bytes.
    """
    found: dict[int, bytes] = {}
    for r in ranges:
        describe = getattr(r.handler, "aml", None)
        if describe is None or id(r.handler) in found:
            continue
        code = describe()
        if not isinstance(code, bytes):
            raise DeviceError(f"{r.name}: aml() returned {type(code).__name__}; allowed is bytes")
        found[id(r.handler)] = code
    return list(found.values())


def check(ranges: Iterable[Range], *, memory_size: int, serial: bool) -> None:
    """Raise :class:`chv.errors.BusError` unless a machine can have all of these devices.

    A range must not overlap another one, the machine's own devices, RAM, or the interrupt controllers.
    """
    taken, slots = _Taken(), SlotNames()
    pio, mmio = Bus("pio", PIO_LIMIT, slots), Bus("mmio", NO_LIMIT, slots)
    for name, (base, size) in PORTS.items():
        if serial or name != "serial":
            pio.add(base, size, taken, name)
    for base, size in _KERNEL_PORTS:
        pio.add(base, size, taken, "KVM's interrupt controllers")
    for base, size in _KERNEL_ADDRESSES:
        mmio.add(base, size, taken, "KVM's interrupt controllers")
    mmio.add(layout.ECAM, layout.ECAM_SIZE, taken, "PCI configuration space")
    for base, size in layout.ram_spans(memory_size):
        mmio.add(base, size, taken, "RAM")
    for r in ranges:
        (pio if r.space == "pio" else mmio).add(r.base, r.size, r.handler, r.name)
