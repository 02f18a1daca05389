"""The UART as a driver sees it, through read() and write() alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chv.devices._serial import Serial

from .uart import (
    BI,
    BREAK,
    DATA,
    DLAB,
    DR,
    DTR,
    FCR,
    FIFO_ERROR,
    IER,
    IIR,
    IIR_LINE,
    IIR_MODEM,
    IIR_RECEIVED,
    IIR_THRE,
    IIR_TIMEOUT,
    LCR,
    LINE,
    LOOP,
    LSR,
    LSR_THRE,
    MCR,
    MODEM,
    MSR,
    NO_INTERRUPT,
    OE,
    OUT1,
    OUT2,
    RECEIVED,
    RING,
    RTS,
    SCR,
    TEMT,
    THRE,
    Irq,
    iir,
    receive_all,
    set_up,
)


@pytest.fixture
def irq() -> Iterator[Irq]:
    irq = Irq()
    yield irq
    irq.close()


@pytest.fixture
def uart(irq: Irq) -> Serial:
    return Serial(irq.fd)


def test_power_on_state(uart: Serial) -> None:
    assert [uart.read(register, 1) for register in (IER, IIR, LCR, MCR, LSR, MSR, SCR)] == [
        0,
        NO_INTERRUPT,
        0,
        0,
        LSR_THRE | TEMT,
        0xB0,
        0,
    ]


def test_registers_keep_the_bits_that_exist(uart: Serial) -> None:
    for register, kept in ((IER, 0x0F), (LCR, 0x7F), (MCR, 0x1F), (SCR, 0xFF)):
        uart.write(register, 1, 0xFF if register != LCR else 0x7F)
        assert uart.read(register, 1) == kept


def test_divisor_latch_hides_data_and_ier(uart: Serial) -> None:
    uart.write(LCR, 1, DLAB | 3)
    uart.write(DATA, 1, 0x01)
    uart.write(IER, 1, 0x02)
    assert (uart.read(DATA, 1), uart.read(IER, 1)) == (1, 2)
    uart.write(LCR, 1, 3)
    assert uart.read(IER, 1) == 0
    assert uart.pending_output == 0


def test_a_wide_access_is_bytes_at_consecutive_ports(uart: Serial) -> None:
    uart.write(MSR, 2, 0xA5FF)
    assert uart.read(SCR, 1) == 0xA5
    assert uart.read(MSR, 2) == 0xA5B0
    uart.write(LCR, 4, 0x00_00_03_1B)  # LCR, MCR, then the two that are read-only
    assert (uart.read(LCR, 1), uart.read(MCR, 1)) == (0x1B, 0x03)


def test_linux_finds_a_16550a(uart: Serial) -> None:
    """The questions that Linux's 8250 driver asks, and the answers of a 16550A."""
    uart.write(IER, 1, 0)
    assert uart.read(IER, 1) & 0x0F == 0
    uart.write(IER, 1, 0x0F)
    assert uart.read(IER, 1) & 0x0F == 0x0F
    uart.write(IER, 1, 0)
    uart.write(MCR, 1, LOOP | OUT2 | RTS)
    assert uart.read(MSR, 1) & 0xF0 == 0x90  # DCD and CTS come back
    uart.write(MCR, 1, 0)
    uart.write(FCR, 1, 0x01)
    assert uart.read(IIR, 1) >> 6 == 3  # FIFOs that work
    uart.write(LCR, 1, 0xBF)
    assert uart.read(IIR, 1) != 0  # no enhanced register as on a 16650
    uart.write(LCR, 1, 0)
    uart.write(FCR, 1, 0x21)
    assert uart.read(IIR, 1) & 0x20 == 0  # no 64-byte FIFO as on a 16750
    uart.write(IER, 1, 0x40)
    assert uart.read(IER, 1) == 0  # no UART unit enable as on an XScale


def test_linux_trusts_the_thre_interrupt(uart: Serial) -> None:
    """Otherwise the driver would use a timer instead (UART_BUG_THRE, UART_BUG_TXEN)."""
    set_up(uart)
    for _ in range(2):
        uart.write(IER, 1, THRE)
        assert iir(uart) == IIR_THRE
        uart.write(IER, 1, 0)


# -- receiving -----------------------------------------------------------------------


