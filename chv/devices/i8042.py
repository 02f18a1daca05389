"""What is left of the keyboard controller: the reset line.

Ports 0x61 to 0x64. There is no keyboard, so the status register says that nothing waits to be read and
nothing is being processed. Command 0xfe pulses the CPU's reset line, the way in which old kernels reboot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_PORT_B: Final = 0  # port 0x61: speaker and timer 2
_COMMAND: Final = 3  # port 0x64: status when read
_TIMER2_OUTPUT: Final = 0x20  # in port 0x61: set, so that a loop waiting for timer 2 ends
_PULSE_RESET: Final = 0xFE


class I8042:
    """Four ports from 0x61. ``on_reset`` is called in the vCPU's thread when the guest asks for a reset."""

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> int:
        return _TIMER2_OUTPUT if offset == _PORT_B else 0

    def write(self, offset: int, size: int, value: int) -> None:
        # A wider write reaches the ports one byte after the other, as on the ISA bus.
        if offset <= _COMMAND < offset + size and (value >> 8 * (_COMMAND - offset)) & 0xFF == _PULSE_RESET:
            self._on_reset()

    def save(self) -> dict[str, int]:
        """There is no state."""
        return {}

    def load(self, state: dict[str, int]) -> None:
        """There is no state."""

    def reset(self) -> None:
        """There is no state."""
