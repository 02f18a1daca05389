"""virtio over PCI (virtio 1.2, 4.1): capabilities, one BAR, MSI-X or INTx, an ioeventfd for each queue."""

from __future__ import annotations

import contextlib
import struct
import threading
from typing import TYPE_CHECKING, Any, Final

from .._irq import IrqSource, IrqStatus
from .._virtqueue import Queue
from ..errors import KvmError
from ..pci import msix
from ..pci.function import COMMAND, COMMAND_INTX_OFF, PciFunction
from ..pci.msix import Msix
from .common import SIZE as COMMON_SIZE
from .common import CommonConfig

if TYPE_CHECKING:
    from .._bus import Bus
    from .._irq import IrqLine
    from .._kvm import KvmVm
    from .._virtqueue import RamMap
    from ..interrupts import GsiRoutes
    from .device import VirtioDevice

VENDOR: Final = 0x1AF4
FIRST_DEVICE_ID: Final = 0x1040
_VENDOR_CAPABILITY: Final = 0x09

# Cloud Hypervisor's BAR (its virtio-devices/src/transport/pci_device.rs).
BAR: Final = 0
BAR_SIZE: Final = 0x80000
COMMON: Final = 0x0
ISR: Final = 0x2000
DEVICE: Final = 0x4000
NOTIFY: Final = 0x6000
MSIX_TABLE: Final = 0x8000
MSIX_PENDING: Final = 0x48000
_ISR_SIZE, _DEVICE_SIZE, _NOTIFY_SIZE = 1, 0x1000, 0x2000
NOTIFY_MULTIPLIER: Final = 4

# Capability types (4.1.4)
_COMMON_CFG, _NOTIFY_CFG, _ISR_CFG, _DEVICE_CFG, _PCI_CFG = 1, 2, 3, 4, 5


