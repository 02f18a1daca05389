"""The processes that startup and contention time: found, started, asked, ended; what they hold."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

DEADLINE = 60.0  # seconds for a process to do what it was started for
STEP = 0.0005  # seconds between two looks

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) [rwxsp-]{4} ")

CHV = (sys.executable, "-m", "chv")


class Absent(RuntimeError):
    """This contestant cannot answer here; the message says why."""


def qemu(machine: str) -> list[str]:
    """The command for QEMU with KVM and no devices; machine is microvm or q35. Raises :class:`Absent`."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise Absent("qemu-system-x86_64 is not installed")
    bare = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-accel", "kvm"]
    return [program, "-M", machine, *bare]


@contextlib.contextmanager
def started(command: Sequence[str], stdout: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended at the end, whatever happens."""
    process: subprocess.Popen[bytes] = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=None if command[0] == sys.executable else subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def until(done: Callable[[], bool], what: str, process: subprocess.Popen[bytes]) -> None:
    """Look until it is so; :class:`Absent` if the process ends or takes too long."""
    deadline = time.monotonic() + DEADLINE
    while not done():
        if process.poll() is not None:
            raise Absent(f"{_program(process)} ended with status {process.returncode} before {what}")
        if time.monotonic() > deadline:
            raise Absent(f"{_program(process)}: {what} did not come in {DEADLINE:.0f} s")
        time.sleep(STEP)


def _program(process: subprocess.Popen[bytes]) -> str:
    return Path(str(process.args[0] if isinstance(process.args, list) else process.args)).name


def connection(path: str, process: subprocess.Popen[bytes]) -> socket.socket:
    """A connection to the Unix socket at path, as soon as somebody listens there."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(DEADLINE)

    def connected() -> bool:
        try:
            client.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    try:
        until(connected, "a socket to connect to", process)
    except BaseException:
        client.close()
        raise
    return client


def ask(client: socket.socket, verb: str, endpoint: str, body: object = None) -> int:
    """One request to the REST API on an open connection; the status of its answer."""
    line = http.client.HTTPConnection("localhost")
    line.sock = client
    try:
        line.request(verb, f"/api/v1/{endpoint}", None if body is None else json.dumps(body))
        answer = line.getresponse()
        answer.read()
    except http.client.HTTPException as error:
        raise Absent(f"the API: {error}") from error
    return answer.status


def vmm_memory(pid: int, guest_size: int) -> int:
    """Resident bytes of all mappings smaller than the guest's RAM, as Cloud Hypervisor's test counts them."""
    total, counted = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if match := _MAPPING.match(line):
            counted = int(match[2], 16) - int(match[1], 16) < guest_size
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def held(pid: int | str = "self") -> dict[str, int]:
    """How many descriptors and threads a process has, and its resident bytes."""
    folder = Path(f"/proc/{pid}")
    resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "fds": len(list((folder / "fd").iterdir())),
        "threads": len(list((folder / "task").iterdir())),
        "rss": resident,
    }
