"""Reset, power-off and the power button of a hardware-reduced ACPI machine (ACPI 6.5, 4.8.3.6, 4.8.3.7).

One byte at ``layout.POWER_PORT`` is the FADT's reset register, sleep control register and sleep status
register at once. Reads give 0 (never "awake again"), writes of anything else have no effect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from .aml import EISAID, Device, Name, Package, Scope

RESET_VALUE: Final = 1
S5_TYPE: Final = 5  # SLP_TYP of soft-off, ours to choose
SLEEP_VALUE: Final = S5_TYPE << 2 | 1 << 5  # with SLP_EN (table 4.20)
BUTTON: Final = "\\_SB.PWRB"


class PowerRegisters:
    """``on_reset`` and ``on_shutdown`` are called on the thread of the vCPU that wrote and return at once."""

    def __init__(self, on_reset: Callable[[], None], on_shutdown: Callable[[], None]) -> None:
        self._actions = {RESET_VALUE: on_reset, SLEEP_VALUE: on_shutdown}

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if (offset, size) == (0, 1) and value in self._actions:
            self._actions[value]()

    def save(self) -> dict[str, Any]:
        """Nothing: the registers keep no state."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


def s5_aml() -> bytes:
    r"""``\_S5``: the value for the sleep control register to switch the machine off (7.4.2)."""
    return Name("\\_S5", Package(S5_TYPE, S5_TYPE, 0, 0))


def button_aml() -> bytes:
    r"""``\_SB.PWRB``, a control method power button (4.8.3.1.2)."""
    return Scope("\\_SB", Device("PWRB", Name("_HID", EISAID("PNP0C0C")), Name("_UID", 0)))
