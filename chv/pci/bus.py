"""The PCI bus: its functions, the host bridge, and where BARs may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from .. import layout
from .._irq import IrqLine
from ..errors import ConfigError
from ._config import ConfigMemory, ConfigPorts, ConfigRoot
from .function import PciFunction

if TYPE_CHECKING:
    from .._kvm import KvmVm

HOST_BRIDGE: Final = (0x8086, 0x0D57)  # Cloud Hypervisor's, which firmware looks for
HOST_BRIDGE_CLASS: Final = 0x060000

# INTA of slot n is GSI 16 + n % 8: the I/O APIC's pins above those of the ISA devices.
INTX_FIRST_GSI: Final = 16
INTX_GSIS: Final = 8


def intx_gsi(slot: int) -> int:
    """The GSI of a slot's INTA."""
    return INTX_FIRST_GSI + slot % INTX_GSIS


class PciBus:
    """Segment 0, bus 0. ``windows`` are the (base, size) where BARs decode.

    ``ports`` handles 0xcf8 to 0xcff, ``ecam`` the configuration space in memory. BARs are placed in
    the order of :meth:`add`, below 4 GiB: firmware made before 2020 does not place any.
    """

    def __init__(self, windows: list[tuple[int, int]], on_reset: Callable[[], None]) -> None:
        self._windows = windows
        self._root = ConfigRoot()
        self._next_bar = layout.DEVICES_32BIT
        self._lines: dict[int, IrqLine] = {}
        self.functions: dict[int, PciFunction] = {}
        self.ports = ConfigPorts(self._root, on_reset)
        self.ecam = ConfigMemory(self._root)
        self.add(PciFunction(*HOST_BRIDGE, HOST_BRIDGE_CLASS), 0)

    def add(self, function: PciFunction, slot: int) -> None:
        """Put a function into a slot (0 to 31) and place its BARs."""
        self._next_bar = function.place_bars(self._next_bar, self.decodes)
        if self._next_bar > layout.DEVICES_32BIT + layout.DEVICES_32BIT_SIZE:
            raise ConfigError(f"PCI slot {slot}: there is no room for its BARs below 4 GiB")
        self._root.add(slot, function.config, function)
        self.functions[slot] = function

    def decodes(self, address: int, size: int) -> bool:
        """Whether a BAR there has an effect: wholly inside one window."""
        return any(base <= address and address + size <= base + length for base, length in self._windows)

    def line(self, vm: KvmVm, slot: int) -> IrqLine:
        """The level-triggered GSI that a slot's INTA pin is wired to."""
        gsi = intx_gsi(slot)
        if gsi not in self._lines:
            self._lines[gsi] = IrqLine(vm.fd, gsi)
        return self._lines[gsi]

    def close(self) -> None:
        """Close the functions; no INTx reaches the VM any more."""
        for function in self.functions.values():
            function.close()
        for line in self._lines.values():
            line.disconnect()
