"""Where and how the boot vCPU enters what was loaded."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Protocol = Literal["pvh", "linux32", "linux64"]


class EntryPoint(Struct, frozen=True):
    """The boot protocol, the first instruction's address, and the general registers that are not zero.

    ``pvh``: 32-bit protected mode, paging off, ``rbx`` = start info (Xen's x86/HVM direct boot ABI).
    ``linux32``: 32-bit protected mode, paging off, ``rsi`` = zero page (Linux boot protocol, 32-bit entry).
    ``linux64``: 64-bit mode, the first GiB mapped to itself, ``rsi`` = zero page (64-bit entry).
    """

    protocol: Protocol
    rip: int
    registers: dict[str, int]
