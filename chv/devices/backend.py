"""Where the bytes of a serial port or console come from and go to, a class for each mode of the config.

``field`` is the part of the configuration that error messages name: ``serial`` or ``console``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from typing import TYPE_CHECKING, Final, Protocol

from ..errors import ConfigError
from .terminal import RawTerminal, make_raw, terminal_size

if TYPE_CHECKING:
    import socket

_TIOCGPTN: Final = 0x80045430  # ioctl_tty(2): the number of the pty that this is the master of


class HasFileno(Protocol):
    """A socket, a file, a pipe end."""

    def fileno(self) -> int: ...


class Backend:
    """The host's end of a serial line or console.

    ``in_fd`` and ``out_fd`` are descriptors to read and write (-1: nothing to read; output is dropped).
    ``listener`` is set instead if clients come and go.
    """

    in_fd: int = -1
    out_fd: int = -1
    pty_path: str | None = None
    listener: socket.socket | None = None

    def size(self) -> tuple[int, int] | None:
        """Columns and rows of the terminal that this is; None if it is none, (0, 0) if nobody has said."""
        sizes = (terminal_size(fd) for fd in (self.out_fd, self.in_fd))
        return next((size for size in sizes if size is not None), None)

    def close(self) -> None:
        """Give back what was opened. May be called more than once."""


class Null(Backend):
    """No input; output is dropped."""


class Fds(Backend):
    """Two descriptors, or objects that have one, of the library's user, who keeps and closes his own.

    A socket or pty serves as both. The descriptors are duplicated, their flags are not changed.
    """

    def __init__(self, in_fd: int | HasFileno, out_fd: int | HasFileno, field: str = "serial") -> None:
        self.in_fd = _duplicate(in_fd, field)
        try:
            self.out_fd = _duplicate(out_fd, field)
        except BaseException:
            os.close(self.in_fd)
            raise

    def close(self) -> None:
        self.in_fd, self.out_fd = _close(self.in_fd), _close(self.out_fd)


def _duplicate(fd: int | HasFileno, field: str) -> int:
    number = fd if isinstance(fd, int) else fd.fileno()
    try:
        return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError as error:
        raise ConfigError(f"{field}: {fd!r} is no open file descriptor ({error.strerror})") from None


def _close(fd: int) -> int:
    if fd >= 0:
        os.close(fd)
    return -1


class Tty(Backend):
    """Standard input and output, in raw mode if the input is a terminal.

    At most one in a process. The descriptors are shared with the shell and others, so their flags stay as
    they are; terminals and pipes are opened once more, non-blocking.
    """

    _taken: Final = threading.Lock()

    def __init__(self, in_fd: int = 0, out_fd: int = 1, field: str = "serial") -> None:
        if not self._taken.acquire(blocking=False):
            raise ConfigError(
                f"{field}.mode: Tty is in use by another VM of this process; free are Pty, Socket, File, Null"
            )
        self._open = True
        self._raw: RawTerminal | None = None
        try:
            self.in_fd = _open_again(in_fd, os.O_RDONLY)
            self.out_fd = _open_again(out_fd, os.O_WRONLY)
            if self.in_fd >= 0 and os.isatty(self.in_fd):
                self._raw = RawTerminal(self.in_fd)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        if self._raw is not None:
            self._raw.restore()
        self.in_fd, self.out_fd = _close(self.in_fd), _close(self.out_fd)
        self._taken.release()


def _open_again(fd: int, flags: int) -> int:
    """A descriptor of our own for what ``fd`` is; -1 if it is closed.

    Opening once more gives flags of our own. It is no use for a socket (not possible), a regular file
    (would begin at its start), or a pty's master (would make a new pty): these are duplicated.
    """
    try:
        found = os.fstat(fd)
    except OSError:
        return -1
    if stat.S_ISFIFO(found.st_mode) or (os.isatty(fd) and not is_pty_master(fd)):
        with contextlib.suppress(OSError):
            return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def is_pty_master(fd: int) -> bool:
    """Whether ``fd`` is the end of a pty that made it, so that reading and writing wait for an opener."""
    try:
        fcntl.ioctl(fd, _TIOCGPTN, bytes(4))
    except OSError:
        return False
    return True


class File(Backend):
    """A file that gets the output, made anew for its owner alone to read. No input."""

    def __init__(self, path: str, field: str = "serial") -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        try:
            self.out_fd = os.open(path, flags, 0o600)
        except OSError as error:
            hint = "; a pipe needs somebody who reads it" if error.errno == errno.ENXIO else ""
            raise ConfigError(f"{field}.file: cannot write {path!r}: {error.strerror}{hint}") from None
        except ValueError as error:
            raise ConfigError(f"{field}.file: {path!r} is not a path ({error})") from None

    def close(self) -> None:
        self.out_fd = _close(self.out_fd)


class Pty(Backend):
    """A new pseudo-terminal in raw mode; ``pty_path`` is what a terminal program opens.

    The slave is not kept open here, so that the kernel tells whether somebody has it open. Its settings
    stay as long as the master does.
    """

    def __init__(self, field: str = "serial") -> None:
        try:
            master, slave = os.openpty()
        except OSError as error:
            raise ConfigError(f"{field}.mode: cannot open a pty: {error.strerror}") from None
        self.in_fd = self.out_fd = master
        try:
            self.pty_path = os.ttyname(slave)
            make_raw(slave, output=True)
            os.set_blocking(master, False)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(slave)

    def close(self) -> None:
        self.in_fd = self.out_fd = _close(self.in_fd)


class Socket(Backend):
    """A Unix stream socket at ``path`` that serves one client at a time; a new client replaces the old one.

    Only the owner may connect (0600). A socket that a dead process left behind is replaced; anything else
    at ``path`` is refused.
    """

    def __init__(self, path: str, field: str = "serial") -> None:
        import socket

        self._path = path
        _remove_stale(path, field)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(listener.fileno(), 0o600)  # the mode that bind() gives to the file (unix(7))
            listener.bind(path)
            listener.listen(1)
            listener.setblocking(False)
            self._identity = _identity(path)
        except (OSError, ValueError) as error:
            listener.close()
            raise _socket_error(path, error, field) from None
        self.listener = listener

    def close(self) -> None:
        if self.listener is None:
            return
        self.listener.close()
        self.listener = None
        with contextlib.suppress(OSError):
            if _identity(self._path) == self._identity:  # it may be somebody else's by now
                os.unlink(self._path)


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _socket_error(path: str, error: Exception, field: str) -> ConfigError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ConfigError(f"{field}.socket: cannot listen on {path!r}: {reason}")


def _remove_stale(path: str, field: str) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise _socket_error(path, error, field) from None
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"{field}.socket: {path!r} exists and is not a socket")
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its queue is full: somebody is listening
        except OSError as error:
            raise _socket_error(path, error, field) from None
    raise ConfigError(f"{field}.socket: {path!r} is in use by another process")


def open_backend(
    mode: str, file: str | None = None, socket: str | None = None, field: str = "serial"
) -> Backend:
    """The backend for ``mode`` in the configuration's part ``field``: Null, Tty, File, Pty or Socket.

    Raises :class:`chv.errors.ConfigError` for what is missing or cannot be opened.
    """
    match mode.lower():
        case "null":
            return Null()
        case "tty":
            return Tty(field=field)
        case "pty":
            return Pty(field)
        case "file":
            return File(_required(field, "file", file), field)
        case "socket":
            return Socket(_required(field, "socket", socket), field)
    raise ConfigError(f"{field}.mode: {mode!r}; allowed are Off, Null, Tty, Pty, File and Socket")


def _required(field: str, key: str, value: str | None) -> str:
    if not value:
        raise ConfigError(f"{field}.{key}: missing; mode {key.capitalize()} needs a path")
    return value
