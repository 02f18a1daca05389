"""The Unix socket that the REST API listens on: made, guarded and removed.

``<path>.lock`` is held while the socket is in use, with the open-file-description lock that Cloud
Hypervisor takes, so that two VMMs, of either kind, never share a path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import struct

from ..errors import ConfigError

PATH_MAX = 107  # bytes: sockaddr_un.sun_path without the final NUL, unix(7)
BACKLOG = 64
_FLOCK = struct.Struct("@hhqqi0q")  # struct flock of fcntl(2): type, whence, start, len, pid


class Listener:
    """A listening socket; :meth:`close` also removes what was created for it."""

    def __init__(self, sock: socket.socket, path: str = "", lock: int = -1) -> None:
        self.socket = sock
        self.path = path
        self._lock = lock
        self._identity = _identity(path) if path else None

    def close(self) -> None:
        self.socket.close()
        if self._lock < 0:
            return
        if _identity(self.path) == self._identity:
            os.unlink(self.path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_lock_path(self.path))
        os.close(self._lock)
        self._lock = -1


def open_listener(spec: str) -> Listener:
    """The socket that an ``--api-socket`` value names: ``PATH``, ``path=PATH`` or ``fd=NUMBER``."""
    key, equals, value = spec.partition("=")
    if equals and key == "fd":
        return listen_on_fd(value)
    return listen_on_path(value if equals and key == "path" else spec)


def listen_on_fd(number: str) -> Listener:
    """A listening Unix socket that this process was started with."""
    if not re.fullmatch(r"[0-9]{1,9}", number):
        raise ConfigError(f"api-socket: fd={number} is not a file descriptor")
    try:
        sock = socket.socket(fileno=int(number))
    except OSError as error:
        raise ConfigError(f"api-socket: fd={number} is not a socket ({error.strerror})") from None
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family != socket.AF_UNIX or not listening:
        sock.detach()
        raise ConfigError(f"api-socket: fd={number} is not a listening Unix socket")
    os.set_inheritable(int(number), False)
    return Listener(sock)


def listen_on_path(path: str) -> Listener:
    """A new socket at ``path`` that only this user can open (0600).

    A socket that nobody listens on is replaced. Raises :class:`ConfigError` when somebody does,
    when something else is at ``path``, and when it cannot be created.
    """
    if not path:
        raise ConfigError("api-socket: the path is empty")
    if len(os.fsencode(path)) > PATH_MAX:
        raise ConfigError(f"api-socket: {path}: longer than {PATH_MAX} bytes, what a Unix socket can have")
    if "\0" in path:
        raise ConfigError("api-socket: the path contains a NUL character")
    lock = _take_lock(path)
    try:
        _remove_stale(path)
        return Listener(_bind(path), path, lock)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_lock_path(path))
        os.close(lock)
        raise


def _lock_path(path: str) -> str:
    return f"{path}.lock"


def _take_lock(path: str) -> int:
    """The locked file beside ``path``; the file may be removed by its last owner while we open it."""
    name = _lock_path(path)
    while True:
        try:
            lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"api-socket: {name}: {error.strerror}") from None
        try:
            fcntl.fcntl(lock, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except OSError as error:
            os.close(lock)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ConfigError(f"api-socket: {path} is in use by another VMM") from None
            raise ConfigError(f"api-socket: {name}: {error.strerror}") from None
        if _identity(name) == _identity_of(os.fstat(lock)):
            return lock
        os.close(lock)


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"api-socket: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(path)
    if result != errno.ECONNREFUSED:
        raise ConfigError(f"api-socket: {path} is in use by another process")
    os.unlink(path)


def _bind(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(sock.fileno(), 0o600)  # bind() gives the file the mode of the socket's inode
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"api-socket: {path}: {error.strerror}") from None
    return sock


def _identity(path: str) -> tuple[int, int] | None:
    try:
        return _identity_of(os.lstat(path))
    except FileNotFoundError:
        return None


def _identity_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
