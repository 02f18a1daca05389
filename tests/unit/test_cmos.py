"""The real-time clock, its alarm and the CMOS RAM, with a clock of the test's own."""

from __future__ import annotations

import calendar
import datetime
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chv.devices.cmos import Cmos

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32
ALARM_SECONDS, ALARM_MINUTES, ALARM_HOURS = 1, 3, 5
A, B, C, D = 10, 11, 12, 13
UIP = 0x80
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10
TIME = (SECONDS, MINUTES, HOURS, DAY, MONTH, YEAR, CENTURY)

EVENING = calendar.timegm((2024, 2, 29, 23, 59, 50))  # a Thursday


class Clock:
    def __init__(self, now: float = EVENING) -> None:
        self.now = float(now)

    def __call__(self) -> float:
        return self.now


class Irq:
    def __init__(self) -> None:
        self.pulses = 0
        self.pulsed = threading.Semaphore(0)

    def pulse(self) -> None:
        self.pulses += 1
        self.pulsed.release()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def irq() -> Irq:
    return Irq()


@pytest.fixture
def cmos(clock: Clock, irq: Irq) -> Iterator[Cmos]:
    cmos = Cmos(irq, clock=clock)
    yield cmos
    cmos.close()


def get(cmos: Cmos, register: int) -> int:
    cmos.write(0, 1, register)
    return cmos.read(1, 1)


def put(cmos: Cmos, register: int, value: int) -> None:
    cmos.write(0, 1, register)
    cmos.write(1, 1, value)


def date(cmos: Cmos) -> list[int]:
    """Year to seconds, as the registers have them in hexadecimal."""
    return [get(cmos, register) for register in (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS)]


def set_date(cmos: Cmos, *values: int) -> None:
    put(cmos, B, get(cmos, B) | SET)
    for register, value in zip((CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS), values, strict=True):
        put(cmos, register, value)
    put(cmos, B, get(cmos, B) & ~SET)


# -- reading the time ------------------------------------------------------------------------


def test_the_time_is_utc_in_bcd(cmos: Cmos, clock: Clock) -> None:
    assert date(cmos) == [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x50]
    assert get(cmos, WEEKDAY) == 5
    clock.now += 10
    assert date(cmos) == [0x20, 0x24, 0x03, 0x01, 0x00, 0x00, 0x00]
    assert get(cmos, WEEKDAY) == 6


def test_binary(cmos: Cmos) -> None:
    put(cmos, B, H24 | BINARY)
    assert date(cmos) == [20, 24, 2, 29, 23, 59, 50]


@pytest.mark.parametrize(
    ("hour", "bcd", "binary"),
    [(0, 0x12, 12), (1, 0x01, 1), (11, 0x11, 11), (12, 0x92, 0x8C), (23, 0x91, 0x8B)],
)
def test_twelve_hours(cmos: Cmos, clock: Clock, hour: int, bcd: int, binary: int) -> None:
    clock.now = EVENING - 23 * 3600 + hour * 3600
    put(cmos, B, 0)
    assert get(cmos, HOURS) == bcd
    put(cmos, B, BINARY)
    assert get(cmos, HOURS) == binary


def test_linux_content(cmos: Cmos) -> None:
    """What rtc_cmos looks at before it takes the clock: valid RAM, 24 hours, no update without end."""
    assert get(cmos, D) == 0x80
    assert get(cmos, B) & H24
    assert get(cmos, A) == 0x26
    put(cmos, D, 0)
    assert get(cmos, D) == 0x80


def test_the_update_is_announced(cmos: Cmos, clock: Clock) -> None:
    clock.now = EVENING + 0.9995
    assert not get(cmos, A) & UIP
    clock.now = EVENING + 0.9998
    assert get(cmos, A) & UIP
    clock.now = EVENING + 1
    assert not get(cmos, A) & UIP


