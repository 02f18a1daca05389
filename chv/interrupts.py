"""Interrupts: a GSI that any thread raises by writing an eventfd."""

from __future__ import annotations

import contextlib
import os

from ._kvm import KvmVm


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
