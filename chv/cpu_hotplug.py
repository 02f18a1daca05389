"""The CPU hotplug registers, and the processors that the guest sees through ACPI.

State only: no threads, no KVM. :class:`CpuHotplug` is told which vCPU comes or should go, the guest
reads and answers through the registers, and ``on_eject`` says when a vCPU is given back.

Registers, little-endian, each at its own width only:

====== ====== ==============================================================================
offset bytes
====== ====== ==============================================================================
0x00   4      the selected vCPU
0x04   1      of the selected vCPU. Read: bit 0 present, 1 inserting, 2 removing.
              Write: bit 1 acknowledges the insertion, 2 the notice of removal, 3 ejects
0x08   4      read: the first vCPU from the selected one on with bit 1 or 2 set, else 0xffffffff
0x0c   4      event code of the next _OST report
0x10   4      status of an _OST report; writing it reports for the selected vCPU
====== ====== ==============================================================================

The first five bytes are as in Cloud Hypervisor v0.5.0. Other offsets and widths read as 0 and
ignore writes, and so does everything about a vCPU that cannot exist.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import asdict

from . import layout
from .acpi.aml import (
    EISAID,
    Access,
    Acquire,
    Add,
    And,
    Arg0,
    Arg1,
    Arg2,
    Bits,
    Break,
    Buffer,
    Call,
    CreateDWordField,
    Device,
    Else,
    Field,
    If,
    Index,
    LEqual,
    LGreaterEqual,
    LLess,
    LNotEqual,
    Local0,
    Local1,
    Local2,
    LOr,
    Method,
    Mutex,
    Name,
    Notify,
    Offset,
    OperationRegion,
    RegionSpace,
    Release,
    Return,
    Scope,
    Store,
    String,
    Update,
    While,
)
from .acpi.tables import PROCESSOR_ENABLED, X2APIC_FIRST, processor_entry
from .errors import ConfigError, ResizeError, ResizePending

SELECT: Final = 0x00
FLAGS: Final = 0x04
NEXT: Final = 0x08
OST_EVENT: Final = 0x0C
OST_STATUS: Final = 0x10

PRESENT: Final = 1 << 0
INSERTING: Final = 1 << 1
REMOVING: Final = 1 << 2
EJECT: Final = 1 << 3

NONE: Final = 0xFFFFFFFF
MAXIMUM: Final = 4096  # names of processors have three hexadecimal digits

# Notification values (ACPI 6.5, table 5.150 and 6.3.5): what the guest is told, what it reports on.
NOTIFY_DEVICE_CHECK: Final = 1
NOTIFY_EJECT_REQUEST: Final = 3
EJECT_EVENTS: Final = (NOTIFY_EJECT_REQUEST, 0x103)
# _OST statuses of an ejection that do not refuse it: success, and still in progress (table 6.60).
EJECT_ACCEPTED: Final = (0x00, 0x84)


def _check_maximum(maximum: int) -> None:
    if not 1 <= maximum <= MAXIMUM:
        raise ConfigError(f"cpus.max_vcpus: {maximum} is not in 1..{MAXIMUM}")


class CpuSlot(Struct):
    """What is known of one possible vCPU."""

    index: int
    present: bool = False
    inserting: bool = False  #: the guest has not yet taken notice that it came
    removing: bool = False  #: the guest has not yet taken notice that it should go
    acknowledged: bool = False  #: the guest took notice that it came, or booted with it
    removal_pending: bool = False  #: an eject is asked for and would be honoured
    ost_event: int | None = None  #: the last _OST report since it was inserted or asked to go
    ost_status: int | None = None

    @property
    def refused(self) -> bool:
        """The guest reported that it will not give this vCPU back."""
        return self.ost_event in EJECT_EVENTS and self.ost_status not in EJECT_ACCEPTED


class CpuHotplug:
    """``boot`` of ``maximum`` possible vCPUs are present at first; both count from 1.

    ``on_eject(index)`` is called on the thread of the vCPU that wrote the register, after the slot has
    become free. All methods may be called from any thread.
    """

    def __init__(self, boot: int, maximum: int, on_eject: Callable[[int], None]) -> None:
        _check_maximum(maximum)
        self.on_eject = on_eject
        self.ignored_ejects = 0  #: ejects that nobody had asked for
        self._lock = threading.Lock()
        self.slots: list[CpuSlot] = [CpuSlot(index) for index in range(maximum)]
        self.reset(boot)

    # -- the host's side -------------------------------------------------------

    @property
    def present_count(self) -> int:
        with self._lock:
            return sum(slot.present for slot in self.slots)

    @property
    def removal_pending(self) -> bool:
        """True while the guest has any vCPU to give back."""
        with self._lock:
            return any(slot.removal_pending for slot in self.slots)

    def insert(self, index: int) -> None:
        """Make vCPU ``index`` present; the guest learns of it when it next scans.

        Raises :class:`ResizeError` if there is no such vCPU or it is there already
        (:class:`ResizePending` if the guest is asked to give it back).
        """
        with self._lock:
            slot = self._slot(index)
            if slot.removal_pending:
                raise ResizePending(f"vCPU {index}: the guest has been asked to give it back and has not yet")
            if slot.present:
                raise ResizeError(f"vCPU {index} is present already")
            self.slots[index] = CpuSlot(index, present=True, inserting=True)

    def request_removal(self, index: int) -> None:
        """Ask the guest to give vCPU ``index`` back; asking again repeats the notice.

        Raises :class:`ResizeError` for vCPU 0, which stays, and for one that is not present.
        """
        with self._lock:
            slot = self._slot(index)
            if index == 0:
                raise ResizeError("vCPU 0 cannot be removed: the guest boots on it")
            if not slot.present:
                raise ResizeError(f"vCPU {index} is not present, so it cannot be removed")
            slot.removing = slot.removal_pending = True
            slot.ost_event = slot.ost_status = None

    def _slot(self, index: int) -> CpuSlot:
        if not 0 <= index < len(self.slots):
            raise ResizeError(f"vCPU {index}: the possible ones are 0..{len(self.slots) - 1}")
        return self.slots[index]

    # -- the guest's side ------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            if (offset, size) == (FLAGS, 1):
                return self._flags()
            if size != 4:
                return 0
            if offset == SELECT:
                return self._selected
            if offset == NEXT:
                return self._next()
            if offset == OST_EVENT:
                return self._event
            return 0

    def write(self, offset: int, size: int, value: int) -> None:
        ejected: int | None = None
        with self._lock:
            if (offset, size) == (FLAGS, 1):
                ejected = self._command(value)
            elif (offset, size) == (SELECT, 4):
                self._selected = value
            elif (offset, size) == (OST_EVENT, 4):
                self._event = value
            elif (offset, size) == (OST_STATUS, 4):
                self._report(value)
        if ejected is not None:
            self.on_eject(ejected)

    def _current(self) -> CpuSlot | None:
        return self.slots[self._selected] if self._selected < len(self.slots) else None

    def _flags(self) -> int:
        slot = self._current()
        if slot is None:
            return 0
        return slot.present * PRESENT | slot.inserting * INSERTING | slot.removing * REMOVING

    def _next(self) -> int:
        for slot in self.slots[self._selected :]:
            if slot.inserting or slot.removing:
                return slot.index
        return NONE

    def _command(self, value: int) -> int | None:
        """Carry out a write to the flags; the vCPU that it ejected, if any."""
        slot = self._current()
        if slot is None:
            return None
        if value & INSERTING and slot.inserting:
            slot.inserting = False
            slot.acknowledged = True
        if value & REMOVING:
            slot.removing = False  # the request itself stays pending: the guest ejects later
        if not value & EJECT:
            return None
        if not slot.removal_pending:
            self.ignored_ejects += 1
            return None
        slot.present = slot.inserting = slot.removing = False
        slot.acknowledged = slot.removal_pending = False
        return slot.index

    def _report(self, status: int) -> None:
        slot = self._current()
        if slot is None:
            return
        slot.ost_event, slot.ost_status = self._event, status
        if slot.refused:
            slot.removing = slot.removal_pending = False

    # -- state -----------------------------------------------------------------

    def reset(self, present: int) -> None:
        """As at power-on, with vCPUs 0 to ``present - 1``; raises :class:`ConfigError` on too many."""
        if not 1 <= present <= len(self.slots):
            raise ConfigError(f"cpus.boot_vcpus: {present} is not in 1..{len(self.slots)} (cpus.max_vcpus)")
        with self._lock:
            self._selected = 0
            self._event = 0
            self.slots[:] = [
                CpuSlot(index, present=index < present, acknowledged=index < present)
                for index in range(len(self.slots))
            ]

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {
                "selected": self._selected,
                "event": self._event,
                "ignored_ejects": self.ignored_ejects,
                "slots": [asdict(slot) for slot in self.slots],
            }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`save` gave; raises :class:`ConfigError` if it is of another size."""
        if len(state["slots"]) != len(self.slots):
            raise ConfigError(f"cpus: the state is of {len(state['slots'])} vCPUs, not of {len(self.slots)}")
        with self._lock:
            self._selected = state["selected"]
            self._event = state["event"]
            self.ignored_ejects = state["ignored_ejects"]
            self.slots[:] = [CpuSlot(**slot) for slot in state["slots"]]

    def aml(
        self, region_space: RegionSpace = RegionSpace.SYSTEM_IO, base: int = layout.CPU_HOTPLUG_PORT
    ) -> bytes:
        """``\\_SB.CPUS``: see :func:`aml`."""
        return aml(len(self.slots), region_space, base)


