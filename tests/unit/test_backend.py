"""What the configuration's serial modes open, and that the user's terminal comes back from raw mode."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chv.devices.backend import Backend, Fds, File, Null, Pty, Socket, Tty, open_backend
from chv.devices.serial import SerialPort
from chv.errors import ConfigError

from .uart import receive_all


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """A pty's master and slave, as a user's terminal."""
    master, slave = os.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def is_raw(fd: int) -> bool:
    lflag: int = termios.tcgetattr(fd)[3]
    return not lflag & (termios.ICANON | termios.ECHO | termios.ISIG)


# -- the modes -------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "kind"), [("Null", Null), ("null", Null), ("Pty", Pty), ("Tty", Tty)])
def test_modes_without_a_path(mode: str, kind: type[Backend]) -> None:
    backend = open_backend(mode, None, None)
    assert type(backend) is kind
    backend.close()
    backend.close()


@pytest.mark.parametrize(
    ("mode", "file", "path", "message"),
    [
        ("Off", None, None, "serial.mode: 'Off'; allowed are"),
        ("Telepathy", None, None, "serial.mode: 'Telepathy'; allowed are"),
        ("File", None, None, "serial.file: missing; mode File needs a path"),
        ("File", "", None, "serial.file: missing"),
        ("File", "/nonexistent/x", None, "serial.file: cannot write '/nonexistent/x': No such file"),
        ("File", "/", None, "serial.file: cannot write '/': Is a directory"),
        ("File", "a\0b", None, "serial.file: 'a\\x00b' is not a path"),
        ("Socket", None, None, "serial.socket: missing; mode Socket needs a path"),
        ("Socket", None, "/nonexistent/x", "serial.socket: cannot listen on '/nonexistent/x': No such file"),
        ("Socket", None, "/tmp/" + "x" * 200, "serial.socket: cannot listen on .*too long"),
        ("Socket", None, "a\0b", "serial.socket: cannot listen on 'a\\x00b': "),
        ("Socket", None, "/dev/null", "serial.socket: '/dev/null' exists and is not a socket"),
    ],
)
def test_what_cannot_be_opened(mode: str, file: str | None, path: str | None, message: str) -> None:
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(ConfigError, match="^" + pattern):
        open_backend(mode, file, path)


def test_a_file_is_emptied_and_private(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old")
    backend = open_backend("File", str(path), None)
    os.write(backend.out_fd, b"new")
    assert backend.in_fd == -1
    backend.close()
    backend.close()
    assert path.read_text() == "new"
    other = tmp_path / "other"
    File(str(other)).close()
    assert stat.S_IMODE(other.stat().st_mode) == 0o600


def test_a_fifo_that_nobody_reads(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="a pipe needs somebody who reads it"):
        File(str(path))


def test_descriptors_of_the_user_stay_his() -> None:
    near, far = socket.socketpair()
    backend = Fds(near, near.fileno())
    backend.close()
    backend.close()
    near.send(b"x")
    assert far.recv(1) == b"x"
    near.close()
    far.close()


def test_descriptors_that_are_closed() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="no open file descriptor"):
        Fds(0, 9999)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_pty_is_raw_and_notices_who_has_it_open() -> None:
    backend = Pty()
    assert backend.pty_path is not None
    poll = select.poll()
    poll.register(backend.in_fd, 0)
    assert poll.poll(0)[0][1] & select.POLLHUP
    slave = os.open(backend.pty_path, os.O_RDWR | os.O_NOCTTY)
    assert not poll.poll(0)
    assert is_raw(slave)
    assert not termios.tcgetattr(slave)[1] & termios.OPOST
    os.close(slave)
    slave = os.open(backend.pty_path, os.O_RDWR | os.O_NOCTTY)
    assert is_raw(slave)  # it stays so for the next one
    os.close(slave)
    backend.close()


# -- sockets -----------------------------------------------------------------------------------


def test_a_socket_is_private_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "serial"
    backend = Socket(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    backend.close()
    backend.close()
    assert not path.exists()


def test_a_stale_socket_is_replaced_and_a_live_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "serial"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    backend = Socket(str(path))
    clients = []
    for _ in range(4):  # more than its queue holds
        with pytest.raises(ConfigError, match="in use by another process"):
            Socket(str(path))
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        client.connect_ex(str(path))
        clients.append(client)
    for client in clients:
        client.close()
    backend.close()


def test_a_socket_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "serial"
    backend = Socket(str(path))
    path.unlink()
    path.write_text("not ours")
    backend.close()
    assert path.read_text() == "not ours"


# -- the user's terminal -------------------------------------------------------------------------

# Runs with a terminal as its standard input and output and as its controlling terminal.
PRELUDE = """
import os, signal, sys, time, threading
from chv.devices.backend import Tty
from chv.devices.serial import SerialPort
port = SerialPort(-1, Tty())
port.start()
os.write(2, b"ready")
"""


def start(script: str, slave: int, prelude: str = PRELUDE) -> subprocess.Popen[bytes]:
    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    return subprocess.Popen(
        [sys.executable, "-c", prelude + script],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        preexec_fn=take_terminal,
        cwd=Path(__file__).parents[2],
    )


def wait_ready(process: subprocess.Popen[bytes]) -> None:
    assert process.stderr is not None
    assert process.stderr.read(5) == b"ready"


def finish(process: subprocess.Popen[bytes]) -> int:
    with process:
        try:
            return process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("port.close()", 0),
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise RuntimeError('broken')", 1),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", -signal.SIGTERM),
        ("os.kill(os.getpid(), signal.SIGHUP); time.sleep(9)", -signal.SIGHUP),
        ("os.abort()", -signal.SIGABRT),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
    ],
)
def test_the_terminal_comes_back(terminal: tuple[int, int], script: str, status: int) -> None:
    _, slave = terminal
    before = termios.tcgetattr(slave)
    process = start(f"time.sleep(0.3)\n{script}", slave)
    wait_ready(process)
    assert is_raw(slave)
    assert finish(process) == status
    assert termios.tcgetattr(slave) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGINT])
def test_the_terminal_comes_back_after_a_signal_to_a_busy_process(
    terminal: tuple[int, int], number: signal.Signals
) -> None:
    """In the middle of Python code that never ends."""
    _, slave = terminal
    before = termios.tcgetattr(slave)
    process = start("while True: pass", slave)
    wait_ready(process)
    assert is_raw(slave)
    process.send_signal(number)
    assert finish(process) in (-number, 1)
    assert termios.tcgetattr(slave) == before


def test_a_handler_of_the_program_is_left_alone(terminal: tuple[int, int]) -> None:
    _, slave = terminal
    before = termios.tcgetattr(slave)
    prelude = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n" + PRELUDE
    process = start("time.sleep(9)", slave, prelude)
    wait_ready(process)
    process.terminate()
    assert finish(process) == 7
    assert termios.tcgetattr(slave) == before


def test_after_close_signals_have_their_default_action(terminal: tuple[int, int]) -> None:
    """The program's own later settings of the terminal are not undone."""
    _, slave = terminal
    script = "port.close()\nimport tty\ntty.setcbreak(0)\nos.write(2, b'x')\ntime.sleep(9)"
    process = start(script, slave)
    wait_ready(process)
    assert process.stderr is not None
    assert process.stderr.read(1) == b"x"
    process.terminate()
    assert finish(process) == -signal.SIGTERM
    assert not termios.tcgetattr(slave)[3] & termios.ICANON


