"""Interrupts: GSIs and MSI-X vectors that any thread raises by writing an eventfd."""

from __future__ import annotations

import contextlib
import os
import select
import threading

from ._kvm import KvmVm
from .errors import ConfigError

MAX_GSIS = 4096  # KVM_MAX_IRQ_ROUTES


class Irq:
    """One edge-triggered global system interrupt, bound to an eventfd by KVM_IRQFD.

    ``fd`` is the eventfd; code without the GIL writes 1 to it. The interrupt may be bound to
    one VM after another (a reboot makes a new one): ``fd`` stays the same.
    """

    def __init__(self, gsi: int) -> None:
        self.gsi = gsi
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def bind(self, vm: KvmVm) -> None:
        """Connect to ``vm``'s interrupt controllers; what was raised before is forgotten."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        vm.irqfd(self.fd, self.gsi)

    def pulse(self) -> None:
        """Raise the interrupt once."""
        os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class GsiRoutes:
    """Which GSI leads where in one VM: pins of the I/O APIC, and messages of MSI-X vectors above them."""

    def __init__(self, vm: KvmVm, pins: int) -> None:
        self._vm = vm
        self._pins = pins
        self._next = pins
        self._reserved = 0
        self._messages: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._apply()

    def reserve(self, count: int) -> None:
        """Say that ``count`` vectors may be asked for; :class:`ConfigError` if KVM cannot have so many."""
        self._reserved += count
        if self._pins + self._reserved > MAX_GSIS:
            raise ConfigError(
                f"devices: they have {self._reserved} MSI-X vectors; KVM has GSIs for {MAX_GSIS - self._pins}"
            )

    def vector(self) -> MsiVector:
        """A new GSI for one vector of a device, with an eventfd; it leads nowhere yet."""
        with self._lock:
            gsi = self._next
            self._next += 1
        return MsiVector(self, self._vm, gsi)

    def set(self, gsi: int, message: tuple[int, int]) -> None:
        """Let ``gsi`` be the MSI with this (address, data), as the guest chose it."""
        # With 32-bit x2APIC ids KVM refuses a message whose address has bits 32 to 39 (api.rst, 4.52).
        message = message[0] & ~(0xFF << 32), message[1]
        with self._lock:
            if self._messages.get(gsi) != message:
                self._messages[gsi] = message
                self._apply()

    def _apply(self) -> None:
        self._vm.set_routes(self._pins, self._messages)


class MsiVector:
    """One MSI-X vector of a device: an eventfd, and the message that a write to it sends.

    While it is masked the eventfd is not connected and counts what is raised: that is the vector's
    pending bit. KVM delivers it when it is connected again (its irqfd looks at the count then).
    """

    def __init__(self, routes: GsiRoutes, vm: KvmVm, gsi: int) -> None:
        self._routes = routes
        self._vm = vm
        self.gsi = gsi
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._connected = False

    def unmask(self, address: int, data: int) -> None:
        """Deliver what is raised, and what is pending, as this message."""
        self._routes.set(self.gsi, (address, data))
        if not self._connected:
            self._vm.irqfd(self.fd, self.gsi)
            self._connected = True

    def mask(self) -> None:
        """Keep what is raised from now on."""
        if self._connected:
            self._vm.irqfd(self.fd, self.gsi, assign=False)
            self._connected = False

    def raise_(self) -> None:
        """Raise it from Python."""
        os.eventfd_write(self.fd, 1)

    @property
    def pending(self) -> bool:
        """Whether it was raised while masked."""
        if self._connected:
            return False
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    def reset(self) -> None:
        """Masked, and nothing pending."""
        self.mask()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        """Give the eventfd back; the device must not use it any more."""
        if self.fd >= 0:
            self.mask()
            os.close(self.fd)
            self.fd = -1