@pytest.mark.parametrize(("trigger", "level"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_trigger_level_tells_data_from_timeout(uart: Serial, trigger: int, level: int) -> None:
    set_up(uart, interrupts=RECEIVED, trigger=trigger)
    uart.inject(bytes(level - 1))
    assert iir(uart) == (IIR_TIMEOUT if level > 1 else NO_INTERRUPT)
    uart.inject(b"x")
    assert iir(uart) == IIR_RECEIVED
    uart.read(DATA, 1)
    assert iir(uart) == (IIR_TIMEOUT if level > 1 else NO_INTERRUPT)


def test_received_bytes_interrupt_once_until_the_fifo_is_empty(uart: Serial, irq: Irq) -> None:
    set_up(uart, interrupts=RECEIVED)
    uart.inject(b"ab")
    uart.inject(b"cd")
    assert irq.take() == 1
    assert receive_all(uart) == b"abcd"
    assert iir(uart) == NO_INTERRUPT
    uart.inject(b"e")
    assert irq.take() == 1


def test_a_driver_that_gives_up_early_is_interrupted_again(uart: Serial, irq: Irq) -> None:
    """Bytes wait behind the FIFO, so it never stays empty: filling it anew counts as an arrival."""
    set_up(uart, interrupts=RECEIVED)
    uart.inject(bytes(range(40)))
    irq.take()
    assert [uart.read(DATA, 1) for _ in range(16)] == list(range(16))
    assert irq.take() == 1
    assert receive_all(uart) == bytes(range(16, 40))


def test_enabling_an_interrupt_whose_cause_is_there(uart: Serial, irq: Irq) -> None:
    set_up(uart)
    uart.inject(b"x")
    assert irq.take() == 0
    uart.write(IER, 1, RECEIVED)
    assert irq.take() == 1
    uart.write(IER, 1, 0)
    uart.write(IER, 1, RECEIVED)
    assert irq.take() == 1


def test_out2_lets_interrupts_through(uart: Serial, irq: Irq) -> None:
    set_up(uart, interrupts=RECEIVED)
    uart.write(MCR, 1, DTR | RTS)
    uart.inject(b"x")
    assert irq.take() == 0
    assert iir(uart) == IIR_TIMEOUT
    uart.write(MCR, 1, DTR | RTS | OUT2)
    assert irq.take() == 1


def test_without_fifo_there_is_one_byte_at_a_time(uart: Serial, irq: Irq) -> None:
    set_up(uart, interrupts=RECEIVED)
    uart.write(FCR, 1, 0)
    assert uart.read(IIR, 1) == NO_INTERRUPT
    uart.inject(b"abc")
    assert uart.pending_input == 2
    assert iir(uart) == IIR_RECEIVED
    assert receive_all(uart) == b"abc"
    assert irq.take() == 3


@pytest.mark.parametrize("value", [0x03, 0x00])
def test_clearing_the_receiver_drops_the_fifo_but_not_what_waits_behind(uart: Serial, value: int) -> None:
    set_up(uart)
    uart.inject(bytes(range(20)))
    uart.write(FCR, 1, value)
    assert receive_all(uart) == bytes(range(16, 20))


def test_clear_bits_mean_nothing_without_the_enable_bit(uart: Serial) -> None:
    uart.inject(b"a")
    uart.write(FCR, 1, 0x06)
    assert receive_all(uart) == b"a"


def test_the_host_never_overruns_the_guest(uart: Serial) -> None:
    set_up(uart)
    data = bytes(i % 251 for i in range(100_000))
    given, taken = 0, bytearray()
    while len(taken) < len(data):
        given += uart.inject(data[given:])
        while uart.read(LSR, 1) & (DR | OE) == DR:
            taken.append(uart.read(DATA, 1))
        assert not uart.read(LSR, 1) & OE
    assert taken == data


def test_reading_an_empty_receiver(uart: Serial) -> None:
    assert uart.read(DATA, 1) == 0
    assert uart.read(LSR, 1) & DR == 0


# -- line status -------------------------------------------------------------------------


def test_break_from_the_host_comes_before_what_waits(uart: Serial, irq: Irq) -> None:
    set_up(uart, interrupts=LINE | RECEIVED)
    uart.send_break()
    uart.inject(b"h")
    assert irq.take() >= 1
    assert iir(uart) == IIR_LINE
    assert uart.read(LSR, 1) & (BI | DR | FIFO_ERROR) == BI | DR | FIFO_ERROR
    assert iir(uart) == IIR_TIMEOUT
    assert uart.read(LSR, 1) & (BI | FIFO_ERROR) == 0
    assert [uart.read(DATA, 1) for _ in range(2)] == [0, ord("h")]


def test_a_break_deeper_in_the_fifo_shows_when_it_is_its_turn(uart: Serial) -> None:
    set_up(uart, interrupts=LINE)
    uart.inject(b"a")
    uart.send_break()
    assert uart.read(LSR, 1) & (BI | FIFO_ERROR) == FIFO_ERROR
    assert iir(uart) == NO_INTERRUPT
    uart.read(DATA, 1)
    assert iir(uart) == IIR_LINE
    assert uart.read(LSR, 1) & BI


def test_loopback_overruns_as_the_chip_does(uart: Serial) -> None:
    set_up(uart, interrupts=LINE)
    uart.write(MCR, 1, LOOP)
    for byte in range(17):
        uart.write(DATA, 1, byte)
    assert iir(uart) == IIR_LINE
    assert uart.read(LSR, 1) & OE
    assert uart.read(LSR, 1) & OE == 0
    assert receive_all(uart) == bytes(range(16))
    uart.write(FCR, 1, 0)
    uart.write(DATA, 1, 1)
    uart.write(DATA, 1, 2)
    assert uart.read(LSR, 1) & OE
    assert uart.read(DATA, 1) == 2


def test_loopback_hears_its_own_break_and_nothing_from_outside(uart: Serial, irq: Irq) -> None:
    set_up(uart, interrupts=RECEIVED | LINE)
    uart.write(MCR, 1, LOOP | OUT2)
    uart.inject(b"outside")
    assert uart.read(LSR, 1) & DR == 0
    uart.write(LCR, 1, BREAK | 3)
    uart.write(LCR, 1, 3)
    assert uart.read(LSR, 1) & (BI | DR) == BI | DR
    assert irq.take() == 0  # OUT2 does not reach its pin
    assert uart.read(DATA, 1) == 0
    assert uart.pending_output == 0
    uart.write(MCR, 1, OUT2)
    assert irq.take() == 1
    assert receive_all(uart) == b"outside"


# -- modem status ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "line", "delta"),
    [(RTS, 0x10, 0x01), (DTR, 0x20, 0x02), (OUT2, 0x80, 0x08)],
)
def test_loopback_connects_the_modem_lines(uart: Serial, output: int, line: int, delta: int) -> None:
    uart.write(MCR, 1, LOOP)
    assert uart.read(MSR, 1) == 0x0B  # CTS, DSR and DCD went away
    uart.write(MCR, 1, LOOP | output)
    assert uart.read(MSR, 1) == line | delta
    assert uart.read(MSR, 1) == line


def test_only_the_end_of_ringing_is_noted(uart: Serial) -> None:
    uart.write(MCR, 1, LOOP)
    uart.read(MSR, 1)
    uart.write(MCR, 1, LOOP | OUT1)
    assert uart.read(MSR, 1) == 0x40
    uart.write(MCR, 1, LOOP)
    assert uart.read(MSR, 1) == 0x04


def test_modem_status_interrupt(uart: Serial, irq: Irq) -> None:
    set_up(uart, interrupts=MODEM)
    uart.read(MSR, 1)
    uart.write(MCR, 1, LOOP)
    uart.write(MCR, 1, OUT2)
    assert irq.take() == 1
    assert iir(uart) == IIR_MODEM
    uart.read(MSR, 1)
    assert iir(uart) == NO_INTERRUPT


# -- sending -----------------------------------------------------------------------------


def test_bytes_written_are_sent(uart: Serial) -> None:
    for byte in b"login: ":
        uart.write(DATA, 1, byte)
    assert uart.pending_output == 7
    assert uart.drain(3) == b"log"
    assert uart.drain() == b"in: "
    assert uart.drain() == b""


def test_thre_interrupt(uart: Serial, irq: Irq) -> None:
    set_up(uart, interrupts=THRE)
    assert irq.take() == 1
    assert iir(uart) == IIR_THRE
    assert iir(uart) == NO_INTERRUPT  # reading it took it away
    uart.write(DATA, 1, ord("x"))
    assert irq.take() == 1
    assert iir(uart) == IIR_THRE
    uart.write(IER, 1, THRE)  # enabled already: no news
    assert iir(uart) == NO_INTERRUPT


def test_a_burst_of_a_fifo_is_one_interrupt(uart: Serial, irq: Irq) -> None:
    set_up(uart, interrupts=THRE)
    irq.take()
    uart.read(IIR, 1)
    for byte in range(16):
        uart.write(DATA, 1, byte)
    assert irq.take() == 1


@pytest.mark.parametrize("fifo", [0x07, 0x00])
def test_a_driver_that_never_reads_iir_gets_its_interrupts(uart: Serial, irq: Irq, fifo: int) -> None:
    """One that sends a byte for each interrupt after a look at LSR."""
    set_up(uart, interrupts=THRE)
    uart.write(FCR, 1, fifo)
    for byte in b"hello":
        assert irq.take() == 1
        assert uart.read(LSR, 1) & LSR_THRE
        uart.write(DATA, 1, byte)
    assert uart.drain() == b"hello"


def test_receiving_has_priority_over_sending(uart: Serial) -> None:
    set_up(uart, interrupts=RECEIVED | THRE)
    uart.inject(b"x")
    assert iir(uart) == IIR_TIMEOUT
    uart.read(DATA, 1)
    assert iir(uart) == IIR_THRE


def fill(uart: Serial) -> int:
    """Write as a driver does, a FIFO's worth whenever THRE is set, until it is not; how many bytes."""
    count = 0
    while uart.read(LSR, 1) & LSR_THRE:
        for _ in range(16):
            uart.write(DATA, 1, count & 0xFF)
            count += 1
    return count


def test_a_full_ring_makes_the_guest_wait_and_loses_nothing(uart: Serial, irq: Irq) -> None:
    set_up(uart, interrupts=THRE)
    count = fill(uart)
    assert count == RING
    assert uart.read(LSR, 1) & (LSR_THRE | TEMT) == 0
    assert iir(uart) == NO_INTERRUPT
    irq.take()
    assert uart.drain(15) == bytes(range(15))
    assert uart.read(LSR, 1) & LSR_THRE == 0  # the guest would write 16
    uart.drain(1)
    assert irq.take() == 1
    assert iir(uart) == IIR_THRE
    assert uart.drain() == bytes(i & 0xFF for i in range(16, count))
    assert uart.overruns == 0


def test_bytes_written_against_the_rules_are_counted(uart: Serial) -> None:
    set_up(uart)
    fill(uart)
    uart.write(DATA, 1, 0xEE)
    uart.write(DATA, 1, 0xEE)
    assert uart.overruns == 2
    assert uart.drain()[-1] == 0xFF


def test_nobody_there_keeps_the_newest_output(uart: Serial, irq: Irq) -> None:
    set_up(uart, interrupts=THRE)
    fill(uart)
    irq.take()
    uart.attached = False
    assert irq.take() == 1
    for byte in b"the end":
        assert uart.read(LSR, 1) & LSR_THRE
        uart.write(DATA, 1, byte)
    assert uart.pending_output == RING
    uart.attached = True
    assert uart.read(LSR, 1) & LSR_THRE == 0
    assert uart.drain()[-7:] == b"the end"
    assert uart.counters["dropped"] == 7


def test_discard_never_makes_the_guest_wait(uart: Serial) -> None:
    uart.discard = True
    for _ in range(RING + 1000):
        uart.write(DATA, 1, 0)
    assert uart.read(LSR, 1) & LSR_THRE
    assert uart.pending_output == 0
    assert uart.counters["dropped"] == RING + 1000


# -- life of the VM ------------------------------------------------------------------------


def test_reset_keeps_what_the_host_has(uart: Serial) -> None:
    set_up(uart, interrupts=0x0F)
    uart.write(DATA, 1, ord("o"))
    uart.inject(bytes(range(30)))
    uart.write(SCR, 1, 0x55)
    uart.reset()
    assert [uart.read(register, 1) for register in (IER, LCR, MCR, SCR)] == [0, 0, 0, 0]
    assert uart.drain() == b"o"
    assert receive_all(uart) == bytes(range(16, 30))


def test_another_eventfd_after_a_reboot(uart: Serial, irq: Irq) -> None:
    set_up(uart, interrupts=RECEIVED)
    other = Irq()
    uart.set_irq_fd(other.fd)
    uart.inject(b"x")
    assert (irq.take(), other.take()) == (0, 1)
    uart.set_irq_fd(-1)
    other.close()
    receive_all(uart)
    uart.inject(b"x")


@settings(deadline=None)  # a busy machine is not an error
@given(
    registers=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 255)), max_size=20),
    data=st.binary(max_size=40),
)
def test_save_and_load(registers: list[tuple[int, int]], data: bytes) -> None:
    uart = Serial(-1)
    uart.inject(data)
    uart.send_break()
    for register, value in registers:
        uart.write(register, 1, value)
    state = uart.save()
    irq = Irq()
    try:
        copy = Serial(irq.fd)
        copy.load(state)
        assert copy.save() == state
        line_is_up = irq.take()
        again = Serial(-1)
        again.load(state)
        order = [MCR, IIR, LSR, MSR, LCR, IER, *([DATA] * 60)]
        assert [copy.read(r, 1) for r in order] == [again.read(r, 1) for r in order]
        assert line_is_up in (0, 1)
    finally:
        irq.close()


@pytest.mark.parametrize("damage", [{"fifo": bytes(17)}, {"fifo_flags": b"x"}, {"input": bytes(20_000)}])
def test_a_damaged_state_is_refused(uart: Serial, damage: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match="saved FIFO or input"):
        uart.load({**uart.save(), **damage})
