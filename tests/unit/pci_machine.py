"""A PCI bus with virtio transports on plain buses, for tests without KVM."""

from __future__ import annotations

import errno
import threading

from chv import layout
from chv._bus import Bus, SlotNames
from chv._virtqueue import Queue, RamMap
from chv.errors import KvmError
from chv.interrupts import GsiRoutes
from chv.memory import GuestMemory
from chv.pci.bus import PciBus
from chv.virtio.device import F_VERSION_1, VirtioDevice
from chv.virtio.transport import VirtioPci

MEMORY = 16 << 20
PHYS_BITS = 46


class FakeVm:
    """What KVM is told: ioeventfds by address, irqfds by GSI, routes."""

    fd = -1

    def __init__(self) -> None:
        self.ioeventfds: dict[int, int] = {}
        self.irqfds: dict[int, int] = {}
        self.routes: dict[int, tuple[int, int]] = {}

    def set_routes(self, pins: int, messages: dict[int, tuple[int, int]]) -> None:
        self.routes = dict(messages)

    def irqfd(self, eventfd: int, gsi: int, assign: bool = True) -> None:
        if assign:
            assert gsi not in self.irqfds
            self.irqfds[gsi] = eventfd
        else:
            assert self.irqfds.pop(gsi) == eventfd

    def ioeventfd(self, eventfd: int, address: int, length: int, assign: bool = True) -> None:
        assert length == 0
        if assign:
            if address in self.ioeventfds:
                raise KvmError(errno.EEXIST, "KVM_IOEVENTFD")
            self.ioeventfds[address] = eventfd
        else:
            assert self.ioeventfds.pop(address) == eventfd


class Echo(VirtioDevice):
    """Answers each chain with its own bytes, backwards. Two queues; a configuration of four bytes."""

    ID = 42

    def __init__(self, features: int = 0) -> None:
        super().__init__("echo", F_VERSION_1 | features, (256, 256))
        self.written = bytearray(b"abcd")
        self.starts: list[tuple[list[int], int]] = []
        self.resets = 0

    def config(self) -> bytes:
        return bytes(self.written)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset + len(data) <= 4:
            self.written[offset : offset + len(data)] = data

    def start(self, queues: dict[int, Queue], features: int) -> None:  # type: ignore[override]
        self.starts.append((sorted(queues), features))
        super().start(queues, features)

    def reset(self) -> None:
        self.resets += 1
        super().reset()

    def work(self, queue: Queue) -> None:
        while not queue.stopping:
            for chain in queue:
                chain.write(chain.read()[::-1])
                chain.done()
            if not queue.enable_kick():
                queue.wait()


class PciMachine:
    """One bus, and the configuration accesses of a guest by ports."""

    # Address and data are two accesses: vCPUs that share the ports take turns, as Linux's do.
    _ports = threading.Lock()

    def __init__(self, *devices: VirtioDevice) -> None:
        self.memory = GuestMemory(MEMORY)
        self.vm = FakeVm()
        self.resets = 0
        slots = SlotNames()
        self.pio, self.mmio = Bus("pio", 0x10000, slots), Bus("mmio", 0, slots)
        self.bus = PciBus(layout.pci_windows(MEMORY, PHYS_BITS), self._reset)
        self.pio.add(layout.PCI_CONFIG_PORT, layout.PCI_CONFIG_SIZE, self.bus.ports, "ports")
        self.mmio.add(layout.ECAM, layout.ECAM_SIZE, self.bus.ecam, "ecam")
        self.routes = GsiRoutes(self.vm, 24)  # type: ignore[arg-type]
        ram = RamMap(self.memory)
        self.transports = []
        for slot, device in enumerate(devices, 1):
            transport = VirtioPci(
                device,
                ram=ram,
                vm=self.vm,  # type: ignore[arg-type]
                mmio=self.mmio,
                routes=self.routes,
                line=self.bus.line(self.vm, slot),  # type: ignore[arg-type]
                slot=slot,
            )
            self.bus.add(transport, slot)
            self.transports.append(transport)

    def _reset(self) -> None:
        self.resets += 1

    def close(self) -> None:
        self.bus.close()

    def read(self, slot: int, register: int, size: int = 4) -> int:
        with self._ports:
            self.pio.write(0xCF8, 4, 1 << 31 | slot << 11 | register & 0xFC)
            return self.pio.read(0xCFC + (register & 3), size)

    def write(self, slot: int, register: int, value: int, size: int = 4) -> None:
        with self._ports:
            self.pio.write(0xCF8, 4, 1 << 31 | slot << 11 | register & 0xFC)
            self.pio.write(0xCFC + (register & 3), size, value)

    def capabilities(self, slot: int) -> list[tuple[int, int]]:
        """(offset, id) of each capability, as a guest walks them."""
        found, offset = [], self.read(slot, 0x34, 1)
        while offset:
            found.append((offset, self.read(slot, offset, 1)))
            offset = self.read(slot, offset + 1, 1)
        return found
