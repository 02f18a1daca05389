"""What every virtio device has: identity, features, configuration, queues, and a worker for each queue."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..logs import Logger
from ..threads import leave_signals_to_main

if TYPE_CHECKING:
    from .._virtqueue import Queue

log = Logger(__name__)

# Feature bits that are not one device's own (virtio 1.2, 6).
F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32
F_RING_RESET = 1 << 40


def _nothing() -> None:
    pass


class VirtioDevice(ABC):
    """A device behind a transport. It lives as long as its VM, over reboots; transports come and go.

    The transport calls :meth:`start` when the driver sets DRIVER_OK and :meth:`stop` before a reset,
    a pause, or the end; both in any thread, never two at a time. Between them the device's workers
    use the queues.
    """

    ID: ClassVar[int]  #: virtio device type (virtio 1.2, 5); the PCI device id is 0x1040 + this
    PCI_CLASS: ClassVar[int] = 0xFF0000  #: 24-bit PCI class code

    def __init__(self, name: str, features: int, queue_sizes: Sequence[int]) -> None:
        self.name = name  #: as in vm.info and vm.counters, for example "_disk0"
        self.features = features  #: what is offered, F_VERSION_1 included
        self.queue_sizes = tuple(queue_sizes)  #: the most entries of each queue, powers of two
        self.accepted = 0  #: the features of the present driver
        self.config_changed: Callable[[], None] = _nothing  #: tell the driver; set by the transport
        self.failure: str | None = None  #: why the device itself is broken, until it is reset
        self._workers: list[tuple[threading.Thread, Queue]] = []

    # -- the driver's side

    def config(self) -> bytes:
        """The device-specific configuration as it is now; what lies behind it reads as 0."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:  # noqa: B027 - most devices have none
        """The driver writes its configuration; ignored unless the device has something to write."""

    def start(self, queues: Mapping[int, Queue], features: int) -> None:
        """Serve ``queues`` (number -> each that the driver enabled) with a thread each, in :meth:`work`."""
        self.accepted = features
        for _, queue in sorted(queues.items()):
            self.start_queue(queue)

    def stop(self) -> None:
        """End the workers. What they took from the rings has been completed, or is given back unused.

        The queues stay as they are: :meth:`start` with the same ones goes on.
        """
        workers, self._workers = self._workers, []
        for _, queue in workers:
            queue.stop()
        for thread, _ in workers:
            thread.join()

    def stop_queue(self, index: int) -> None:
        """End one queue's worker (virtio 1.2, 2.6.1: queue reset)."""
        for pair in self._workers:
            if pair[1].index == index:
                pair[1].stop()
                pair[0].join()
                self._workers.remove(pair)
                return

    def start_queue(self, queue: Queue) -> None:
        """Start one queue's worker (again)."""
        queue.prepare()
        thread = threading.Thread(
            target=self._run, args=(queue,), name=f"{self.name}.{queue.index}", daemon=True
        )
        thread.start()
        self._workers.append((thread, queue))

    def _run(self, queue: Queue) -> None:
        leave_signals_to_main()
        try:
            self.work(queue)
        except Exception as error:
            log.exception("%s: the worker of queue %d ended", self.name, queue.index)
            self.failure = f"queue {queue.index}: {error!r}"
            self.config_changed()

    @abstractmethod
    def work(self, queue: Queue) -> None:
        """Serve one queue until ``queue.stop()``; in a thread of its own, without the GIL where it is hot.

        It must not raise, whatever the guest does; a ring that breaks ends it. What it raises is logged,
        and the driver is told that the device needs a reset.
        """

    def reset(self) -> None:
        """Forget what the driver did; called stopped."""
        self.accepted = 0

    # -- the host's side

    def counters(self) -> dict[str, int]:
        """What ``vm.counters`` shows, with Cloud Hypervisor's names where it has them."""
        return {}

    def save(self) -> dict[str, Any]:
        """Plain values; called stopped."""
        return {"accepted": self.accepted}

    def load(self, state: dict[str, Any]) -> None:
        self.accepted = state["accepted"]

    def close(self) -> None:  # noqa: B027 - a device may hold nothing
        """Give back what the device holds on the host: files, taps, threads."""
