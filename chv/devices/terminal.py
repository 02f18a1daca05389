"""Raw mode on the user's terminal, and the way back from it on every exit path."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import termios
from collections.abc import Iterator
from typing import Any, Final

from ._serial import guard_terminal, unguard_terminal

_IFLAG, _OFLAG, _CFLAG, _LFLAG = 0, 1, 2, 3  # in tcgetattr()'s list

_INPUT_OFF: Final = (
    termios.IGNBRK
    | termios.BRKINT
    | termios.PARMRK
    | termios.ISTRIP
    | termios.INLCR
    | termios.IGNCR
    | termios.ICRNL
    | termios.IXON
)
_LOCAL_OFF: Final = termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN


def make_raw(fd: int, *, output: bool) -> None:
    """Set terminal ``fd`` as cfmakeraw(3) does; with ``output``, leave output processing off as well.

    A user's own terminal keeps its output processing, so that what chv itself prints to it still starts
    at the left margin. A guest ends its lines with CR LF and does not notice.
    """
    settings: list[Any] = termios.tcgetattr(fd)
    settings[_IFLAG] &= ~_INPUT_OFF
    settings[_LFLAG] &= ~_LOCAL_OFF
    settings[_CFLAG] = settings[_CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    if output:
        settings[_OFLAG] &= ~termios.OPOST
    settings[6][termios.VMIN], settings[6][termios.VTIME] = 1, 0
    _apply(fd, settings)


def _apply(fd: int, settings: list[Any]) -> None:
    with _no_stop():
        termios.tcsetattr(fd, termios.TCSANOW, settings)


@contextlib.contextmanager
def _no_stop() -> Iterator[None]:
    """Let a process in the background change its terminal's settings instead of being stopped for it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def terminal_size(fd: int) -> tuple[int, int] | None:
    """Columns and rows of terminal or pty ``fd``, (0, 0) if nobody set them; None if it is no terminal."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return None
    return size.columns, size.lines


def in_background(fd: int) -> bool:
    """Whether this process may not read from terminal ``fd``, because another job of the shell has it."""
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:
        return False  # not our controlling terminal, so there is no job control on it


class RawTerminal:
    """Terminal ``fd`` in raw mode until :meth:`restore`, the process's end, or its death by a signal.

    A process that runs in the background leaves the terminal as it is: somebody else is using it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pid = os.getpid()
        self._settings: list[Any] | None = None
        if in_background(fd):
            return
        self._settings = termios.tcgetattr(fd)
        guard_terminal(fd)
        atexit.register(self.restore)
        try:
            make_raw(fd, output=False)
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Set the terminal as it was found. May be called more than once."""
        settings, self._settings = self._settings, None
        if settings is None or os.getpid() != self._pid:
            return
        with contextlib.suppress(termios.error):  # the terminal may be gone
            _apply(self._fd, settings)
        unguard_terminal()
        atexit.unregister(self.restore)
