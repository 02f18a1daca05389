"""Who takes part in the exit benchmarks: each runs a guest and hands back what it wrote to COM1."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from . import build, guests
from .environment import ROOT
from .guests import Guest

TIMEOUT = 120
WORKERS = ("chv_c", "chv_py", "chv_py_spin", "pure_python")
PEERS = ("kvmtool", "cloud-hypervisor", "firecracker")

Exits = dict[str, int]


class Absent(Exception):
    """This contestant cannot take part; the message says why."""


class Contestant(ABC):
    """One VMM."""

    name: str

    def lacks(self, case: guests.Case) -> str | None:
        """Why this contestant has no such case; None if it has."""
        return None

    @abstractmethod
    def run(self, guest: Guest) -> tuple[bytes, Exits | None]:
        """What the guest wrote, and how many exits its register had by bus, if the VMM counts them.

        The VMM runs on the processors that this thread may run on.
        Raises :class:`Absent` if the guest does not come to its end.
        """

    def close(self) -> None:  # noqa: B027 - most keep nothing running
        """End what it keeps running."""


class Floor(Contestant):
    """The C program."""

    name = "floor"

    def __init__(self) -> None:
        self._program = build.floor()

    def run(self, guest: Guest) -> tuple[bytes, Exits]:
        command = [str(self._program), guest.rom, str(guest.cpus), str(guest.wakes)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise Absent(f"the guest did not end in {TIMEOUT} s") from None
        if done.returncode != 0:
            raise Absent(done.stderr.decode(errors="replace").strip() or f"status {done.returncode}")
        words = done.stderr.decode().split()
        return done.stdout, {bus: int(count) for bus, count in zip(words[::2], words[1::2], strict=True)}


class Worker(Contestant):
    """A VMM in Python, in a process that runs one guest after another."""

    def __init__(self, name: str) -> None:
        self.name = name
        build.device()  # compiled here, where a failure is seen
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.exit_worker", name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, guest: Guest) -> tuple[bytes, Exits]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        wanted = {"guest": asdict(guest), "cpus": sorted(os.sched_getaffinity(0))}
        try:
            self._process.stdin.write(json.dumps(wanted) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Absent(f"its process ended with status {self._process.wait()}") from None
        line = self._process.stdout.readline()
        if not line:
            raise Absent(f"its process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Absent(answer["error"])
        return bytes.fromhex(answer["output"]), answer["exits"]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Qemu(Contestant):
    """QEMU's ``pc`` with KVM's interrupt controllers, the guest as its firmware, and pci-testdev."""

    name = "qemu"

    def __init__(self) -> None:
        program = shutil.which("qemu-system-x86_64")
        if program is None:
            raise Absent("qemu-system-x86_64 is not installed")
        self._program = program

    def lacks(self, case: guests.Case) -> str | None:
        if case.group == "wake":
            return "it has no device with which a process beside it can raise an irqfd and leave the time"
        return None

    def run(self, guest: Guest) -> tuple[bytes, None]:
        reader, writer = os.pipe()
        # Without arch-capabilities: QEMU asserts where KVM offers that MSR and does not take it.
        options = (
            "-machine pc,kernel_irqchip=on -accel kvm -cpu host,-arch-capabilities"
            " -nodefaults -no-user-config -display none"
            f" -device pci-testdev,addr={guests.PCI_SLOT:#x} -m {guests.MEMORY_SIZE >> 20}"
            f" -smp {guest.cpus} -serial file:/proc/self/fd/{writer}"
        )
        command = [self._program, *options.split(), "-bios", guest.rom]
        try:
            return _until_complete(command, reader, writer), None
        finally:
            os.close(reader)


class Peer(Contestant):
    """Another VMM, named by the user: it boots the guest as its kernel and writes COM1 to standard output.

    It has no device at the guest's addresses, so its "userspace" exits are those that nobody claims.
    """

    def __init__(self, kind: str, program: str) -> None:
        if kind not in PEERS:
            raise Absent(f"{kind} is not known; known are {', '.join(PEERS)}")
        found = shutil.which(program)
        if found is None:
            raise Absent(f"{program} is not a program")
        self.name = kind
        self._program = found

    def lacks(self, case: guests.Case) -> str | None:
        if case.group == "wake":
            return "nothing beside it can raise an irqfd of its"
        if case.name.startswith("ioeventfd"):
            return "it has no ioeventfd at the guest's addresses"
        return None

    def run(self, guest: Guest) -> tuple[bytes, None]:
        with tempfile.TemporaryDirectory() as folder:
            command = [self._program, *self._options(guest, Path(folder))]
            reader, writer = os.pipe()
            try:
                return _until_complete(command, reader, writer, stdout=True), None
            finally:
                os.close(reader)

    def _options(self, guest: Guest, folder: Path) -> list[str]:
        size = guests.MEMORY_SIZE >> 20
        if self.name == "kvmtool":
            # Its firmware area is the last 128 KiB below 1 MiB.
            image = folder / "rom"
            image.write_bytes(bytes(0x10000) + Path(guest.rom).read_bytes())
            text = f"run --firmware {image} --cpus {guest.cpus} --mem {2 * size} --console serial"
            text += " --network mode=none"
        elif self.name == "cloud-hypervisor":
            text = f"--kernel {guest.elf} --cpus boot={guest.cpus} --memory size={size}M"
            text += " --serial tty --console off"
        else:
            config = folder / "config.json"
            machine = {"vcpu_count": guest.cpus, "mem_size_mib": size}
            source = {"kernel_image_path": guest.elf, "boot_args": ""}
            config.write_text(json.dumps({"boot-source": source, "drives": [], "machine-config": machine}))
            text = f"--no-api --config-file {config}"
        return text.split()


def _until_complete(command: Sequence[str], reader: int, writer: int, *, stdout: bool = False) -> bytes:
    """What a VMM writes to a pipe until the guest's samples are complete; then the VMM is ended.

    ``writer`` is its standard output, or inherited under its number.
    """
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=writer if stdout else errors,
            stderr=errors,
            pass_fds=() if stdout else (writer,),
        ) as process:
            os.close(writer)
            try:
                output = _read_samples(reader)
            finally:
                process.kill()
        if not guests.is_complete(output):
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip() or repr(output[-200:])
            raise Absent(f"the guest did not end: {said[-400:]}")
    return output


def _read_samples(reader: int) -> bytes:
    deadline = time.monotonic() + TIMEOUT
    output = b""
    while not (guests.END_MAGIC in output and guests.is_complete(output)):
        ready, _, _ = select.select([reader], [], [], max(0, deadline - time.monotonic()))
        piece = os.read(reader, 1 << 16) if ready else b""
        if not piece:
            break
        output += piece
    return output
