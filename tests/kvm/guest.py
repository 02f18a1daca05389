"""Guests of a few instructions: memory, buses and vCPUs with nothing else around them.

A program ends itself with ``out 0xf4, al``: the vCPU that wrote stands still behind that
instruction and its registers can be read. Programs are text, an instruction a line, its bytes
before the ``;`` and the assembly behind it::

    machine_code('''
        b0 01    ; mov al, 1
        e6 f4    ; out 0xf4, al
    ''')
"""

from __future__ import annotations

import contextlib
import queue
import time
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from chv import bootstate, layout
from chv._bus import Bus, SlotNames
from chv._kvm import Kvm
from chv._kvmrun import install_kick_handler
from chv.boot.entry import EntryPoint
from chv.exits import Exits, merge, present
from chv.memory import GuestMemory
from chv.vcpu import Vcpu

if TYPE_CHECKING:
    from chv._bus import Handler
    from chv._kvm import CpuidEntry

Mode = Literal["real", "protected", "long"]

CODE = 0x1000  # where programs are put and start
STACK = 0x8000
DATA = 0x10000  # free for tests, up to the end of memory
MEMORY_SIZE = 1 << 20
DONE_PORT = 0xF4


def machine_code(text: str) -> bytes:
    """The bytes before the ``;`` of each line."""
    return b"".join(bytes.fromhex(line.split(";")[0].strip()) for line in text.splitlines())


class Report(NamedTuple):
    """What a vCPU told about its end; ``outcome`` "done" is the guest's own ``out 0xf4, al``."""

    vcpu: Vcpu
    outcome: str
    error: BaseException | None
    value: int = 0


class Recorder:
    """A device that remembers accesses and reads as what it is given."""

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        return self.value & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


class _Done:
    def __init__(self, guest: TinyGuest) -> None:
        self._guest = guest

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._guest.finish(value)


