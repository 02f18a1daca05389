"""A console (virtio 1.2, 5.3): what Linux calls hvc0. Written in Python on the queue API."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from .._virtqueue import STOPPED
from ..config import ConsoleConfig, ConsoleMode
from ..devices.backend import Backend, open_backend
from ..devices.line import INPUT_SIZE, Line
from ..errors import ConfigError
from .device import F_VERSION_1, VirtioDevice

if TYPE_CHECKING:
    from .._virtqueue import Chain, Queue

F_SIZE: Final = 1 << 0  # (virtio 1.2, 5.3.3)
F_EMERG_WRITE: Final = 1 << 2

RECEIVE: Final = 0  # queue numbers, as the driver sees them (virtio 1.2, 5.3.2)
TRANSMIT: Final = 1
QUEUE_SIZE: Final = 256

_CONFIG: Final = struct.Struct("<HHII")  # cols, rows, max_nr_ports, emerg_wr (virtio 1.2, 5.3.4)
_EMERG_WR: Final = 8  # its offset there
_PORTS: Final = 1

_PIECE: Final = 64 << 10  # so much of a chain is taken at a time
_AT_STOP: Final = 1 << 20  # so much of it when there is no time left
_PATIENCE: Final = 1.0  # seconds; Linux waits in a loop, with a lock held and interrupts off
_SOCKET_PATH_MAX: Final = 107  # unix(7): sun_path holds 108 bytes with its NUL


class Console(VirtioDevice):
    """One port between the guest's hvc0 and ``backend``, which it owns. Both outlive reboots.

    What the host sends waits until the guest takes it. What the guest sends waits for a slow reader, and
    the guest with it, at most a second for each buffer: then, and while there is no reader at all, the
    oldest output is dropped.

    ``size`` is (columns, rows), (0, 0) if unknown; it follows a terminal's.
    """

    ID = 3
    PCI_CLASS = 0x078000

    def __init__(self, name: str, backend: Backend) -> None:
        super().__init__(name, F_VERSION_1 | F_SIZE | F_EMERG_WRITE, (QUEUE_SIZE, QUEUE_SIZE))
        self._backend = backend
        self.line = Line(backend, name)
        self.size = self._terminal_size = backend.size() or (0, 0)
        self._sent = self._received = 0
        self.line.start()

    @classmethod
    def open(cls, config: ConsoleConfig, field: str, name: str) -> Console:
        """Open what ``config`` names. Raises :class:`chv.errors.ConfigError`, with ``field`` in its message.

        Mode Off is no device, and refused here.
        """
        backend = open_backend(config.mode.value, config.file, config.socket, field)
        try:
            return cls(name, backend)
        except BaseException:
            backend.close()
            raise

    @property
    def pty_path(self) -> str | None:
        """With mode Pty, what a terminal program opens."""
        return self._backend.pty_path

    # -- configuration ---------------------------------------------------------------------------

    def config(self) -> bytes:
        columns, rows = self.size
        return _CONFIG.pack(columns, rows, _PORTS, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        """A character written to ``emerg_wr`` goes out without any queue: a guest's first or last words."""
        if offset == _EMERG_WR and data:
            self._sent += 1
            self.line.put(data[:1])

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest this size, 0 to 65535 each. A terminal's next change of size goes ahead of it.

        Raises :class:`chv.errors.ConfigError` outside of that range.
        """
        for what, value in (("columns", columns), ("rows", rows)):
            if not 0 <= value <= 0xFFFF:
                raise ConfigError(f"{self.name}: {value} {what} are not within 0-65535")
        if (columns, rows) != self.size:
            self.size = columns, rows
            if self.accepted & F_SIZE:
                self.config_changed()

    def _follow(self, columns: int, rows: int) -> None:
        if (columns, rows) != self._terminal_size:
            self._terminal_size = columns, rows
            self.resize(columns, rows)

    # -- queues ----------------------------------------------------------------------------------

    def start(self, queues: Mapping[int, Queue], features: int) -> None:
        super().start(queues, features)
        if features & F_SIZE:
            self.line.watch_size(self._follow)

    def stop(self) -> None:
        self.line.watch_size(None)
        super().stop()

    def work(self, queue: Queue) -> None:
        if queue.index == RECEIVE:
            self._receive(queue)
        elif queue.index == TRANSMIT:
            # Linux looks at the size when it is told of a change, and not before.
            if self.accepted & F_SIZE and self.size != (0, 0):
                self.config_changed()
            self._transmit(queue)

    def _receive(self, queue: Queue) -> None:
        """Fill the guest's buffers with what the host sends."""
        line = self.line
        stopped = False
        while not stopped:
            wait_for = line.readable.fd
            if line.pending_input:
                for chain in queue:
                    self._received += chain.write(line.take(min(chain.writable_bytes, INPUT_SIZE)))
                    chain.done()
                    if not line.pending_input:
                        break
                else:
                    wait_for = -1  # the guest has to give us buffers first
            stopped = bool(queue.wait(wait_for) & STOPPED)

    def _transmit(self, queue: Queue) -> None:
        """Hand over what the guest sends."""
        stopped = False
        while not stopped:
            for chain in queue:
                self._forward(queue, chain)
                chain.done()
            stopped = bool(queue.wait() & STOPPED)

    def _forward(self, queue: Queue, chain: Chain) -> None:
        left = chain.readable_bytes
        long = left > _PIECE  # a hostile guest's chain may have terabytes
        stopped_at: int | None = None
        for piece in _pieces(chain):
            if stopped_at is None and self._must_stop(queue, long):
                stopped_at = left
            if stopped_at is not None and stopped_at - left >= _AT_STOP:
                self.line.lose(left)
                break
            self.line.put(piece)
            left -= len(piece)
        self._sent += chain.readable_bytes

    def _must_stop(self, queue: Queue, look: bool) -> bool:
        """Wait until the line has room; True if the worker is to stop instead."""
        line = self.line
        if look and queue.wait(timeout=0) & STOPPED:
            return True
        limit = time.monotonic() + _PATIENCE
        while not line.has_room():
            left = limit - time.monotonic()
            if left <= 0:
                line.give_up()
            elif queue.wait(line.writable.fd, left) & STOPPED:
                return True
        return False

    # -- the host's side -------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """``sent`` and ``received``: bytes taken from and handed to the guest. ``dropped``: output that
        nobody took. ``write_errors``, ``read_errors``: what ended the output or the input.
        """
        line = self.line
        return {
            "sent": self._sent,
            "received": self._received,
            "dropped": line.dropped,
            "write_errors": int(line.error is not None),
            "read_errors": int(line.input_error is not None),
        }

    def save(self) -> dict[str, Any]:
        return {**super().save(), "size": list(self.size), "input": self.line.peek()}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        columns, rows = state["size"]
        self.size = columns, rows
        self.line.feed(state["input"])

    def close(self) -> None:
        """Hand over the guest's last words and close the backend; see :meth:`chv.devices.line.Line.close`."""
        self.line.close()


def _pieces(chain: Chain) -> Iterator[memoryview]:
    for buffer in chain.readable:
        for start in range(0, len(buffer), _PIECE):
            with buffer[start : start + _PIECE] as piece:
                yield piece


def check(config: ConsoleConfig, field: str, boot_vcpus: int) -> None:
    """What can be said about ``config`` without opening anything: raises :class:`chv.errors.ConfigError`."""
    for key, mode in (("file", ConsoleMode.FILE), ("socket", ConsoleMode.SOCKET)):
        path = getattr(config, key)
        if config.mode is not mode:
            continue
        if not path:
            raise ConfigError(f"{field}.{key}: required with mode {mode.value}, but missing")
        if "\0" in path:
            raise ConfigError(f"{field}.{key}: it contains a NUL character")
        length = len(path.encode(errors="surrogateescape"))
        if mode is ConsoleMode.SOCKET and length > _SOCKET_PATH_MAX:
            raise ConfigError(
                f"{field}.{key}: {length} bytes long, a socket's path has at most {_SOCKET_PATH_MAX}"
            )
