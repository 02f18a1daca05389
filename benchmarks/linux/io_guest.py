"""A guest of the disk image with a second disk to measure on, run by chv or QEMU, commanded over ssh."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.guests import kernel
from tests.images import ClearImage
from tests.images.initrd import initrd
from tests.images.layout import OPTIONS

from .boots import BootFailed, Wanted, process, sockets

READY_TIMEOUT = 400.0
DISK_MIB = 128


class CommandFailed(Exception):
    """A command in the guest did not do its work."""


@dataclass(frozen=True)
class Files:
    """What every contestant boots, and a folder for its own copies."""

    image: ClearImage
    wanted: Wanted
    folder: Path

    @classmethod
    def prepare(cls, image: ClearImage, folder: Path) -> Files:
        """Kernel and initrd of the image's default entry."""
        series = next(iter(image.entries))
        path = folder / "initrd"
        path.write_bytes(initrd(kernel(series)))
        return cls(image, Wanted(str(kernel(series).bzimage), str(path), OPTIONS), folder)

    def copies(self, who: str) -> tuple[ClearImage, Path]:
        """A root disk and a disk to measure on, without holes, for one contestant."""
        copy = self.image.copy(self.folder, name=f"{who}.img")
        data = self.folder / f"{who}.data"
        with data.open("wb") as file:
            for _ in range(DISK_MIB):
                file.write(bytes(range(256)) * 4096)
        return copy, data


@dataclass
class IoGuest:
    """A guest that runs only while it has its turn: all share a processor, and an idle guest is not still."""

    who: str
    image: ClearImage
    tap: str
    vmm: subprocess.Popen[bytes]

    def turn(self, begin: bool) -> None:
        """Begin or end a turn: the VMM is stopped between two, its tap down, as all have the same address."""
        ip("link", "set", self.tap, "up" if begin else "down")
        self.vmm.send_signal(signal.SIGCONT if begin else signal.SIGSTOP)

    def cpu_seconds(self) -> float:
        """What the VMM has taken of the processor outside of its guest, KVM and io_uring's workers with it.

        Source: proc(5), /proc/pid/stat, utime, stime and guest_time (which is a part of utime).
        """
        fields = Path(f"/proc/{self.vmm.pid}/stat").read_text().rpartition(")")[2].split()
        utime, stime, guest = (int(fields[number - 3]) for number in (14, 15, 43))
        return (utime + stime - guest) / os.sysconf("SC_CLK_TCK")

    def run(self, command: str, timeout: float = 120) -> str:
        """What a command prints; CommandFailed if its status is not 0 or time is over."""
        try:
            done = subprocess.run(
                self.image.ssh(command), capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise CommandFailed(f"{command}: not done after {timeout:.0f} s") from error
        if done.returncode:
            raise CommandFailed(f"{command}: status {done.returncode}: {done.stderr[-300:]}")
        return done.stdout

    def wait(self) -> None:
        """Until ssh answers and all services have started; BootFailed if that does not come."""
        deadline = time.monotonic() + READY_TIMEOUT
        while True:
            if self.vmm.poll() is not None:
                raise BootFailed("the VMM ended")
            try:
                self.run("true", timeout=60)
                self.run("systemctl is-system-running --wait || true")
                return
            except CommandFailed as failure:
                if time.monotonic() > deadline:
                    raise BootFailed(f"no ssh after {READY_TIMEOUT:.0f} s: {failure}") from failure
                time.sleep(1)


def ip(*arguments: str) -> None:
    """iproute2's ip; CommandFailed with what it says."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CommandFailed(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextlib.contextmanager
def tap(name: str, image: ClearImage) -> Iterator[None]:
    """A tap of that name with the gateway's address. Needs CAP_NET_ADMIN."""
    ip("tuntap", "add", name, "mode", "tap")
    try:
        ip("address", "add", f"{image.gateway}/24", "dev", name)
        yield
    finally:
        ip("link", "delete", name)


@contextlib.contextmanager
def start(who: str, files: Files) -> Iterator[IoGuest]:
    """Boot a guest, ready for its first turn. Its name is "chv", or "qemu_" and what its disks use (aio=)."""
    image, data = files.copies(who)
    name = f"bench-{who[-8:].strip('_')}"
    with tap(name, image), sockets() as (mine, theirs):
        if who == "chv":
            command = chv_command(files.wanted, image.path, data, name, theirs.fileno())
        else:
            command = qemu_command(files.wanted, image.path, data, name, who.removeprefix("qemu_"))
        with process(command, theirs) as (vmm, _):
            guest = IoGuest(who, image, name, vmm)
            ip("link", "set", name, "up")
            guest.wait()
            guest.turn(False)
            yield guest
        mine.close()


def chv_command(wanted: Wanted, root: Path, data: Path, tap_name: str, mark_fd: int) -> list[str]:
    """chv in a process of its own."""
    return wanted.chv(mark_fd, disks=[{"path": str(root)}, {"path": str(data)}], net=[{"tap": tap_name}])


def qemu_command(wanted: Wanted, root: Path, data: Path, tap_name: str, aio: str) -> list[str]:
    """QEMU's q35 with the same devices: raw files, an iothread for the measured disk, a tap without vhost."""
    command = [
        *wanted.qemu("q35"),
        *("-serial", "null", "-object", "iothread,id=disk"),
        *("-object", "rng-random,id=entropy,filename=/dev/urandom"),
    ]
    for name, path, thread in (("root", root, ""), ("data", data, ",iothread=disk")):
        command += ["-drive", f"if=none,id={name},format=raw,cache=writeback,aio={aio},file={path}"]
        command += ["-device", f"virtio-blk-pci,drive={name}{thread}"]
    command += ["-netdev", f"tap,id=net,ifname={tap_name},script=no,downscript=no,vhost=off"]
    return [*command, "-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci,rng=entropy"]
