"""What the image looks like: partitions, names, boot entries, addresses. No files are touched here.

The shape is Clear Linux's: GPT, an EFI system partition with systemd-boot, kernels under
EFI/org.clearlinux, an ext4 root. Boot entries are of type 1 of the Boot Loader Specification
(https://uapi-group.org/specifications/specs/boot_loader_specification/).
"""

from __future__ import annotations

import re
from pathlib import Path

MIB = 1 << 20
SECTOR = 512

IMAGE_SIZE = 2048 * MIB
ESP_START, ESP_SIZE = 1 * MIB, 256 * MIB
ROOT_START = ESP_START + ESP_SIZE
# The second partition table has the last 33 sectors; partitions end on a MiB.
ROOT_SIZE = IMAGE_SIZE - ROOT_START - 1 * MIB

ESP_LABEL = "CLEARESP"
ROOT_LABEL = "clear-root"

# UEFI 2.10, table 5-7; the Discoverable Partitions Specification for the root's.
ESP_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
ROOT_TYPE = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"

BOOT_LOADER = "EFI/BOOT/BOOTX64.EFI"

OPTIONS = (
    f"root=LABEL={ROOT_LABEL} rootfstype=ext4 rw quiet console=hvc0 console=ttyS0,115200n8 "
    "net.ifnames=0 systemd.gpt_auto=0"
)
"""The kernel command line. The last console is /dev/console; each one that exists gets a getty."""

NETWORKS = 4
"""Network interfaces that get an address."""


def address(interface: int) -> str:
    """The guest's address on eth0, eth1, ..."""
    return f"192.168.{249 + interface}.2"


def gateway(interface: int) -> str:
    """The host's address on the same network."""
    return f"192.168.{249 + interface}.1"


def partition_table() -> str:
    """The script for sfdisk."""
    rows = [
        (ESP_START, ESP_SIZE, ESP_TYPE, "EFI"),
        (ROOT_START, ROOT_SIZE, ROOT_TYPE, "root"),
    ]
    lines = [
        f'start={start // SECTOR}, size={size // SECTOR}, type={kind}, name="{name}"'
        for start, size, kind, name in rows
    ]
    return "\n".join(["label: gpt", *lines]) + "\n"


def esp_in(path: Path) -> str:
    """The EFI system partition of an image, as mtools name it."""
    return f"{path}@@{ESP_START}"


def version(release: str) -> str:
    """What the image calls a kernel: no "+", which has a meaning in an entry's name (boot counting)."""
    match = re.match(r"[0-9.]+(-[0-9]+)?", release)
    if match is None:
        raise ValueError(f"{release!r} does not begin with a kernel's version")
    return match[0]


def entry_name(release: str) -> str:
    """The file name of a boot entry."""
    return f"Clear-linux-kvm-{version(release)}.conf"


def pattern(series: str) -> str:
    """A ``default`` that only the entry of a series matches, in every loader.

    systemd-boot compares with names in lower case, rust-hypervisor-firmware with names as they are.
    """
    return f"?lear-linux-kvm-{series}.*"


def loader_conf(default: str) -> str:
    """loader/loader.conf."""
    return f"timeout 0\ndefault {default}\n"


def kernel_path(release: str) -> str:
    """Where the kernel is in the EFI system partition."""
    return f"EFI/org.clearlinux/kernel-org.clearlinux.kvm.{version(release)}"


def initrd_path(release: str) -> str:
    """Where the initrd is in the EFI system partition."""
    return f"EFI/org.clearlinux/initrd-org.clearlinux.kvm.{version(release)}"


def entry(release: str) -> str:
    """A boot entry."""
    return (
        f"title Clear-shaped Debian with {release}\n"
        f"version {version(release)}\n"
        f"linux /{kernel_path(release)}\n"
        f"initrd /{initrd_path(release)}\n"
        f"options {OPTIONS}\n"
    )
