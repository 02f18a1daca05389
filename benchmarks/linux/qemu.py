"""QEMU's command lines and its monitor, for the side of the comparison that is not chv."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

PROGRAM = "qemu-system-x86_64"

MACHINES = {
    # Without what a Linux guest does not need there. An RTC it does need: it waits for one that is missing.
    "microvm": "microvm,x-option-roms=off,pit=off,pic=off,rtc=on",
    "q35": "q35",
}

START = b'{"execute": "qmp_capabilities"}\n{"execute": "cont"}\n'
"""Written to the monitor before QEMU starts: with -S it begins as soon as it is ready, and says when."""


def base(machine: str, smp: str, memory: str) -> list[str]:
    """QEMU with KVM and no device beside the machine's own."""
    return [
        *(PROGRAM, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-machine", MACHINES[machine], "-accel", "kvm", "-cpu", "host", "-smp", smp, "-m", memory),
    ]


def monitor(fd: int) -> list[str]:
    """Options for a monitor on an open socket."""
    return ["-chardev", f"socket,id=monitor,fd={fd}", "-mon", "chardev=monitor,mode=control"]


def debug_console(fd: int, port: int) -> list[str]:
    """Options for a debug console and a serial port that send to the same open socket; see mark.h."""
    device = ["-device", f"isa-debugcon,iobase={port:#x},chardev=mark", "-serial", "chardev:mark"]
    return ["-chardev", f"socket,id=mark,mux=on,fd={fd}", *device]


def messages(data: bytes) -> Iterator[dict[str, Any]]:
    """What a monitor said: one JSON object a line, the last one whole or left out."""
    for line in data.split(b"\n")[:-1]:
        if line.strip():
            yield json.loads(line)


def event_ns(data: bytes, name: str) -> int | None:
    """When an event happened first, in ns of CLOCK_REALTIME; None if the monitor did not tell of it."""
    for message in messages(data):
        if message.get("event") == name:
            stamp = message["timestamp"]
            return int(stamp["seconds"]) * 10**9 + int(stamp["microseconds"]) * 1000
    return None


def complaint(stderr: bytes) -> str:
    """What QEMU said before it ended, without its usual warnings."""
    lines: Sequence[str] = stderr.decode(errors="replace").splitlines()
    return "; ".join(line for line in lines if "warning:" not in line)[-300:]
