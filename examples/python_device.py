"""A device written in Python: a serial port of three registers, on which Linux puts its first messages.

    python -m examples.python_device --kernel vmlinuz --initramfs initrd

The initramfs must give a root shell on ttyS0, the port that chv has anyway.
"""

from __future__ import annotations

import argparse
import time

from chv.testing import Guest

BASE = 0x510  # free I/O ports; the kernel is told of them on its command line
SIZE = 8
DATA, LINE_STATUS = 0, 5
EMPTY = 0x60  # line status: ready to send, everything sent


class EarlyPort:
    """What is written to the first register, as lines with the host's time."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._line = bytearray()

    def read(self, offset: int, size: int) -> int:
        return EMPTY if (offset, size) == (LINE_STATUS, 1) else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if (offset, size) != (DATA, 1):
            return
        self._line.append(value)
        if value == ord("\n"):
            self.lines.append(f"{time.strftime('%T')} {self._line.decode(errors='replace').strip()}")
            self._line.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--initramfs", required=True)
    parser.add_argument("--boot-timeout", type=float, default=120.0, metavar="SECONDS")
    options = parser.parse_args()

    port = EarlyPort()
    cmdline = f"earlycon=uart8250,io,{BASE:#x}"
    with Guest(kernel=options.kernel, initramfs=options.initramfs, cmdline=cmdline) as vm:
        vm.add_pio(BASE, SIZE, port, name="early-port")
        vm.boot()
        vm.wait_for_prompt(options.boot_timeout)
        accesses = vm.exits.devices["early-port"]
    print(*port.lines[:10], f"... {len(port.lines)} lines in all", sep="\n")
    print(f"{accesses.reads} reads, {accesses.writes} writes, {accesses.mean_ns / 1000:.1f} us each")


if __name__ == "__main__":
    main()
