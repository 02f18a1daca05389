"""The common configuration of a virtio device: the register logic, without any bus (virtio 1.2, 4.1.4.3)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from .._virtqueue import Queue
from .device import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_RESET, F_VERSION_1

if TYPE_CHECKING:
    from .._irq import IrqSource
    from .device import VirtioDevice

log = logging.getLogger(__name__)

NO_VECTOR: Final = 0xFFFF
SIZE: Final = 0x3C  # of the structure, with queue_reset

# Device status (2.1)
ACKNOWLEDGE: Final = 1
DRIVER: Final = 2
DRIVER_OK: Final = 4
FEATURES_OK: Final = 8
NEEDS_RESET: Final = 64
FAILED: Final = 128
_DRIVER_BITS: Final = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED


@dataclass(slots=True)
class QueueRegisters:
    """What a driver has written for one queue."""

    size: int
    enabled: bool = False
    vector: int = NO_VECTOR
    desc: int = 0
    avail: int = 0
    used: int = 0


class CommonConfig:
    """One device's common configuration and its queues.

    Fields are answered at their exact offset and width; the 64-bit ones also as two halves. Any other
    access reads as 0 and is ignored. ``vector_changed(cause, vector)`` tells the transport which vector a
    queue (its number) or the configuration (-1) has been given; it returns whether there is such a vector.
    """

    def __init__(
        self,
        device: VirtioDevice,
        queues: list[Queue],
        config_irq: IrqSource,
        vector_changed: Callable[[int, int], bool],
    ) -> None:
        self.device = device
        self.queues = queues
        self.offered = device.features | F_VERSION_1 | F_RING_RESET
        self._config_irq = config_irq
        self._vector_changed = vector_changed
        self._lock = threading.RLock()
        self._paused = False
        self._running = False
        self._generation = 0
        self._clear()
        device.config_changed = self.config_changed
        self._readers: dict[tuple[int, int], Callable[[], int]] = {
            (0x00, 4): lambda: self._device_select,
            (0x04, 4): lambda: _word(self.offered, self._device_select),
            (0x08, 4): lambda: self._driver_select,
            (0x0C, 4): lambda: _word(self._accepted, self._driver_select),
            (0x10, 2): lambda: self._config_vector,
            (0x12, 2): lambda: len(self.queues),
            (0x14, 1): self._read_status,
            (0x15, 1): lambda: self._generation & 0xFF,
            (0x16, 2): lambda: self._queue_select,
            (0x18, 2): lambda: self._queue("size"),
            (0x1A, 2): lambda: self._queue("vector", NO_VECTOR),
            (0x1C, 2): lambda: int(self._queue("enabled")),
            (0x1E, 2): lambda: self._queue_select if self._queue_select < len(self.queues) else 0,
            (0x3A, 2): lambda: 0,  # queue_reset: a reset is complete when its write returns
        }
        self._writers: dict[tuple[int, int], Callable[[int], None]] = {
            (0x00, 4): self._write_device_select,
            (0x08, 4): self._write_driver_select,
            (0x0C, 4): self._write_driver_features,
            (0x10, 2): self._write_config_vector,
            (0x14, 1): self._write_status,
            (0x16, 2): self._write_queue_select,
            (0x18, 2): self._write_queue_size,
            (0x1A, 2): self._write_queue_vector,
            (0x1C, 2): self._write_queue_enable,
            (0x3A, 2): self._write_queue_reset,
        }

    def _clear(self) -> None:
        self._device_select = self._driver_select = self._queue_select = 0
        self._accepted = 0
        self._status = 0
        self._config_vector = NO_VECTOR
        self._registers = [QueueRegisters(size) for size in self.device.queue_sizes]

    # -- the guest's side

    def read(self, offset: int, size: int) -> int:
        if 0x20 <= offset < 0x38:
            return self._read_address(offset, size)
        reader: Callable[[], int] | None = self._readers.get((offset, size))
        if reader is None:
            return 0
        with self._lock:
            return reader()

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            if 0x20 <= offset < 0x38:
                self._write_address(offset, size, value)
                return
            writer = self._writers.get((offset, size))
            if writer is not None:
                writer(value)

    def notify(self, index: int) -> None:
        """A notification that came through this process: KVM signals the others itself."""
        if index < len(self.queues):
            self.queues[index].kick()

    # -- selectors and features

    def _write_device_select(self, value: int) -> None:
        self._device_select = value

    def _write_driver_select(self, value: int) -> None:
        self._driver_select = value

    def _write_driver_features(self, value: int) -> None:
        if self._status & FEATURES_OK or self._driver_select > 1:
            return
        shift = 32 * self._driver_select
        self._accepted = self._accepted & ~(0xFFFF_FFFF << shift) | value << shift

    # -- status (3.1.1)

    @property
    def broken(self) -> bool:
        """Whether a queue has broken: the device needs a reset."""
        return any(queue.error is not None for queue in self.queues)

    def _read_status(self) -> int:
        return self._status | (NEEDS_RESET if self._status & DRIVER_OK and self.broken else 0)

    def _write_status(self, value: int) -> None:
        if value == 0:
            self.reset()
            return
        new = value & _DRIVER_BITS | self._status  # only a reset takes bits away (2.1.1)
        if new & FEATURES_OK and not self._status & FEATURES_OK and not self._features_fit():
            new &= ~(FEATURES_OK | DRIVER_OK)
        if new & DRIVER_OK and not new & FEATURES_OK:
            new &= ~DRIVER_OK
        starts = new & DRIVER_OK and not self._status & DRIVER_OK
        self._status = new
        if starts:
            self._start()

    def _features_fit(self) -> bool:
        return bool(self._accepted & F_VERSION_1) and not self._accepted & ~self.offered

    def _start(self) -> None:
        for index, registers in enumerate(self._registers):
            if registers.enabled:
                self._enable_ring(index)
        if not self._paused:
            self._run()

    def _run(self) -> None:
        enabled = {index: self.queues[index] for index, r in enumerate(self._registers) if r.enabled}
        self._running = True
        self.device.start(enabled, self._accepted & ~F_RING_RESET)

    def _halt(self) -> None:
        if self._running:
            self._running = False
            self.device.stop()

    def reset(self) -> None:
        """Reset the device (2.4): when this returns nothing of the driver is used any more."""
        with self._lock:
            self._halt()
            self.device.reset()
            for index, queue in enumerate(self.queues):
                queue.reset()
                self._vector_changed(index, NO_VECTOR)
            self._vector_changed(-1, NO_VECTOR)
            self._clear()

    # -- queues

    def _queue(self, name: str, otherwise: int = 0) -> int:
        if self._queue_select >= len(self.queues):
            return otherwise
        value: int = getattr(self._registers[self._queue_select], name)
        return value

    def _selected(self) -> QueueRegisters | None:
        """The selected queue's registers while they may be changed."""
        if self._queue_select >= len(self.queues):
            return None
        registers = self._registers[self._queue_select]
        return None if registers.enabled else registers

    def _write_queue_select(self, value: int) -> None:
        self._queue_select = value

    def _write_queue_size(self, value: int) -> None:
        registers = self._selected()
        if registers is None or not value or value & (value - 1):
            return
        if value <= self.device.queue_sizes[self._queue_select]:
            registers.size = value

    def _write_queue_vector(self, value: int) -> None:
        if self._queue_select < len(self.queues):
            known = self._vector_changed(self._queue_select, value)
            self._registers[self._queue_select].vector = value if known else NO_VECTOR

    def _write_config_vector(self, value: int) -> None:
        self._config_vector = value if self._vector_changed(-1, value) else NO_VECTOR

    def _write_queue_enable(self, value: int) -> None:
        registers = self._selected()
        if value != 1 or registers is None:
            return
        registers.enabled = True
        if self._status & DRIVER_OK:
            # After the reset of this queue alone (2.6.1.2); before DRIVER_OK all start together.
            self._enable_ring(self._queue_select)
            if self._running:
                self.device.start_queue(self.queues[self._queue_select])

    def _enable_ring(self, index: int) -> None:
        registers = self._registers[index]
        self.queues[index].enable(
            registers.size,
            registers.desc,
            registers.avail,
            registers.used,
            event_idx=bool(self._accepted & F_EVENT_IDX),
            indirect=bool(self._accepted & F_INDIRECT_DESC),
        )

    def _write_queue_reset(self, value: int) -> None:
        index = self._queue_select
        if value != 1 or index >= len(self.queues) or not self._accepted & F_RING_RESET:
            return
        if self._running:
            self.device.stop_queue(index)
        self.queues[index].reset()
        self._registers[index] = QueueRegisters(
            self.device.queue_sizes[index], vector=self._registers[index].vector
        )

    def _read_address(self, offset: int, size: int) -> int:
        found = _address_field(offset, size)
        if found is None or self._queue_select >= len(self.queues):
            return 0
        name, shift = found
        value: int = getattr(self._registers[self._queue_select], name)
        return value >> shift & (1 << 8 * size) - 1

    def _write_address(self, offset: int, size: int, value: int) -> None:
        found = _address_field(offset, size)
        registers = self._selected()
        if found is None or registers is None:
            return
        name, shift = found
        mask = ((1 << 8 * size) - 1) << shift
        setattr(registers, name, getattr(registers, name) & ~mask | value << shift)

    # -- the device's side

    def config_changed(self) -> None:
        """The device's configuration has changed: tell the driver (2.5.1). From any thread; never waits."""
        self._generation += 1
        if self._status & DRIVER_OK:
            self._config_irq.pulse()

    # -- the machine's side

    def pause(self) -> None:
        """Stop the workers; the rings stay as they are."""
        with self._lock:
            self._paused = True
            self._halt()

    def resume(self) -> None:
        with self._lock:
            self._paused = False
            if self._status & DRIVER_OK and not self._running:
                self._run()

    def save(self) -> dict[str, Any]:
        """Plain values; called paused."""
        return {
            "selects": [self._device_select, self._driver_select, self._queue_select],
            "accepted": self._accepted,
            "status": self._status,
            "config_vector": self._config_vector,
            "generation": self._generation,
            "registers": [[r.size, r.enabled, r.vector, r.desc, r.avail, r.used] for r in self._registers],
            "queues": [queue.save() for queue in self.queues],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`save` gave; :meth:`resume` starts the workers."""
        with self._lock:
            self._device_select, self._driver_select, self._queue_select = state["selects"]
            self._accepted, self._status = state["accepted"], state["status"]
            self._generation = state["generation"]
            self._registers = [QueueRegisters(*values) for values in state["registers"]]
            self._write_config_vector(state["config_vector"])
            for index, registers in enumerate(self._registers):
                self._vector_changed(index, registers.vector)
                self.queues[index].load(state["queues"][index])


def _word(value: int, select: int) -> int:
    return value >> 32 * select & 0xFFFF_FFFF if select < 4 else 0


def _address_field(offset: int, size: int) -> tuple[str, int] | None:
    """Which queue address, and from which bit on, an access at 0x20 to 0x37 means."""
    field, place = divmod(offset - 0x20, 8)
    if (size, place) not in ((8, 0), (4, 0), (4, 4)):
        return None
    return ("desc", "avail", "used")[field], 8 * place
