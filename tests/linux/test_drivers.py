"""Stock drivers that come and go, again and again: their devices work with each new one."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from chv.testing import Guest
from tests.linux.guests import assert_healthy
from tests.netns import in_namespace, links

MIB = 1 << 20
CYCLES = 3
HOST, GUEST = "192.168.249.1", "192.168.249.2"

# Each driver with a command that uses its device, in the $i-th cycle. Which hvc it is that the console gets
# is the kernel's business.
USES = {
    "virtio_blk": 'test "$(md5sum </dev/vda)" = "$noise"',
    "virtio_net": f"ifconfig eth0 {GUEST} && ping -c 2 -i 0.1 -W 10 {HOST} >/dev/null",
    "virtio-rng": 'test "$(head -c 100 /dev/hwrng | wc -c)" = 100',
    "virtio_console": "for tty in /dev/hvc?; do echo line $i 2>&- >$tty && break; done",
}
# Where a driver is built into the kernel, its devices are taken from it and given back.
FOLDERS = {
    "virtio_console": "/sys/bus/virtio/drivers/virtio_console/virtio*",
    "virtio_pci": "/sys/bus/pci/drivers/virtio-pci/0000:*",
}


@in_namespace
def test_drivers_come_and_go(guest: Callable[..., Guest], series: str, tmp_path: Path) -> None:
    disk, console = tmp_path / "disk", tmp_path / "console"
    disk.write_bytes(os.urandom(2 * MIB))
    vm = guest(
        series,
        cmdline="quiet guest.devices",
        disks=f"path={disk}",
        net=f"tap=,ip={HOST},mask=255.255.255.0",
        console=f"file={console}",
    )
    vm.run(f"noise='{hashlib.md5(disk.read_bytes()).hexdigest()}  -'; cd /lib/modules/devices")
    modules = vm.run("echo *").split()
    names = {driver: re.sub("virtio.", "use_", driver) for driver in USES}
    for driver, use in USES.items():
        vm.run(f"{names[driver]}() {{ {use}; }}")
        repeat(vm, another(driver, modules), names[driver])
    # The one below them all.
    repeat(vm, another("virtio_pci", modules), " && ".join(names.values()))
    lines = b"".join(b"line %d\r\n" % cycle for cycle in range(1, CYCLES + 1))
    assert console.read_bytes() == 2 * lines
    assert_healthy(vm)
    vm.close()
    assert links() == set()


def repeat(vm: Guest, change: str, use: str) -> None:
    """A change and then the device, a few times."""
    vm.run(f"(for i in $(seq {CYCLES}); do {{ {change}; }} && {use} || exit 1; done)", timeout=120)


def another(driver: str, modules: list[str]) -> str:
    """A command that removes a driver and loads it again."""
    for module in modules:
        if module.endswith(f"-{driver}.ko"):
            return f"rmmod {driver.replace('-', '_')} && insmod {module}"
    folder, _, devices = FOLDERS[driver].rpartition("/")
    steps = (f"for d in $all; do echo $d >{step} || exit 1; done" for step in ("unbind", "bind"))
    return f"cd {folder} && all=$(echo {devices}) && {'; '.join(steps)}"
