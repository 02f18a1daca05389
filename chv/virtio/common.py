"""The common configuration of a virtio device: the register logic, without any bus (virtio 1.2, 4.1.4.3)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ..logs import Logger
from .device import F_RING_RESET, F_VERSION_1
from .queue_registers import NO_VECTOR, QueueRegisters

if TYPE_CHECKING:
    from .._irq import IrqSource
    from .._virtqueue import Queue
    from .device import VirtioDevice

log = Logger(__name__)

SIZE: Final = 0x3C  # of the structure, with queue_reset
_ADDRESSES, _ADDRESSES_END = 0x20, 0x38

# Device status (2.1)
ACKNOWLEDGE: Final = 1
DRIVER: Final = 2
DRIVER_OK: Final = 4
FEATURES_OK: Final = 8
NEEDS_RESET: Final = 64
FAILED: Final = 128
_DRIVER_BITS: Final = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED


class CommonConfig:
    """One device's common configuration and its queues.

    Fields are answered at their exact offset and width; the 64-bit ones also as two halves. Any other
    access reads as 0 and is ignored. ``vector_changed(cause, vector)`` tells the transport which vector a
    queue (its number) or the configuration (-1) has been given; it returns whether there is such a vector.

    Any number of vCPUs may call at once. A reset waits for the device's workers, and what workers call
    (:meth:`config_changed`) never waits for a reset.
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
        self._lock = threading.Lock()  # of the registers; held while workers end
        self._config_lock = threading.Lock()  # of config_changed; held for moments, with or without the other
        self._registers = [QueueRegisters(queue) for queue in queues]
        self._paused = False
        self._running = False
        self._generation = 0
        self._last_config = device.config()
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
            (0x15, 1): self._read_generation,
            (0x16, 2): lambda: self._queue_select,
            (0x18, 2): lambda: 0 if (queue := self._selected) is None else queue.size,
            (0x1A, 2): lambda: NO_VECTOR if (queue := self._selected) is None else queue.vector,
            (0x1C, 2): lambda: 0 if (queue := self._selected) is None else int(queue.enabled),
            (0x1E, 2): lambda: 0 if self._selected is None else self._queue_select,
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
        self._device_select = self._driver_select = 0
        self._accepted = 0
        self._status = 0
        self._config_vector = NO_VECTOR
        for registers in self._registers:
            registers.clear()
        self._write_queue_select(0)

    # -- the guest's side

    def read(self, offset: int, size: int) -> int:
        reader = self._readers.get((offset, size))
        with self._lock:
            if reader is not None:
                return reader()
            if _ADDRESSES <= offset < _ADDRESSES_END and self._selected is not None:
                return self._selected.read_address(offset - _ADDRESSES, size)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        writer = self._writers.get((offset, size))
        with self._lock:
            if writer is not None:
                writer(value)
            elif _ADDRESSES <= offset < _ADDRESSES_END and self._selected is not None:
                self._selected.write_address(offset - _ADDRESSES, size, value)

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
        """Whether a queue or the device itself has broken: the device needs a reset."""
        return self.device.failure is not None or any(queue.error is not None for queue in self.queues)

    def _read_status(self) -> int:
        return self._status | (NEEDS_RESET if self._status & DRIVER_OK and self.broken else 0)

    def _write_status(self, value: int) -> None:
        if value == 0:
            self._reset()
            return
        new = value & _DRIVER_BITS | self._status  # only a reset takes bits away (2.1.1)
        if new & FEATURES_OK and not self._status & FEATURES_OK and not self._features_fit():
            new &= ~FEATURES_OK
        if not new & FEATURES_OK:
            new &= ~DRIVER_OK
        starts = new & DRIVER_OK and not self._status & DRIVER_OK
        self._status = new
        if starts:
            for registers in self._registers:
                if registers.enabled:
                    registers.set_up(self._accepted)
            self._run()

    def _features_fit(self) -> bool:
        return bool(self._accepted & F_VERSION_1) and not self._accepted & ~self.offered

    # -- the device's workers

    def _run(self) -> None:
        if self._paused or self._running:
            return
        enabled = {index: r.queue for index, r in enumerate(self._registers) if r.enabled}
        self._running = True
        self._try(lambda: self.device.start(enabled, self._accepted & ~F_RING_RESET))

    def _try(self, start: Callable[[], None]) -> None:
        """Start workers. If this host has no thread or memory left, it is the device that is broken."""
        try:
            start()
        except (OSError, MemoryError, RuntimeError) as error:
            log.warning("%s: cannot start: %s", self.device.name, error)
            self.device.failure = str(error)
            self._config_irq.pulse()

    def _halt(self) -> None:
        if self._running:
            self._running = False
            self.device.stop()

    def reset(self) -> None:
        """Reset the device (2.4): when this returns nothing of the driver is used any more."""
        with self._lock:
            self._reset()

    def _reset(self) -> None:
        self._halt()
        self.device.reset()
        self.device.failure = None
        for index, queue in enumerate(self.queues):
            queue.reset()
            self._vector_changed(index, NO_VECTOR)
        with self._config_lock:  # after this no thread raises the interrupt for this driver
            self._vector_changed(-1, NO_VECTOR)
            self._clear()
            if self._config_irq.status is not None:
                self._config_irq.status.take()

    # -- queues

    def _write_queue_select(self, value: int) -> None:
        self._queue_select = value
        self._selected = self._registers[value] if value < len(self._registers) else None

    def _write_queue_size(self, value: int) -> None:
        if self._selected is not None:
            self._selected.write_size(value)

    def _write_queue_vector(self, value: int) -> None:
        if self._selected is not None:
            known = self._vector_changed(self._queue_select, value)
            self._selected.vector = value if known else NO_VECTOR

    def _write_config_vector(self, value: int) -> None:
        self._config_vector = value if self._vector_changed(-1, value) else NO_VECTOR

    def _write_queue_enable(self, value: int) -> None:
        registers = self._selected
        if value != 1 or registers is None or registers.enabled:
            return
        registers.enabled = True
        if self._status & DRIVER_OK:
            # After the reset of this queue alone (2.6.1.2); before DRIVER_OK all start together.
            registers.set_up(self._accepted)
            if self._running:
                queue = registers.queue
                self._try(lambda: self.device.start_queue(queue))

    def _write_queue_reset(self, value: int) -> None:
        registers, index = self._selected, self._queue_select
        if value != 1 or registers is None or not self._accepted & F_RING_RESET:
            return
        if self._running:
            self.device.stop_queue(index)
        registers.queue.reset()
        registers.clear()
        self._vector_changed(index, NO_VECTOR)

    # -- the device's configuration

    def config_changed(self) -> None:
        """The device's configuration has changed: tell the driver (2.5.1). From any thread."""
        with self._config_lock:
            self._generation += 1
            if self._status & DRIVER_OK:
                self._config_irq.pulse()

    def _read_generation(self) -> int:
        """Another one than before if any part of the configuration is another (4.1.4.3.1).

        The device says so only when it has changed it, and a driver may read it between the two.
        """
        config = self.device.config()
        if config != self._last_config:
            self._last_config = config
            with self._config_lock:
                self._generation += 1
        return self._generation & 0xFF

    # -- the machine's side

    def pause(self) -> None:
        """Stop the workers; the rings stay as they are."""
        with self._lock:
            self._paused = True
            self._halt()

    def resume(self) -> None:
        with self._lock:
            self._paused = False
            if self._status & DRIVER_OK:
                self._run()

    def save(self) -> dict[str, Any]:
        """Plain values; called paused."""
        return {
            "selects": [self._device_select, self._driver_select, self._queue_select],
            "accepted": self._accepted,
            "status": self._status,
            "config_vector": self._config_vector,
            "generation": self._generation,
            "queues": [registers.save() for registers in self._registers],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`save` gave; :meth:`resume` starts the workers."""
        with self._lock:
            self._device_select, self._driver_select, queue_select = state["selects"]
            self._write_queue_select(queue_select)
            self._accepted, self._status = state["accepted"], state["status"]
            self._generation = state["generation"]
            self._write_config_vector(state["config_vector"])
            for index, registers in enumerate(self._registers):
                registers.load(state["queues"][index])
                self._vector_changed(index, registers.vector)


def _word(value: int, select: int) -> int:
    return value >> 32 * select & 0xFFFF_FFFF if select < 4 else 0
