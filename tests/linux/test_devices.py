"""virtio devices under stock Linux drivers: disks, the entropy device, the console, PCI itself."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chv.testing import Console, Guest
from tests.linux.guests import assert_healthy, reboot

MIB = 1 << 20
DEVICES = "quiet guest.devices"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """64 MiB of noise."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(MIB))
    yield path
    path.unlink()


def digest(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def functions(vm: Guest) -> list[str]:
    """Slot and ids of each PCI function that the guest sees."""
    names = vm.run("cd /sys/bus/pci/devices; for d in *; do echo $d $(cat $d/vendor $d/device); done")
    return names.splitlines()


def test_a_disk_is_read_written_flushed_and_kept_over_a_reboot(
    guest: Callable[..., Guest], series: str, disk: Path
) -> None:
    vm = guest(series, cmdline=DEVICES, cpus=2, disks=f"path={disk},num_queues=2,serial=chv-disk")
    assert vm.run("cat /sys/block/vda/size /sys/block/vda/serial").split() == [str(128 * 1024), "chv-disk"]
    assert vm.run("ls /sys/block/vda/mq | wc -l") == "2"
    assert vm.run("md5sum < /dev/vda", timeout=120).split()[0] == digest(disk)
    vm.run("dd if=/dev/urandom of=/dev/shm/noise bs=1M count=8 2>/dev/null")
    wanted = vm.run("md5sum < /dev/shm/noise").split()[0]
    vm.run("dd if=/dev/shm/noise of=/dev/vda bs=4k seek=1024 conv=notrunc,fsync 2>/dev/null", timeout=120)
    with disk.open("rb") as file:
        file.seek(4 * MIB)
        assert hashlib.md5(file.read(8 * MIB)).hexdigest() == wanted
    before = functions(vm)
    reboot(vm)
    assert functions(vm) == before
    assert vm.run("dd if=/dev/vda bs=4k skip=1024 count=2048 2>/dev/null | md5sum").split()[0] == wanted
    counters = vm.counters()["_disk0"]
    assert counters["read_bytes"] >= 64 * MIB
    assert counters["write_bytes"] >= 8 * MIB
    assert_healthy(vm)


def test_discarded_blocks_are_holes(guest: Callable[..., Guest], disk: Path) -> None:
    vm = guest(cmdline=DEVICES, disks=f"path={disk}")
    before = disk.stat().st_blocks
    assert int(vm.run("cat /sys/block/vda/queue/discard_max_bytes")) > 0
    vm.run("blkdiscard -o $((16<<20)) -l $((32<<20)) /dev/vda")
    assert not any(disk.read_bytes()[16 * MIB : 48 * MIB])
    assert disk.stat().st_blocks <= before - 32 * MIB // 512 + 64


def test_a_readonly_disk_cannot_be_written(guest: Callable[..., Guest], disk: Path) -> None:
    vm = guest(cmdline=DEVICES, disks=f"path={disk},readonly=on,direct=on")
    before = digest(disk)
    assert vm.run("cat /sys/block/vda/ro") == "1"
    assert vm.run("dd if=/dev/zero of=/dev/vda bs=4k count=1 2>&1", check=False)
    assert digest(disk) == before


def test_a_truncated_file_is_an_io_error_and_the_guest_lives_on(
    guest: Callable[..., Guest], disk: Path
) -> None:
    vm = guest(cmdline=DEVICES, disks=f"path={disk}")
    os.truncate(disk, 8 * MIB)
    assert "error" in vm.run("dd if=/dev/vda of=/dev/null bs=1M skip=32 count=1 2>&1", check=False)
    os.truncate(disk, 64 * MIB)
    assert vm.run("dd if=/dev/vda bs=1M skip=32 count=1 2>/dev/null | tr -d '\\000' | wc -c") == "0"


def test_entropy_comes_from_the_host(guest: Callable[..., Guest], series: str) -> None:
    vm = guest(series, cmdline=DEVICES)
    assert vm.run("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng")
    assert vm.run("head -c 1000 /dev/hwrng | wc -c") == "1000"


def test_log_in_over_hvc0(vm_factory: Callable[..., Guest]) -> None:
    from chv import VM
    from tests.linux.guests import BOOT_TIMEOUT, guest_files

    cmdline = "console=hvc0 quiet guest.devices guest.tty=hvc0"
    with VM(**guest_files("6.12"), cmdline=cmdline, serial="off", console="pty") as vm:
        vm.boot()
        fd = os.open(vm.info["config"]["console"]["file"], os.O_RDWR | os.O_NOCTTY)
        try:
            with Console(fd) as console:
                console.send("\n")
                console.wait_for_prompt(BOOT_TIMEOUT)
                # The shell's controlling terminal: device 229:0 (the kernel's devices.txt: hvc0).
                assert console.run("cut -d' ' -f7 /proc/$$/stat").output == f"{229 << 8}\n"
        finally:
            os.close(fd)


def test_fourteen_devices_at_once_and_a_bar_that_moves(guest: Callable[..., Guest], tmp_path: Path) -> None:
    disks = []
    for number in range(12):
        path = tmp_path / f"disk{number}"
        path.write_bytes(bytes([number]) * MIB)
        disks.append(f"path={path},readonly=on")
    vm = guest(cmdline=DEVICES, disks=disks, console="null")
    found = functions(vm)
    assert found[0] == "0000:00:00.0 0x8086 0x0d57"
    assert [line.split()[2] for line in found[1:]] == ["0x1043", *["0x1042"] * 12, "0x1044"]
    for number, name in enumerate("abcdefghijkl"):
        assert vm.run(f"head -c 1 /dev/vd{name} | od -An -tu1").strip() == str(number)
    assert_a_bar_moves(vm)
    assert vm.run("head -c 1 /dev/vdc | od -An -tu1").strip() == "2"
    assert_healthy(vm)


def assert_a_bar_moves(vm: Guest) -> None:
    """Take the third disk away and find it again: Linux puts the BAR somewhere else."""
    device = "/sys/bus/pci/devices/0000:00:04.0"
    before = vm.run(f"head -1 {device}/resource").split()[0]
    vm.run(f"echo 1 > {device}/remove; echo 1 > /sys/bus/pci/rescan")
    after = vm.run(f"head -1 {device}/resource").split()[0]
    assert re.fullmatch("0x[0-9a-f]{16}", after)
    assert int(after, 16), (before, after)


def test_a_driver_comes_and_goes_a_hundred_times(guest: Callable[..., Guest], disk: Path) -> None:
    vm = guest(cmdline=DEVICES, disks=f"path={disk},readonly=on")
    wanted = digest(disk)
    name = vm.run("basename $(readlink /sys/block/vda/device)")
    vm.run(
        "cd /sys/bus/virtio/drivers/virtio_blk; "
        f"(for i in $(seq 100); do echo {name} > unbind && echo {name} > bind || exit 1; done)",
        timeout=300,
    )
    assert vm.run("md5sum < /dev/vda", timeout=120).split()[0] == wanted
    for module in ("virtio_blk", "virtio_rng"):
        vm.run(f"rmmod {module}; insmod /lib/modules/devices/*-{module.replace('_rng', '-rng')}.ko")
    assert vm.run("md5sum < /dev/vda", timeout=120).split()[0] == wanted
    assert_healthy(vm)
