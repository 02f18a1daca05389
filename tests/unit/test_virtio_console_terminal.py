"""A console on the user's terminal: he gets it back as it was, however the process ends."""

from __future__ import annotations

import os
import select
import signal
import termios

import pytest

from .test_backend import finish, is_raw, start, terminal, wait_ready

__all__ = ["terminal"]  # a fixture

PRELUDE = """
import os, signal, sys, time
from chv.config import ConsoleConfig, ConsoleMode
from chv.virtio.console import Console
from tests.unit.virtio_machine import machine
from tests.unit.test_virtio_console import Guest
console = Console.open(ConsoleConfig(mode=ConsoleMode.TTY), "console", "__console")
os.write(2, b"ready")
"""


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("console.close()", 0),
        ("", 0),
        ("raise RuntimeError('broken')", 1),
        ("with machine(console): raise RuntimeError('broken')", 1),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", -signal.SIGTERM),
        ("os.kill(os.getpid(), signal.SIGHUP); time.sleep(9)", -signal.SIGHUP),
        ("os.abort()", -signal.SIGABRT),
    ],
)
def test_the_terminal_comes_back(terminal: tuple[int, int], script: str, status: int) -> None:
    _, slave = terminal
    before = termios.tcgetattr(slave)
    process = start(f"time.sleep(0.3)\n{script}", slave, PRELUDE)
    wait_ready(process)
    assert is_raw(slave)
    assert finish(process) == status
    assert termios.tcgetattr(slave) == before


def test_typing_reaches_the_guest_and_its_output_the_terminal(terminal: tuple[int, int]) -> None:
    master, slave = terminal
    script = """
with machine(console) as m:
    guest = Guest(m)
    guest.say(b"got " + guest.hear(8).hex().encode())
console.close()
"""
    process = start(script, slave, PRELUDE)
    wait_ready(process)
    os.write(master, b"a\x03\x1a\x04\x11\x13\rq")  # what a terminal would act on, in raw mode
    printed = b""
    while not printed.endswith(b"71"):
        assert select.select([master], [], [], 10)[0], printed
        printed += os.read(master, 100)
    assert printed == b"got 61031a0411130d71"
    assert finish(process) == 0


def test_a_process_in_the_background_is_not_stopped(terminal: tuple[int, int]) -> None:
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
    script = """
with machine(console) as m:
    Guest(m).say(b"still here")
    time.sleep(0.4)
    assert console.line.pending_input == 0
console.close()
"""
    process = start(script, slave, prelude + PRELUDE)
    wait_ready(process)
    assert termios.tcgetattr(slave) == before
    os.write(master, b"for the shell\n")
    assert finish(process) == 0
    assert termios.tcgetattr(slave) == before
