"""Record which ports and addresses a stock kernel's boot touches: what benchmarks.dispatch replays.

Boots with chv, every device behind a Python object that notes each access, until the guest's /init writes
port 0xe9. The buses of the machine are replaced by ones that note; accesses to ports that nobody claims are
noted too, by a device that fills the gaps between the others.
"""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chv
import chv.machine
import chv.vm
from benchmarks.linux.guest import MARK_PORT, initramfs
from benchmarks.linux.where import enter
from benchmarks.results import parser
from benchmarks.trace import Access, Layout, write
from chv._bus import Bus
from chv.ranges import PIO_LIMIT
from tests.guests import SERIES, kernel

MiB = 1 << 20
TIMEOUT = 280.0

_lock = threading.Lock()
_accesses: list[Access] = []
_buses: list[NotingBus] = []


class Noting:
    """A device, and the list of what was asked of it."""

    def __init__(self, device: Any, space: str, base: int) -> None:
        self.device = device
        self.space = space
        self.base = base

    def read(self, offset: int, size: int) -> int:
        _note(Access(self.space, self.base + offset, size, False))
        value: int = self.device.read(offset, size)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        _note(Access(self.space, self.base + offset, size, True))
        self.device.write(offset, size, value)


def _note(access: Access) -> None:
    with _lock:
        _accesses.append(access)


class Nobody:
    """What the gaps between devices read as."""

    def read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        pass


class GapsFilled(chv.machine.Machine):
    """A machine whose ports all answer."""

    def start(self) -> None:
        assert isinstance(self.pio, NotingBus)
        self.pio.fill_gaps()
        super().start()


class NotingBus(Bus):
    """A bus whose devices are all noted."""

    def __init__(self, name: str, limit: int, slots: object) -> None:
        self.placed: dict[int, Noting] = {}
        self.sizes: dict[int, int] = {}
        self.claimed: list[tuple[int, int, str]] = []
        _buses.append(self)

    def add(self, base: int, size: int, handler: Any, name: str = "") -> None:
        label = name or type(handler).__name__
        super().add(base, size, Noting(handler, self.name, base), label)
        self.claimed.append((base, size, label))

    def add_movable(self, size: int, handler: Any, name: str = "") -> int:
        noting = Noting(handler, self.name, 0)
        number = super().add_movable(size, noting, name or type(handler).__name__)
        self.placed[number] = noting
        self.sizes[number] = size
        return number

    def place(self, number: int, base: int | None) -> None:
        if base is not None:
            self.placed[number].base = base
        super().place(number, base)

    def fill_gaps(self) -> None:
        """Put somebody where nobody is, so that those accesses are noted as well."""
        position = 0
        for base, size, _ in [*self.ranges(), (PIO_LIMIT, 0, "")]:
            if base > position:
                super().add(position, base - position, Noting(Nobody(), self.name, position), "nobody")
            position = base + size


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; ``--json FILE`` is where the trace goes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser(__doc__).parse_args(given)
    initramfs()
    if (status := enter("benchmarks.record_trace", given, options.json)) is not None:
        return status
    vars(chv.machine)["Bus"] = NotingBus
    vars(chv.vm)["Machine"] = GapsFilled
    reached = threading.Event()

    class Mark:
        def read(self, offset: int, size: int) -> int:
            return 0xFF

        def write(self, offset: int, size: int, value: int) -> None:
            reached.set()

    with chv.VM(
        kernel=str(kernel(SERIES[0]).bzimage),
        initramfs=str(initramfs()),
        cmdline="console=ttyS0 panic=-1",
        memory=512 * MiB,
        serial="null",
    ) as vm:
        vm.add_pio(MARK_PORT, 1, Mark(), "mark")
        vm.boot()
        if not reached.wait(TIMEOUT):
            print(f"/init was not reached; {len(_accesses)} accesses", file=sys.stderr)
            return 1
        counts = {name: stats.count for name, stats in vm.exits.devices.items()}
    with _lock:
        accesses = list(_accesses)
    print(f"{len(accesses)} accesses", counts, file=sys.stderr)
    target: Path = options.json or Path("trace.json.gz")
    target.write_bytes(gzip.compress(write(accesses, _layout()), 9, mtime=0))
    return 0


def _layout() -> Layout:
    """Where the devices were at the end."""
    found = Layout([], [])
    for bus in _buses:
        ranges = found.pio if bus.name == "pio" else found.mmio
        ranges += [(base, size) for base, size, _ in bus.claimed]
        ranges += [(noting.base, bus.sizes[number]) for number, noting in bus.placed.items() if noting.base]
    return found


if __name__ == "__main__":
    sys.exit(main())