def test_a_wide_access_is_index_and_data(cmos: Cmos) -> None:
    cmos.write(0, 2, 0x1240)
    assert cmos.read(0, 2) == 0x1240


# -- setting it --------------------------------------------------------------------------------


def test_setting_the_time_keeps_the_difference(cmos: Cmos, clock: Clock) -> None:
    set_date(cmos, 0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58)
    assert date(cmos) == [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]
    clock.now += 2
    assert date(cmos) == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]


def test_time_stands_still_while_it_is_set(cmos: Cmos, clock: Clock) -> None:
    put(cmos, B, SET | H24)
    clock.now += 100.9999
    assert get(cmos, SECONDS) == 0x50
    assert not get(cmos, A) & UIP
    put(cmos, B, H24)
    assert get(cmos, SECONDS) == 0x50
    clock.now += 1
    assert get(cmos, SECONDS) == 0x51


def test_the_divider_starts_half_a_second_before_the_update(cmos: Cmos, clock: Clock) -> None:
    """Linux sets the time so: SET, divider reset, the registers, then both back."""
    put(cmos, B, H24 | SET)
    put(cmos, A, 0x76)
    put(cmos, SECONDS, 0x30)
    put(cmos, B, H24)
    clock.now += 50
    assert get(cmos, SECONDS) == 0x30  # the divider still holds it
    put(cmos, A, 0x26)
    clock.now += 0.4
    assert get(cmos, SECONDS) == 0x30
    clock.now += 0.2
    assert get(cmos, SECONDS) == 0x31


def test_a_register_set_on_the_run(cmos: Cmos, clock: Clock) -> None:
    clock.now += 0.25
    put(cmos, MINUTES, 0x00)
    assert date(cmos) == [0x20, 0x24, 0x02, 0x29, 0x23, 0x00, 0x50]
    clock.now += 0.8
    assert get(cmos, SECONDS) == 0x51


@settings(deadline=None)  # a busy machine is not an error
@given(
    st.datetimes(),
    st.sampled_from([0, BINARY, H24, H24 | BINARY]),
)
def test_every_date_comes_back(moment: datetime.datetime, mode: int) -> None:
    clock = Clock(calendar.timegm(moment.timetuple()))
    source, copy = Cmos(clock=clock), Cmos(clock=Clock(0))
    put(source, B, mode)
    put(copy, B, mode)
    set_date(copy, *date(source))
    assert date(copy) == date(source)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), max_size=40),
    st.lists(st.floats(0, 1e6), min_size=1, max_size=5),
)
def test_no_guest_can_make_it_raise(writes: list[tuple[int, int]], steps: list[float]) -> None:
    clock = Clock()
    cmos = Cmos(clock=clock)
    for register, value in writes:
        put(cmos, register, value)
    for step in steps:
        clock.now += step
        for register in range(128):
            assert 0 <= get(cmos, register) <= 255
    cmos.load(cmos.save())
    cmos.reset()


# -- RAM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "middle", "high"),
    [
        (8 << 20, 0, 0),
        (16 << 20, 0, 0),
        (1 << 30, (1 << 30) - (16 << 20), 0),
        (3 << 30, (3 << 30) - (16 << 20), 0),
        (6 << 30, (3 << 30) - (16 << 20), 3 << 30),
        (1 << 45, (3 << 30) - (16 << 20), 0xFFFFFF << 16),
    ],
)
def test_firmware_finds_the_memory_size(size: int, middle: int, high: int) -> None:
    cmos = Cmos(memory_size=size)
    assert (get(cmos, 0x34) | get(cmos, 0x35) << 8) << 16 == middle
    assert (get(cmos, 0x5B) | get(cmos, 0x5C) << 8 | get(cmos, 0x5D) << 16) << 16 == high


