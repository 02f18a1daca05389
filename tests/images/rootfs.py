"""The image's root file system: Debian packages by mmdebstrap, and the files of rootfs/ over them."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.guests.initramfs import PASSWORD
from tests.guests.kernels import Kernel
from tests.guests.modules import load_order
from tests.images import layout

HERE = Path(__file__).parent
FILES = HERE / "rootfs"
FINISH = HERE / "finish"

PACKAGES = (
    *("systemd-sysv", "udev", "kmod", "systemd-boot-efi"),
    *("iproute2", "iputils-ping", "ethtool", "dropbear-bin"),
    *("e2fsprogs", "pciutils", "procps", "fio", "iperf3"),
)

BOOT_LOADER = "usr/lib/systemd/boot/efi/systemd-bootx64.efi"
"""systemd-boot, from the package systemd-boot-efi."""

MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "virtio_scsi", "sd_mod"),
    *("virtio_balloon", "virtio_mem", "virtio_pmem", "virtio_mmio", "virtiofs", "vmw_vsock_virtio_transport"),
    *(
        "button",
        "evdev",
        "vfat",
        "nls_ascii",
        "nls_cp437",
        "nls_iso8859_1",
        "autofs4",
        "configfs",
        "efivarfs",
    ),
    *("loop", "tun", "msr", "crc32c_intel", "sch_fq", "pktgen"),
)

EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*")


def mirrors() -> list[str]:
    """Lines for sources.list: each suite of Debian that apt knows here. LookupError if none."""
    keyring = next(Path("/usr/share/keyrings").glob("debian-archive-keyring.*"), None)
    signed = f"[signed-by={keyring}] " if keyring else ""
    line = f"deb {signed}$(REPO_URI) $(RELEASE) $(COMPONENT)"
    command = ["apt-get", "indextargets", "--format", line, "Created-By: Packages", "Origin: Debian"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    if not found:
        raise LookupError("apt knows no Debian mirror here (is `apt-get update` done?)")
    return sorted(set(found))


def build(root: Path, work: Path, kernels: Sequence[Kernel], public_key: str, log: Path) -> None:
    """Make the file system in the folder ``root``, which is made too.

    ``work`` is for temporary files. What the tools print goes to ``log``.
    subprocess.CalledProcessError if they fail.
    """
    overlay = work / "overlay.tar"
    with tarfile.open(overlay, "w") as archive:
        for name, data, mode in files(kernels, public_key):
            _add(archive, name, data, mode)
    # The suite on the command line is not used when whole lines follow, but has to be there.
    command = [
        *("mmdebstrap", "--mode=auto", "--variant=essential", "--format=directory"),
        f"--include={','.join(PACKAGES)}",
        "--aptopt=Acquire::Languages none",
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude={path}" for path in EXCLUDED),
        *(
            "--hook-dir=/usr/share/mmdebstrap/hooks/maybe-merged-usr",
            f"--customize-hook=tar-in {shlex.quote(str(overlay))} /",
        ),
        *('--customize-hook=chroot "$1" /finish', "", str(root), *mirrors()),
    ]
    with log.open("ab") as out:
        subprocess.run(command, stdout=out, stderr=out, check=True)


def as_owner() -> list[str]:
    """What to put before a command so that it sees the files of ``root`` as root's own."""
    return [] if os.geteuid() == 0 else ["mmdebstrap", "--unshare-helper"]


def files(kernels: Sequence[Kernel], public_key: str) -> Iterator[tuple[str, bytes, int]]:
    """Name, content and mode of the files that come over the packages."""
    for path in sorted(FILES.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(FILES)), path.read_bytes(), 0o644
    for number in range(layout.NETWORKS):
        yield f"etc/systemd/network/eth{number}.network", network(number).encode(), 0o644
    yield "root/.ssh/authorized_keys", public_key.encode(), 0o600
    for kernel in kernels:
        folder = f"usr/lib/modules/{kernel.release}"
        for module in load_order(kernel, MODULES):
            yield f"{folder}/kernel/{module.name}", module.read_bytes(), 0o644
        for table in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
            yield f"{folder}/{table}", (kernel.modules / table).read_bytes(), 0o644
    yield "finish.password", PASSWORD.encode(), 0o600
    yield "finish", FINISH.read_bytes(), 0o755


def network(number: int) -> str:
    """A file for systemd-networkd: the static address of one interface."""
    route = f"Gateway={layout.gateway(number)}\n" if number == 0 else ""
    return (
        f"[Match]\nName=eth{number}\nDriver=virtio_net\n\n"
        f"[Network]\nAddress={layout.address(number)}/24\n{route}"
        "LinkLocalAddressing=no\nIPv6AcceptRA=no\nLLMNR=no\n"
    )


def _add(archive: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    """Add a file, owned by root; tar makes the folders above it."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    archive.addfile(member, io.BytesIO(data))
