"""A virtual machine: built from a configuration, booted, changed while it runs."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from msgspec import Struct

from . import exits, layout, ranges, vcpu
from ._bus import SlotNames
from .acpi.ged import Event
from .config import ConsoleMode, PayloadConfig, VmConfig, VmState, make_config, validate
from .config.devices import places
from .devices.backend import Backend, Fds, open_backend
from .devices.serial import SerialPort
from .errors import ConfigError, NotSupportedYet, ResizeError, ResizePending, StateError
from .interrupts import Irq
from .logs import Logger
from .machine import Machine
from .memory import GuestMemory
from .peripherals import Peripheral, open_all, plug
from .ranges import Range
from .threads import leave_signals_to_main

if TYPE_CHECKING:
    from ._bus import Handler
    from .boot import Payload
    from .boot.source import StrPath
    from .cpu_hotplug import CpuSlot
    from .virtio.device import VirtioDevice

log = Logger(__name__)

# Cloud Hypervisor's state machine (its vmm/src/vm.rs).
_TRANSITIONS = {
    VmState.CREATED: {VmState.RUNNING},
    VmState.RUNNING: {VmState.PAUSED, VmState.SHUTDOWN},
    VmState.PAUSED: {VmState.RUNNING, VmState.SHUTDOWN},
    VmState.SHUTDOWN: {VmState.RUNNING},
}

# How long until an event that the guest has not read is signalled again, first and at most, in seconds.
_REPEAT_FIRST = 0.5
_REPEAT_MOST = 8.0


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


class VcpuState(Struct, frozen=True):
    """What is known of one possible vCPU.

    ``present``: plugged. ``acknowledged``: the guest has taken notice of it. ``online``: the guest
    runs it (None: it could not be asked just now). ``removing``: asked back, not given yet.
    ``ost``: the last ``_OST`` (event, status) that the guest reported for it (ACPI 6.5, 6.3.5).
    """

    index: int
    present: bool
    acknowledged: bool
    online: bool | None
    removing: bool
    ost: tuple[int, int] | None
    possible: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The form that ``vm.info`` has it in."""
        return {
            "id": self.index,
            "possible": self.possible,
            "present": self.present,
            "acknowledged": self.acknowledged,
            "online": self.online,
            "removing": self.removing,
            "ost": None if self.ost is None else {"event": self.ost[0], "status": self.ost[1]},
        }


def _vcpu_state(slot: CpuSlot, online: bool | None) -> VcpuState:
    report = None
    if slot.ost_event is not None and slot.ost_status is not None:
        report = (slot.ost_event, slot.ost_status)
    return VcpuState(slot.index, slot.present, slot.acknowledged, online, slot.removal_pending, report)


