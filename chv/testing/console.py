"""A guest's console: wait for text, type, run commands and get exactly their output."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import select
import shlex
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, Self

from .errors import CommandFailed, ConsoleClosed, ConsoleTimeout, LoginFailed
from .log import Log

PROMPT: Final = r"(?m:^)[^\n]*[#$] \Z"
"""Where a shell waits: a last line that ends with ``# `` or ``$ ``."""

# A shell function that runs $2 and frames what it printed: a begin mark, the output, an end mark with
# status and checksum. The output goes to a file first because the kernel writes to the same line and
# may do so in the middle of a word: the checksum tells, and then the file is sent again.
# The marks are put together by printf, so that the echo of what is typed never looks like one.
# `command` keeps a syntax error in $2 from ending the whole line.
_PREPARE: Final = (
    "for _chv_dir in /dev/shm /run /tmp; do [ -w $_chv_dir ] && break; done; "
    "_chv_show() { printf '\\n%s:%s\\n' \"chv-$1\" begin; cat $_chv_dir/.chv-$$; "
    'printf \'\\n%s:%s:%s:%s:\\n\' "chv-$1" end $_chv_status "$(md5sum <$_chv_dir/.chv-$$)"; }; '
    '_chv_run() { command eval "$2" </dev/null >$_chv_dir/.chv-$$ 2>&1; _chv_status=$?; _chv_show $1; }'
)
_NOT_PREPARED: Final = re.compile(
    rb"(?:\A|[\r\n]|[#$] )[\w./-]+: (?:(?:line )?\d+: )?_chv_(?:run|show): (?:command )?not found"
)
_KERNEL_LINE: Final = re.compile(rb"\[ *\d+\.\d{6}\](?:\[ *[TC]\d+\])? [^\n]*\n")
_PROMPT_AT_END: Final = re.compile(rb"[#$] (?:\x1b\[6n)?\Z")

_MARK_AREA: Final = 4000
"""How many bytes before the end the end mark is looked for, kernel messages behind it included."""

_PIECE: Final = 400
"""How many characters are typed at once: line editors of small shells take about 1000."""

_QUIET: Final = 3.0
"""After how many seconds without a word a prompt means that the end mark got lost."""

_TRIES: Final = 10


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a command printed (standard output and error together) and its exit status."""

    output: str
    status: int

    def check(self, command: str = "the command") -> Self:
        """Raise :class:`CommandFailed` unless the status is 0."""
        if self.status:
            raise CommandFailed(command, self.status, self.output)
        return self


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came back for a call; without a result it was damaged, or the shell lacks the functions."""

    result: CommandResult | None = None
    unprepared: bool = False


