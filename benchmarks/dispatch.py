"""What it costs to find an exit's device and call it, without KVM.

The exits are replayed from a stock kernel's boot (recorded by benchmarks.record_trace) and from synthetic
traces in which 8, 64 and 512 ranges are equally likely. ``switch`` is C with a switch over the addresses,
``search`` C with a binary search, ``chv_c`` the buses with devices in C, ``chv_py`` with devices in Python.
A sample is the mean over one pass of a trace, in ns an exit; ratios are to the switch. Where valgrind is
installed, callgrind counts instructions an exit: those do not depend on what else the machine does.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import build, trace
from benchmarks.environment import ROOT
from benchmarks.results import Case, Report, finish, parser, progress
from benchmarks.trace import Access, Layout
from chv._bus import Bus, SlotNames

REFERENCE = "switch"
SYNTHETIC = (8, 64, 512)
COUNT = 20_000  # exits of a synthetic trace
COUNTED = 100_000  # exits for callgrind, at least half of them
CONTESTANTS = ("switch", "search", "chv_c", "chv_py")
FUNCTIONS = {"switch": "replay_switch", "search": "replay_search"}
PASSES = {"chv_py": 1}
_ACCESS = struct.Struct("<QBBB5x")


class PythonRegister:
    """What was written last is read."""

    def __init__(self) -> None:
        self.value = 0

    def read(self, offset: int, size: int) -> int:
        return self.value & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    made = parser(__doc__)
    made.add_argument("--callgrind", nargs=3, metavar=("TRACE", "WHO", "PASSES"), help="replay only")
    options = made.parse_args(arguments)
    if options.callgrind:
        name, who, passes = options.callgrind
        replay = contestant(who, name)
        for _ in range(int(passes)):
            replay()
        return 0
    rounds = options.rounds or (3 if options.quick else 30)
    passes = 3 if options.quick else 20
    report = Report("dispatch", options.quick, reference=REFERENCE)
    with progress(len(names()) * (rounds + 1), "dispatch") as bar:
        for name in names():
            accesses, layout = load(name)
            facts = {"ranges": len(layout.pio) + len(layout.mmio), "exits": len(accesses)}
            case = report.case(name, userspace_exit=False, **facts)
            measure(case, rounds, passes, bar)
            bar.advance(f"{name}: instructions")
            for who in (*FUNCTIONS, "chv_c"):
                count_instructions(case, who)
    finish(report, options)
    return 0


def names() -> list[str]:
    """The traces: the boot, and the synthetic ones by their number of ranges."""
    return ["boot", *(f"uniform_{ranges}" for ranges in SYNTHETIC)]


def load(name: str) -> tuple[list[Access], Layout]:
    """The accesses of a trace and where its devices are, in order of address."""
    if name == "boot":
        accesses, layout = trace.read()
    else:
        accesses, layout = trace.uniform(int(name.removeprefix("uniform_")), COUNT)
    return accesses, Layout(sorted(layout.pio), sorted(layout.mmio))


def measure(case: Case, rounds: int, passes: int, bar: Any) -> None:
    """Rounds in which each contestant replays the trace some times."""
    replays = {who: contestant(who, case.name) for who in CONTESTANTS}
    claimed = {who: replay() for who, replay in replays.items()}
    if len(set(claimed.values())) != 1:
        raise SystemExit(f"{case.name}: the contestants disagree on what belongs to a device: {claimed}")
    for _ in range(rounds):
        bar.advance(case.name)
        for who, replay in replays.items():
            samples = []
            for _ in range(PASSES.get(who, passes)):
                begin = time.perf_counter_ns()
                replay()
                samples.append((time.perf_counter_ns() - begin) / case.facts["exits"])
            case.add(who, samples)


def contestant(who: str, name: str) -> Callable[[], int]:
    """What replays a trace once and says how many accesses belonged to a device."""
    accesses, layout = load(name)
    packed = b"".join(_ACCESS.pack(a.address, a.size, a.is_write, a.space == "pio") for a in accesses)
    if who.startswith("chv"):
        return _buses(who, layout, packed)
    library = floor(name, layout)
    library.floor_clear()
    for is_pio, ranges in ((1, layout.pio), (0, layout.mmio)):
        for base, size in ranges:
            library.floor_add(is_pio, ctypes.c_uint64(base), ctypes.c_uint64(size))
    function = getattr(library, FUNCTIONS[who])
    function.restype = ctypes.c_size_t
    return lambda: int(function(packed, ctypes.c_size_t(len(accesses))))


def _buses(who: str, layout: Layout, packed: bytes) -> Callable[[], int]:
    slots = SlotNames()
    pio, mmio = Bus("pio", 0x10000, slots), Bus("mmio", 0, slots)
    make = build.device().Register if who == "chv_c" else PythonRegister
    for bus, ranges in ((pio, layout.pio), (mmio, layout.mmio)):
        for base, size in ranges:
            bus.add(base, size, make(), f"{base:#x}")
    replay: Callable[[], int] = build.extension("_dispatch").Replay(pio, mmio, packed).run
    return replay


# -- instructions ---------------------------------------------------------------------


def count_instructions(case: Case, who: str) -> None:
    """By callgrind: what more passes take beyond one pass. Without valgrind the case says so."""
    if shutil.which("valgrind") is None:
        case.absent(f"{who}_instructions", "valgrind is not installed")
        return
    more = max(COUNTED // case.facts["exits"], 1)
    counted = collected(case.name, who, 1 + more) - collected(case.name, who, 1)
    case.value(who, "instructions", counted / (more * case.facts["exits"]), "per exit")


def collected(name: str, who: str, passes: int) -> int:
    """The instructions of a whole process that replays a trace so often."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable]
    command += ["-m", "benchmarks.dispatch", "--callgrind", name, who, str(passes)]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if found is None:
        raise SystemExit(f"callgrind said nothing of {who}: {done.stderr[-500:]}")
    return int(found[1])


# -- building ----------------------------------------------------------------------------


def floor(name: str, layout: Layout) -> ctypes.CDLL:
    """dispatch.c with the switch of this trace. Raises :class:`benchmarks.build.BuildError`."""
    source = build.SOURCES / "floor" / "dispatch.c"
    cases = build.BUILT / f"dispatch_{name}.h"
    text = cases_of(layout)
    build.BUILT.mkdir(parents=True, exist_ok=True)
    if not cases.exists() or cases.read_text() != text:
        half = cases.with_suffix(".half")
        half.write_text(text)
        half.replace(cases)
    flags = ("-O2", "-shared", "-fPIC", *build.STRICT, "-include", str(cases))
    path = build.built(
        build.BUILT / f"dispatch_{name}.so",
        [source, cases],
        lambda target: build.compiled(target, *flags, str(source)),
    )
    return ctypes.CDLL(str(path))


def cases_of(layout: Layout) -> str:
    """The switch's cases; a device's number is its place among all, ports first."""
    number, macros = 0, []
    for macro, ranges in (("PIO_CASES", layout.pio), ("MMIO_CASES", layout.mmio)):
        cases = []
        for base, size in ranges:
            first, last = f"{base:#x}ull", f"{base + size - 1:#x}ull"
            cases.append(f"case {first} ... {last}: return FOUND({number}, {first}, {last});")
            number += 1
        macros.append(f"#define {macro} {' '.join(cases)}\n")
    return "".join(macros)


if __name__ == "__main__":
    sys.exit(main())
