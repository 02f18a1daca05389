"""Guests whose vCPUs come and go, and what they say of it, with the time when it was heard."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

from . import qemu
from .boots import BootFailed, Wanted, process, sockets
from .guest import MARK_PORT

TIMEOUT = 180.0


class Silent(Exception):
    """The guest did not say what was expected of it."""


class Ear:
    """What cpus.c says: (letter, vCPU, CLOCK_MONOTONIC in ns) in the order in which it is heard."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._rest = b""

    def hear(self, letter: str, count: int, timeout: float = TIMEOUT) -> list[tuple[str, int, int]]:
        """Everything up to the ``count``-th line that begins with ``letter``; Silent if it does not come."""
        deadline = time.monotonic() + timeout
        heard: list[tuple[str, int, int]] = []
        while sum(line[0] == letter for line in heard) < count:
            if not select.select([self._line], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise Silent(f"{count} x {letter} did not come in {timeout:.0f} s: {heard}")
            piece = os.read(self._line.fileno(), 65536)
            now = time.monotonic_ns()
            if not piece:
                raise Silent("the VMM ended")
            *lines, self._rest = (self._rest + piece).split(b"\n")
            heard += [(*parse(line), now) for line in lines]
        return heard


def parse(line: bytes) -> tuple[str, int]:
    """A line of the guest: its letter and the vCPU, -1 if it names none."""
    letter, _, number = line.decode("ascii", errors="replace").strip().partition(" ")
    return letter, int(number) if number.isdigit() else -1


class Resizable:
    """A guest that runs with one vCPU; ``resize`` asks for more or fewer."""

    def __init__(self, ear: Ear, ask: Callable[[int, int], None]) -> None:
        self._ear = ear
        self._ask = ask
        self._now = 1

    def grow(self, count: int) -> tuple[int, int]:
        """Ask for ``count`` more: ns until the guest has all as present, and until it has all online.

        The pause that cpus.c makes between the two is not in the second.
        """
        start = time.monotonic_ns()
        self._ask(self._now, self._now + count)
        heard = self._ear.hear("O", count)
        self._now += count
        return growth(heard, start, count)

    def shrink(self, count: int) -> int:
        """Ask for ``count`` back: ns until the guest has removed all."""
        start = time.monotonic_ns()
        self._ask(self._now, self._now - count)
        heard = self._ear.hear("R", count)
        self._now -= count
        return heard[-1][2] - start


def growth(heard: list[tuple[str, int, int]], start: int, count: int) -> tuple[int, int]:
    """From what was heard: ns to the last P, and from there on without the pauses before each B."""
    paused = 0
    last = start
    present = [at for letter, _, at in heard if letter == "P"]
    if len(present) != count:
        raise Silent(f"{len(present)} vCPUs became present, not {count}: {heard}")
    for letter, _, at in heard:
        if letter == "B":
            paused += at - last
        last = at
    return present[-1] - start, last - start - paused


@contextlib.contextmanager
def chv(wanted: Wanted, maximum: int) -> Iterator[Resizable]:
    """A guest of chv, in a process of its own."""
    with sockets() as (mine, theirs):
        command = wanted.chv(theirs.fileno(), maximum)
        with process(command, theirs) as (vmm, _):

            def ask(_: int, desired: int) -> None:
                assert vmm.stdin is not None
                vmm.stdin.write(f"{desired}\n".encode())
                vmm.stdin.flush()

            yield Resizable(ready(mine, vmm), ask)


@contextlib.contextmanager
def q35(wanted: Wanted, maximum: int) -> Iterator[Resizable]:
    """A guest of QEMU's q35."""
    with sockets() as (mine, theirs), sockets() as (monitor, its_monitor):
        command = wanted.qemu("q35", f"1,maxcpus={maximum},sockets={maximum},cores=1,threads=1")
        command += [*qemu.monitor(its_monitor.fileno()), *qemu.debug_console(theirs.fileno(), MARK_PORT)]
        monitor.sendall(b'{"execute": "qmp_capabilities"}\n')
        with process(command, theirs, its_monitor) as (vmm, _):
            yield Resizable(
                ready(mine, vmm), lambda now, desired: monitor.sendall(qemu_request(now, desired))
            )


def qemu_request(now: int, desired: int) -> bytes:
    """The monitor's commands that add or remove vCPUs, all in one piece."""
    commands: list[dict[str, Any]] = []
    for cpu in range(now, desired):
        place = {"socket-id": cpu, "core-id": 0, "thread-id": 0}
        arguments = {"driver": "host-x86_64-cpu", "id": f"cpu{cpu}", **place}
        commands.append({"execute": "device_add", "arguments": arguments})
    for cpu in reversed(range(desired, now)):
        commands.append({"execute": "device_del", "arguments": {"id": f"cpu{cpu}"}})
    return b"".join(json.dumps(command).encode() + b"\n" for command in commands)


def ready(line: socket.socket, vmm: subprocess.Popen[bytes]) -> Ear:
    """The guest's voice, once its /init runs; BootFailed if it does not."""
    ear = Ear(line)
    try:
        ear.hear("I", 1)
    except Silent as silent:
        raise BootFailed(f"{silent} (process {vmm.pid})") from silent
    return ear
