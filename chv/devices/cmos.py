"""The real-time clock and its CMOS RAM.

A Motorola MC146818 behind an index and a data port. The clock runs in UTC with the host's; when the guest
sets it, the difference is kept. The RAM tells firmware how much memory there is.

Not there: the square wave output (it leads nowhere on a PC), daylight saving (bit 0 of register B is kept,
without effect) and the periodic interrupt: its flag is set at the programmed rate for those who poll
register C, but interrupts nobody, because 8192 interrupts a second are not for Python to make. Linux uses
neither (its RTC core makes periodic events with a timer of its own).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from datetime import date
from typing import Any, Final, Protocol

from .. import layout
from ..acpi.aml import EISAID, IO, Device, Interrupt, Name, ResourceTemplate, Scope

# Register numbers and bits: MC146818 data sheet; the century as in FADT.CENTURY of PCs.
_SECONDS, _MINUTES, _HOURS = 0, 2, 4
_ALARMS: Final = (1, 3, 5)
_WEEKDAY, _DAY, _MONTH, _YEAR, _CENTURY = 6, 7, 8, 9, 0x32
_CLOCK: Final = (_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR, _CENTURY)
_A, _B, _C, _D = 10, 11, 12, 13
_A_UPDATING: Final = 0x80
_A_DIVIDER: Final = 0x70
_A_DIVIDER_RESET: Final = 0x60  # and 0x70
_A_POWER_ON: Final = 0x26  # 32768 Hz crystal, 1024 Hz periodic rate
_B_SET, _B_PERIODIC, _B_ALARM, _B_UPDATED = 0x80, 0x40, 0x20, 0x10
_B_BINARY, _B_24H = 0x04, 0x02
_C_IRQ, _C_PERIODIC, _C_ALARM, _C_UPDATED = 0x80, 0x40, 0x20, 0x10
_D_VALID: Final = 0x80
_ANY: Final = 0xC0  # in an alarm register: matches every value
_PM: Final = 0x80  # in an hour register with 12 hours

_SHUTDOWN_RESET: Final = 0x8F  # index of the shutdown status with NMI masked: writing 0 asks for a reset
_SIZE: Final = 128
_UPDATE_WARNING: Final = 244e-6  # seconds from the update-in-progress flag to the update
_LONGEST_WAIT: Final = 10.0  # seconds; the host's clock may be set meanwhile
_EPOCH: Final = date(1970, 1, 1).toordinal()
_UNIT: Final = 64 * layout.KiB


class _Pulse(Protocol):
    def pulse(self) -> None: ...


class Cmos:
    """Index at offset 0, data at offset 1.

    ``irq``: has ``pulse()``, raises GSI 8. ``memory_size``: the guest's RAM in bytes. ``on_reset`` is called
    when the guest asks for a reset. ``clock`` gives seconds since 1970, UTC.

    Alarm and update interrupts come from one thread, started when the guest enables the first of them and
    ended by :meth:`close`.
    """

    def __init__(
        self,
        irq: _Pulse | None = None,
        memory_size: int = 0,
        on_reset: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._irq = irq
        self._on_reset = on_reset
        self._clock = clock
        self._lock = threading.Condition()
        self._index = 0
        self._offset = 0.0  # guest's time minus host's
        self._held: float | None = None  # the guest's time while its clock stands still
        self._seen = clock()  # flags in C are up to date for the guest's time until here
        self._ram = bytearray(_SIZE)
        self._ram[_A], self._ram[_B] = _A_POWER_ON, _B_24H
        self._timer: threading.Thread | None = None
        self._closed = False
        self._describe_memory(memory_size)

    def _describe_memory(self, size: int) -> None:
        """RAM from 16 MiB to 4 GiB, and above 4 GiB, in units of 64 KiB, where firmware looks for it."""
        low = min(size, layout.RAM_32BIT_END)
        middle = min(max(low - 16 * layout.MiB, 0) // _UNIT, 0xFFFF)
        high = min((size - low) // _UNIT, 0xFFFFFF)
        self._ram[0x34:0x36] = middle.to_bytes(2, "little")
        self._ram[0x5B:0x5E] = high.to_bytes(3, "little")

    # -- ports ----------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            value = 0
            for i in range(size):  # a wider access is one byte after the other
                byte = self._index if offset + i == 0 else self._read_register(self._index & 0x7F)
                value |= byte << 8 * i
            return value

    def write(self, offset: int, size: int, value: int) -> None:
        reset = False
        with self._lock:
            for i in range(size):
                byte = value >> 8 * i & 0xFF
                if offset + i == 0:
                    self._index = byte
                elif self._index == _SHUTDOWN_RESET and byte == 0:
                    reset = True
                else:
                    self._write_register(self._index & 0x7F, byte)
        if reset and self._on_reset is not None:
            self._on_reset()

    def _read_register(self, index: int) -> int:
        if index in _CLOCK:
            if self._held is None:
                self._show_time()
        elif index == _A:
            return self._ram[_A] | (_A_UPDATING if self._update_is_near() else 0)
        elif index == _C:
            self._collect_flags()
            flags, self._ram[_C] = self._ram[_C], 0
            self._lock.notify_all()
            return flags
        elif index == _D:
            return _D_VALID
        return self._ram[index]

    def _write_register(self, index: int, value: int) -> None:
        if index in _CLOCK:
            self._set_clock_register(index, value)
        elif index == _A:
            self._change_control(_A, value & ~_A_UPDATING)
        elif index == _B:
            # Entering SET clears the update interrupt's enable (data sheet, register B).
            self._change_control(_B, value & ~_B_UPDATED if value & _B_SET else value)
        elif index not in (_C, _D):
            self._ram[index] = value
        self._serve_interrupts()

    # -- time -------------------------------------------------------------------------------

    def _now(self) -> float:
        return self._clock() + self._offset if self._held is None else self._held

    def _update_is_near(self) -> bool:
        return self._held is None and 1 - self._now() % 1 <= _UPDATE_WARNING

    def _stands_still(self) -> bool:
        return bool(self._ram[_B] & _B_SET) or self._ram[_A] & _A_DIVIDER >= _A_DIVIDER_RESET

    def _change_control(self, index: int, value: int) -> None:
        self._collect_flags()
        divider_was_reset = self._ram[_A] & _A_DIVIDER >= _A_DIVIDER_RESET
        if self._held is None:
            self._show_time()  # in the old format, which is what stays when the clock stands still
        self._ram[index] = value
        if self._stands_still():
            if self._held is None:
                self._held = self._clock() + self._offset
        elif self._held is not None:
            # The first update follows half a second after the divider is let go (data sheet, register A).
            fraction = 0.5 if divider_was_reset else self._held % 1
            self._start_at(self._shown_time() + fraction)

    def _set_clock_register(self, index: int, value: int) -> None:
        if self._held is not None:
            self._ram[index] = value
            return
        self._collect_flags()
        now = self._now()
        self._show_time()
        self._ram[index] = value
        self._start_at(self._shown_time() + now % 1)

    def _start_at(self, guest_time: float) -> None:
        self._held = None
        self._offset = guest_time - self._clock()
        self._seen = guest_time

    def _show_time(self) -> None:
        """Put the guest's present time into the registers."""
        t = time.gmtime(math.floor(self._now()))
        self._ram[_SECONDS] = self._encode(t.tm_sec)
        self._ram[_MINUTES] = self._encode(t.tm_min)
        self._ram[_HOURS] = self._encode_hour(t.tm_hour)
        self._ram[_WEEKDAY] = self._encode((t.tm_wday + 1) % 7 + 1)  # Sunday is 1
        self._ram[_DAY] = self._encode(t.tm_mday)
        self._ram[_MONTH] = self._encode(t.tm_mon)
        self._ram[_YEAR] = self._encode(t.tm_year % 100)
        self._ram[_CENTURY] = self._encode(t.tm_year // 100)

    def _shown_time(self) -> int:
        """What the registers say, in seconds since 1970. Values that no date has are brought into range."""
        year = self._decode(_CENTURY) * 100 + self._decode(_YEAR)
        month = min(max(self._decode(_MONTH), 1), 12)
        year = min(max(year, 1), 9998)
        hour, minute, second = self._decode_hour(_HOURS), self._decode(_MINUTES), self._decode(_SECONDS)
        days = date(year, month, 1).toordinal() - _EPOCH + self._decode(_DAY) - 1
        return ((days * 24 + hour) * 60 + minute) * 60 + second

    def _encode(self, value: int) -> int:
        return value if self._ram[_B] & _B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, index: int) -> int:
        value = self._ram[index]
        return value if self._ram[_B] & _B_BINARY else (value >> 4) * 10 + (value & 0xF)

    def _encode_hour(self, hour: int) -> int:
        if self._ram[_B] & _B_24H:
            return self._encode(hour)
        return self._encode((hour + 11) % 12 + 1) | (_PM if hour >= 12 else 0)

    def _decode_hour(self, index: int) -> int:
        if self._ram[_B] & _B_24H:
            return self._decode(index)
        value = self._ram[index] & ~_PM
        hour = value if self._ram[_B] & _B_BINARY else (value >> 4) * 10 + (value & 0xF)
        return hour % 12 + (12 if self._ram[index] & _PM else 0)

    # -- interrupts -------------------------------------------------------------------------

    def _collect_flags(self) -> None:
        """Set the flags of what has happened since they were looked at last."""
        if self._held is not None:
            return
        before, now = self._seen, self._now()
        self._seen = now
        if now <= before:  # the host's clock was set back
            return
        if math.floor(now) > math.floor(before):
            self._ram[_C] |= _C_UPDATED
        alarm = self._next_alarm(before)
        if alarm is not None and alarm <= now:
            self._ram[_C] |= _C_ALARM
        rate = _periodic_rate(self._ram[_A] & 0x0F)
        if rate and math.floor(now * rate) > math.floor(before * rate):
            self._ram[_C] |= _C_PERIODIC

    def _next_alarm(self, after: float) -> int | None:
        """The first second later than ``after`` that the alarm registers match."""
        minutes, seconds = self._alarm_values(_MINUTES, 60), self._alarm_values(_SECONDS, 60)
        start = math.floor(after) + 1
        midnight = start - start % 86400
        today = self._alarm_values(_HOURS, 24)
        hours: list[int] = [*today, *(24 + hour for hour in today)]
        for hour in hours:
            if midnight + hour * 3600 + 3599 < start:
                continue
            for minute in minutes:
                if midnight + hour * 3600 + minute * 60 + 59 < start:
                    continue
                for second in seconds:
                    moment: int = midnight + hour * 3600 + minute * 60 + second
                    if moment >= start:
                        return moment
        return None

    def _alarm_values(self, register: int, count: int) -> range:
        alarm = register + 1
        if self._ram[alarm] & _ANY == _ANY:
            return range(count)
        value = self._decode_hour(alarm) if register == _HOURS else self._decode(alarm)
        return range(value, value + 1) if value < count else range(0)

    def _serve_interrupts(self) -> None:
        """Interrupt if a flag and its enable have met; see to it that the next one finds somebody waiting."""
        enabled = self._ram[_B] & (_B_ALARM | _B_UPDATED)
        if enabled & self._ram[_C]:
            if not self._ram[_C] & _C_IRQ and self._irq is not None and not self._closed:
                self._irq.pulse()
            self._ram[_C] |= _C_IRQ
        else:
            self._ram[_C] &= ~_C_IRQ
        if enabled and self._timer is None and self._irq is not None and not self._closed:
            self._timer = threading.Thread(target=self._run_timer, name="rtc", daemon=True)
            self._timer.start()
        self._lock.notify_all()

    def _run_timer(self) -> None:
        with self._lock:
            while not self._closed:
                moment = self._next_event()
                if moment is None:
                    self._lock.wait()
                    continue
                delay = moment - self._now()
                if delay > 0:
                    self._lock.wait(min(delay, _LONGEST_WAIT))
                self._collect_flags()
                if self._ram[_C] & self._ram[_B] & (_B_ALARM | _B_UPDATED) and not self._ram[_C] & _C_IRQ:
                    self._serve_interrupts()

    def _next_event(self) -> float | None:
        """When the next interrupt is due; None while there is none, or the guest has not taken the last."""
        if self._held is not None or self._ram[_C] & _C_IRQ:
            return None
        moments: list[float] = []
        if self._ram[_B] & _B_UPDATED:
            moments.append(math.floor(self._seen) + 1)
        if self._ram[_B] & _B_ALARM and (alarm := self._next_alarm(self._seen)) is not None:
            moments.append(alarm)
        return min(moments, default=None)

    # -- life of the VM ---------------------------------------------------------------------

    def close(self) -> None:
        """End the interrupts. May be called more than once."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
            timer = self._timer
        if timer is not None:
            timer.join()

    def reset(self) -> None:
        """What the reset line does: interrupts are disabled and forgotten. Time and RAM stay."""
        with self._lock:
            self._collect_flags()
            self._ram[_B] &= ~(_B_PERIODIC | _B_ALARM | _B_UPDATED)
            self._ram[_C] = 0
            self._index = 0
            self._serve_interrupts()

    def save(self) -> dict[str, Any]:
        """``offset_ns``: guest's time minus host's; ``held_ns``: guest's time if it stands still."""
        with self._lock:
            self._collect_flags()
            held = None if self._held is None else round(self._held * 1e9)
            return {
                "index": self._index,
                "ram": bytes(self._ram),
                "offset_ns": round(self._offset * 1e9),
                "held_ns": held,
            }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state. The clock goes on with this host's, at the saved difference."""
        ram = state["ram"]
        if len(ram) != _SIZE:
            raise ValueError(f"cmos: {len(ram)} bytes of saved RAM; allowed are {_SIZE}")
        with self._lock:
            self._index = state["index"]
            self._ram[:] = ram
            self._offset = state["offset_ns"] / 1e9
            self._held = None if state["held_ns"] is None else state["held_ns"] / 1e9
            self._seen = self._now()
            self._ram[_C] &= ~_C_IRQ  # so that what was pending interrupts again
            self._serve_interrupts()


def _periodic_rate(select: int) -> int:
    """Periodic rate in Hz for the rate select bits with a 32768 Hz crystal (data sheet, table 5)."""
    if select == 0:
        return 0
    return 1 << (9 - select) if select < 3 else 1 << (16 - select)


def aml() -> bytes:
    """The clock in the ACPI namespace (PNP0B00)."""
    resources = ResourceTemplate(
        IO(layout.CMOS_PORT, layout.CMOS_PORT, 0, layout.CMOS_SIZE),
        Interrupt(layout.RTC_GSI, edge=True),
    )
    return Scope("\\_SB", Device("RTC", Name("_HID", EISAID("PNP0B00")), Name("_CRS", resources)))
