"""What it takes until a VM runs: imports, processes, machines, memory.

``import``: fresh interpreters that import chv, and that also get its VM class, beside one that does nothing.
``api_answering``: from starting the process to the answer to vmm.ping; QEMU's to its QMP greeting.
``first_exit``: from starting the process to the first byte that a guest of five instructions writes to COM1;
the first KVM_RUN lies before it. ``lifecycle``: create, boot and delete a VM, many times in one process.
``memory``: resident bytes of all mappings smaller than the guest's RAM, once that guest has written its byte.
The contestants take turns; ratios are to QEMU's microvm.
"""

from __future__ import annotations

import json
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.guests import elf
from benchmarks.linux.where import compile_ahead
from benchmarks.processes import CHV, Absent, ask, connection, qemu, started, vmm_memory
from benchmarks.results import Case, Report, finish, parser, progress
from benchmarks.statistics import median

REFERENCE = "qemu_microvm"
GUEST_MIB = 512
MiB = 1 << 20
# mov dx, 0x3f8; mov al, "A"; out dx, al; out 0x40, al; hlt with interrupts off, for ever
GUEST = bytes.fromhex("66 ba f803  b0 41  ee  e6 40  fa  f4  eb fd")

IMPORTS = {
    "python": "pass",
    "chv": "import chv",
    "chv_vm": "import chv; chv.VM",
    "msgspec": "import msgspec",
}
# What a program that only wants VMs must not get.
FOREIGN = ("http", "waitress", "requests", "pyroute2", "matplotlib", "rich", "numpy", "asyncio", "logging")

Measure = Callable[[Path, str], float]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    made = parser(__doc__)
    made.add_argument("--lives", type=int, metavar="N", help="machines in one process [1000; quick: 20]")
    options = made.parse_args(arguments)
    rounds = options.rounds or (3 if options.quick else 15)
    lives = options.lives or (20 if options.quick else 1000)
    compile_ahead()
    report = Report("startup", options.quick, reference=REFERENCE)
    with tempfile.TemporaryDirectory() as folder, progress(3 * rounds + 2, "startup") as bar:
        kernel = Path(folder, "kernel")
        kernel.write_bytes(elf(GUEST))
        imports(report.case("import", userspace_exit=False), rounds, bar)
        take_turns(report.case("api_answering"), API, kernel, rounds, bar)
        take_turns(report.case("first_exit", memory_mib=GUEST_MIB), FIRST, kernel, rounds, bar)
        lifecycle(report.case("lifecycle", lives=lives), kernel, lives)
        bar.advance()
        memory(report.case("memory", memory_mib=GUEST_MIB), kernel)
        bar.advance()
    finish(report, options)
    return 0


# -- imports -------------------------------------------------------------------------


def imports(case: Case, rounds: int, bar: Any) -> None:
    """Fresh interpreters, one of each a round; and what they have imported then."""
    for code in IMPORTS.values():
        _python(code)  # warms the page cache
    used: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(rounds):
        bar.advance("import")
        for name, code in IMPORTS.items():
            before = _cpu_seconds()
            case.add(name, [_python(code)])
            used[name].append(_cpu_seconds() - before)
    for name, code in IMPORTS.items():
        case.value(name, "cpu_time", median(used[name]) * 1e3, "ms")
        modules = modules_of(code)
        case.value(name, "modules", len(modules), "")
        found = {module.partition(".")[0] for module in modules} & set(FOREIGN)
        case.value(name, "foreign_modules", len(found), "")


def _python(code: str) -> float:
    begin = time.perf_counter_ns()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter_ns() - begin


def modules_of(code: str) -> list[str]:
    """The modules that an interpreter has after ``code``."""
    script = f"{code}\nimport sys; print(*sys.modules)"
    return subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout.split()


# -- one process after the other --------------------------------------------------------


def take_turns(case: Case, contestants: dict[str, Measure], kernel: Path, rounds: int, bar: Any) -> None:
    """A sample of each a round. Who fails is absent from then on, with the reason."""
    present = dict(contestants)
    used: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        bar.advance(case.name)
        for name, measure in list(present.items()):
            before = _cpu_seconds()
            try:
                case.add(name, [measure(kernel, name)])
                used[name].append(_cpu_seconds() - before)
            except Absent as why:
                case.absent(name, str(why))
                del present[name]
    for name in present:
        case.value(name, "cpu_time", median(used[name]) * 1e3, "ms")