class TinyGuest:
    """One VM that runs ``code`` on vCPU 0, in real mode, 32-bit protected mode or 64-bit mode.

    The others wait for INIT and SIPI. ``extra_cpuid`` leaves take the place of the host's.
    Without ``irqchip`` there is one vCPU that knows no APIC.
    """

    def __init__(
        self,
        code: str = "",
        *,
        mode: Mode = "protected",
        vcpus: int = 1,
        memory_size: int = MEMORY_SIZE,
        registers: dict[str, int] | None = None,
        extra_cpuid: dict[int, CpuidEntry] | None = None,
        irqchip: bool = True,
    ) -> None:
        self.reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self.vcpus: list[Vcpu] = []
        self.names = SlotNames()
        self.pio = Bus("pio", 0x10000, self.names)
        self.mmio = Bus("mmio", 0, self.names)
        self.pio.add(DONE_PORT, 1, _Done(self), "done")
        self._mode: Mode = mode
        install_kick_handler()
        with contextlib.ExitStack() as stack:
            self.memory = GuestMemory(memory_size)
            stack.callback(self.memory.close)
            self.kvm = stack.enter_context(Kvm())
            self.vm = stack.enter_context(self.kvm.create_vm())
            self.vm.set_tss_address(layout.KVM_TSS)
            self.vm.set_identity_map_address(layout.KVM_IDENTITY_MAP)
            if irqchip:
                self.vm.create_irqchip()
            for slot, region in enumerate(self.memory.regions):
                self.vm.set_memory_region(slot, region.base, region.size, region.address)
            stack.callback(self._close_vcpus)
            cpuid = [e for e in self.kvm.supported_cpuid() if e[0] not in (extra_cpuid or {})]
            cpuid += (extra_cpuid or {}).values()
            for index in range(vcpus):
                vcpu = self._create_vcpu(index)
                if irqchip:
                    vcpu.initialize([_with_apic_id(entry, index) for entry in cpuid])
            self.load(code, registers)
            self._stack = stack.pop_all()

    def _create_vcpu(self, index: int) -> Vcpu:
        vcpu = Vcpu(self.vm, index, self.kvm.vcpu_mmap_size(), self.pio, self.mmio, self._report)
        self.vcpus.append(vcpu)
        return vcpu

    def _report(self, vcpu: Vcpu, outcome: str, error: BaseException | None) -> None:
        self.reports.put(Report(vcpu, outcome, error))

    def finish(self, value: int = 0) -> None:
        """Stop the vCPUs; what the write to the done port does."""
        for vcpu in self.vcpus:
            vcpu.pause()
        self.reports.put(Report(self.vcpus[0], "done", None, value))

    def _close_vcpus(self) -> None:
        for vcpu in self.vcpus:
            vcpu.stop()
        for vcpu in self.vcpus:
            vcpu.close()

    def load(self, code: str, registers: dict[str, int] | None = None) -> None:
        """Make vCPU 0 start ``code``, from scratch."""
        self.memory.write(CODE, machine_code(code))
        vcpu = self.vcpus[0]
        values = {"rsp": STACK, **(registers or {})}
        if self._mode == "real":
            special = vcpu.kvm.special_registers()
            special["cs"].update(base=0, selector=0)
            vcpu.kvm.set_special_registers(special)
            vcpu.kvm.set_registers({"rip": CODE, "rflags": 2, **values})
        else:
            protocol: Literal["pvh", "linux64"] = "linux64" if self._mode == "long" else "pvh"
            bootstate.enter(vcpu, self.memory, EntryPoint(protocol, CODE, values))

    # -- running ----------------------------------------------------------------------

    def start(self) -> None:
        for vcpu in self.vcpus:
            vcpu.start()

    def wait(self, timeout: float = 10) -> Report:
        """The next report of a vCPU; AssertionError when none comes."""
        try:
            report = self.reports.get(timeout=timeout)
        except queue.Empty:
            raise AssertionError(f"the guest did not end in {timeout} s") from None
        if report.outcome == "done":
            self.pause()
        return report

    def run(self, timeout: float = 10) -> Report:
        """Start the guest and wait for its end."""
        self.start()
        return self.wait(timeout)

    def run_to_done(self, timeout: float = 10) -> dict[str, int]:
        """Run until ``out 0xf4, al``; vCPU 0's registers behind it."""
        report = self.run(timeout)
        if report.error is not None:
            raise report.error
        assert report.outcome == "done", f"{report.outcome}: {report.vcpu.run.exit_details()}"
        return self.vcpus[0].kvm.registers()

    def pause(self) -> None:
        for vcpu in self.vcpus:
            vcpu.pause()
        for vcpu in self.vcpus:
            assert vcpu.wait_parked(10), f"vCPU {vcpu.index} did not stand still"

    def resume(self) -> None:
        for vcpu in self.vcpus:
            vcpu.resume()

    def exits(self) -> Exits:
        return present(merge(vcpu.run.statistics() for vcpu in self.vcpus), self.names.names)

    def counter(self, address: int = DATA, size: int = 4) -> int:
        """A little-endian number in guest memory."""
        return int.from_bytes(self.memory.read(address, size), "little")

    # -- the end -----------------------------------------------------------------------

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _with_apic_id(entry: CpuidEntry, apic_id: int) -> CpuidEntry:
    function, index, flags, eax, ebx, ecx, edx = entry
    if function == 1:
        ebx = ebx & 0xFFFFFF | (apic_id & 0xFF) << 24
    elif function in (0xB, 0x1F):
        edx = apic_id
    return function, index, flags, eax, ebx, ecx, edx


def run_code(
    code: str,
    *,
    mode: Mode = "protected",
    pio: dict[int, tuple[int, Handler]] | None = None,
    mmio: dict[int, tuple[int, Handler]] | None = None,
    registers: dict[str, int] | None = None,
) -> dict[str, int]:
    """Run a program that ends itself, with devices by base address; returns the registers at its end."""
    with TinyGuest(code, mode=mode, registers=registers) as guest:
        for bus, devices in ((guest.pio, pio), (guest.mmio, mmio)):
            for base, (size, handler) in (devices or {}).items():
                bus.add(base, size, handler)
        return guest.run_to_done()


def eventually(condition: object, timeout: float = 10) -> None:
    """Wait until ``condition()`` is true; AssertionError when it does not become so."""
    assert callable(condition)
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.005)