# -- AML ---------------------------------------------------------------------------


def aml(
    maximum: int,
    region_space: RegionSpace = RegionSpace.SYSTEM_IO,
    base: int = layout.CPU_HOTPLUG_PORT,
) -> bytes:
    """The processors of a machine with ``maximum`` possible vCPUs, and the methods that use the registers.

    ``region_space`` and ``base`` say where the registers are, so that an interpreter in a test can have
    them in memory. The method to run when the GED reports the CPU event is ``\\_SB.CPUS.CSCN``.
    Raises :class:`ConfigError` if ``maximum`` is not in 1..4096.
    """
    _check_maximum(maximum)
    return Scope(
        "\\_SB",
        Device(
            "CPUS",
            Name("_HID", String("ACPI0010")),
            Name("_CID", EISAID("PNP0A05")),
            OperationRegion("PRST", region_space, base, layout.CPU_HOTPLUG_SIZE),
            Field(
                "PRST",
                Access.DWORD,
                False,
                Update.PRESERVE,
                Bits("CSEL", 32),
                Offset(NEXT),
                Bits("CNXT", 32),
                Bits("CEVT", 32),
                Bits("COSC", 32),
            ),
            Field("PRST", Access.BYTE, False, Update.WRITE_AS_ZEROS, Offset(FLAGS), Bits("CFLG", 8)),
            Mutex("CPLK"),
            _status_method(),
            _madt_entry_method(maximum),
            _eject_method(),
            _ost_method(),
            Method("CTFY", 2, False, _notify_tree(0, maximum)),
            _scan_method(maximum),
            *(_processor(index) for index in range(maximum)),
        ),
    )


