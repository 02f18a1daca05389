"""Random accesses and host bytes against a model of the port in plain Python."""

from __future__ import annotations

from collections import deque

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from chv.devices._serial import Serial

from .uart import (
    BI,
    BREAK,
    DATA,
    DLAB,
    DR,
    FCR,
    FIFO_ERROR,
    IER,
    IIR,
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
    OUT2,
    RECEIVED,
    RING,
    SCR,
    TEMT,
    THRE,
    Irq,
)


class SerialMachine(RuleBasedStateMachine):
    """What the data sheet says, with lists instead of rings, and each register as a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.irq = Irq()
        self.uart = Serial(self.irq.fd)
        self.ier = self.lcr = self.mcr = self.scr = self.fcr = 0
        self.fifo: deque[tuple[int, int]] = deque()
        self.waiting: deque[int] = deque()
        self.breaks = False
        self.overrun = False
        self.thre_pending = False
        self.cts, self.deltas = 0xB0, 0
        self.sent: list[int] = []
        self.shown: set[int] = set()
        self.looked = False
        self.pulses = 0

    def teardown(self) -> None:
        self.irq.close()

    # -- the model

    def depth(self) -> int:
        return 16 if self.fcr & 1 else 1

    def room(self) -> bool:
        return bool(self.mcr & LOOP) or RING - len(self.sent) >= 16

    def causes(self) -> set[int]:
        found = set()
        if self.overrun or (self.fifo and self.fifo[0][1]):
            found.add(LINE)
        if self.fifo:
            found.add(RECEIVED)
        if self.thre_pending:
            found.add(THRE)
        if self.deltas:
            found.add(MODEM)
        return {cause for cause in found if self.ier & cause}

    def settle(self) -> None:
        """The end of an access: a pulse if a cause is new to the line."""
        line = self.causes() if self.mcr & (OUT2 | LOOP) == OUT2 else set()
        if line - self.shown:
            self.pulses += 1
            self.looked = False
        self.shown = line

    def refill(self) -> None:
        if self.mcr & LOOP:
            return
        if not self.fifo and (self.breaks or self.waiting):
            self.shown.discard(RECEIVED)
        if self.breaks and len(self.fifo) < self.depth():
            self.fifo.append((0, BI))
            self.breaks = False
        while self.waiting and len(self.fifo) < self.depth():
            self.fifo.append((self.waiting.popleft(), 0))

    def hear(self, byte: int, flags: int) -> None:
        if len(self.fifo) == self.depth():
            self.overrun = True
            if self.fcr & 1:
                return
            self.fifo.clear()
        self.fifo.append((byte, flags))

    @initialize(
        left=st.sampled_from([None] * 9 + [16, 40]),
        ier=st.sampled_from([0x00, 0x01, 0x02, 0x03, 0x05, 0x0F, 0x0F, 0x0F]),
        fcr=st.sampled_from([0x00, 0x01, 0x41, 0x81, 0xC1]),
    )
    def begin(self, left: int | None, ier: int, fcr: int) -> None:
        """As a driver leaves the port when it has been opened; sometimes with room for few bytes only."""
        if left is not None:
            for _ in range(RING - left):
                self.uart.write(DATA, 1, 0x55)
            self.sent = [0x55] * (RING - left)
            self.thre_pending = True
        self.write_fcr(fcr)
        self.write_lcr(0x03)
        self.write_mcr(0x0B)
        self.write_ier(ier)

    # -- the host

    @rule(size=st.integers(0, 40))
    def inject(self, size: int) -> None:
        data = bytes(range(size))
        assert self.uart.inject(data) == len(data)
        self.waiting.extend(data)
        self.refill()
        self.settle()

    @rule()
    def send_break(self) -> None:
        self.uart.send_break()
        self.breaks = True
        self.refill()
        self.settle()

    @rule(count=st.integers(1, 100))
    def drain(self, count: int) -> None:
        assert self.uart.drain(count) == bytes(self.sent[:count])
        had_room = self.room()
        del self.sent[:count]
        if self.room() and not had_room:
            self.thre_pending = True
        self.settle()

    # -- the guest

    @rule(value=st.one_of(st.integers(0, 15), st.integers(0, 255)))
    def write_ier(self, value: int) -> None:
        self.uart.write(IER, 1, value)
        if self.lcr & DLAB:
            return
        if value & ~self.ier & THRE and self.room():
            self.thre_pending = True
        self.ier = value & 0x0F
        self.settle()

    @rule(value=st.sampled_from([0x00, 0x01, 0x03, 0x05, 0x41, 0x81, 0x81, 0xC1, 0xC1, 0xC7, 0x02, 0xFE]))
    def write_fcr(self, value: int) -> None:
        self.uart.write(FCR, 1, value)
        if (value ^ self.fcr) & 1 or value & 3 == 3:
            self.fifo.clear()
            self.shown.discard(RECEIVED)
        self.fcr = value & 0xC1 if value & 1 else 0
        self.refill()
        self.settle()

    @rule(value=st.sampled_from([0x03] * 6 + [0x83, 0x43, 0x1B]))
    def write_lcr(self, value: int) -> None:
        self.uart.write(LCR, 1, value)
        if value & ~self.lcr & BREAK and self.mcr & LOOP:
            self.hear(0, BI)
        self.lcr = value
        self.settle()

    @rule(value=st.sampled_from([0x0B] * 8 + [0x08, 0x08, 0x00, 0x10, 0x1F, 0x1A, 0xFF]))
    def write_mcr(self, value: int) -> None:
        self.uart.write(MCR, 1, value)
        had_room = self.room()
        self.mcr = value & 0x1F
        lines = 0xB0
        if value & LOOP:
            rts, dtr, out1, out2 = value & 2, value & 1, value & 4, value & 8
            lines = (rts and 0x10) | (dtr and 0x20) | (out1 and 0x40) | (out2 and 0x80)
        for line, delta in ((0x10, 1), (0x20, 2), (0x80, 8)):
            if (lines ^ self.cts) & line:
                self.deltas |= delta
        if self.cts & 0x40 and not lines & 0x40:
            self.deltas |= 4
        self.cts = lines
        if self.room() != had_room:
            self.thre_pending = self.room()
        self.refill()
        self.settle()

    @rule(value=st.integers(0, 255), count=st.sampled_from([1, 1, 5, 16]))
    def write_thr(self, value: int, count: int) -> None:
        for i in range(count):
            self.uart.write(DATA, 1, (value + i) & 0xFF)
            if self.lcr & DLAB:
                continue
            if self.mcr & LOOP:
                self.hear((value + i) & 0xFF, 0)
            elif len(self.sent) < RING:
                self.sent.append((value + i) & 0xFF)
            if self.looked or not self.fcr & 1:
                self.shown.discard(THRE)
            self.thre_pending = self.room()
            self.settle()

    @rule(count=st.integers(1, 20))
    def read_rbr(self, count: int) -> None:
        for _ in range(count):
            found = self.uart.read(DATA, 1)
            if self.lcr & DLAB:
                return
            assert found == (self.fifo.popleft()[0] if self.fifo else 0)
            if not self.fifo:
                self.refill()
            self.settle()

    @rule()
    def read_iir(self) -> None:
        found = self.causes()
        level = {0x00: 1, 0x40: 4, 0x80: 8, 0xC0: 14}[self.fcr & 0xC0]
        if LINE in found:
            expected = 0x06
        elif RECEIVED in found:
            expected = 0x04 if len(self.fifo) >= level else 0x0C
        elif THRE in found:
            expected = 0x02
            self.thre_pending = False
        else:
            expected = 0x00 if MODEM in found else NO_INTERRUPT
        assert self.uart.read(IIR, 1) == expected | (0xC0 if self.fcr & 1 else 0)
        self.looked = True
        self.settle()

    @rule()
    def read_lsr(self) -> None:
        expected = LSR_THRE | TEMT if self.room() else 0
        if self.fifo:
            expected |= DR | self.fifo[0][1]
        if self.overrun:
            expected |= OE
        if self.fcr & 1 and any(flags for _, flags in self.fifo):
            expected |= FIFO_ERROR
        assert self.uart.read(LSR, 1) == expected
        self.overrun = False
        if self.fifo:
            self.fifo[0] = (self.fifo[0][0], 0)
        self.looked = True
        self.settle()

    @rule()
    def read_msr(self) -> None:
        assert self.uart.read(MSR, 1) == self.cts | self.deltas
        self.deltas = 0
        self.settle()

    @rule(value=st.integers(0, 255))
    def scratch(self, value: int) -> None:
        self.uart.write(SCR, 1, value)
        assert self.uart.read(SCR, 1) == value

    @rule()
    def save_and_load(self) -> None:
        """A copy made from the saved state has an interrupt line that rises anew."""
        copy = Serial(-1)
        copy.load(self.uart.save())
        assert copy.save() == self.uart.save()
        assert copy.counters["interrupts"] == bool(self.shown)

    @rule()
    def reset(self) -> None:
        self.uart.reset()
        self.ier = self.lcr = self.mcr = self.scr = self.fcr = 0
        self.fifo.clear()
        self.breaks = self.overrun = self.looked = self.thre_pending = False
        self.cts, self.deltas, self.shown = 0xB0, 0, set()
        self.refill()

    # -- what always holds

    @invariant()
    def interrupts_agree(self) -> None:
        assert self.uart.counters["interrupts"] == self.pulses
        assert self.irq.take() <= self.pulses

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.uart.pending_output == len(self.sent)
        assert self.uart.pending_input == len(self.waiting)
        assert (self.uart.read(LCR, 1), self.uart.read(MCR, 1)) == (self.lcr, self.mcr)


TestSerialAgainstModel = SerialMachine.TestCase
TestSerialAgainstModel.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
