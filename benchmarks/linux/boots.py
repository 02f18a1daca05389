"""One boot of one contestant, seen from outside: a process that starts, and a byte that its guest writes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.guests.cache import CHECKOUT

from . import kvm_stats, qemu
from .guest import BEGIN, END, MARK_PORT
from .kernel_log import init_us, lines

TIMEOUT = 300.0


class BootFailed(Exception):
    """The guest's /init did not run, and what the VMM said."""


@dataclass(frozen=True)
class Wanted:
    """What to boot."""

    kernel: str
    initramfs: str
    cmdline: str
    vcpus: int = 1
    memory_mib: int = 512

    def chv(self, mark_fd: int, max_vcpus: int | None = None, **more: Any) -> list[str]:
        """The command of a chv that boots this, with more of VmConfig's parts; see chv_boot.py."""
        parts = {
            "kernel": self.kernel, "initramfs": self.initramfs, "cmdline": self.cmdline,
            "cpus": {"boot_vcpus": self.vcpus, "max_vcpus": max_vcpus or self.vcpus},
            "memory": {"size": self.memory_mib << 20}, "mark_fd": mark_fd, **more,
        }  # fmt: skip
        return [sys.executable, "-m", "benchmarks.linux.chv_boot", json.dumps(parts)]

    def qemu(self, machine: str, smp: str = "") -> list[str]:
        """The command of a QEMU that boots this, with no device beside the machine's own."""
        return [
            *qemu.base(machine, smp or str(self.vcpus), f"{self.memory_mib}M"),
            *("-kernel", self.kernel, "-initrd", self.initramfs, "-append", self.cmdline),
        ]


@dataclass
class Boot:
    """Moments of one boot, in ns of CLOCK_MONOTONIC, and what else is known of it."""

    start: int = 0
    first_run: int = 0
    init: int = 0
    log: str = ""
    kvm: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    exits: dict[str, Any] = field(default_factory=dict)

    @property
    def before_clock(self) -> int | None:
        """From the first KVM_RUN until the guest's own clock began, in ns; None if the log has no /init."""
        us = init_us(lines(self.log))
        return None if us is None else self.init - us * 1000 - self.first_run


def chv(wanted: Wanted) -> Boot:
    """Boot with chv, in a new Python."""
    with sockets() as (mine, theirs), process(wanted.chv(theirs.fileno()), theirs) as (vmm, boot):
        watch(mine, vmm, boot)
        output, errors = vmm.communicate(timeout=60)
    if vmm.returncode:
        raise BootFailed(errors.decode(errors="replace")[-500:])
    seen = json.loads(output)
    spans = {step: (start, end) for step, start, end in seen["spans"]}
    boot.first_run = spans["start"][0]
    boot.host = host_steps(boot.start, seen, spans)
    boot.exits = {name: seen[name] for name in ("reasons", "devices", "device_ns")}
    return boot


def host_steps(start: int, seen: dict[str, Any], spans: dict[str, tuple[int, int]]) -> dict[str, int]:
    """What the host did before the first KVM_RUN, in ns: disjoint parts, in order of time."""
    took = {step: end - begin for step, (begin, end) in spans.items()}
    acpi = took["acpi"]
    parts = {
        "interpreter": seen["started"] - start,
        "imports": seen["imported"] - seen["started"],
        "configuration": seen["configured"] - seen["imported"],
        "memory": took["memory"],
        "kernel": took["unpack"],
        "kvm": took["kvm"],
        "acpi": acpi,
        "load": took["load"] - acpi,
    }
    parts["other"] = spans["start"][0] - start - sum(parts.values())
    return parts


def qemu_boot(wanted: Wanted, machine: str) -> Boot:
    """Boot with one of QEMU's machines."""
    with sockets() as (mine, theirs), sockets() as (monitor, its_monitor):
        command = [*wanted.qemu(machine), "-S", *qemu.monitor(its_monitor.fileno())]
        command += qemu.debug_console(theirs.fileno(), MARK_PORT)
        monitor.sendall(qemu.START)
        realtime = time.time_ns() - time.monotonic_ns()
        with process(command, theirs, its_monitor) as (vmm, boot):
            watch(mine, vmm, boot)
            monitor.setblocking(False)
            said = monitor.recv(1 << 20)
            vmm.kill()
            vmm.communicate()
    resumed = qemu.event_ns(said, "RESUME")
    if resumed is None:
        raise BootFailed(f"QEMU's monitor did not say when the guest began: {said!r}")
    boot.first_run = resumed - realtime
    boot.host = {"qemu": boot.first_run - boot.start}
    return boot


def panic(said: str) -> str:
    """What a kernel that panicked said of it, for a message; empty if it did not."""
    at = said.find("Kernel panic")
    return "" if at < 0 else f"; the guest said {said[max(0, at - 100) : at + 700]!r}"


@contextlib.contextmanager
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connected pair: one end for this process, one for a child."""
    mine, theirs = socket.socketpair()
    with mine, theirs:
        yield mine, theirs


@contextlib.contextmanager
def process(command: list[str], *pass_fds: socket.socket) -> Iterator[tuple[subprocess.Popen[bytes], Boot]]:
    """Start a VMM, noting when; it does not outlive the block. The child's ends are closed here."""
    start = time.monotonic_ns()
    with tempfile.TemporaryFile() as errors:
        vmm = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors if command[0] == qemu.PROGRAM else subprocess.PIPE,
            pass_fds=[end.fileno() for end in pass_fds],
        )
        for end in pass_fds:
            end.close()
        try:
            yield vmm, Boot(start)
        except BootFailed as failure:
            vmm.kill()
            _, said = vmm.communicate()
            errors.seek(0)
            raise BootFailed(f"{failure}: {qemu.complaint(said or errors.read())}") from None
        finally:
            if vmm.poll() is None:
                vmm.kill()
            vmm.wait()


def watch(mark: socket.socket, vmm: subprocess.Popen[bytes], boot: Boot) -> None:
    """Wait for /init and its log. BootFailed if the VMM ends first or time is over."""
    deadline = time.monotonic() + TIMEOUT
    data = b""
    while not (boot.init and data.endswith(END)):
        if not select.select([mark], [], [], max(0.0, deadline - time.monotonic()))[0]:
            seen = f"only {data[-80:]!r} of its log" if data else "not there"
            raise BootFailed(f"/init: {seen} after {TIMEOUT:.0f} s")
        piece = os.read(mark.fileno(), 65536)
        now = time.monotonic_ns()
        if not piece:
            where = "in" if boot.init else "before"
            raise BootFailed(f"the VMM ended {where} /init{panic(data.decode(errors='replace'))}")
        if not boot.init and BEGIN in piece:
            boot.init = now
            boot.kvm = kvm_stats.of(vmm.pid)
        data += piece
    boot.log = data.partition(BEGIN)[2].removesuffix(END).decode(errors="replace")
