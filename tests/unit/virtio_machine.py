"""A virtio device with its queues and a driver at the other end, without KVM and without PCI."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from chv._irq import IrqSource
from chv._virtqueue import Queue, RamMap
from chv.memory import GuestMemory
from chv.virtio.device import VirtioDevice
from tests.virtio_driver import Ring

MB = 1 << 20


@dataclass
class Machine:
    """One power-on: what a transport would own, and the driver's rings."""

    device: VirtioDevice
    memory: GuestMemory
    queues: list[Queue]
    rings: list[Ring]

    def start(self, features: int | None = None) -> None:
        """As DRIVER_OK does; all that is offered is accepted unless told."""
        self.device.start(
            {queue.index: queue for queue in self.queues},
            self.device.features if features is None else features,
        )


@contextlib.contextmanager
def machine(device: VirtioDevice, *, ring_size: int = 8, started: bool = True) -> Iterator[Machine]:
    """The device runs with new queues; afterwards it is stopped and reset, as for a reboot."""
    memory = GuestMemory(8 * MB)
    ram = RamMap(memory)
    queues = [
        Queue(ram, index, size, IrqSource(), IrqSource()) for index, size in enumerate(device.queue_sizes)
    ]
    rings = [Ring(memory, base=(2 * index + 1) * MB, size=ring_size) for index in range(len(queues))]
    for queue, ring in zip(queues, rings, strict=True):
        ring.enable(queue)
    found = Machine(device, memory, queues, rings)
    try:
        if started:
            found.start()
        yield found
    finally:
        device.stop()
        device.reset()
        for queue in queues:
            queue.close()
        memory.close()
