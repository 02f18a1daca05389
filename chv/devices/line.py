"""The host's side of a console written in Python: two buffers, and a thread between them and a backend."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from ..threads import leave_signals_to_main
from .backend import Backend
from .peer import Peer

INPUT_SIZE: Final = 16 << 10  #: so many bytes from the host wait here for the guest, others at their source
OUTPUT_SIZE: Final = 128 << 10  #: with so many bytes waiting for the host, the guest is asked to wait
_MOST: Final = 1 << 20  # so many are kept, in either direction, when waiting is not possible

_NAP: Final = 0.1  # seconds between looks at what does not tell when it can be read again
_SIZE_EVERY: Final = 0.5  # seconds between looks at a terminal's size: nothing tells a pty's master
_GATHER: Final = 0.001  # seconds in which a few bytes become more: a guest writes them in small pieces
_GATHER_BELOW: Final = 64
_CLOSE_PATIENCE: Final = 1.0  # seconds without any progress after which output is given up
_JOIN_PATIENCE: Final = 2.0

_GONE: Final = select.POLLERR | select.POLLHUP | select.POLLNVAL


class Level:
    """An eventfd that is readable while something is so."""

    def __init__(self, value: bool = False) -> None:
        self.fd = os.eventfd(int(value), os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._value = value

    def set(self, value: bool) -> None:
        if value != self._value:
            self._value = value
            if value:
                os.eventfd_write(self.fd, 1)
            else:
                os.eventfd_read(self.fd)

    def close(self) -> None:
        os.close(self.fd)


class Line:
    """A console's line to ``backend``, from :meth:`start` until :meth:`close`, which closes the backend too.

    Any thread may take input (:meth:`take`) and give output (:meth:`put`); neither waits. Input is never
    lost: what finds no room stays at its source. Output is lost only where nobody takes it: the newest
    ``OUTPUT_SIZE`` bytes are kept for who comes next.
    """

    def __init__(self, backend: Backend, name: str) -> None:
        self.backend = backend
        self.name = name
        self.readable = Level()  #: there is input
        self.writable = Level(True)  #: there is room for output
        self.error: OSError | None = None  #: of the write that failed: output is thrown away since then
        self.input_error: OSError | None = None
        self.dropped = 0  #: bytes of output that nobody took
        self._input = bytearray()
        self._output = bytearray()
        self._trimmed = 0  # bytes taken away at its front to make room
        self._attached = backend.listener is None
        self._stalled = False
        self._discard = backend.listener is None and backend.out_fd < 0
        self._lock = threading.Lock()
        self._progress = threading.Condition(self._lock)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self._peer: Peer | None = None
        self._client: socket.socket | None = None
        self._resting = False  # the input: it cannot be waited for with poll(2)
        self._terminal = backend.size() is not None
        self._size: tuple[int, int] | None = None
        self._resized: Callable[[int, int], None] | None = None
        self._watching = threading.Lock()

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start to move bytes. Once."""
        backend = self.backend
        if self._thread is not None or self._closed:
            raise RuntimeError("a line is started once")
        if backend.listener is None:
            if backend.in_fd < 0 and backend.out_fd < 0:
                return
            self._peer = Peer(backend.in_fd, backend.out_fd)
        self._thread = threading.Thread(target=self._run, name=f"{self.name}.host", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hand over the guest's last words, end the thread, close the backend; once or more.

        Waits for a slow reader as long as he reads, for one who does not one second.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            if self._thread is not None:
                self._flush()
        finally:
            self._stopping = True
            os.eventfd_write(self._wake, 1)
            if self._thread is not None:
                self._thread.join(_JOIN_PATIENCE)
            if self._thread is None or not self._thread.is_alive():
                self._let_go()
            self.backend.close()

    def _let_go(self) -> None:
        if self._peer is not None:
            self._hang_up()
        self.readable.close()
        self.writable.close()
        os.close(self._wake)

    def _flush(self) -> None:
        with self._progress:
            left = len(self._output)
            while left and self._attached:
                self._progress.wait_for(lambda: not self._output or not self._attached, _CLOSE_PATIENCE)
                if len(self._output) >= left:
                    return
                left = len(self._output)

    # -- the guest's side ------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether somebody takes the output."""
        return self._attached

    @property
    def pending_input(self) -> int:
        """How many bytes wait for the guest."""
        return len(self._input)

    @property
    def pending_output(self) -> int:
        """How many bytes wait to be written."""
        return len(self._output)

    def take(self, size: int) -> bytes:
        """At most ``size`` bytes of input."""
        with self._lock:
            data = bytes(self._input[:size])
            if self._closed or not data:
                return b""
            was_full = len(self._input) >= INPUT_SIZE
            del self._input[:size]
            self.readable.set(bool(self._input))
            if was_full:
                self._poke()
        return data

    def peek(self) -> bytes:
        """The input that waits, which stays."""
        with self._lock:
            return bytes(self._input)

    def feed(self, data: bytes) -> None:
        """Input, as if the host had sent it."""
        with self._lock:
            self._input += data
            if not self._closed:
                self.readable.set(bool(self._input))

    def put(self, data: bytes | memoryview) -> None:
        """Output. There is room always: who can wait first does so until it is :attr:`writable`.

        The oldest output is dropped where somebody does not do so, or where nobody takes it.
        """
        with self._lock:
            if self._discard or self._closed:
                self.dropped += len(data)
                return
            was_empty = not self._output
            self._output += data
            self._trim()
            self._update()
            if was_empty:
                self._poke()  # not before: the thread looks at it without the lock

    def lose(self, size: int) -> None:
        """Count ``size`` bytes of output that could not even be put here."""
        with self._lock:
            self.dropped += size

    def has_room(self) -> bool:
        """Whether the guest need not wait."""
        with self._lock:
            return self._room()

    def give_up(self) -> None:
        """The guest has waited too long: it goes on, and output is lost, until the reader has caught up."""
        with self._lock:
            self._stalled = True
            self._trim()
            self._update()

    # With the lock held:

    def _waited_for(self) -> bool:
        return self._attached and not self._stalled

    def _room(self) -> bool:
        return len(self._output) < OUTPUT_SIZE or self._discard or self._closed or not self._waited_for()

    def _update(self) -> None:
        """After a change of the output or of who takes it."""
        if len(self._output) <= OUTPUT_SIZE // 2:
            self._stalled = False
        if not self._closed:
            self.writable.set(self._room())

    def _trim(self) -> None:
        surplus = len(self._output) - (_MOST if self._waited_for() else OUTPUT_SIZE)
        if surplus > 0:
            del self._output[:surplus]
            self._trimmed += surplus
            self.dropped += surplus

    def _poke(self) -> None:
        """Let the thread look again."""
        if not self._closed:
            os.eventfd_write(self._wake, 1)

    # -- the terminal's size ---------------------------------------------------------------------

    def watch_size(self, resized: Callable[[int, int], None] | None) -> None:
        """Call ``resized(columns, rows)`` with the terminal's size, now and when it changes.

        In the line's thread; it must not come back here. None: no more, and no call is under way.
        """
        with self._watching:
            self._size = None
            self._resized = resized
        with self._lock:
            self._poke()

    def _follow_size(self) -> None:
        if self._resized is None or not self._terminal:
            return
        size = self.backend.size()
        with self._watching:
            if self._resized is not None and size is not None and size != self._size:
                self._size = size
                self._resized(*size)

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        leave_signals_to_main()
        while not self._stopping:
            events, timeout = self._prepare()
            ready = _poll(events, timeout)
            if ready.get(self._wake):
                self._woken()
            self._follow_size()
            listener = self.backend.listener
            if listener is not None and ready.get(listener.fileno()):
                self._accept(listener)
            elif self._peer is not None:
                self._serve(self._peer, ready)

    def _prepare(self) -> tuple[dict[int, int], float | None]:
        """What to poll for, and for how long at most."""
        events = {self._wake: select.POLLIN}
        timeout = _SIZE_EVERY if self._resized is not None and self._terminal else None
        if self.backend.listener is not None:
            events[self.backend.listener.fileno()] = select.POLLIN
        peer = self._peer
        if peer is None:
            return events, timeout
        if peer.pty:
            self._look_at_pty(peer)
        if self._resting or not self._attached:
            timeout = _NAP if peer.pty or self._resting else timeout
        if self._reads(peer) and not self._resting:
            events[peer.in_fd] = select.POLLIN
        if peer.out_fd >= 0 and self._attached:
            events[peer.out_fd] = events.get(peer.out_fd, 0) | (select.POLLOUT if self._output else 0)
        self._resting = False
        return events, timeout

    def _reads(self, peer: Peer) -> bool:
        return peer.in_fd >= 0 and len(self._input) < INPUT_SIZE

    def _look_at_pty(self, peer: Peer) -> None:
        """A master that nobody has open is always ready (hung up); nothing tells when somebody opens it."""
        state = _poll({peer.in_fd: select.POLLIN}, 0).get(peer.in_fd, 0)
        self._attach(not state & select.POLLHUP)
        if state & (select.POLLHUP | select.POLLIN) == select.POLLHUP:
            self._resting = True

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        if self._peer is not None and 0 < len(self._output) < _GATHER_BELOW and not self._stopping:
            time.sleep(_GATHER)

    def _serve(self, peer: Peer, ready: dict[int, int]) -> None:
        if self._reads(peer) and ready.get(peer.in_fd):
            self._read(peer, INPUT_SIZE - len(self._input))
        found = ready.get(peer.out_fd, 0)
        if peer.pty and found & select.POLLHUP:
            return  # the last one has just closed it
        if found & select.POLLOUT:
            self._write(peer)
        elif found & _GONE:
            self._lost(peer, BrokenPipeError(errno.EPIPE, "whoever read the output has gone"))
        if self._client is not None and peer.in_fd < 0 and peer.out_fd < 0:
            self._hang_up()

    def _read(self, peer: Peer, size: int) -> bool:
        """Whether there was something."""
        try:
            data = peer.read(size)
        except OSError as error:
            self.input_error = error
            data = b""
        if data is None:
            self._resting = True
        elif data:
            self.feed(data)
        else:
            peer.in_fd = -1
        return bool(data)

    def _write(self, peer: Peer) -> None:
        with self._lock:
            data = bytes(self._output[: 64 << 10])
            mark = self._trimmed
        try:
            written = peer.write(data) if data else 0
        except OSError as error:
            self._lost(peer, error)
            return
        with self._progress:
            # Of what was just written, some may have been dropped meanwhile to make room.
            again = min(self._trimmed - mark, written)
            self.dropped -= again
            del self._output[: written - again]
            self._update()
            self._progress.notify_all()

    def _lost(self, peer: Peer, error: OSError) -> None:
        """Nobody reads any more. A client may come back; a file or pipe does not."""
        peer.out_fd = -1
        if self._client is not None:
            self._attach(False)
            return
        with self._progress:
            self.error = error
            self._discard = True
            self.dropped += len(self._output)
            self._output.clear()
            self._update()
            self._progress.notify_all()

    def _attach(self, attached: bool) -> None:
        with self._progress:
            if attached != self._attached:
                self._attached = attached
                if not attached:
                    self._trim()
                self._update()
                self._progress.notify_all()

    # -- clients of a socket ---------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        """Serve a new client in place of the old one, whose input is not lost."""
        try:
            client, _ = listener.accept()
            peer = Peer(client.fileno(), client.fileno())
        except OSError:  # gone before it was accepted, or there are no descriptors left
            time.sleep(_NAP)
            return
        old = self._peer
        while old is not None and old.in_fd >= 0 and len(self._input) < _MOST and self._read(old, _MOST):
            pass
        if old is not None:
            self._hang_up()
        self._peer, self._client = peer, client
        self._resting = False
        self._attach(True)

    def _hang_up(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None
        if self._client is not None:
            with contextlib.suppress(OSError):  # the peer was faster
                self._client.shutdown(socket.SHUT_RDWR)
            self._client.close()
            self._client = None
            self._attach(False)


def _poll(events: dict[int, int], timeout: float | None) -> dict[int, int]:
    poll = select.poll()
    for fd, mask in events.items():
        poll.register(fd, mask)
    return dict(poll.poll(None if timeout is None else timeout * 1000))