def test_ram_keeps_what_is_written(cmos: Cmos) -> None:
    for register in [*range(14, 50), *range(51, 128)]:
        put(cmos, register, register ^ 0xA5)
    for register in [*range(14, 50), *range(51, 128)]:
        assert get(cmos, register) == register ^ 0xA5
        assert get(cmos, register | 0x80) == register ^ 0xA5  # bit 7 masks the NMI, no more


def test_reset_through_the_shutdown_status() -> None:
    resets: list[int] = []
    cmos = Cmos(on_reset=lambda: resets.append(1))
    put(cmos, 0x0F, 0)  # Linux clears it when it starts vCPUs
    put(cmos, 0x8F, 5)
    assert resets == []
    put(cmos, 0x8F, 0)
    assert resets == [1]
    put(Cmos(), 0x8F, 0)


# -- flags and interrupts ------------------------------------------------------------------------


def test_reading_register_c_clears_it(cmos: Cmos, clock: Clock) -> None:
    get(cmos, C)
    clock.now += 1
    assert get(cmos, C) & UF
    assert get(cmos, C) == 0


@pytest.mark.parametrize(
    ("select", "period"), [(6, 1 / 1024), (15, 0.5), (1, 1 / 256), (2, 1 / 128), (3, 1 / 8192)]
)
def test_the_periodic_flag(cmos: Cmos, clock: Clock, select: int, period: float) -> None:
    put(cmos, A, 0x20 | select)
    get(cmos, C)
    clock.now += period * 0.5
    assert not get(cmos, C) & PF
    clock.now += period * 0.6
    assert get(cmos, C) & PF
    put(cmos, A, 0x20)
    get(cmos, C)
    clock.now += 10
    assert not get(cmos, C) & PF


@pytest.mark.parametrize(
    ("alarm", "delay"),
    [
        ((0x00, 0x00, 0x00), 10),
        ((0x23, 0x59, 0x55), 5),
        ((0x23, 0x59, 0x50), 86400),
        ((0x23, 0x59, 0x49), 86399),
        ((0x12, 0x30, 0x00), 12 * 3600 + 30 * 60 + 10),
        ((0xFF, 0xFF, 0x15), 25),
        ((0xC0, 0x10, 0x00), 610),
        ((0xFF, 0xFF, 0xFF), 1),
        ((0x01, 0xFF, 0xFF), 3610),
        ((0x25, 0x00, 0x00), None),
        ((0x10, 0x61, 0x00), None),
    ],
)
def test_the_alarm_flag(cmos: Cmos, clock: Clock, alarm: tuple[int, int, int], delay: int | None) -> None:
    for register, value in zip((ALARM_HOURS, ALARM_MINUTES, ALARM_SECONDS), alarm, strict=True):
        put(cmos, register, value)
    get(cmos, C)
    if delay is None:
        clock.now += 3 * 86400
        assert not get(cmos, C) & AF
        return
    clock.now += delay - 0.001
    assert not get(cmos, C) & AF
    clock.now += 0.002
    assert get(cmos, C) & AF


def test_an_afternoon_alarm_with_twelve_hours(cmos: Cmos, clock: Clock) -> None:
    put(cmos, B, 0)
    put(cmos, ALARM_HOURS, 0x81)
    get(cmos, C)
    clock.now += 10 + 13 * 3600 - 1
    assert not get(cmos, C) & AF
    clock.now = EVENING + 10 + 13 * 3600 + 59 * 60 + 50
    put(cmos, ALARM_MINUTES, 0xFF)
    put(cmos, ALARM_SECONDS, 0xFF)
    get(cmos, C)
    clock.now += 1
    assert get(cmos, C) & AF


def test_enabling_an_interrupt_whose_flag_is_set(cmos: Cmos, clock: Clock, irq: Irq) -> None:
    clock.now += 1
    put(cmos, B, H24)  # looks at the time
    put(cmos, B, H24 | UIE)
    assert irq.pulses == 1
    assert get(cmos, C) & (IRQF | UF) == IRQF | UF


