"""A memory-mapped device in Python that Linux finds by itself, through an ACPI entry of its own.

A second serial port, ttyS1: the guest's 8250 driver binds to it because of its ACPI id, and what a
program in the guest writes there arrives here. It has no interrupt, so the driver polls it.

    python -m examples.acpi_device --kernel vmlinuz --initramfs initrd

The initramfs must give a root shell on ttyS0.
"""

from __future__ import annotations

import argparse

from chv.acpi.aml import EISAID, Device, Memory32Fixed, Name, ResourceTemplate, Scope
from chv.testing import Guest

BASE, SIZE = 0xD000_0000, 8


class MemoryUart:
    """A 16550 with the registers that sending needs; what arrives is in ``text``."""

    def __init__(self) -> None:
        self.registers = bytearray(SIZE)
        self.text = bytearray()

    def read(self, offset: int, size: int) -> int:
        if offset == 5:  # line status: ready to send, everything sent
            return 0x60
        if offset == 2:  # the FIFOs are on; "ready to send" if the driver wants to hear that, else nothing
            return 0xC2 if self.registers[1] & 2 else 0xC1
        if offset == 6:  # modem status: somebody is there
            return 0xB0
        return self.registers[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        latch = self.registers[3] & 0x80
        if offset == 0 and not latch:
            self.text.append(value & 0xFF)
        elif offset not in (0, 1) or not latch:
            self.registers[offset] = value & 0xFF

    def aml(self) -> bytes:
        """What tells the guest: a 16550 in memory (its ids: PNP0501, as for any PC's)."""
        resources = ResourceTemplate(Memory32Fixed(BASE, SIZE))
        return Scope(
            "\\_SB", Device("UAR1", Name("_HID", EISAID("PNP0501")), Name("_UID", 2), Name("_CRS", resources))
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--initramfs", required=True)
    parser.add_argument("--boot-timeout", type=float, default=120.0, metavar="SECONDS")
    options = parser.parse_args()

    uart = MemoryUart()
    with Guest(kernel=options.kernel, initramfs=options.initramfs, cmdline="quiet") as vm:
        vm.add_mmio(BASE, SIZE, uart, name="memory-uart")
        vm.boot()
        vm.wait_for_prompt(options.boot_timeout)
        print(vm.run("cat /sys/class/tty/ttyS1/iomem_base; dmesg | grep ttyS1"))
        vm.run("echo hello from the guest > /dev/ttyS1", timeout=30)
        assert vm.wait_for(lambda _: b"guest" in uart.text, 30)
    print(uart.text.decode())


if __name__ == "__main__":
    main()