class Console:
    """The host's end of a guest's serial line: a socket, a pty, or two descriptors.

    All that comes is read at once and kept, in :attr:`log`. Waiting goes forward: each
    :meth:`wait_for` starts looking behind what the last one found. Timeouts are in seconds;
    where one passes, :class:`ConsoleTimeout` shows the console's last lines. The descriptors
    stay the caller's: close them after the console. ``log_file`` is written while the guest runs,
    so it is there whatever happens to this process.
    """

    def __init__(
        self, read: int | _HasFileno, write: int | _HasFileno | None = None, *, log_file: Path | None = None
    ) -> None:
        self._read = read  # kept, so that a socket is not closed by the garbage collector meanwhile
        self._write = read if write is None else write
        self._log = Log(_fileno(self._read), log_file)
        self._position = 0
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading. The log stays."""
        self._log.close()

    @property
    def log(self) -> str:
        """All that the guest printed, without escape sequences, lines ending in a bare newline."""
        return self._log.text

    @property
    def raw_log(self) -> bytes:
        """All that the guest printed, byte for byte."""
        return self._log.raw

    @property
    def tail(self) -> str:
        """The last lines of the log."""
        return self._log.tail

    def send(self, text: str | bytes) -> None:
        """Type text as it is; end it with a newline to enter it."""
        data = text.encode() if isinstance(text, str) else text
        fd = _fileno(self._write)
        while data:
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:
                select.select([], [fd], [])
            except OSError as error:
                raise ConsoleClosed(f"cannot write to the console: {error.strerror}\n{self.tail}") from None

    def wait_for(self, pattern: str | re.Pattern[str], timeout: float = 60.0) -> re.Match[str]:
        """The next match of a regular expression in what the guest prints.

        Starts where the last wait ended; ``^`` and ``$`` match at lines if the pattern is a string.
        """
        compiled = re.compile(pattern, re.MULTILINE) if isinstance(pattern, str) else pattern

        def look() -> re.Match[str] | None:
            # Bytes that are no text become characters that turn back into the same bytes.
            return compiled.search(self._log.text_from(self._position, "surrogateescape"))

        with self._lock:
            found = self._log.wait(look, timeout)
            if found is None:
                raise self._nothing(f"{compiled.pattern!r}", timeout)
            self._position += len(found.string[: found.end()].encode(errors="surrogateescape"))
            return found

    def wait_for_line(self, pattern: str, timeout: float = 60.0) -> str:
        """The next complete line in which a regular expression matches."""
        return self.wait_for(rf"^(?=[^\n]*?(?:{pattern}))[^\n]*\n", timeout)[0].rstrip("\n")

    def wait_for_prompt(self, timeout: float = 60.0, prompt: str = PROMPT) -> None:
        """Until a shell waits for a command.

        A prompt that a kernel message has pushed up is not seen: when nothing more comes
        an empty line asks for another one.
        """
        with self._lock:
            deadline = time.monotonic() + timeout
            patience = 1.0
            while True:
                left = deadline - time.monotonic()
                seen = self._log.raw_size
                try:
                    self.wait_for(prompt, max(0.0, min(patience, left)))
                    return
                except ConsoleTimeout:
                    if left <= patience:
                        raise self._nothing(f"a prompt ({prompt!r})", timeout) from None
                if self._log.raw_size == seen and self._log.text_from(self._position).strip():
                    self.send("\n")
                    patience = min(2 * patience, 10.0)

    def login(self, user: str, password: str | None = None, timeout: float = 60.0) -> None:
        """Answer ``login:`` and ``Password:``, then wait for the shell's prompt."""
        deadline = time.monotonic() + timeout
        self.wait_for(r"login: ?\Z", timeout)
        self.send(f"{user}\n")
        if password is not None:
            self.wait_for(r"(?i)password: ?\Z", max(0.0, deadline - time.monotonic()))
            self.send(f"{password}\n")
        answer = self.wait_for(rf"(?i)(login incorrect)|{PROMPT}", max(0.0, deadline - time.monotonic()))
        if answer[1]:
            raise LoginFailed(f"the guest refuses user {user!r}: {answer[1]}")

    def run(self, command: str, timeout: float = 60.0) -> CommandResult:
        """Run a command in the shell that waits on the console; return its output and status.

        It runs in that very shell, so ``cd`` and variables stay, with nothing to read. What it prints
        comes back byte for byte, whatever else appears on the console. The guest needs a POSIX shell,
        ``cat``, ``md5sum`` and a place to write (/dev/shm, /run or /tmp).
        """
        with self._lock:
            deadline = time.monotonic() + timeout
            first = f"_chv_run ID {self._quoted(command, deadline, timeout)}"
            call = first
            for _ in range(_TRIES):
                name = secrets.token_hex(4)
                answer = self._call(call, name, deadline)
                self._go_behind(f"chv-{name}:end:")
                if answer is None:
                    # It may still run, and would get in the way of the next command.
                    self.send(b"\x03")
                    raise self._nothing(f"the end of {command!r}", timeout)
                if answer.result is not None:
                    return answer.result
                if answer.unprepared:
                    self.send(f"{_PREPARE}\n")
                    call = first
                else:
                    call = "_chv_show ID"
            raise ConsoleTimeout(f"the output of {command!r} came damaged {_TRIES} times\n{self.tail}")

    def _go_behind(self, mark: str) -> None:
        """Go on behind the line that has a mark; behind everything if a kernel message tore it apart."""
        text = self._log.text_from(self._position, "surrogateescape")
        before, found, after = text.partition(mark)
        line = after.partition("\n")
        passed = before + found + line[0] + line[1] if found else text
        self._position += len(passed.encode(errors="surrogateescape"))

    def _call(self, call: str, name: str, deadline: float) -> _Answer | None:
        """Type one call of a shell function: its result, or what to do next; None after the deadline."""
        start = self._log.raw_size
        self.send(f"{call.replace(' ID', f' {name}', 1)}\n")
        mark = f"chv-{name}".encode()

        def look() -> _Answer | None:
            return _answer(self._log.raw_from(start), mark)

        while True:
            left = deadline - time.monotonic()
            answer = self._log.wait(look, min(_QUIET, left))
            if answer is not None:
                return answer
            if left <= _QUIET or self._log.closed:
                return None
            if _PROMPT_AT_END.search(_KERNEL_LINE.sub(b"", self._log.raw_from(start))):
                return _Answer()

    def _quoted(self, command: str, deadline: float, timeout: float) -> str:
        """A shell word that stands for the command; a long one is typed into a variable first."""
        if len(command) <= _PIECE and command.isascii() and command.isprintable():
            return shlex.quote(command)
        # Octal for printf: no byte of it means anything to a terminal or line editor.
        encoded = "".join(
            chr(byte) if chr(byte).isalnum() and byte < 0x80 else f"\\0{byte:03o}"
            for byte in command.encode()
        )
        name = secrets.token_hex(4)
        for number, start in enumerate(range(0, len(encoded), _PIECE)):
            before = '"$_chv_text"' if number else ""
            piece = encoded[start : start + _PIECE]
            self.send(f"_chv_text={before}'{piece}'; printf '%s:%s.\\n' chv-{name} {number}\n")
            try:
                self.wait_for(rf"chv-{name}:{number}\.", max(0.0, deadline - time.monotonic()))
            except ConsoleTimeout:
                raise self._nothing(f"the shell to take {command[:60]!r}...", timeout) from None
        return '"$(printf %b "$_chv_text")"'

    def _nothing(self, what: str, timeout: float) -> ConsoleTimeout | ConsoleClosed:
        if self._log.closed:
            return ConsoleClosed(
                f"the console was closed while waiting for {what}; its last lines:\n{self.tail}"
            )
        return ConsoleTimeout(f"waited {timeout:g} s for {what}; the console's last lines:\n{self.tail}")


