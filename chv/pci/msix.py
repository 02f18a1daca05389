"""MSI-X: the table and the pending bits of a function (PCI Local Bus 3.0, 6.8.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from ..interrupts import GsiRoutes, MsiVector

CAPABILITY: Final = 0x11
ENTRY_SIZE: Final = 16
MAX_VECTORS: Final = 2048
ENABLE: Final = 1 << 15
FUNCTION_MASK: Final = 1 << 14
_MASKED: Final = 1
_ONES: Final = 0xFFFF_FFFF


class Msix:
    """``count`` vectors. Any offset and width that a guest may use is answered."""

    def __init__(self, count: int, routes: GsiRoutes) -> None:
        if not 1 <= count <= MAX_VECTORS:
            raise ValueError(f"{count} MSI-X vectors; allowed are 1 to {MAX_VECTORS}")
        routes.reserve(count)
        self.count = count
        self._routes = routes
        self._table = [[0, 0, 0, _MASKED] for _ in range(count)]  # address low, high, data, control
        self._vectors: dict[int, MsiVector] = {}
        self.enabled = False
        self._function_mask = False

    def capability(self, bar: int, table: int, pending: int) -> tuple[bytes, bytes]:
        """The capability's body and its writable bits; ``table`` and ``pending`` are offsets in the BAR."""
        size = self.count - 1
        body = b"".join(
            value.to_bytes(width, "little")
            for value, width in ((size, 2), (table | bar, 4), (pending | bar, 4))
        )
        return body, (ENABLE | FUNCTION_MASK).to_bytes(2, "little")

    def fd(self, vector: int) -> int:
        """The eventfd that raises ``vector``."""
        return self._vector(vector).fd

    def _vector(self, index: int) -> MsiVector:
        found = self._vectors.get(index)
        if found is None:
            found = self._vectors[index] = self._routes.vector()
        return found

    # -- the guest's side

    def set_control(self, value: int) -> None:
        """The guest wrote the capability's message control."""
        before = self.enabled, self._function_mask
        self.enabled, self._function_mask = bool(value & ENABLE), bool(value & FUNCTION_MASK)
        if before != (self.enabled, self._function_mask):
            for index in range(self.count):
                self._apply(index)

    def table_read(self, offset: int, size: int) -> int:
        index, place = divmod(offset, ENTRY_SIZE)
        if index >= self.count or size not in (4, 8) or place % size:
            return 0
        entry = self._table[index]
        value = entry[place // 4]
        return value | entry[place // 4 + 1] << 32 if size == 8 else value

    def table_write(self, offset: int, size: int, value: int) -> None:
        index, place = divmod(offset, ENTRY_SIZE)
        if index >= self.count or size not in (4, 8) or place % size:
            return
        entry = self._table[index]
        entry[place // 4] = value & _ONES
        if size == 8:
            entry[place // 4 + 1] = value >> 32
        entry[3] &= _MASKED
        self._apply(index)

    def pending_read(self, offset: int, size: int) -> int:
        """The pending bits: one for each vector that was raised while masked."""
        value = 0
        for bit in range(8 * size):
            vector = self._vectors.get(8 * offset + bit)
            if self.enabled and vector is not None and vector.pending:
                value |= 1 << bit
        return value

    def _apply(self, index: int) -> None:
        low, high, data, control = self._table[index]
        if self.enabled and not self._function_mask and not control & _MASKED:
            self._vector(index).unmask(high << 32 | low, data)
        elif index in self._vectors:
            self._vectors[index].mask()

    # -- state

    def save(self) -> dict[str, Any]:
        pending = [index for index, vector in self._vectors.items() if vector.pending]
        return {
            "table": [list(entry) for entry in self._table],
            "enabled": self.enabled,
            "function_mask": self._function_mask,
            "pending": pending,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._table = [list(entry) for entry in state["table"]]
        self.enabled, self._function_mask = state["enabled"], state["function_mask"]
        for index in state["pending"]:
            self._vector(index).raise_()
        for index in range(self.count):
            self._apply(index)

    def close(self) -> None:
        for vector in self._vectors.values():
            vector.close()
        self._vectors.clear()
