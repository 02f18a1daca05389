"""A VMM in pure Python as a contestant of the exit benchmarks: fcntl, mmap and struct, no compiled code.

That is what people write to try KVM from Python. Numbers are those of linux/kvm.h on x86-64.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
import struct
import threading
from contextlib import ExitStack
from typing import Any

from . import guests
from .exit_chv import TIMEOUT, Waker
from .guests import Guest

_CREATE_VM = 0xAE01
_VCPU_MMAP_SIZE = 0xAE04
_GET_SUPPORTED_CPUID = 0xC008AE05
_CREATE_VCPU = 0xAE41
_SET_MEMORY_REGION = 0x4020AE46
_SET_TSS_ADDRESS = 0xAE47
_CREATE_IRQCHIP = 0xAE60
_IRQFD = 0x4020AE76
_IOEVENTFD = 0x4040AE79
_RUN = 0xAE80
_SET_CPUID2 = 0x4008AE90
_GET_DEVICE_ATTR = 0x4018AEE2

_EXIT_IO = 2
_EXIT_MMIO = 6
_EXIT_INTR = 10

_IO = struct.Struct("<BBHIQ")  # direction, size, port, count, data_offset; at 32
_MMIO = struct.Struct("<Q8sIB")  # address, data, length, is_write; at 32
_WHERE = 32


class _Vmm:
    def __init__(self, guest: Guest, ticks: Any, stack: ExitStack) -> None:
        self._guest = guest
        self._ticks = ticks
        self._stack = stack
        self.output = bytearray()
        self.exits = {"pio": 0, "mmio": 0}
        self.value = 0
        self.done = threading.Event()
        self._stopped = False
        self.kvm = self._owned(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        self.vm = self._owned(fcntl.ioctl(self.kvm, _CREATE_VM, 0))
        fcntl.ioctl(self.vm, _SET_TSS_ADDRESS, 0x70000000)  # Python's int argument is a signed one
        fcntl.ioctl(self.vm, _CREATE_IRQCHIP, 0)
        self.memory = mmap.mmap(-1, guests.MEMORY_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with open(guest.rom, "rb") as image:
            self.memory[0xF0000:0x100000] = image.read()
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._add_memory(0, 0, guests.MEMORY_SIZE, self.address)
        self._add_memory(1, 0xFFFF0000, 0x10000, self.address + 0xF0000)
        for flags, port in ((1 << 1, guests.PIO_EVENT), (0, guests.MMIO_EVENT)):  # KVM_IOEVENTFD_FLAG_PIO
            request = struct.pack("<QQIiI36x", 0, port, 1, self._eventfd(), flags)
            fcntl.ioctl(self.vm, _IOEVENTFD, request)
        self.run_size = fcntl.ioctl(self.kvm, _VCPU_MMAP_SIZE, 0)
        self.vcpus = [self._create_vcpu(index) for index in range(guest.cpus)]

    def _owned(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    def _eventfd(self) -> int:
        return self._owned(os.eventfd(0, os.EFD_CLOEXEC))

    def _add_memory(self, slot: int, base: int, size: int, address: int) -> None:
        fcntl.ioctl(self.vm, _SET_MEMORY_REGION, struct.pack("<IIQQQ", slot, 0, base, size, address))

    def _create_vcpu(self, index: int) -> int:
        vcpu = self._owned(fcntl.ioctl(self.vm, _CREATE_VCPU, index))
        cpuid = bytearray(8 + 256 * 40)
        struct.pack_into("<I", cpuid, 0, 256)
        fcntl.ioctl(self.kvm, _GET_SUPPORTED_CPUID, cpuid)
        fcntl.ioctl(vcpu, _SET_CPUID2, cpuid)
        return vcpu

    def run(self) -> None:
        """Run the guest to its end."""
        waker, threads = Waker(self._ticks), []
        if self._guest.wakes:
            threads.append(threading.Thread(target=waker.run, args=self._wakes()))
        threads += [threading.Thread(target=self._loop, args=(vcpu,)) for vcpu in self.vcpus]
        for thread in threads:
            thread.start()
        try:
            if not self.done.wait(TIMEOUT):
                raise TimeoutError(f"the guest did not end in {TIMEOUT} s")
        finally:
            waker.stop()
            self._stopped = True
            for thread in threads:
                while thread.is_alive():
                    signal.pthread_kill(thread.ident or 0, signal.SIGUSR1)
                    thread.join(0.05)

    def _wakes(self) -> tuple[Any, ...]:
        offset = ctypes.c_int64()
        attribute = struct.pack("<IIQQ", 0, 0, 0, ctypes.addressof(offset))  # TSC_CTRL, TSC_OFFSET
        fcntl.ioctl(self.vcpus[0], _GET_DEVICE_ATTR, attribute)
        event = self._eventfd()
        fcntl.ioctl(self.vm, _IRQFD, struct.pack("<IIII16x", event, guests.WAKE_GSI, 0, 0))
        ready, stamp = (self.address + at for at in (guests.MAILBOX_READY, guests.MAILBOX_STAMP))
        return ready, stamp, self._guest.wakes, offset.value, lambda: os.eventfd_write(event, 1)

    def _loop(self, vcpu: int) -> None:
        run = mmap.mmap(vcpu, self.run_size)
        while not self._stopped:
            try:
                fcntl.ioctl(vcpu, _RUN, 0)
            except (InterruptedError, BlockingIOError):
                continue
            (reason,) = struct.unpack_from("<I", run, 8)
            if reason == _EXIT_IO:
                if self._io(run):
                    self.done.set()
                    return
            elif reason == _EXIT_MMIO:
                self._mmio(run)
            elif reason != _EXIT_INTR:
                raise RuntimeError(f"exit reason {reason}")

    def _io(self, run: mmap.mmap) -> bool:
        direction, size, port, count, at = _IO.unpack_from(run, _WHERE)
        if 0 <= port - guests.PIO - guests.REGISTER < guests.REGISTER_SIZE:
            self.exits["pio"] += 1
            for _ in range(count):
                if direction:
                    self.value = int.from_bytes(run[at : at + size], "little")
                else:
                    run[at : at + size] = (self.value & (1 << 8 * size) - 1).to_bytes(size, "little")
                at += size
        elif port == guests.COM1 and direction:
            self.output += run[at : at + size * count]
        elif port == guests.DONE_PORT and direction:
            return True
        elif not direction:
            run[at : at + size * count] = b"\xff" * (size * count)
        return False

    def _mmio(self, run: mmap.mmap) -> None:
        address, data, length, is_write = _MMIO.unpack_from(run, _WHERE)
        if 0 <= address - guests.MMIO - guests.REGISTER < guests.REGISTER_SIZE:
            self.exits["mmio"] += 1
            if is_write:
                self.value = int.from_bytes(data[:length], "little")
            else:
                run[_WHERE + 8 : _WHERE + 8 + length] = (self.value & (1 << 8 * length) - 1).to_bytes(
                    length, "little"
                )
        elif not is_write:
            run[_WHERE + 8 : _WHERE + 8 + length] = b"\xff" * length


def run(guest: Guest, ticks: Any) -> tuple[bytes, dict[str, int]]:
    """What the guest wrote, and how many exits its register had by bus."""
    # A signal that is handled ends KVM_RUN.
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGUSR1, before)
        vmm = _Vmm(guest, ticks, stack)
        vmm.run()
        return bytes(vmm.output), vmm.exits