def _answer(raw: bytes, mark: bytes) -> _Answer | None:
    """What the guest's answer to a call says, or None if it is not complete."""
    begin_mark = re.compile(rb"\n%b:begin\r*\n" % mark)
    end_mark = re.compile(rb"\n%b:end:(\d+):([0-9a-f]{32}) *-:\r*\n" % mark)
    if not end_mark.search(raw[-_MARK_AREA:]) and not end_mark.search(
        _KERNEL_LINE.sub(b"", raw[-_MARK_AREA:])
    ):
        begun = begin_mark.search(raw) is not None
        missing = _NOT_PREPARED.search(raw) or _NOT_PREPARED.search(_KERNEL_LINE.sub(b"", raw))
        return _Answer(unprepared=True) if missing and not begun else None
    # Kernel messages are taken out only if that makes it right: a command may print such lines too.
    for text in (raw, _KERNEL_LINE.sub(b"", raw)):
        begin, end = begin_mark.search(text), end_mark.search(text)
        if begin is not None and end is not None:
            lines = text[begin.end() : end.start()] + b"\n"
            # One terminal on the way makes \r\n of a newline, the next one \r\r\n.
            for output in (lines.replace(b"\r\n", b"\n"), re.sub(rb"\r+\n", b"\n", lines)):
                if hashlib.md5(output[:-1], usedforsecurity=False).hexdigest() == end[2].decode():
                    return _Answer(CommandResult(output[:-1].decode(errors="replace"), int(end[1])))
    return _Answer()


def _fileno(end: int | _HasFileno) -> int:
    return end if isinstance(end, int) else end.fileno()
