"""A PCI function: identity, BARs, capabilities (PCI Local Bus 3.0, 6)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct

from ._config import ConfigSpace

COMMAND: Final = 0x04
STATUS: Final = 0x06
BAR0: Final = 0x10
CAPABILITIES: Final = 0x34
INTERRUPT_LINE: Final = 0x3C
FIRST_CAPABILITY: Final = 0x40

COMMAND_MEMORY: Final = 1 << 1
COMMAND_MASTER: Final = 1 << 2
COMMAND_INTX_OFF: Final = 1 << 10
_COMMAND_WRITABLE: Final = 0x0547  # I/O, memory, master, parity, SERR, INTx disable
_STATUS_CAPABILITIES: Final = 1 << 4
_BAR_64BIT: Final = 0b100
_BAR_PREFETCHABLE: Final = 0b1000


class _Bar(Struct):
    size: int
    bits: int
    address: int | None = None  # where it decodes


class _Hook(Struct, frozen=True):
    first: int
    end: int


class PciFunction:
    """Function 0 of a slot on bus 0.

    ``class_code`` has 24 bits. Memory decoding is on from the start, as if firmware had placed the BARs:
    old firmware expects that. A subclass overrides :meth:`bar_moved`, :meth:`config_written` and, for a
    capability with ``hook``, :meth:`hook_read` and :meth:`hook_write`. Each holds :attr:`lock`.
    """

    def __init__(
        self,
        vendor: int,
        device: int,
        class_code: int,
        *,
        revision: int = 0,
        subsystem_vendor: int = 0,
        subsystem: int = 0,
        interrupt_pin: int = 0,
    ) -> None:
        self.config = ConfigSpace()
        self.lock = threading.RLock()
        self._bars: dict[int, _Bar] = {}
        self._next_capability = FIRST_CAPABILITY
        self._link = CAPABILITIES
        self._hook: _Hook | None = None
        self._may_decode: Callable[[int, int], bool] = lambda address, size: True
        set_ = self.config.set
        set_(0x00, 4, device << 16 | vendor)
        set_(COMMAND, 2, COMMAND_MEMORY, _COMMAND_WRITABLE)
        set_(0x08, 4, class_code << 8 | revision)
        set_(0x0C, 1, 0, 0xFF)  # cache line size: for software to remember
        set_(0x2C, 4, subsystem << 16 | subsystem_vendor)
        set_(INTERRUPT_LINE, 2, interrupt_pin << 8 | 0xFF, 0xFF)

    # -- building

    def add_bar(self, index: int, size: int, *, bits: int = 64, prefetchable: bool = False) -> None:
        """A memory BAR of ``size`` bytes, a power of two from 16 on; with 64 bits it takes two registers."""
        if (
            size < 16
            or size & (size - 1)
            or bits not in (32, 64)
            or not 0 <= index <= (4 if bits == 64 else 5)
        ):
            raise ValueError(f"BAR {index}: {size} bytes in {bits} bits cannot be")
        flags = (_BAR_64BIT if bits == 64 else 0) | (_BAR_PREFETCHABLE if prefetchable else 0)
        writable = (1 << bits) - size
        self.config.set(BAR0 + 4 * index, bits // 8, flags, writable)
        self._bars[index] = _Bar(size, bits)

    def add_capability(self, ident: int, body: bytes, writable: bytes = b"", *, hook: bool = False) -> int:
        """Append a capability; returns its offset. ``body`` is what follows its two header bytes.

        ``writable`` are the bits of ``body`` that a guest can write. With ``hook`` (one for each function)
        accesses to the body are left to :meth:`hook_read` and :meth:`hook_write`.
        """
        offset = self._next_capability
        end = offset + 2 + len(body)
        if end > 0x100:
            raise ValueError("no room for another PCI capability")
        self.config.set(offset, 2, ident)
        for index, byte in enumerate(body):
            self.config.set(offset + 2 + index, 1, byte, writable[index] if index < len(writable) else 0)
        self.config.set(self._link, 1, offset)
        self.config.set(STATUS, 2, _STATUS_CAPABILITIES)
        self._link = offset + 1
        self._next_capability = end + 3 & ~3
        if hook:
            self._hook = _Hook(offset + 2, end)
            self.config.hook(offset + 2, end)
        return offset

    def place_bars(self, next_address: int, may_decode: Callable[[int, int], bool]) -> int:
        """Put the BARs at ``next_address`` and above, aligned to their size; returns the end of the last.

        ``may_decode(address, size)`` says where a BAR has an effect.
        """
        self._may_decode = may_decode
        for index, bar in sorted(self._bars.items()):
            address = -(-next_address // bar.size) * bar.size
            self.config.write(BAR0 + 4 * index, bar.bits // 8, address)
            next_address = address + bar.size
        self._decode()
        return next_address

    # -- the guest's side

    def read(self, offset: int, size: int) -> int:
        """A guest reads configuration space."""
        hook = self._hook
        if hook is not None and offset < hook.end and offset + size > hook.first:
            with self.lock:
                return self.hook_read(offset, size)
        return self.config.get(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest writes configuration space."""
        with self.lock:
            hook = self._hook
            if hook is not None and offset < hook.end and offset + size > hook.first:
                self.hook_write(offset, size, value)
                return
            self.config.write(offset, size, value)
            if offset < BAR0 + 24:
                self._decode()
            self.config_written(offset, size)

    @property
    def command(self) -> int:
        """The command register."""
        return self.config.get(COMMAND, 2)

    def bar_address(self, index: int) -> int | None:
        """Where a BAR decodes accesses; None: nowhere."""
        return self._bars[index].address

    def _decode(self) -> None:
        on = bool(self.command & COMMAND_MEMORY)
        for index, bar in self._bars.items():
            written = self.config.get(BAR0 + 4 * index, bar.bits // 8) & ~0xF
            address = written if on and self._may_decode(written, bar.size) else None
            if address != bar.address:
                bar.address = address
                self.bar_moved(index, address)

    # -- for subclasses

    def bar_moved(self, index: int, address: int | None) -> None:
        """A BAR decodes elsewhere from now on, or no more."""

    def config_written(self, offset: int, size: int) -> None:
        """The guest wrote ``size`` bytes at ``offset``, and they have been stored."""

    def hook_read(self, offset: int, size: int) -> int:
        """What the guest reads from the capability with a hook; ``offset`` is that in configuration space."""
        return self.config.get(offset, size)

    def hook_write(self, offset: int, size: int, value: int) -> None:
        """The guest writes to the capability with a hook."""
        self.config.write(offset, size, value)

    # -- state

    def save(self) -> dict[str, Any]:
        return {"config": self.config.dump()}

    def load(self, state: dict[str, Any]) -> None:
        with self.lock:
            self.config.restore(state["config"])
            self._decode()

    def close(self) -> None:
        """Give back what the function holds."""
