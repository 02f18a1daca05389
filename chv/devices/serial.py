"""COM1: the UART, its host side and the two threads between them, and its ACPI device."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from .. import layout
from ..acpi.aml import EISAID, IO, Device, Interrupt, Name, ResourceTemplate, Scope, String
from ..threads import leave_signals_to_main
from ._serial import ENDED, FAILED, WATCHED, Serial
from .backend import Backend

if TYPE_CHECKING:
    import socket

_CLOSE_PATIENCE: Final = 1.0  # seconds without any progress after which output is given up
_JOIN_PATIENCE: Final = 2.0


class SerialPort:
    """A serial port and what it is connected to. It outlives reboots of the guest.

    ``irq_fd`` is an eventfd that raises the port's interrupt (-1: none). ``backend`` is closed together
    with the port.
    """

    def __init__(self, irq_fd: int, backend: Backend) -> None:
        self.device = Serial(irq_fd)
        self.backend = backend
        self._threads: list[threading.Thread] = []
        self._clients: queue.SimpleQueue[socket.socket | None] = queue.SimpleQueue()
        self._closed = False
        if backend.listener is not None:
            self.device.attached = False  # until the first client comes
        elif backend.out_fd < 0:
            self.device.discard = True

    def start(self) -> None:
        """Start to move bytes. Once."""
        if self._threads or self._closed:
            raise RuntimeError("a serial port is started once")
        backend = self.backend
        if backend.listener is not None:
            self._spawn("in", self._accept_clients)
            self._spawn("out", self._write_to_clients)
        if backend.in_fd >= 0:
            self._spawn("in", self._read)
        if backend.out_fd >= 0:
            self._spawn("out", lambda: self.device.run_writer(backend.out_fd))

    def _spawn(self, direction: str, loop: Callable[[], object]) -> None:
        thread = threading.Thread(
            target=_without_signals, args=(loop,), name=f"serial-{direction}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _read(self) -> None:
        self.device.run_reader(self.backend.in_fd)
        self.device.run_reader(-1)  # the input has ended; the rest of it goes to the guest at its pace

    def close(self) -> None:
        """Hand over the guest's last words, end the threads, restore the terminal; once or more.

        Waits for a slow reader as long as he reads, for one who does not one second.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._threads:
                self._flush()
        finally:
            self.device.stop()
            self._clients.put(None)
            for thread in self._threads:
                thread.join(_JOIN_PATIENCE)
            self._threads.clear()
            self.backend.close()

    def _flush(self) -> None:
        left = self.device.pending_output
        while left and not self.device.flush(_CLOSE_PATIENCE):
            if self.device.pending_output >= left or not self.device.attached:
                return
            left = self.device.pending_output

    def set_irq_fd(self, fd: int) -> None:
        """Interrupt through another eventfd from now on, for a VM built anew."""
        self.device.set_irq_fd(fd)

    def aml(self) -> bytes:
        """COM1 for the guest's ACPI namespace."""
        return aml()

    # -- clients of a socket: the reading thread accepts and reads, the other writes ------

    def _accept_clients(self) -> None:
        listener = self.backend.listener
        assert listener is not None
        client: socket.socket | None = None
        while True:
            outcome = self.device.run_reader(-1 if client is None else client.fileno(), listener.fileno())
            if outcome == WATCHED:
                with contextlib.suppress(OSError):  # gone before it was accepted
                    new, _ = listener.accept()
                    _hang_up(client)
                    client = new
                    self._clients.put(new.dup())  # each thread closes its own
                continue
            _hang_up(client)
            client = None
            if outcome not in (ENDED, FAILED):
                return

    def _write_to_clients(self) -> None:
        while (client := self._clients.get()) is not None:
            with client:
                self.device.run_writer(client.fileno(), reconnects=True)


def _without_signals(loop: Callable[[], object]) -> None:
    leave_signals_to_main()
    loop()


def _hang_up(client: socket.socket | None) -> None:
    if client is not None:
        import socket

        with contextlib.suppress(OSError):  # the peer was faster
            client.shutdown(socket.SHUT_RDWR)
        client.close()


def aml() -> bytes:
    """COM1 in the ACPI namespace (PNP0501: 16550A-compatible)."""
    resources = ResourceTemplate(
        IO(layout.COM1_PORT, layout.COM1_PORT, 0, layout.COM1_SIZE),
        Interrupt(layout.COM1_GSI, edge=True),
    )
    com1 = Device(
        "COM1",
        Name("_HID", EISAID("PNP0501")),
        Name("_UID", 0),
        Name("_DDN", String("COM1")),
        Name("_CRS", resources),
    )
    return Scope("\\_SB", com1)