def _name(index: int) -> str:
    return f"C{index:03X}"


def _processor(index: int) -> bytes:
    eject = b"" if index == 0 else Method("_EJ0", 1, False, Call("CEJ0", index))
    return Device(
        _name(index),
        Name("_HID", String("ACPI0007")),
        Name("_UID", index),
        Method("_STA", 0, False, Return(Call("CSTA", index))),
        Method("_MAT", 0, False, Return(Call("CMAT", index))),
        eject,
        Method("_OST", 3, False, Call("COST", index, Arg0, Arg1)),
    )


def _status_method() -> bytes:
    """``CSTA (index)``: the value of _STA, 0x0F or 0."""
    return Method(
        "CSTA",
        1,
        False,
        Acquire("CPLK"),
        Store(Arg0, "CSEL"),
        Store("CFLG", Local0),
        Release("CPLK"),
        If(And(Local0, PRESENT), Return(0x0F)),
        Return(0),
    )


def _madt_entry_method(maximum: int) -> bytes:
    """``CMAT (index)``: the processor's MADT entry.

    It says "enabled" even while the processor is absent: Linux takes the APIC id of a processor that
    it is told about from an enabled entry only.
    """
    local_apic = (
        Store(Buffer(processor_entry(0, PROCESSOR_ENABLED)), Local0),
        Store(Arg0, Index(Local0, 2)),
        Store(Arg0, Index(Local0, 3)),
        Return(Local0),
    )
    x2apic = If(
        LGreaterEqual(Arg0, X2APIC_FIRST),
        Store(Buffer(processor_entry(X2APIC_FIRST, PROCESSOR_ENABLED)), Local1),
        CreateDWordField(Local1, 4, "APIC"),
        CreateDWordField(Local1, 12, "PUID"),
        Store(Arg0, "APIC"),
        Store(Arg0, "PUID"),
        Return(Local1),
    )
    return Method("CMAT", 1, True, x2apic if maximum > X2APIC_FIRST else b"", *local_apic)


