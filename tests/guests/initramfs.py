"""The user space of the test guests: busybox, a real lscpu, and a root shell on the serial line.

What the kernel command line can ask of it (see rootfs/init):

==================  ==========================================================
``guest.tty=``      the terminal of the shell, default ttyS0
``guest.login``     ``login:`` and a password in place of a shell
``guest.then=``     ``poweroff``, ``reboot`` or ``panic`` as soon as it is up
==================  ==========================================================
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tests.guests.cache import cache, digest, write_whole
from tests.guests.cpio import Archive
from tests.guests.kernels import Kernel
from tests.guests.modules import load_order

PASSWORD = "hotplug"
"""The password of root, where the guest asks for one."""

READY = "guest: ready"
"""The line that a guest prints when its user space is up, before the shell's first prompt."""

MODULES = ("button", "evdev")
"""The power button needs both: one makes the key press, one lets /init read it."""

DRIVERS = ("virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "virtio-rng", "ext4")
"""Loaded if the command line has guest.devices: most tests look at other things and boot quicker without."""

PROGRAMS = ("lscpu",)
"""Programs of this machine that go in with their shared libraries; the rest is busybox."""

ROOTFS = Path(__file__).with_name("rootfs")


def initramfs(kernel: Kernel, modules: Sequence[str] = MODULES) -> Path:
    """The initramfs for a kernel, built unless one of the same content is there."""
    archive = Archive()
    add_rootfs(archive)
    add_busybox(archive)
    for program in PROGRAMS:
        add_program(archive, program)
    add_modules(archive, kernel, modules)
    archive.folder("lib/modules/devices")
    loaded = load_order(kernel, modules)
    drivers = [module for module in load_order(kernel, DRIVERS) if module not in loaded]
    for number, module in enumerate(drivers):
        archive.file(f"lib/modules/devices/{number:02}-{module.name}", module.read_bytes())
    data = archive.data()
    path = cache() / "guests" / f"initramfs-{kernel.release}-{digest([data])}.cpio"
    return path if path.exists() else write_whole(path, data)


def add_rootfs(archive: Archive) -> None:
    """The files of rootfs/, the empty folders to mount on, and the password file."""
    for folder in ("dev", "proc", "sys", "run", "root", "tmp", "etc"):
        archive.folder(folder)
    # The kernel opens /dev/console before /init can mount a devtmpfs there.
    archive.device("dev/console", 5, 1)
    for path in sorted(ROOTFS.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(ROOTFS))
            archive.file(name, path.read_bytes(), 0o755 if name.count("/") == 0 else 0o644)
    shadow = subprocess.run(
        ["busybox", "mkpasswd", "-m", "md5", "-S", "chvguest", PASSWORD],
        capture_output=True,
        text=True,
        check=True,
    )
    archive.file("etc/shadow", f"root:{shadow.stdout.strip()}:19000:0:99999:7:::\n".encode(), 0o600)


def add_busybox(archive: Archive) -> None:
    """busybox and a link for each of its commands."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise FileNotFoundError("busybox is not installed (Debian: busybox-static)")
    archive.file("bin/busybox", Path(busybox).read_bytes(), 0o755)
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    for applet in applets.stdout.split():
        if applet not in ("busybox", *PROGRAMS):
            archive.symlink(f"bin/{applet}", "busybox")
    archive.symlink("sbin", "bin")


def add_program(archive: Archive, name: str) -> None:
    """A program of this machine and the shared libraries that ldd lists for it."""
    program = shutil.which(name)
    if program is None:
        raise FileNotFoundError(f"{name} is not installed (Debian: util-linux)")
    archive.file(f"bin/{name}", Path(program).read_bytes(), 0o755)
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
    for library in re.findall(r"(/\S+) \(0x", listed.stdout):
        # The loader's path is fixed in the program; the others are found in /lib.
        home = library.lstrip("/") if "ld-linux" in library else f"lib/{os.path.basename(library)}"
        archive.file(home, Path(library).read_bytes(), 0o755)


def add_modules(
    archive: Archive,
    kernel: Kernel,
    names: Sequence[str],
    change: Mapping[str, Callable[[bytes], bytes]] = MappingProxyType({}),
) -> None:
    """Modules under numbered names: /init loads them in that order.

    ``change`` has functions that make another module of the file of this name.
    """
    archive.folder("lib/modules")
    for number, module in enumerate(load_order(kernel, names)):
        data = module.read_bytes()
        if module.name in change:
            data = change[module.name](data)
        archive.file(f"lib/modules/{number:02}-{module.name}", data)
