"""What an exit costs while the same process is busy with something else.

A vCPU writes a port over and over and times each exit by its TSC; the port's handler is in C or in Python.
Beside it, taking turns: nothing (``idle``); another VM with handlers in Python (``python_vcpu``); a Python
thread that computes (``python_spins``; ``python_spins_quick``: threads take turns as in the chv process);
the REST API answering 1,000 requests a second to a client process (``api``); virtio-rng's worker, which fills
buffers of 64 KiB (``io_worker``). Ratios are to ``idle``. What needs the GIL waits up to the switch interval.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from benchmarks import build, exit_chv, guests
from benchmarks.guests import Guest, elf, program
from benchmarks.processes import ask
from benchmarks.results import Report, finish, parser, progress
from chv._kvmrun import nanoseconds_per_tick
from chv.threads import take_turns_quickly

CASE = "outl_to_user"
RATE = 1000  # requests a second
HANDLERS = ("c", "python")
# out 0x40, al; again
LOOP = bytes.fromhex("e6 40  eb fc")
RING = 64
BUFFER = 64 << 10
TIMER_SLACK = Path("/proc/self/timerslack_ns")

Gauges = dict[str, tuple[float, str]]
Disturb = Callable[[Path], contextlib.AbstractContextManager[Gauges]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; ``--ask SOCKET`` is what the API's client process runs."""
    made = parser(__doc__)
    made.add_argument(
        "--ask", metavar="SOCKET", help=f"send {RATE} requests a second until standard input ends"
    )
    options = made.parse_args(arguments)
    if options.ask:
        return client(options.ask)
    rounds = options.rounds or (1 if options.quick else 10)
    counts = {"c": 200 if options.quick else 2000, "python": 100 if options.quick else 300}
    report = Report("contention", options.quick, reference="idle")
    device = build.device()
    total = len(HANDLERS) * rounds * len(DISTURBANCES)
    with tempfile.TemporaryDirectory() as folder, progress(total, "contention") as bar:
        for handler in HANDLERS:
            case = report.case(f"{handler}_handler", userspace_exit=True, guest=CASE)
            guest = write_guest(Path(folder), counts[handler])
            for _ in range(rounds):
                for name, disturb in DISTURBANCES.items():
                    bar.advance(f"{handler} handler, {name}")
                    with disturb(Path(folder)) as gauges:
                        taken = samples(guest, device, python=handler == "python")
                    case.add(name, taken)
                    for gauge, (value, unit) in gauges.items():
                        case.value(name, gauge, value, unit)
    finish(report, options)
    return 0


def write_guest(folder: Path, iterations: int) -> Guest:
    """A guest with the one case, as exit_chv takes it."""
    path = folder / f"contention-{iterations}.elf"
    path.write_bytes(elf(program([case for case in guests.CASES if case.name == CASE], iterations)))
    return Guest("single", iterations, "", str(path))


def samples(guest: Guest, device: ModuleType, *, python: bool) -> list[float]:
    """The guest's exits in ns."""
    output, _ = exit_chv.run(guest, device, python=python)
    scale = nanoseconds_per_tick()
    return [ticks * scale for ticks in guests.samples(output)[CASE]]


# -- what else the process does ------------------------------------------------------------


@contextlib.contextmanager
def idle(folder: Path) -> Iterator[Gauges]:
    """Nothing."""
    yield {}


@contextlib.contextmanager
def python_vcpu(folder: Path) -> Iterator[Gauges]:
    """Another VM in this process, all whose exits are handled in Python."""
    import chv

    kernel = folder / "loop.elf"
    kernel.write_bytes(elf(LOOP))
    gauges: Gauges = {}
    with chv.VM(kernel=str(kernel), memory=guests.MEMORY_SIZE, serial="off") as vm:
        vm.add_pio(0x40, 1, exit_chv.Register(), "busy")
        vm.boot()
        begin = time.monotonic()
        yield gauges
        gauges["python_exits"] = (vm.exits.devices["busy"].count / (time.monotonic() - begin), "1/s")


@contextlib.contextmanager
def python_spins(folder: Path) -> Iterator[Gauges]:
    """A thread that holds the GIL whenever it can."""
    with exit_chv.spinning():
        yield {"switch_interval": (sys.getswitchinterval() * 1e6, "us")}


@contextlib.contextmanager
def python_spins_quick(folder: Path) -> Iterator[Gauges]:
    """The same with threads that take turns as in the ``chv`` process."""
    interval, slack = sys.getswitchinterval(), TIMER_SLACK.read_text()
    take_turns_quickly()
    try:
        with python_spins(folder) as gauges:
            yield gauges
    finally:
        sys.setswitchinterval(interval)
        TIMER_SLACK.write_text(slack)


@contextlib.contextmanager
def api(folder: Path) -> Iterator[Gauges]:
    """The REST API of this process, and a process that asks it."""
    from chv.api.server import ApiServer
    from chv.vmm import Vmm

    path = str(folder / "api")
    gauges: Gauges = {}
    command = [sys.executable, "-m", "benchmarks.contention", "--ask", path]
    with (
        ApiServer(Vmm(), path),
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as asking,
    ):
        assert asking.stdout is not None
        asking.stdout.readline()  # the first answer
        begin = time.monotonic()
        yield gauges
        seconds = time.monotonic() - begin
        answered, _ = asking.communicate(b"\n")
        gauges["requests"] = (int(answered) / seconds, "1/s")


def client(path: str) -> int:
    """Requests on one connection, at the rate, until standard input has a line; prints how many."""
    import select
    import socket

    count = 0
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        ask(connection, "GET", "vmm.ping")
        print("ready", flush=True)
        begin = time.monotonic()
        while not select.select([sys.stdin], [], [], max(begin + count / RATE - time.monotonic(), 0))[0]:
            ask(connection, "GET", "vmm.ping")
            count += 1
    print(count, flush=True)
    return 0


@contextlib.contextmanager
def io_worker(folder: Path) -> Iterator[Gauges]:
    """virtio-rng's worker; a driver in this process gives it a ring of buffers again and again."""
    from chv.config import RngConfig
    from chv.virtio.rng import Rng
    from tests.unit.virtio_machine import machine
    from tests.virtio_driver import WRITE

    stop = threading.Event()
    filled = 0
    gauges: Gauges = {}
    device = Rng.open(RngConfig(), "rng", "rng")
    with contextlib.closing(device), machine(device, ring_size=RING) as running:
        queue, ring = running.queues[0], running.rings[0]

        def drive() -> None:
            nonlocal filled
            while not stop.is_set():
                for _ in range(RING):
                    ring.add_buffers([(ring.data, BUFFER, WRITE)])
                queue.kick()
                filled += sum(written for _, written in ring.wait(RING))

        thread = threading.Thread(target=drive)
        thread.start()
        begin = time.monotonic()
        try:
            yield gauges
        finally:
            stop.set()
            thread.join()
        gauges["bytes"] = (filled / (time.monotonic() - begin), "B/s")


DISTURBANCES: dict[str, Disturb] = {
    "idle": idle,
    "python_vcpu": python_vcpu,
    "python_spins": python_spins,
    "python_spins_quick": python_spins_quick,
    "api": api,
    "io_worker": io_worker,
}


if __name__ == "__main__":
    sys.exit(main())
