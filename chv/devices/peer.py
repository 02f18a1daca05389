"""Reading and writing what is at the other end of a console, without ever waiting for it."""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Final

from .backend import is_pty_master
from .terminal import in_background

_PIECE: Final = 4096  # a pipe that poll(2) calls writable takes so much at once (pipe(7): PIPE_BUF)


class Peer:
    """One other end: the descriptors of a backend, or a client of its socket.

    ``in_fd`` and ``out_fd`` become -1 when there is nothing more to read, or nobody who reads. Closing it
    leaves the descriptors open.
    """

    def __init__(self, in_fd: int, out_fd: int) -> None:
        self.in_fd = in_fd
        self.out_fd = out_fd
        self.pty = in_fd >= 0 and is_pty_master(in_fd)
        self._in_socket = _socket_of(in_fd)
        self._out_socket = _socket_of(out_fd)

    def close(self) -> None:
        """Let go of the descriptors."""
        for end in (self._in_socket, self._out_socket):
            if end is not None:
                end.close()
        self._in_socket = self._out_socket = None
        self.in_fd = self.out_fd = -1

    def read(self, size: int) -> bytes | None:
        """At most ``size`` bytes; nothing at the end of the input; None if there is nothing now.

        Raises OSError for what is no such end.
        """
        size = min(size, _PIECE)
        try:
            if self._in_socket is not None:
                return self._in_socket.recv(size, socket.MSG_DONTWAIT)
            return os.read(self.in_fd, size)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b""
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # Nobody has the pty open, or another job of the shell has the terminal. Else it hung up.
            return None if self.pty or in_background(self.in_fd) else b""

    def write(self, data: bytes) -> int:
        """Write the beginning of ``data``: how many bytes. Raises OSError if nobody will read them."""
        try:
            if self._out_socket is not None:
                return self._out_socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            return os.write(self.out_fd, data[:_PIECE])
        except BlockingIOError:
            return 0
        except OSError as error:
            if self.pty and error.errno == errno.EIO:
                return 0
            raise


def _socket_of(fd: int) -> socket.socket | None:
    """A socket can be asked not to wait without a change of the flags that it shares with others."""
    if fd < 0 or not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return None
    return socket.socket(fileno=os.dup(fd))
