"""What benchmarks.startup runs in fresh processes: a boot without the API, and a thousand machines in one.

``first KERNEL`` boots it with the serial port on stdout and waits; ``lives KERNEL COUNT`` creates, boots and
deletes so many VMs and prints a JSON object of what that took and left.
"""

from __future__ import annotations

import gc
import sys
import time
from typing import Any

import chv

MEMORY = 32 << 20
EARLY = 100  # after so many lives everything that is made once has been made


class Alive:
    """The port that the guest writes when it runs."""

    def __init__(self) -> None:
        import threading

        self.event = threading.Event()

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.event.set()


def first(kernel: str) -> None:
    """Until the process is ended."""
    with chv.VM(kernel=kernel, memory=MEMORY, serial="tty") as vm:
        vm.boot()
        vm.wait()


def lives(kernel: str, count: int) -> dict[str, Any]:
    """``count`` times: create, boot until the guest has run, delete."""
    from benchmarks.processes import held

    whole, boots = [], []
    early: dict[str, int] = {}
    for number in range(count):
        begin = time.perf_counter_ns()
        port = Alive()
        with chv.VM(kernel=kernel, memory=MEMORY, serial="null") as vm:
            vm.add_pio(0x40, 1, port)
            vm.boot()
            if not port.event.wait(30):
                raise SystemExit("the guest did not run")
            boots.append(time.perf_counter_ns() - begin)
        whole.append(time.perf_counter_ns() - begin)
        if number + 1 == min(EARLY, count):
            gc.collect()
            early = held()
    gc.collect()
    time.sleep(0.1)  # a thread that was joined takes a moment to leave /proc
    return {"whole": whole, "boots": boots, "early": early, "late": held()}


def main() -> None:
    if sys.argv[1] == "first":
        first(sys.argv[2])
    else:
        import json

        print(json.dumps(lives(sys.argv[2], int(sys.argv[3]))))


if __name__ == "__main__":
    main()