def test_interrupts_wait_until_register_c_is_read(irq: Irq) -> None:
    """With the host's clock: one interrupt, no second one until the first was taken, then one each second."""
    cmos = Cmos(irq)
    try:
        get(cmos, C)
        put(cmos, B, H24 | UIE)
        assert irq.pulsed.acquire(timeout=3)
        time.sleep(1.2)
        assert irq.pulses == 1
        assert get(cmos, C) & (IRQF | UF) == IRQF | UF
        before = time.monotonic()
        assert irq.pulsed.acquire(timeout=3)
        assert time.monotonic() - before < 1.2
    finally:
        cmos.close()


def test_an_alarm_interrupts_at_its_second(irq: Irq) -> None:
    clock = Clock(time.time())
    start = time.monotonic()
    offset = clock.now - start
    cmos = Cmos(irq, clock=lambda: time.monotonic() + offset)
    try:
        put(cmos, B, H24 | BINARY)
        at = time.gmtime(clock.now + 1)
        for register, value in (
            (ALARM_HOURS, at.tm_hour),
            (ALARM_MINUTES, at.tm_min),
            (ALARM_SECONDS, at.tm_sec),
        ):
            put(cmos, register, value)
        get(cmos, C)
        put(cmos, B, H24 | BINARY | AIE)
        assert irq.pulsed.acquire(timeout=3)
        assert int(time.monotonic() + offset) == int(clock.now + 1)
        assert get(cmos, C) & (IRQF | AF) == IRQF | AF
    finally:
        cmos.close()


def test_the_periodic_interrupt_is_not_there(cmos: Cmos, clock: Clock, irq: Irq) -> None:
    put(cmos, B, H24 | PIE)
    clock.now += 10
    assert get(cmos, C) & PF
    assert irq.pulses == 0


def test_set_disables_the_update_interrupt(cmos: Cmos) -> None:
    put(cmos, B, H24 | UIE)
    put(cmos, B, H24 | UIE | SET)
    assert get(cmos, B) == H24 | SET


def test_a_closed_clock_interrupts_nobody(clock: Clock, irq: Irq) -> None:
    cmos = Cmos(irq, clock=clock)
    put(cmos, B, H24 | AIE | UIE)
    cmos.close()
    cmos.close()
    clock.now += 100
    put(cmos, B, H24 | AIE | UIE)
    assert irq.pulses == 0
    assert not any(thread.name == "rtc" for thread in threading.enumerate())


def test_a_clock_set_back_does_no_harm(cmos: Cmos, clock: Clock) -> None:
    get(cmos, C)
    clock.now -= 1000
    assert get(cmos, C) == 0
    clock.now += 1
    assert get(cmos, C) & UF


# -- life of the VM --------------------------------------------------------------------------------


def test_reset_disables_interrupts_and_keeps_time_and_ram(cmos: Cmos, clock: Clock) -> None:
    set_date(cmos, 0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58)
    put(cmos, 0x40, 0x99)
    put(cmos, B, H24 | AIE | PIE | UIE)
    clock.now += 1
    cmos.reset()
    assert get(cmos, B) == H24
    assert get(cmos, C) == 0
    assert get(cmos, 0x40) == 0x99
    assert get(cmos, YEAR) == 0x99


def test_save_and_load(cmos: Cmos, clock: Clock) -> None:
    set_date(cmos, 0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58)
    put(cmos, 0x40, 0x99)
    cmos.write(0, 1, 0x33)
    copy = Cmos(clock=clock)
    copy.load(cmos.save())
    assert copy.read(0, 1) == 0x33
    assert (get(copy, YEAR), get(copy, 0x40)) == (0x99, 0x99)
    put(cmos, B, H24 | SET)
    clock.now += 60
    copy.load(cmos.save())
    assert get(copy, SECONDS) == 0x58  # still held
    with pytest.raises(ValueError, match="allowed are 128"):
        copy.load({**cmos.save(), "ram": b""})
