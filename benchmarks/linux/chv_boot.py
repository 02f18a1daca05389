"""One boot by chv, timed from inside: ``python -m benchmarks.linux.chv_boot JSON``, a process of its own.

The debug console is one more device, in Python, that sends each byte to a descriptor, as QEMU's
isa-debugcon does; so the moment of /init is taken in the same way for both. When its
standard input ends, what was counted and timed is printed as JSON. Until then each line on its
standard input is a number of vCPUs to resize to.
"""

from __future__ import annotations

import time

STARTED = time.monotonic_ns()

import contextlib  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import chv  # noqa: E402
import chv.machine  # noqa: E402
import chv.vm  # noqa: E402

IMPORTED = time.monotonic_ns()

MARK_PORT = 0xE9


class DebugConsole:
    """Port 0xe9: what is written goes out, a read finds that the port is there."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._line = bytearray()
        self._begun = False

    def read(self, offset: int, size: int) -> int:
        """The value by which a guest knows the device."""
        return MARK_PORT

    def write(self, offset: int, size: int, value: int) -> None:
        """A byte: the first goes out at once, the others line by line."""
        self._line.append(value & 0xFF)
        if not self._begun or value in b"\n\x04":
            self._begun = True
            with contextlib.suppress(OSError):  # nobody may be there to read it any more
                os.write(self._fd, self._line)
            self._line.clear()


class Steps:
    """When the steps of a boot began and ended, by wrapping the functions that do them."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, int, int]] = []

    def watch(self, owner: Any, name: str, step: str) -> None:
        """Note each call of ``owner.name`` as ``step``."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.monotonic_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self.spans.append((step, start, time.monotonic_ns()))

        setattr(owner, name, timed)


def main() -> None:
    """Boot what the argument describes, and wait until the other side has seen enough."""
    wanted = json.loads(sys.argv[1])
    fd = wanted.pop("mark_fd")
    steps = Steps()
    steps.watch(chv.vm, "GuestMemory", "memory")
    steps.watch(chv.vm.VM, "_read_payload", "unpack")
    steps.watch(chv.machine.Machine, "__init__", "kvm")
    steps.watch(chv.machine.Machine, "start", "start")
    steps.watch(chv.machine.Machine, "load", "load")
    steps.watch(chv.machine, "machine_tables", "acpi")
    with chv.VM(serial="null", **wanted) as vm:
        configured = time.monotonic_ns()
        vm.add_pio(MARK_PORT, 1, DebugConsole(fd), "debug-console")
        vm.boot()
        for line in sys.stdin:
            vm.resize(desired_vcpus=int(line))
        exits = vm.exits
    print(
        json.dumps(
            {
                "started": STARTED,
                "imported": IMPORTED,
                "configured": configured,
                "spans": steps.spans,
                "reasons": {name: stats.count for name, stats in exits.reasons.items()},
                "devices": {name: stats.count for name, stats in exits.devices.items()},
                "device_ns": {name: stats.total_ns for name, stats in exits.devices.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
