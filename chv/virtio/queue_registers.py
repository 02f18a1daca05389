"""The registers of one queue in the common configuration (virtio 1.2, 4.1.4.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from .device import F_EVENT_IDX, F_INDIRECT_DESC

if TYPE_CHECKING:
    from .._virtqueue import Queue

NO_VECTOR: Final = 0xFFFF
_DESC, _AVAIL, _USED = range(3)


class QueueRegisters:
    """What a driver has written for one queue. Nothing but the vector can change while it is enabled."""

    __slots__ = ("addresses", "enabled", "queue", "size", "vector")

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.clear()

    def clear(self) -> None:
        """As after a reset; the vector, which belongs to the transport, as well."""
        self.size = self.queue.max_size
        self.enabled = False
        self.vector = NO_VECTOR
        self.addresses = [0, 0, 0]  # descriptors, available ring, used ring

    def write_size(self, value: int) -> None:
        """Ignored unless it is a power of two that is not more than the queue has."""
        if not self.enabled and 0 < value <= self.queue.max_size and not value & (value - 1):
            self.size = value

    def read_address(self, offset: int, size: int) -> int:
        """``offset`` counts from the first of the three addresses; they are read whole or by halves."""
        field, byte = divmod(offset, 8)
        if size == 8 and byte == 0:
            return self.addresses[field]
        if size == 4 and byte in (0, 4):
            return self.addresses[field] >> 8 * byte & 0xFFFF_FFFF
        return 0

    def write_address(self, offset: int, size: int, value: int) -> None:
        """Firmware writes each half of an address on its own; any other part is ignored."""
        field, byte = divmod(offset, 8)
        if self.enabled or (size, byte) not in ((8, 0), (4, 0), (4, 4)):
            return
        mask = (1 << 8 * size) - 1 << 8 * byte
        self.addresses[field] = self.addresses[field] & ~mask | value << 8 * byte

    def set_up(self, features: int) -> None:
        """Give the queue its ring, for a driver that accepted ``features``."""
        self.queue.enable(
            self.size,
            self.addresses[_DESC],
            self.addresses[_AVAIL],
            self.addresses[_USED],
            event_idx=bool(features & F_EVENT_IDX),
            indirect=bool(features & F_INDIRECT_DESC),
        )

    def save(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "enabled": self.enabled,
            "vector": self.vector,
            "addresses": list(self.addresses),
            "ring": self.queue.save(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.size, self.enabled, self.vector = state["size"], state["enabled"], state["vector"]
        self.addresses = list(state["addresses"])
        self.queue.load(state["ring"])