class VM:
    """A virtual machine.

    Takes a :class:`chv.config.VmConfig`, or its parts as keywords (see
    :func:`chv.config.make_config`)::

        with chv.VM(kernel="vmlinuz", initramfs="initrd", cmdline="console=ttyS0",
                    cpus=dict(boot=4, max=8), memory="1G", serial="tty") as vm:
            vm.boot()
            vm.resize(desired_vcpus=8)
            vm.wait()

    ``serial`` may also be a socket or other object with ``fileno()``: the guest's COM1 reads and
    writes it. One default is not the command line's: ``console`` is off, as a program that uses a
    library does not expect it to take the terminal. ``cache_dir`` is a folder, yours alone, in which
    unpacked kernels are kept for the next VM that boots one of them; see :mod:`chv.boot.cache`.
    All methods may be called from any thread. Leaving the ``with`` block deletes the VM.
    """

    def __init__(
        self,
        config: VmConfig | None = None,
        /,
        *,
        serial: str | dict[str, Any] | _HasFileno | None = None,
        cache_dir: StrPath | None = None,
        **parts: Any,
    ) -> None:
        self._cache_dir = cache_dir
        self._serial_object: _HasFileno | None = None
        if serial is not None and hasattr(serial, "fileno"):
            self._serial_object = serial
            parts["serial"] = "null"
        elif serial is not None:
            parts["serial"] = serial
        if config is not None and parts:
            raise ConfigError(
                f"config: given together with {', '.join(sorted(parts))}; only one way is allowed"
            )
        self.config = config if config is not None else make_config(**{"console": "off", **parts})
        self._state = VmState.CREATED
        self._deleted = False
        self._failure: BaseException | None = None
        self._lock = threading.RLock()
        self._changed = threading.Condition()
        self._machine: Machine | None = None
        self._memory: GuestMemory | None = None
        self._payload: Payload | None = None
        self._serial: SerialPort | None = None
        self._serial_irq: Irq | None = None
        self._peripherals: list[Peripheral] = []
        self._users_devices: list[VirtioDevice] = []
        self._ranges: list[Range] = []
        self._slots = SlotNames()
        self._past_exits: exits.Statistics = {}
        self._events: queue.SimpleQueue[tuple[Machine, str, BaseException | None] | None] = (
            queue.SimpleQueue()
        )
        self._control: threading.Thread | None = None
        _open_vms.add(self)

    # -- before boot --------------------------------------------------------------------

    def add_pio(self, base: int, size: int, handler: Handler, name: str = "") -> None:
        """Give the guest a device of yours: ``size`` I/O ports from ``base``.

        ``handler`` has ``read(offset, size) -> int`` and ``write(offset, size, value)``. What it
        raises stops the VM; :meth:`wait` raises it again. Takes effect at once, also after a reboot.
        If it has a method ``aml() -> bytes``, what that returns is put into the DSDT at the next power-on.
        Raises :class:`chv.errors.BusError` for a range that overlaps another, a device of the
        machine, or KVM's interrupt controllers.
        """
        self._add_range(Range("pio", base, size, handler, name or type(handler).__name__))

    def add_mmio(self, base: int, size: int, handler: Handler, name: str = "") -> None:
        """Like :meth:`add_pio`, for guest-physical addresses outside RAM."""
        self._add_range(Range("mmio", base, size, handler, name or type(handler).__name__))

    def add_device(self, device: VirtioDevice) -> None:
        """Give the guest a virtio device of yours, before boot; see docs/virtqueues.md.

        It gets the lowest free PCI slot behind the configuration's devices, and stays over reboots and
        power-offs. It is yours to close, after the VM. Raises :class:`chv.errors.ConfigError` for a name
        that another device has, or when no slot is free.
        """
        with self._locked():
            self._check_not_deleted()
            if self._machine is not None:
                raise StateError("add_device: the VM runs; devices cannot be added to it yet")
            plug(places(self.config), [*self._users_devices, device])
            self._users_devices.append(device)

    def _add_range(self, new: Range) -> None:
        with self._locked():
            self._check_not_deleted()
            serial = self.config.serial.mode is not ConsoleMode.OFF
            ranges.check([*self._ranges, new], memory_size=self.config.memory.size, serial=serial)
            if self._machine is not None:
                bus = self._machine.pio if new.space == "pio" else self._machine.mmio
                bus.add(new.base, new.size, new.handler, new.name)
            self._ranges.append(new)

    # -- lifecycle ------------------------------------------------------------------------

    @property
    def state(self) -> VmState:
        """One of "Created", "Running", "Paused" and "Shutdown"."""
        return self._state

    def boot(self) -> None:
        """Build the machine and start it; a paused VM goes on.

        Raises :class:`chv.errors.ConfigError` for a configuration that cannot work,
        :class:`chv.errors.ImageError` for a kernel that cannot be loaded,
        :class:`chv.errors.KvmError` when the host refuses.
        """
        with self._locked():
            if self._state is VmState.PAUSED:
                self.resume()
                return
            self._check_transition(VmState.RUNNING, "boot")
            validate(self.config)
            self._failure = None
            try:
                self._open_host_side()
                self._power_on()
            except BaseException:
                self._close_host_side()
                raise
            if self._control is None:
                self._control = threading.Thread(
                    target=_control, args=(weakref.ref(self), self._events), name="vm-control", daemon=True
                )
                self._control.start()
            self._set_state(VmState.RUNNING)

    def pause(self) -> None:
        """Stop all vCPUs between two instructions; the guest's clock stands still until :meth:`resume`."""
        with self._locked():
            self._check_running("pause")
            self._need_machine().pause()
            self._set_state(VmState.PAUSED)

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        with self._locked():
            if self._state is not VmState.PAUSED:
                raise StateError(f"resume: the VM is {self._state.value}; only a Paused one can go on")
            self._need_machine().resume()
            self._set_state(VmState.RUNNING)

    def shutdown(self) -> None:
        """Switch the power off, without asking the guest; :meth:`boot` starts it again."""
        with self._locked():
            self._check_transition(VmState.SHUTDOWN, "shut down")
            self._power_off()

    def reboot(self) -> None:
        """Reset the machine, without asking the guest; resized vCPUs remain."""
        with self._locked():
            self._check_not_deleted()
            if self._machine is None:
                raise StateError(
                    f"reboot: the VM is {self._state.value}; only a Running or Paused one can reboot"
                )
            self._reset()

    def power_button(self) -> None:
        """Press the power button; a guest that listens shuts down."""
        with self._locked():
            self._check_running("power-button")
            self._need_machine().ged.notify(Event.POWER_BUTTON)

    def delete(self) -> None:
        """Switch off and forget the VM; a second call does nothing. What :meth:`wait` waits for ends."""
        with self._locked():
            if self._deleted:
                return
            if self._machine is not None:
                self._power_off()
            self._deleted = True
            self._events.put(None)
            with self._changed:
                self._changed.notify_all()
        control = self._control
        if control is not None and control is not threading.current_thread():
            control.join()
        _open_vms.discard(self)

    close = delete

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.delete()

    # -- waiting ----------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> bool:
        """Until the guest has shut down, or the VM was deleted; False when ``timeout`` seconds went by first.

        Raises what stopped the VM if that was no orderly shutdown: :class:`chv.errors.GuestCrash`, or
        whatever a device handler raised.
        """
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._deleted or self._state is VmState.SHUTDOWN or self._failure is not None, timeout
            )
        if self._failure is not None:
            raise self._failure
        return done

    def wait_for(self, condition: Callable[[VM], object], timeout: float | None = None) -> bool:
        """Until ``condition(vm)`` is true, looking every 50 ms; False when ``timeout`` seconds went by."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not condition(self):
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True

    # -- changing it ----------------------------------------------------------------------------

    def resize(
        self,
        desired_vcpus: int | None = None,
        desired_ram: int | None = None,
        desired_balloon: int | None = None,
    ) -> None:
        """Change the number of vCPUs, from 1 to the configured maximum, also while the guest runs.

        Returns when the guest has been notified; :attr:`cpus` shows what it did. Before boot the
        configuration is changed. Raises :class:`chv.errors.ResizeError` for a number out of range,
        :class:`chv.errors.ResizePending` while the guest has not given back an earlier vCPU.
        """
        if desired_balloon is not None:
            raise NotSupportedYet("desired_balloon: there is no balloon device yet")
        with self._locked():
            self._check_not_deleted()
            if desired_ram is not None and desired_ram != self.config.memory.size:
                raise NotSupportedYet(
                    f"desired_ram: {desired_ram} differs from the present {self.config.memory.size} bytes; "
                    "memory cannot be resized yet"
                )
            if desired_vcpus is not None:
                self._resize_vcpus(desired_vcpus)

    def _resize_vcpus(self, desired: int) -> None:
        maximum = self.config.cpus.max_vcpus
        if isinstance(desired, bool) or not isinstance(desired, int) or not 1 <= desired <= maximum:
            raise ResizeError(
                f"desired_vcpus: {desired} is not possible; allowed are 1 to {maximum} (cpus.max_vcpus)"
            )
        machine = self._machine
        if machine is None:
            self.config.cpus.boot_vcpus = desired
            return
        if machine.hotplug.removal_pending:
            waiting = [slot.index for slot in machine.hotplug.slots if slot.removal_pending]
            raise ResizePending(
                f"desired_vcpus: the guest has not given back vCPU {', '.join(map(str, waiting))} yet; "
                "resize again when it has"
            )
        difference = desired - machine.hotplug.present_count
        if difference > 0:
            machine.add_vcpus(difference)
        elif difference < 0:
            machine.request_removal(-difference)
        self.config.cpus.boot_vcpus = desired
        if difference:
            machine.ged.notify(Event.CPU)
            self._events.put((machine, "repeat", None))

    # -- looking at it ---------------------------------------------------------------------------

    @property
    def cpus(self) -> list[VcpuState]:
        """The state of each possible vCPU, by number."""
        with self._locked():
            machine = self._machine
            if machine is None:
                boot, maximum = self.config.cpus.boot_vcpus, self.config.cpus.max_vcpus
                return [VcpuState(i, i < boot, False, False, False, None) for i in range(maximum)]
            online = machine.online()
            return [_vcpu_state(slot, online.get(slot.index, False)) for slot in machine.hotplug.slots]

    @property
    def info(self) -> dict[str, Any]:
        """What ``vm.info`` of the REST API answers.

        Beside Cloud Hypervisor's keys: ``vcpus``, a dict for each possible one, and ``hotplug``, which
        says what a resize still waits for: vCPUs that the guest has not acknowledged, not given back,
        or refused to give back.
        """
        with self._locked():
            cpus = self.cpus
            machine = self._machine
            slots = [] if machine is None else machine.hotplug.slots
            hotplug = {
                "desired_vcpus": self.config.cpus.boot_vcpus,
                "present_vcpus": sum(cpu.present for cpu in cpus),
                "not_acknowledged": [s.index for s in slots if s.present and not s.acknowledged],
                "removal_pending": [s.index for s in slots if s.removal_pending],
                "removal_refused": [s.index for s in slots if s.refused],
            }
            return {
                "config": self.config.to_dict(),
                "state": self._state.value,
                "memory_actual_size": self.config.memory.size,
                "device_tree": {
                    peripheral.device.name: {"id": peripheral.device.name, "pci_bdf": peripheral.bdf}
                    for peripheral in self._peripherals
                },
                "vcpus": [cpu.to_dict() for cpu in cpus],
                "hotplug": hotplug,
            }

    @property
    def exits(self) -> exits.Exits:
        """KVM exits so far, by reason and by device, with latencies; also over reboots."""
        with self._locked():
            parts = [self._past_exits]
            if self._machine is not None:
                parts.append(self._machine.statistics())
            return exits.present(exits.merge(parts), self._slots.names)

    def counters(self) -> dict[str, dict[str, int]]:
        """What ``vm.counters`` of the REST API answers: exits by reason, accesses by device."""
        with self._locked():
            self._need_machine()
            found = self.exits
        result = {"__exits": {name: stats.count for name, stats in found.reasons.items()}}
        for name, stats in found.devices.items():
            result[f"__{name}"] = {"reads": stats.reads, "writes": stats.writes}
        for peripheral in self._peripherals:
            result[peripheral.device.name] = peripheral.device.counters()
        return result

    @property
    def serial(self) -> SerialPort | None:
        """The booted VM's serial port; None when it has none."""
        return self._serial

    @property
    def memory(self) -> GuestMemory | None:
        """The booted VM's memory."""
        return self._memory

    # -- power ---------------------------------------------------------------------------------------

    def _open_host_side(self) -> None:
        """What outlives a reboot: memory, the unpacked kernel, the serial line."""
        config = self.config
        self._memory = GuestMemory(config.memory.size, thp=config.memory.thp)
        users = plug(places(config), self._users_devices)
        self._peripherals = [*open_all(config), *users]
        for peripheral in self._peripherals:
            if (pty_path := getattr(peripheral.device, "pty_path", None)) is not None:
                config.console.file = pty_path
        self._payload = self._read_payload()
        if config.serial.mode is not ConsoleMode.OFF:
            self._serial_irq = Irq(layout.COM1_GSI)
            self._serial = SerialPort(self._serial_irq.fd, self._open_serial())
            if self._serial.backend.pty_path is not None:
                config.serial.file = self._serial.backend.pty_path
            self._serial.start()

    def _read_payload(self) -> Payload:
        from . import boot

        payload = self.config.payload or PayloadConfig()
        if payload.kernel or payload.firmware:
            return boot.prepare(
                kernel=payload.kernel,
                firmware=payload.firmware,
                initramfs=payload.initramfs,
                cmdline=payload.cmdline or "",
                memory_size=self.config.memory.size,
                cache_dir=self._cache_dir,
            )
        assert self.config.disks  # validated
        return boot.prepare_image(
            self.config.disks[0].path or "",
            payload.boot_entry,
            cmdline=payload.cmdline or "",
            memory_size=self.config.memory.size,
            cache_dir=self._cache_dir,
        )

    def _open_serial(self) -> Backend:
        if self._serial_object is not None:
            fd = self._serial_object.fileno()
            return Fds(fd, fd)
        serial = self.config.serial
        return open_backend(serial.mode.value, serial.file, serial.socket)

    def _close_host_side(self) -> None:
        with contextlib.ExitStack() as stack:
            if self._memory is not None:
                stack.callback(self._memory.close)
            if self._payload is not None:
                stack.callback(self._payload.close)
            if self._serial_irq is not None:
                stack.callback(self._serial_irq.close)
            if self._serial is not None:
                stack.callback(self._serial.close)
            for peripheral in self._peripherals:
                if peripheral.device not in self._users_devices:
                    stack.callback(peripheral.device.close)
            self._memory = self._payload = self._serial = self._serial_irq = None
            self._peripherals = []

    def _power_on(self) -> None:
        assert self._memory is not None
        assert self._payload is not None
        machine: Machine | None = None

        def report(event: str, error: BaseException | None) -> None:
            assert machine is not None
            self._events.put((machine, event, error))

        machine = Machine(
            cpus=self.config.cpus,
            memory=self._memory,
            serial=self._serial,
            serial_irq=self._serial_irq,
            peripherals=self._peripherals,
            ranges=self._ranges,
            slots=self._slots,
            report=report,
        )
        try:
            machine.load(self._payload)
            machine.start()
        except BaseException:
            machine.close()
            raise
        self._machine = machine

    def _stop_machine(self) -> None:
        machine = self._need_machine()
        self._machine = None
        statistics = machine.statistics()
        machine.close()
        self._past_exits = exits.merge([self._past_exits, statistics])

    def _power_off(self) -> None:
        self._stop_machine()
        self._close_host_side()
        self._set_state(VmState.SHUTDOWN)

    def _reset(self) -> None:
        assert self._memory is not None
        self._stop_machine()
        self._memory.clear()
        try:
            if self._boots_image:
                self._read_image_again()
            self._power_on()
        except BaseException as error:
            self._failure = error
            self._close_host_side()
            self._set_state(VmState.SHUTDOWN)
            raise
        self._set_state(VmState.RUNNING)

    @property
    def _boots_image(self) -> bool:
        payload = self.config.payload
        return payload is None or not (payload.kernel or payload.firmware)

    def _read_image_again(self) -> None:
        """The guest may have installed another kernel since."""
        fresh = self._read_payload()
        if self._payload is not None:
            self._payload.close()
        self._payload = fresh

    def _handle(self, machine: Machine, event: str, error: BaseException | None) -> None:
        """What a guest asked for, in the control thread; what goes wrong there, :meth:`wait` raises."""
        with self._locked():
            if machine is not self._machine:
                return  # of an incarnation that is gone
            try:
                self._carry_out(event, error)
            except Exception as failure:
                log.debug("%s failed", event, exc_info=failure)
                self._failure = failure
                self._close_host_side()
                self._set_state(VmState.SHUTDOWN)

    def _carry_out(self, event: str, error: BaseException | None) -> None:
        if event == "reset":
            self._reset()
        elif event == "shutdown":
            self._power_off()
        else:
            log.debug("the VM stopped", exc_info=error)
            self._failure = error
            self._power_off()

    def _repeat_events(self) -> bool:
        """Signal again what the guest has not read; whether there is such."""
        with self._locked():
            machine = self._machine
            if machine is None or self._state is not VmState.RUNNING:
                return False
            return machine.ged.repeat()

    # -- checks ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the VM's lock. Not for a device handler: who holds it may be waiting for that vCPU."""
        if vcpu.runs_this_thread():
            raise StateError("a device handler may not call methods of a VM; use another thread")
        with self._lock:
            yield

    def _set_state(self, state: VmState) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()

    def _need_machine(self) -> Machine:
        self._check_not_deleted()
        if self._machine is None:
            raise StateError(f"the VM is {self._state.value}, not running")
        return self._machine

    def _check_not_deleted(self) -> None:
        if self._deleted:
            raise StateError("the VM was deleted")

    def _check_running(self, action: str) -> None:
        self._check_not_deleted()
        if self._state is not VmState.RUNNING:
            raise StateError(f"{action}: the VM is {self._state.value}; allowed is Running")

    def _check_transition(self, target: VmState, action: str) -> None:
        self._check_not_deleted()
        if target not in _TRANSITIONS[self._state]:
            allowed = ", ".join(s.value for s, targets in _TRANSITIONS.items() if target in targets)
            raise StateError(f"{action}: the VM is {self._state.value}; allowed are {allowed}")


def _control(
    reference: weakref.ref[VM], events: queue.SimpleQueue[tuple[Machine, str, BaseException | None] | None]
) -> None:
    """Carry out what guests ask for: a vCPU's thread cannot stop itself."""
    leave_signals_to_main()
    delay: float | None = None
    while True:
        try:
            item = events.get(timeout=delay)
        except queue.Empty:
            item = None
            vm = reference()
            if vm is None:
                return
            # An edge that comes while the guest has the interrupt masked is lost, for example during boot.
            delay = min(delay * 2, _REPEAT_MOST) if vm._repeat_events() and delay else None
            del vm
            continue
        vm = reference()
        if item is None or vm is None:
            return
        machine, event, error = item
        if event == "repeat":
            delay = _REPEAT_FIRST
        else:
            vm._handle(machine, event, error)
        del vm, item, machine, error


_open_vms: weakref.WeakSet[VM] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A vCPU's thread must not outlive the interpreter."""
    for vm in list(_open_vms):
        vm.delete()