def _eject_method() -> bytes:
    """``CEJ0 (index)``: give a processor back."""
    return Method(
        "CEJ0", 1, False, Acquire("CPLK"), Store(Arg0, "CSEL"), Store(EJECT, "CFLG"), Release("CPLK")
    )


def _ost_method() -> bytes:
    """``COST (index, event, status)``: hand on what _OST reports."""
    return Method(
        "COST",
        3,
        False,
        Acquire("CPLK"),
        Store(Arg0, "CSEL"),
        Store(Arg1, "CEVT"),
        Store(Arg2, "COSC"),
        Release("CPLK"),
    )


def _notify_tree(first: int, end: int) -> bytes:
    """``Notify (CPUx, Arg1)`` for the x in ``first..end-1`` that Arg0 is, found by halving."""
    if end - first == 1:
        return If(LEqual(Arg0, first), Notify(_name(first), Arg1))
    middle = (first + end) // 2
    return If(LLess(Arg0, middle), _notify_tree(first, middle)) + Else(_notify_tree(middle, end))


def _scan_method(maximum: int) -> bytes:
    """``CSCN ()``: tell the OS of every processor that has news, and acknowledge.

    It goes from one processor with news to the next, so it costs what there is to tell and not what is
    possible. It ends whatever the registers say: the index only grows. It acknowledges before it
    notifies, so that news of the same processor that comes meanwhile is kept for the next scan.
    """
    return Method(
        "CSCN",
        0,
        True,
        Acquire("CPLK"),
        Store(0, Local0),
        While(
            LLess(Local0, maximum),
            Store(Local0, "CSEL"),
            Store("CNXT", Local1),
            If(LOr(LLess(Local1, Local0), LGreaterEqual(Local1, maximum)), Break),
            If(LNotEqual(Local1, Local0), Store(Local1, "CSEL")),
            Store("CFLG", Local2),
            And(Local2, INSERTING | REMOVING, "CFLG"),
            If(And(Local2, INSERTING), Call("CTFY", Local1, NOTIFY_DEVICE_CHECK)),
            If(And(Local2, REMOVING), Call("CTFY", Local1, NOTIFY_EJECT_REQUEST)),
            Add(Local1, 1, Local0),
        ),
        Release("CPLK"),
    )
