"""Disks under load, and what is on them afterwards: written at random and read back, kept over a reset."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from chv.testing import Guest
from tests.images import find
from tests.linux.guests import assert_healthy, reboot
from tests.support import require

KIB, MIB = 1 << 10, 1 << 20

CPUS = 4
SHARE = 512 * KIB
"""What each vCPU writes to each disk, in a part of it for itself."""

DISKS = [
    f"num_queues={queues},direct={direct},_disable_io_uring={plain}"
    for queues, direct, plain in product((1, CPUS), ("off", "on"), ("off", "on"))
]
"""/dev/vdb and so on; /dev/vda is the image that has fio."""

FIO = (
    f"fio --name=global --rw=randwrite --size={SHARE} --bssplit=4k/70:16k/20:64k/10 --verify=crc32c "
    "--verify_fatal=1 --verify_state_save=0 --direct=1 --ioengine=libaio --iodepth=16 --thread"
)


def image() -> Path:
    try:
        return find().path.resolve()
    except FileNotFoundError as error:
        require(False, str(error))
        raise


@pytest.mark.timeout(600)  # a minute or two, and several on a busy machine in the testbed
def test_what_is_written_at_random_is_read_back(guest: Callable[..., Guest], tmp_path: Path) -> None:
    disks = [f"path={image()},readonly=on"]
    for number, options in enumerate(DISKS):
        path = tmp_path / f"disk{number}"
        with path.open("wb") as file:
            file.truncate(CPUS * SHARE)
        disks.append(f"path={path},id=disk{number},{options}")
    vm = guest(cmdline="quiet guest.devices", cpus=CPUS, memory="1G", disks=disks)
    run_fio(vm)
    for number in range(len(DISKS)):
        counters = vm.counters()[f"disk{number}"]
        assert counters["write_bytes"] == CPUS * SHARE
        assert counters["read_bytes"] >= CPUS * SHARE
        assert counters["io_errors"] == 0
    interrupts = interrupts_of_queues(vm)
    assert len(interrupts) == 1 + len(DISKS) // 2 * (1 + CPUS)
    assert all(interrupts.values()), interrupts
    assert_healthy(vm)


def run_fio(vm: Guest) -> None:
    """A job for each disk and vCPU, all at once; each reads back what it wrote, or fails."""
    vm.run("mkdir /run/image; mount -t ext4 -o ro,noload /dev/vda2 /run/image")
    vm.run("cd /run/image; for d in dev proc sys tmp; do mount --bind /$d $d; done")
    vm.run(
        "jobs=; for d in b c d e f g h i; do for cpu in 0 1 2 3; do "
        f'jobs="$jobs --name=$d$cpu --filename=/dev/vd$d --cpus_allowed=$cpu --offset=$((cpu * {SHARE}))"; '
        "done; done"
    )
    vm.run(f"chroot . {FIO} $jobs >/tmp/fio 2>&1 || {{ grep -v '^ ' /tmp/fio; false; }}", timeout=300)


def interrupts_of_queues(vm: Guest) -> dict[str, int]:
    """How many interrupts each queue of each disk gave, on all vCPUs."""
    script = f"/-req/ {{ n = 0; for (i = 2; i < {2 + CPUS}; i++) n += $i; print $NF, n }}"
    lines = vm.run(f"awk '{script}' /proc/interrupts").splitlines()
    return {name: int(count) for name, count in (line.split() for line in lines)}


def test_a_file_is_there_after_sync_and_reboot_f(
    guest: Callable[..., Guest], series: str, tmp_path: Path
) -> None:
    tool = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    require(tool, "mkfs.ext4 is missing (Debian: e2fsprogs)")
    disk = tmp_path / "disk"
    subprocess.run([str(tool), "-q", disk, "16M"], check=True)
    vm = guest(series, cmdline="quiet guest.devices", disks=f"path={disk}")
    mount = "mkdir /run/disk && mount -t ext4 /dev/vda /run/disk && cd /run/disk"
    vm.run(f"{mount} && mkdir folder && head -c {3 * MIB + 5} /dev/urandom >folder/file")
    digest = vm.run("sha256sum folder/file")
    reboot(vm, "sync; reboot -f")
    vm.run(mount)
    # It was not unmounted: the journal was all that the file system had.
    assert "recovery complete" in vm.run("dmesg | grep EXT4")
    assert vm.run("sha256sum folder/file") == digest
    assert_healthy(vm)
    vm.run("cd /; umount /run/disk")
    vm.close()
    subprocess.run([Path(str(tool)).with_name("e2fsck"), "-fn", disk], check=True)
