"""The 16550A's registers as the tests name them, and a driver that uses them as an operating system does."""

from __future__ import annotations

import contextlib
import os

from chv.devices._serial import Serial

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
FCR = IIR

RECEIVED, THRE, LINE, MODEM = 1, 2, 4, 8  # in IER
NO_INTERRUPT, IIR_THRE, IIR_RECEIVED, IIR_LINE, IIR_TIMEOUT, IIR_MODEM = 0x01, 0x02, 0x04, 0x06, 0x0C, 0x00
DR, OE, BI, LSR_THRE, TEMT, FIFO_ERROR = 0x01, 0x02, 0x10, 0x20, 0x40, 0x80
DTR, RTS, OUT1, OUT2, LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
DLAB, BREAK = 0x80, 0x40
RING = 131072


class Irq:
    """An eventfd, and how often it was pulsed."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def take(self) -> int:
        """The pulses since the last call."""
        with contextlib.suppress(BlockingIOError):
            return os.eventfd_read(self.fd)
        return 0

    def close(self) -> None:
        os.close(self.fd)


def set_up(device: Serial, *, interrupts: int = 0, trigger: int = 0xC0) -> None:
    """What a driver does when it opens the port: 8N1, FIFOs, interrupts let through."""
    device.write(LCR, 1, 0x03)
    device.write(FCR, 1, 0x07 | trigger)
    device.write(MCR, 1, DTR | RTS | OUT2)
    device.write(IER, 1, interrupts)


def iir(device: Serial) -> int:
    """The interrupt identification without the FIFO bits."""
    return device.read(IIR, 1) & 0x0F


def receive_all(device: Serial) -> bytes:
    """What a driver's receive loop gets."""
    data = bytearray()
    while device.read(LSR, 1) & DR:
        data.append(device.read(DATA, 1))
    return bytes(data)