def _cpu_seconds() -> float:
    """Of all children that have ended: what a busy machine disturbs least."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def chv_answers(kernel: Path, name: str) -> float:
    """``chv --api-socket``: until vmm.ping is answered."""
    path = str(kernel.with_name("api"))
    begin = time.perf_counter_ns()
    with started([*CHV, "--api-socket", path]) as process, connection(path, process) as client:
        if ask(client, "GET", "vmm.ping") != 200:
            raise Absent("vmm.ping failed")
        return time.perf_counter_ns() - begin


def qemu_answers(kernel: Path, name: str) -> float:
    """QEMU that waits for orders (-S): until QMP has greeted."""
    path = kernel.with_name("qmp")
    path.unlink(missing_ok=True)
    command = [*qemu(name.removeprefix("qemu_")), "-S", "-qmp", f"unix:{path},server=on,wait=off"]
    begin = time.perf_counter_ns()
    with started(command) as process, connection(str(path), process) as client:
        if not client.recv(4096):
            raise Absent("QMP did not greet")
        return time.perf_counter_ns() - begin


def command_for(kernel: Path, name: str, api: bool = False) -> list[str]:
    """How contestant ``name`` boots the kernel with COM1 on stdout."""
    if name == "chv_library":
        return [sys.executable, "-m", "benchmarks.startup_child", "first", str(kernel)]
    if name.startswith("chv"):
        served = ["--api-socket", str(kernel.with_name("api"))] if api else []
        boot = [
            "--kernel",
            str(kernel),
            "--memory",
            f"size={GUEST_MIB}M",
            "--serial",
            "tty",
            "--console",
            "off",
        ]
        return [*CHV, *boot, *served]
    boot = ["-kernel", str(kernel), "-m", str(GUEST_MIB), "-serial", "stdio"]
    return [*qemu(name.removeprefix("qemu_")), *boot]


def first_byte(kernel: Path, name: str) -> float:
    """Until the guest's byte comes out."""
    begin = time.perf_counter_ns()
    with started(command_for(kernel, name), stdout=subprocess.PIPE) as process:
        _await_byte(process)
        return time.perf_counter_ns() - begin


def _await_byte(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], 20)[0]:
        raise Absent("the guest wrote nothing in 20 s: this KVM does not run what comes before it")
    if not process.stdout.read(1):
        raise Absent(f"it ended with status {process.wait()}")


API: dict[str, Measure] = {"chv": chv_answers, REFERENCE: qemu_answers, "qemu_q35": qemu_answers}
FIRST: dict[str, Measure] = dict.fromkeys(("chv", "chv_library", REFERENCE, "qemu_q35"), first_byte)


# -- many machines in one process; memory -------------------------------------------------


def lifecycle(case: Case, kernel: Path, count: int) -> None:
    """Create, boot and delete in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.startup_child", "lives", str(kernel), str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    case.add("chv_library", found["whole"])
    case.add("chv_library_until_first_exit", found["boots"])
    for when in ("early", "late"):
        for what, value in found[when].items():
            case.value("chv_library", f"{what}_{when}", value, "B" if what == "rss" else "")


def memory(case: Case, kernel: Path) -> None:
    """What each VMM holds beside the guest's memory, while the guest stands still."""
    for name, api in (("chv", False), ("chv_api", True), (REFERENCE, False), ("qemu_q35", False)):
        try:
            with started(command_for(kernel, name, api), stdout=subprocess.PIPE) as process:
                _await_byte(process)
                if api:
                    with connection(str(kernel.with_name("api")), process) as client:
                        ask(client, "GET", "vm.info")
                value = vmm_memory(process.pid, GUEST_MIB * MiB) / MiB
            case.value(name, "vmm_memory", value, "MiB")
        except Absent as why:
            case.absent(name, str(why))


if __name__ == "__main__":
    sys.exit(main())