class VirtioPci(PciFunction):
    """A transport in front of ``device`` for one power-on.

    ``line`` is the GSI of the slot's INTA; it is used while a driver has MSI-X off. Accesses to the BAR
    that are not a queue notification come to :meth:`bar_read` and :meth:`bar_write`.
    """

    def __init__(
        self,
        device: VirtioDevice,
        *,
        ram: RamMap,
        vm: KvmVm,
        mmio: Bus,
        routes: GsiRoutes,
        line: IrqLine | None,
        slot: int,
    ) -> None:
        super().__init__(
            VENDOR,
            FIRST_DEVICE_ID + device.ID,
            device.PCI_CLASS,
            revision=1,
            subsystem_vendor=VENDOR,
            subsystem=FIRST_DEVICE_ID + device.ID,
            interrupt_pin=0 if line is None else 1,
        )
        self.device = device
        self._vm = vm
        self._mmio = mmio
        self._isr = IrqStatus(line, slot)
        self.config.show_interrupt(self._isr)
        self._config_irq = IrqSource(self._isr, 2)
        self._queue_irqs = [IrqSource(self._isr, 1) for _ in device.queue_sizes]
        self.queues = [
            Queue(ram, index, size, irq, self._config_irq)
            for index, (size, irq) in enumerate(zip(device.queue_sizes, self._queue_irqs, strict=True))
        ]
        self._msix = Msix(len(self.queues) + 1, routes)
        self._irq_lock = threading.Lock()  # of the vectors and of which cause has which; nothing waits in it
        self._chosen: dict[int, int] = {}  # cause -> vector, as the driver wrote it
        self.common = CommonConfig(device, self.queues, self._config_irq, self._vector_changed)
        self._notified_at: int | None = None  # where the ioeventfds are
        self._add_capabilities()
        self.add_bar(BAR, BAR_SIZE)
        self._range = mmio.add_movable(BAR_SIZE, _Bar(self), f"{device.name.strip('_')}-bar")

    # -- configuration space

    def _add_capabilities(self) -> None:
        notify = struct.pack("<I", NOTIFY_MULTIPLIER)
        for kind, offset, length, extra in (
            (_COMMON_CFG, COMMON, COMMON_SIZE, b""),
            (_ISR_CFG, ISR, _ISR_SIZE, b""),
            (_DEVICE_CFG, DEVICE, _DEVICE_SIZE, b""),
            (_NOTIFY_CFG, NOTIFY, _NOTIFY_SIZE, notify),
        ):
            self.add_capability(_VENDOR_CAPABILITY, _capability(kind, offset, length, extra))
        body, writable = self._msix.capability(BAR, MSIX_TABLE, MSIX_PENDING)
        self._msix_control = self.add_capability(msix.CAPABILITY, body, writable) + 2
        # The window's BAR, offset, length and data can be written (4.1.4.9).
        self._window = self.add_capability(
            _VENDOR_CAPABILITY,
            _capability(_PCI_CFG, 0, 0, bytes(4)),
            b"\0\0\xff\0\0\0" + b"\xff" * 12,
            hook=True,
        )

    def config_written(self, offset: int, size: int) -> None:
        if offset < self._msix_control + 2 and offset + size > self._msix_control:
            with self._irq_lock:
                self._msix.set_control(self.config.get(self._msix_control, 2))
            self._connect()
        if offset < COMMAND + 2 and offset + size > COMMAND:
            self._isr.gate(bool(self.command & COMMAND_INTX_OFF))

    def hook_read(self, offset: int, size: int) -> int:
        """The configuration access window: reading its data reads the BAR (4.1.4.9)."""
        target = self._window_target(offset, size)
        if target is not None:
            value = self.bar_read(target, size)
            self.config.set(offset, size, value, (1 << 8 * size) - 1)
            return value
        return self.config.get(offset, size)

    def hook_write(self, offset: int, size: int, value: int) -> None:
        self.config.write(offset, size, value)
        target = self._window_target(offset, size)
        if target is not None:
            self.bar_write(target, size, value)

    def _window_target(self, offset: int, size: int) -> int | None:
        """Where in the BAR an access to the window's data goes; None if it is none or makes no sense."""
        window = self._window
        if offset != window + 16 or self.config.get(window + 4, 1) != BAR:
            return None
        target, length = self.config.get(window + 8, 4), self.config.get(window + 12, 4)
        if length not in (1, 2, 4) or length != size or target % length or target + length > BAR_SIZE:
            return None
        return target

    # -- the BAR

    def bar_moved(self, index: int, address: int | None) -> None:
        self._mmio.place(self._range, address)
        self._signal_at(None if address is None else address + NOTIFY)

    def _signal_at(self, address: int | None) -> None:
        """Have KVM turn notifications at ``address`` into writes of the queues' eventfds."""
        if self._notified_at is not None:
            for queue in self.queues:
                place = self._notified_at + NOTIFY_MULTIPLIER * queue.index
                self._vm.ioeventfd(queue.kick_fd, place, 0, assign=False)
            self._notified_at = None
        if address is None:
            return
        done: list[Queue] = []
        for queue in self.queues:
            try:
                self._vm.ioeventfd(queue.kick_fd, address + NOTIFY_MULTIPLIER * queue.index, 0)
            except KvmError:
                # Another device's BAR lies there already: then a guest gets what it asked for, and
                # notifications come here the slow way.
                for other in done:
                    place = address + NOTIFY_MULTIPLIER * other.index
                    self._vm.ioeventfd(other.kick_fd, place, 0, assign=False)
                return
            done.append(queue)
        self._notified_at = address

    def bar_read(self, offset: int, size: int) -> int:
        if offset < ISR:
            return self.common.read(offset, size)
        if offset < DEVICE:
            return self._isr.take() if offset == ISR else 0
        if offset < NOTIFY:
            return self._read_device(offset - DEVICE, size)
        if offset < MSIX_TABLE:
            return 0
        if offset < MSIX_PENDING:
            return self._msix.table_read(offset - MSIX_TABLE, size)
        return self._msix.pending_read(offset - MSIX_PENDING, size)

    def bar_write(self, offset: int, size: int, value: int) -> None:
        if offset < ISR:
            self.common.write(offset, size, value)
        elif DEVICE <= offset < NOTIFY:
            self.device.write_config(offset - DEVICE, value.to_bytes(size, "little"))
        elif NOTIFY <= offset < MSIX_TABLE:
            self.common.notify((offset - NOTIFY) // NOTIFY_MULTIPLIER)
        elif MSIX_TABLE <= offset < MSIX_PENDING:
            with self._irq_lock:
                self._msix.table_write(offset - MSIX_TABLE, size, value)

    def _read_device(self, offset: int, size: int) -> int:
        return int.from_bytes(self.device.config()[offset : offset + size], "little")

    # -- interrupts

    def _vector_changed(self, cause: int, vector: int) -> bool:
        """The driver gives a cause (-1: the configuration, else a queue) a vector; whether it exists."""
        known = vector < self._msix.count
        with self._irq_lock:
            self._chosen.pop(cause, None)
            if known:
                self._chosen[cause] = vector
            self._connect_one(cause)
        return known

    def _connect(self) -> None:
        with self._irq_lock:
            for cause in range(-1, len(self.queues)):
                self._connect_one(cause)

    def _connect_one(self, cause: int) -> None:
        source = self._config_irq if cause < 0 else self._queue_irqs[cause]
        if self._msix.enabled:
            vector = self._chosen.get(cause)
            if vector is None:
                source.use_nothing()
            else:
                source.use_message(self._msix.fd(vector))
        else:
            source.use_pin()

    # -- the machine's side

    def pause(self) -> None:
        """Stop the device's workers."""
        self.common.pause()

    def resume(self) -> None:
        self.common.resume()

    def save(self) -> dict[str, Any]:
        return {
            **super().save(),
            "common": self.common.save(),
            "msix": self._msix.save(),
            "isr": self._isr.value,
        }

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._msix.load(state["msix"])
        self.common.load(state["common"])
        for bit in (1, 2):
            if state["isr"] & bit:
                IrqSource(self._isr, bit).pulse()
        self._isr.gate(bool(self.command & COMMAND_INTX_OFF))
        self._connect()

    def close(self) -> None:
        """Reset the device, which goes on to the next power-on, and give back what belongs to this one."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._msix.close)
            for queue in self.queues:
                stack.callback(queue.close)
            stack.callback(self._signal_at, None)
            stack.callback(self.common.reset)


class _Bar:
    """What the bus calls."""

    def __init__(self, transport: VirtioPci) -> None:
        self.read = transport.bar_read
        self.write = transport.bar_write


def _capability(kind: int, offset: int, length: int, extra: bytes) -> bytes:
    """A virtio capability (4.1.4) behind its first two bytes."""
    return struct.pack("<BBB3xII", 16 + len(extra), kind, BAR, offset, length) + extra
