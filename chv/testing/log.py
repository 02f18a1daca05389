"""The log of a console: bytes come in on a thread of their own, others wait for text in it."""

from __future__ import annotations

import os
import re
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

# ECMA-48, 5.4 control sequences and 5.6 control strings; the rest are two-character escapes.
_ESCAPE: Final = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[^\[\]])")
_UNFINISHED: Final = re.compile(rb"(?:\x1b(?:\[[0-?]*[ -/]*|\][^\x07\x1b]{0,200}\x1b?)?|\r+)\Z")

_TAIL: Final = 40
"""How many lines of the console an error message shows."""


class Log:
    """Reads a file descriptor until its end and keeps what came.

    ``raw`` is every byte; ``text`` is the same without escape sequences and with bare
    newlines as line ends; what overwrites a line is a line of its own there. Whether the
    descriptor blocks does not matter and is not changed. ``file`` gets the bytes as they come.
    """

    def __init__(self, fd: int, file: Path | None = None) -> None:
        self._file = None if file is None else file.open("wb", buffering=0)
        self._fd = fd
        self._raw = bytearray()
        self._text = bytearray()
        self._held = b""
        self._closed = False
        self._changed = threading.Condition()
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._read_all, name="console-log", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether the other end is gone."""
        return self._closed

    @property
    def raw(self) -> bytes:
        """Every byte that came."""
        with self._changed:
            return bytes(self._raw)

    @property
    def text(self) -> str:
        """All of it, readable."""
        return self.text_from(0)

    def text_from(self, start: int, errors: str = "replace") -> str:
        """The text from a position on; positions are in bytes, :attr:`size` is the last."""
        with self._changed:
            return self._text[start:].decode(errors=errors)

    def raw_from(self, start: int) -> bytes:
        """The bytes as they came from a position on; :attr:`raw_size` is the last."""
        with self._changed:
            return bytes(self._raw[start:])

    @property
    def size(self) -> int:
        """How many bytes of text there are."""
        return len(self._text)

    @property
    def raw_size(self) -> int:
        """How many bytes came."""
        return len(self._raw)

    @property
    def tail(self) -> str:
        """The last lines, for an error message."""
        return "\n".join(self.text_from(max(0, self.size - 10000)).splitlines()[-_TAIL:])

    def wait(self, look: Callable[[], T | None], timeout: float) -> T | None:
        """What ``look()`` returns once that is not None; it is called again when something came.

        None when ``timeout`` seconds are over, or nothing more can come.
        """
        deadline = time.monotonic() + timeout
        while True:
            seen = self.raw_size
            started = time.monotonic()
            found = look()
            if found is not None:
                return found
            # Looking at a long log takes time; not at every byte, so that it stays a small part.
            now = time.monotonic()
            time.sleep(min(4 * (now - started), max(0.0, deadline - now)))
            with self._changed:
                come = self._changed.wait_for(
                    lambda seen=seen: self.raw_size > seen or self._closed,  # type: ignore[misc]
                    max(0.0, deadline - time.monotonic()),
                )
            if not come or (self._closed and self.raw_size == seen):
                return None

    def close(self) -> None:
        """Stop reading. The text stays."""
        if self._stop_write >= 0:
            os.close(self._stop_write)
            self._stop_write = -1
            self._thread.join()
            os.close(self._stop_read)
            if self._file is not None:
                self._file.close()

    def _read_all(self) -> None:
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        poller.register(self._stop_read, select.POLLIN)
        while True:
            if any(fd == self._stop_read for fd, _ in poller.poll()):
                break
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                continue
            except OSError:
                break  # a pty whose other end was closed (EIO), or a connection reset
            if not data:
                break
            if self._file is not None:
                self._file.write(data)
            with self._changed:
                self._add(data)
                self._changed.notify_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _add(self, data: bytes) -> None:
        self._raw += data
        data = self._held + data
        unfinished = _UNFINISHED.search(data, max(0, len(data) - 256))
        self._held = data[unfinished.start() :] if unfinished else b""
        data = data[: len(data) - len(self._held)]
        data = _ESCAPE.sub(b"", data).replace(b"\r\n", b"\n")
        if b"\r" in data:
            # Back to the beginning of the line: nothing there yet, or what comes replaces it.
            before = bytes(self._text[-1:] or b"\n")
            data = re.sub(rb"\n\r+", b"\n", before + data).replace(b"\r", b"\n")[1:]
        self._text += data