def test_a_child_does_not_restore_its_parents_terminal(terminal: tuple[int, int]) -> None:
    _, slave = terminal
    script = """
import warnings
warnings.simplefilter("ignore")  # Python 3.12 and later warn of a fork beside threads
if os.fork() == 0:
    sys.exit()  # runs what atexit has
os.wait()
os.write(2, b"x")
time.sleep(0.3)
"""
    process = start(script, slave)
    wait_ready(process)
    assert process.stderr is not None
    assert process.stderr.read(1) == b"x"
    assert is_raw(slave)
    assert finish(process) == 0
    assert not is_raw(slave)


def test_raw_mode_keeps_output_processing(terminal: tuple[int, int]) -> None:
    """So that a message of chv's own starts at the left margin."""
    _, slave = terminal
    before: list[Any] = termios.tcgetattr(slave)
    process = start("time.sleep(0.3)", slave)
    wait_ready(process)
    assert termios.tcgetattr(slave)[1] == before[1]
    finish(process)


def test_typing_reaches_the_guest_and_its_output_the_terminal(terminal: tuple[int, int]) -> None:
    master, slave = terminal
    script = """
data = bytearray()
while not data.endswith(b"q"):
    if port.device.read(5, 1) & 1:
        data.append(port.device.read(0, 1))
for byte in b"got " + data.hex().encode():
    port.device.write(0, 1, byte)
port.close()
"""
    process = start(script, slave)
    wait_ready(process)
    os.write(master, b"a\x03\x1a\x04\x11\x13\rq")  # what a terminal would act on, in raw mode
    printed = b""
    while not printed.endswith(b"71"):
        assert select.select([master], [], [], 10)[0], printed
        printed += os.read(master, 100)
    assert printed == b"got 61031a0411130d71"
    assert finish(process) == 0


def test_a_process_in_the_background_leaves_the_terminal_alone(terminal: tuple[int, int]) -> None:
    """It is not stopped either (SIGTTIN, SIGTTOU) when somebody types, or when it ends."""
    master, slave = terminal
    before = termios.tcgetattr(slave)
    prelude = """
import os, sys
child = os.fork()
if child:
    os.setpgid(child, child)
    status = os.waitpid(child, os.WUNTRACED)[1]
    sys.exit(99 if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status))
os.setpgid(0, 0)
"""
    process = start("time.sleep(0.5)\nport.close()", slave, prelude + PRELUDE)
    wait_ready(process)
    assert termios.tcgetattr(slave) == before
    os.write(master, b"for the shell\n")
    assert finish(process) == 0
    assert termios.tcgetattr(slave) == before


def test_only_one_vm_has_the_terminal() -> None:
    null = os.open("/dev/null", os.O_RDWR)
    first = Tty(null, null)
    with pytest.raises(ConfigError, match=r"serial\.mode: Tty is in use"):
        Tty(null, null)
    first.close()
    Tty(null, null).close()
    os.close(null)


def test_standard_descriptors_that_are_no_terminal(tmp_path: Path) -> None:
    """A pipe in, a file out: flags are shared with others and stay, and the file goes on where it was."""
    reader, writer = os.pipe()
    log = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    os.write(log, b"before ")
    port = SerialPort(-1, Tty(reader, log))
    port.start()
    os.write(writer, b"input")
    limit = time.monotonic() + 5
    got = b""
    while got != b"input":
        assert time.monotonic() < limit
        got += receive_all(port.device)
    for byte in b"output":
        port.device.write(0, 1, byte)
    port.close()
    os.write(log, b" after")
    assert os.pread(log, 100, 0) == b"before output after"
    assert not fcntl.fcntl(reader, fcntl.F_GETFL) & os.O_NONBLOCK
    for fd in (reader, writer, log):
        os.close(fd)


def test_closed_standard_descriptors() -> None:
    backend = Tty(9998, 9999)
    assert (backend.in_fd, backend.out_fd) == (-1, -1)
    backend.close()
