"""Passing a stream on while it comes in, up to a mark that says where it ends."""

from __future__ import annotations

import os


class MarkedStream:
    """Copies bytes to a file descriptor until the mark, which it keeps to itself."""

    def __init__(self, fd: int, mark: bytes) -> None:
        self._fd = fd
        self._mark = mark
        self._held = b""
        self.ended = False

    def pass_on(self, data: bytes) -> None:
        """Write what is known to lie before the mark; hold back what may be its beginning."""
        if self.ended:
            return
        data = self._held + data
        before, mark, _ = data.partition(self._mark)
        if mark:
            self.ended = True
            held = 0
        else:
            held = next(
                (
                    n
                    for n in range(min(len(data), len(self._mark)), 0, -1)
                    if self._mark.startswith(data[-n:])
                ),
                0,
            )
            before = data[: len(data) - held]
        self._held = data[len(data) - held :]
        write_all(self._fd, before)


def write_all(fd: int, data: bytes) -> None:
    """Write to a file descriptor until everything is out."""
    while data:
        data = data[os.write(fd, data) :]
