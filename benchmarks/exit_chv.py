"""chv as a contestant of the exit benchmarks: the whole machine, with one more device.

The device's register is handled in C (``device.pyx``) or by :class:`Register`. What takes the guest's
samples is in C in both cases, so that it does not count.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import chv
from chv.interrupts import Irq
from chv.machine import Machine

from . import guests
from .guests import Guest

TIMEOUT = 120


class Register:
    """What was written last is read; the guests read no fewer bytes than they wrote last."""

    def __init__(self) -> None:
        self.value = 0

    def read(self, offset: int, size: int) -> int:
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value


class Waker:
    """Wakes a guest that halts, from a Python thread: ``device.Waker`` in Python.

    ``ready`` and ``stamp`` are addresses in this process, which stay what they are as long as the guest runs.
    """

    def __init__(self, ticks: Any) -> None:
        self._ticks = ticks
        self._stopped = False

    def run(self, ready: int, stamp: int, count: int, offset: int, pulse: Callable[[], None]) -> None:
        is_ready, stamped = ctypes.c_uint32.from_address(ready), ctypes.c_uint32.from_address(stamp)
        for number in range(1, count + 1):
            while is_ready.value < number:
                if self._stopped:
                    return
                time.sleep(0.0003)
            time.sleep(0.0003)
            stamped.value = self._ticks() + offset & 0xFFFFFFFF
            pulse()

    def stop(self) -> None:
        self._stopped = True


class Control:
    """Byte 0 of the device, as QEMU's pci-testdev has it: the guest says what it is about to test.

    It is written by vCPU 0, which is out of KVM_RUN then; so the vCPU's clock can be read.
    """

    def __init__(self, device: Any, guest: Guest, *, python: bool) -> None:
        self.vm: chv.VM | None = None
        self._device = device
        self._guest = guest
        self._python = python
        self._events: list[int] = []
        self._irq: Irq | None = None
        self._waker: Any = None
        self._thread: threading.Thread | None = None

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if value == guests.TEST_EVENT and not self._events:
            vm = self._machine()._vm
            self._events = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2)]
            vm.ioeventfd(self._events[0], guests.PIO_EVENT, 1, pio=True)
            vm.ioeventfd(self._events[1], guests.MMIO_EVENT, 1)
        elif value == guests.TEST_WAKE and self._thread is None:
            self._start_waking(self._machine())

    def _machine(self) -> Machine:
        # The vCPU runs a moment before boot() returns.
        while self.vm is None or self.vm._machine is None:
            time.sleep(0.0005)
        return self.vm._machine

    def _start_waking(self, machine: Machine) -> None:
        offset = machine._vcpus[0].kvm.tsc_offset()
        if offset is None:
            raise RuntimeError("this host's KVM does not tell a guest's TSC offset")
        self._irq = Irq(guests.WAKE_GSI)
        self._irq.bind(machine._vm)
        region = machine.memory.find(guests.MAILBOX, 8)
        ready, stamp = (region.address + at for at in (guests.MAILBOX_READY, guests.MAILBOX_STAMP))
        self._waker = Waker(self._device.ticks) if self._python else self._device.Waker()
        raise_it = self._irq.pulse if self._python else self._irq.fd
        arguments = (ready, stamp, self._guest.wakes, offset, raise_it)
        self._thread = threading.Thread(target=self._waker.run, args=arguments)
        self._thread.start()

    def close(self) -> None:
        """Before the VM is deleted: its memory is used."""
        if self._thread is not None:
            self._waker.stop()
            self._thread.join()
        if self._irq is not None:
            self._irq.close()
        for fd in self._events:
            os.close(fd)


def run(guest: Guest, device: Any, *, python: bool, spin: bool = False) -> tuple[bytes, dict[str, int]]:
    """What the guest wrote, and how many exits its register had by bus.

    ``python``: the register is a Python object. ``spin``: another Python thread computes all the time.
    """
    output = device.Output(1 << 22)
    control = Control(device, guest, python=python)
    with (
        chv.VM(kernel=guest.elf, cpus=guest.cpus, memory=guests.MEMORY_SIZE, serial="off") as vm,
        spinning() if spin else nullcontext(),
    ):
        control.vm = vm
        for add, base, name in ((vm.add_pio, guests.PIO, "pio"), (vm.add_mmio, guests.MMIO, "mmio")):
            add(base, 1, control, name="control")
            register = Register() if python else device.Register()
            add(base + guests.REGISTER, guests.REGISTER_SIZE, register, name=f"register-{name}")
        vm.add_pio(guests.COM1, 1, output)
        vm.add_pio(guests.DONE_PORT, 1, device.Done())
        try:
            vm.boot()
            if not vm.wait(TIMEOUT):
                raise TimeoutError(f"the guest did not end in {TIMEOUT} s")
        finally:
            control.close()
        devices = vm.exits.devices
        counts = {
            bus: devices[f"register-{bus}"].count if f"register-{bus}" in devices else 0
            for bus in ("pio", "mmio")
        }
    return output.take(), counts


@contextmanager
def spinning() -> Iterator[None]:
    """A Python thread that holds the GIL whenever it can."""
    stop = threading.Event()

    def spin() -> None:
        stopped = stop.is_set
        while not stopped():
            pass

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def switch_interval() -> float:
    """How long a Python thread may keep the GIL, in seconds: what the spinning one makes others wait."""
    return sys.getswitchinterval()
