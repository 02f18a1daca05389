"""One vCPU: its KVM descriptor, its thread, and what can be asked of it while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._kvmrun import KICK_SIGNAL, VcpuRun
from .threads import leave_signals_to_main

if TYPE_CHECKING:
    from ._bus import Bus
    from ._kvm import CpuidEntry, KvmVcpu, KvmVm

_RFLAGS_IF = 1 << 9

# Local APIC registers (Intel SDM vol. 3A, table 11-1), as a PC's firmware leaves them.
_APIC_LVT_LINT0 = 0x350
_APIC_LVT_LINT1 = 0x360
_MODE_NMI = 4 << 8
_MODE_EXTINT = 7 << 8

_APIC_BASE_X2APIC = 1 << 10  # IA32_APIC_BASE.EXTD, Intel SDM vol. 3A, 11.12.1

# What firmware would have set up: memory is write-back by default (MTRRdefType, Intel SDM vol. 3A 12.11.2.1),
# fast string instructions are on (IA32_MISC_ENABLE, vol. 4).
_BOOT_MSRS = {0x2FF: 0x806, 0x1A0: 1}


_this_thread = threading.local()


def runs_this_thread() -> bool:
    """Whether the caller is a device handler, on a vCPU's thread."""
    return getattr(_this_thread, "is_vcpu", False)


class Vcpu:
    """A vCPU and the thread that runs it.

    ``report(vcpu, outcome, error)`` is called in the vCPU's thread when the guest cannot simply go on:
    outcome is "reset", "shutdown", "unhandled" or "exception" (``error`` is the exception then). After
    it the vCPU stands still until it is stopped.
    """

    def __init__(
        self,
        vm: KvmVm,
        index: int,
        shared_size: int,
        pio: Bus,
        mmio: Bus,
        report: Callable[[Vcpu, str, BaseException | None], None],
    ) -> None:
        self.index = index
        self.kvm: KvmVcpu = vm.create_vcpu(index)
        try:
            self.run = VcpuRun(self.kvm.fd, shared_size, pio, mmio)
        except BaseException:
            self.kvm.close()
            raise
        self._report = report
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._alive = False
        self._paused = False  # what is asked for
        self._parked = False  # what the thread did about it
        self._stopping = False
        self._ended = False  # the guest cannot go on; wait to be stopped
        self._sample_wanted = False
        self._online: bool | None = None
        self._initial: dict[str, Any] = {}

    # -- setting up; no thread runs yet ------------------------------------------

    def initialize(self, cpuid: list[CpuidEntry], *, x2apic: bool = False) -> None:
        """Give the vCPU its identity and remember the state that it has after a reset.

        With ``x2apic`` its local APIC is in that mode from the start: Linux ignores APIC ids that
        xAPIC cannot name unless it finds the boot processor in x2APIC mode.
        """
        self.kvm.set_cpuid(cpuid)
        if x2apic:
            special = self.kvm.special_registers()
            special["apic_base"] |= _APIC_BASE_X2APIC
            self.kvm.set_special_registers(special)
        self.kvm.set_msrs(_BOOT_MSRS)
        self.kvm.reset_fpu()
        lapic = bytearray(self.kvm.lapic())
        for register, mode in ((_APIC_LVT_LINT0, _MODE_EXTINT), (_APIC_LVT_LINT1, _MODE_NMI)):
            value = int.from_bytes(lapic[register : register + 4], "little")
            lapic[register : register + 4] = (value & ~0x700 | mode).to_bytes(4, "little")
        self.kvm.set_lapic(bytes(lapic))
        self._initial = {
            "registers": self.kvm.registers(),
            "special_registers": self.kvm.special_registers(),
            "lapic": bytes(lapic),
        }

    def power_up(self) -> None:
        """Back to the state after a reset: an application processor that waits for INIT and SIPI."""
        self.kvm.set_special_registers(self._initial["special_registers"])
        self.kvm.set_registers(self._initial["registers"])
        self.kvm.set_lapic(self._initial["lapic"])
        self.kvm.reset_fpu()
        self.kvm.set_mp_state("uninitialized")

    # -- the thread ---------------------------------------------------------------

    def start(self, *, paused: bool = False) -> None:
        """Start the vCPU's thread; with ``paused`` it waits for :meth:`resume` first."""
        self.join()
        self._paused = paused
        self._stopping = self._ended = self._parked = False
        self._alive = True
        self._thread = threading.Thread(target=self._main, name=f"vcpu{self.index}", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        leave_signals_to_main(keep=[KICK_SIGNAL])
        _this_thread.is_vcpu = True
        try:
            self._run_until_stopped()
        finally:
            with self._changed:
                self._alive = False
                self._changed.notify_all()

    def _run_until_stopped(self) -> None:
        while True:
            try:
                if not self._wait_until_wanted():
                    return
                outcome = self.run.run()
                error = self.run.take_exception() if outcome == "exception" else None
                if outcome != "kicked":
                    self._end(outcome, error)
            except BaseException as exception:
                self._end("exception", exception)

    def _end(self, outcome: str, error: BaseException | None) -> None:
        with self._changed:
            self._ended = True
        self._report(self, outcome, error)

    def _wait_until_wanted(self) -> bool:
        """Stand still while paused or ended; False when the thread is to go."""
        with self._changed:
            while True:
                if self._sample_wanted:
                    self._sample()
                if self._stopping:
                    return False
                if not self._paused and not self._ended:
                    self._parked = False
                    self.run.rearm()
                    return True
                self._parked = True
                self._changed.notify_all()
                self._changed.wait()

    def pause(self) -> None:
        """Ask the thread to stand still; :meth:`wait_parked` waits for it."""
        with self._changed:
            self._paused = True
            self.run.kick()
            self._changed.notify_all()

    def wait_parked(self, timeout: float | None = None) -> bool:
        """Until the thread stands still with no access under way."""
        with self._changed:
            return self._changed.wait_for(lambda: self._parked or not self.running, timeout)

    def resume(self) -> None:
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def stop(self) -> None:
        """Ask the thread to end; returns at once, may be called from any thread, also a vCPU's."""
        with self._changed:
            self._stopping = True
            self.run.kick()
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until the thread has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def running(self) -> bool:
        """Whether the vCPU has a thread."""
        return self._alive

    # -- what the guest made of it -----------------------------------------------------

    def ask_online(self) -> None:
        """Ask the thread to look; :meth:`online` has the answer.

        KVM tells a vCPU's state only while it is out of KVM_RUN.
        """
        with self._changed:
            if self._alive:
                self._sample_wanted = True
                self.run.kick()
                self._changed.notify_all()

    def online(self, timeout: float = 1.0) -> bool | None:
        """Whether the guest runs this vCPU, as of :meth:`ask_online`; None: no answer in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._sample_wanted or not self._alive, timeout):
                return None
            return self._online if self._alive else False

    def _sample(self) -> None:
        self._sample_wanted = False
        self._online = None
        state = self.kvm.mp_state()
        if state == "halted":
            # Linux puts an offline CPU to rest with interrupts disabled, an idle one never.
            self._online = bool(self.kvm.registers()["rflags"] & _RFLAGS_IF)
        else:
            self._online = state == "runnable"
        self._changed.notify_all()

    def close(self) -> None:
        """Stop the thread and give back what KVM holds for the vCPU."""
        self.stop()
        self.join()
        self.run.close()
        self.kvm.close()
