"""One incarnation of a VM's hardware, from power-on to power-off.

A reboot makes a new one: new KVM descriptors and new device state, so nothing of the last run
can leak into the next. What outlives it (guest memory, the serial line's host side, the loaded
kernel) belongs to the VM and is handed in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from . import bootstate, exits, layout
from ._bus import Bus, SlotNames
from ._kvm import Kvm, KvmVm
from ._kvmrun import install_kick_handler
from ._virtqueue import RamMap
from .acpi.ged import Ged
from .acpi.power import PowerRegisters
from .cpu_hotplug import CpuHotplug
from .cpuid import GuestCpuid, Topology
from .devices._debug_port import DebugPort
from .devices._timer import PmTimer
from .devices.cmos import Cmos
from .devices.i8042 import I8042
from .dsdt import machine_tables
from .errors import ConfigError, KvmError
from .interrupts import GsiRoutes, Irq
from .pci import aml
from .pci.bus import PciBus
from .ranges import NO_LIMIT, PIO_LIMIT, PORTS, described
from .vcpu import Vcpu, runs_this_thread
from .virtio.transport import VirtioPci

if TYPE_CHECKING:
    from ._bus import Handler
    from .boot import Payload
    from .config import CpusConfig
    from .devices.serial import SerialPort
    from .memory import GuestMemory
    from .peripherals import Peripheral
    from .ranges import Range

# What chv cannot do without (names as in the kernel's api.rst, without KVM_CAP_).
_NEEDED = (
    "IRQCHIP", "USER_MEMORY", "SET_TSS_ADDR", "SET_IDENTITY_MAP_ADDR", "EXT_CPUID", "MP_STATE", "IRQ_ROUTING",
    "IRQFD", "IOEVENTFD", "IMMEDIATE_EXIT", "ADJUST_CLOCK",
)  # fmt: skip

_X2APIC_32BIT_IDS = 1 << 0  # KVM_X2APIC_API_USE_32BIT_IDS
_X2APIC_NO_BROADCAST_QUIRK = 1 << 1  # KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
_LAST_XAPIC_VCPUS = 255  # APIC id 255 is xAPIC's broadcast


Report = Callable[[str, BaseException | None], None]


class Machine:
    """The hardware of one power-on: KVM's VM, buses, devices, ACPI tables and vCPUs.

    ``report(event, error)`` is called in a vCPU's thread when the guest asks for "reset" or
    "shutdown", or cannot go on ("failed", with the exception). All vCPUs have been told to stand
    still then. It must not wait for a vCPU.
    """

    def __init__(
        self,
        *,
        cpus: CpusConfig,
        memory: GuestMemory,
        serial: SerialPort | None,
        serial_irq: Irq | None,
        peripherals: Sequence[Peripheral],
        ranges: Iterable[Range],
        slots: SlotNames,
        report: Report,
    ) -> None:
        self.maximum = cpus.max_vcpus
        self.memory = memory
        self._serial = serial
        self._report_event = report
        self._vcpus: dict[int, Vcpu] = {}
        self.transports: list[VirtioPci] = []
        self._paused = False
        self._clock = 0
        self._clock_tsc: int | None = None
        self._stack = contextlib.ExitStack()
        install_kick_handler()
        with contextlib.ExitStack() as stack:
            self._kvm: Kvm = stack.enter_context(Kvm())
            _check_host(self._kvm, self.maximum)
            self._vm: KvmVm = stack.enter_context(self._kvm.create_vm())
            self._shared_size = self._kvm.vcpu_mmap_size()
            self._cpuid = _guest_cpuid(self._kvm, cpus)
            self._create_platform()
            self._ged_irq = self._own_irq(stack, layout.GED_GSI)
            rtc_irq = self._own_irq(stack, layout.RTC_GSI)
            self.pio = Bus("pio", PIO_LIMIT, slots)
            self.mmio = Bus("mmio", NO_LIMIT, slots)
            self.hotplug = CpuHotplug(cpus.boot_vcpus, self.maximum, self._eject)
            self.ged = Ged(self._ged_irq)
            self.pm_timer = PmTimer()
            self.debug_port = DebugPort()
            self.cmos = Cmos(irq=rtc_irq, memory_size=memory.size, on_reset=self._guest_reset)
            stack.callback(self.cmos.close)
            if serial is not None and serial_irq is not None:
                serial_irq.bind(self._vm)
                serial.device.reset()
            self._windows = layout.pci_windows(memory.size, cpus.max_phys_bits)
            self.pci = PciBus(self._windows, self._guest_reset)
            stack.callback(self.pci.close)
            self._attach(peripherals)
            users = list(ranges)
            self._users_aml = described(users)
            self._claim_ranges(users)
            stack.callback(self._close_vcpus)
            self._stack = stack.pop_all()

    # -- building ---------------------------------------------------------------------

    def _create_platform(self) -> None:
        vm = self._vm
        vm.set_tss_address(layout.KVM_TSS)
        vm.set_identity_map_address(layout.KVM_IDENTITY_MAP)
        vm.create_irqchip()
        # KVM also connects GSIs 0 to 15 to its PICs. A hardware-reduced kernel never sets those up, so
        # they would deliver what comes early as vector 0 and up, which are exceptions.
        self.routes = GsiRoutes(vm, layout.IOAPIC_PINS)
        if self.maximum > _LAST_XAPIC_VCPUS:
            vm.enable_x2apic_api(_X2APIC_32BIT_IDS | _X2APIC_NO_BROADCAST_QUIRK)
        for slot, region in enumerate(self.memory.regions):
            vm.set_memory_region(slot, region.base, region.size, region.address)

    def _own_irq(self, stack: contextlib.ExitStack, gsi: int) -> Irq:
        irq = Irq(gsi)
        stack.callback(irq.close)
        irq.bind(self._vm)
        return irq

    def _attach(self, peripherals: Sequence[Peripheral]) -> None:
        """Put each device into its slot, behind a transport of this power-on."""
        ram = RamMap(self.memory)
        for peripheral in peripherals:
            slot = peripheral.slot
            transport = VirtioPci(
                peripheral.device,
                ram=ram,
                vm=self._vm,
                mmio=self.mmio,
                routes=self.routes,
                line=self.pci.line(self._vm, slot),
                slot=slot,
            )
            self.transports.append(transport)
            self.pci.add(transport, slot)

    def _claim_ranges(self, ranges: Iterable[Range]) -> None:
        if self._serial is not None:
            self._claim_ports("serial", self._serial.device)
        self._claim_ports("i8042", I8042(self._guest_reset))
        self._claim_ports("cmos", self.cmos)
        self._claim_ports("debug-port", self.debug_port)
        self._claim_ports("acpi-power", PowerRegisters(self._guest_reset, self._guest_shutdown))
        self._claim_ports("pm-timer", self.pm_timer)
        self._claim_ports("cpu-hotplug", self.hotplug)
        self._claim_ports("ged", self.ged)
        self._claim_ports("pci-config", self.pci.ports)
        self.mmio.add(layout.ECAM, layout.ECAM_SIZE, self.pci.ecam, "pci-ecam")
        for r in ranges:
            (self.pio if r.space == "pio" else self.mmio).add(r.base, r.size, r.handler, r.name)

    def _claim_ports(self, name: str, handler: Handler) -> None:
        base, size = PORTS[name]
        self.pio.add(base, size, handler, name)

    def load(self, payload: Payload) -> None:
        """Put kernel, boot information and ACPI tables into memory; the boot vCPU will enter the kernel."""
        present = self.hotplug.present_count
        tables = machine_tables(
            present=present,
            maximum=self.maximum,
            serial=self._serial is not None,
            pci=True,
            extra=[aml.aml(self._windows), *self._users_aml],
        )
        entry = payload.place(self.memory, rsdp=tables.rsdp, reserved=[(layout.ECAM, layout.ECAM_SIZE)])
        tables.write(self.memory)
        for index in range(present):
            self._create_vcpu(index)
        bootstate.enter(self._vcpus[0], self.memory, entry)

    def _create_vcpu(self, index: int) -> Vcpu:
        vcpu = Vcpu(self._vm, index, self._shared_size, self.pio, self.mmio, self._vcpu_ended)
        self._vcpus[index] = vcpu
        vcpu.initialize(self._cpuid.entries(index), x2apic=self.maximum > _LAST_XAPIC_VCPUS)
        return vcpu

    # -- running --------------------------------------------------------------------------

    def start(self) -> None:
        for vcpu in list(self._vcpus.values()):
            vcpu.start()

    def pause(self) -> None:
        """Stop all vCPUs, each with no access under way, and the guest's clocks."""
        self._paused = True
        self._freeze()
        for vcpu in list(self._vcpus.values()):
            vcpu.wait_parked()
        for transport in self.transports:
            transport.pause()
        for vcpu in list(self._vcpus.values()):
            vcpu.kvm.notify_paused()
        self._clock, self._clock_tsc = self._vm.clock()
        self.pm_timer.pause()

    def resume(self) -> None:
        """Go on where :meth:`pause` stopped: TSC, kvmclock and PM timer have the value that they had."""
        self._vm.set_clock(self._clock)
        self._turn_tsc_back()
        self.pm_timer.resume()
        for transport in self.transports:
            transport.resume()
        self._paused = False
        for vcpu in list(self._vcpus.values()):
            vcpu.resume()

    def _turn_tsc_back(self) -> None:
        """Take from the TSCs what went by in the pause: a guest compares them with its kvmclock.

        The host must tell which TSC belongs to a kvmclock (Linux 5.16 and later); else they run on.
        """
        clock, tsc = self._vm.clock()
        if tsc is None or self._clock_tsc is None:
            return
        khz = self._vcpus[0].kvm.tsc_khz()
        missed = tsc - self._clock_tsc - (clock - self._clock) * khz // 1_000_000
        for vcpu in list(self._vcpus.values()):
            offset = vcpu.kvm.tsc_offset()
            if offset is not None:
                vcpu.kvm.set_tsc_offset(offset - missed)

    def _freeze(self) -> None:
        for vcpu in list(self._vcpus.values()):
            vcpu.pause()

    def _guest_reset(self) -> None:
        self._freeze()
        self._report_event("reset", None)

    def _guest_shutdown(self) -> None:
        self._freeze()
        self._report_event("shutdown", None)

    def _vcpu_ended(self, vcpu: Vcpu, outcome: str, error: BaseException | None) -> None:
        self._freeze()
        if outcome in ("reset", "shutdown"):
            self._report_event(outcome, None)
            return
        if error is None:
            from . import crash

            error = crash.describe(vcpu, self.memory)
        self._report_event("failed", error)

    # -- CPU hotplug -----------------------------------------------------------------------

    def add_vcpus(self, count: int) -> list[int]:
        """Plug the ``count`` lowest absent vCPUs; returns their numbers. The guest is not told yet."""
        added = [slot.index for slot in self.hotplug.slots if not slot.present][:count]
        for index in added:
            vcpu = self._vcpus.get(index)
            if vcpu is None:
                vcpu = self._create_vcpu(index)
            else:
                # KVM never gives a vCPU back, so one that was removed returns from where it was kept.
                vcpu.join()
                vcpu.power_up()
            vcpu.start(paused=self._paused)
            self.hotplug.insert(index)
        return added

    def request_removal(self, count: int) -> list[int]:
        """Ask for the ``count`` highest present vCPUs back; returns their numbers."""
        present = [slot.index for slot in self.hotplug.slots if slot.present]
        wanted = present[-count:] if count else []
        for index in wanted:
            self.hotplug.request_removal(index)
        return wanted

    def _eject(self, index: int) -> None:
        self._vcpus[index].stop()

    def online(self) -> dict[int, bool | None]:
        """Which vCPUs the guest runs; None where one did not answer."""
        asked = [vcpu for index, vcpu in sorted(self._vcpus.items()) if self.hotplug.slots[index].present]
        for vcpu in asked:
            vcpu.ask_online()
        return {vcpu.index: vcpu.online() for vcpu in asked}

    def statistics(self) -> exits.Statistics:
        return exits.merge(vcpu.run.statistics() for vcpu in list(self._vcpus.values()))

    # -- the end ---------------------------------------------------------------------------

    def _close_vcpus(self) -> None:
        vcpus = list(self._vcpus.values())
        for vcpu in vcpus:
            vcpu.stop()
        for vcpu in vcpus:
            vcpu.close()
        self._vcpus.clear()

    def close(self) -> None:
        """Stop everything and give all descriptors back. Not from a vCPU's thread."""
        assert not runs_this_thread()
        self._stack.close()


def _check_host(kvm: Kvm, maximum: int) -> None:
    missing = [name for name in _NEEDED if not kvm.check_extension(name)]
    if missing:
        raise KvmError(0, f"/dev/kvm lacks {', '.join('KVM_CAP_' + name for name in missing)}")
    limit = kvm.check_extension("MAX_VCPUS")
    if maximum > limit:
        raise ConfigError(f"cpus.max_vcpus: {maximum} is more than this host's KVM allows ({limit})")


def _guest_cpuid(kvm: Kvm, cpus: CpusConfig) -> GuestCpuid:
    t = cpus.topology
    if t is None:
        topology = Topology.flat(cpus.max_vcpus)
    else:
        topology = Topology(t.threads_per_core, t.cores_per_die, t.dies_per_package, t.packages)
    return GuestCpuid(
        kvm.supported_cpuid(),
        topology,
        tsc_deadline=bool(kvm.check_extension("TSC_DEADLINE_TIMER")),
        max_physical_bits=cpus.max_phys_bits,
    )
