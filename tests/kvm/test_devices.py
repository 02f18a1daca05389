"""Machines with devices on the real /dev/kvm: what a guest of a few bytes sees, and what is left behind."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from chv import ConfigError
from tests.netns import in_namespace

from .kernels import FOREVER, POWER_OFF, tiny_vm

# Reads the host bridge's ids through 0xcf8 and 0xcfc and powers off if they are right.
READ_BRIDGE = """
    66 ba f8 0c           ; mov dx, 0xcf8
    b8 00 00 00 80        ; mov eax, 1 << 31
    ef                    ; out dx, eax
    66 ba fc 0c           ; mov dx, 0xcfc
    ed                    ; in eax, dx
    3d 86 80 57 0d        ; cmp eax, 0x0d578086
    75 fe                 ; jne $
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return path


def test_a_guest_finds_the_host_bridge() -> None:
    with tiny_vm(READ_BRIDGE + POWER_OFF + FOREVER) as vm:
        vm.boot()
        assert vm.wait(10)
        assert vm.exits.devices["pci-config"].count == 2


def test_fifty_boots_with_devices_leave_nothing(disk: Path) -> None:
    def once() -> None:
        with tiny_vm(POWER_OFF + FOREVER, disks=f"path={disk}", console="null", serial="null") as vm:
            vm.boot()
            assert vm.wait(10)

    once()
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), threading.active_count(), mappings()
    for _ in range(50):
        once()
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before[:2]
    assert mappings() <= before[2] + 8


@in_namespace
def test_fifty_boots_with_every_device_leave_no_tap() -> None:
    """Disk, two network devices, entropy and both consoles."""

    def taps() -> list[str]:
        with IPRoute() as route:
            return sorted(link.get("ifname") for link in route.get_links())

    def once() -> None:
        disk = os.memfd_create("disk")
        os.truncate(disk, 1 << 20)
        try:
            with tiny_vm(
                FOREVER,
                disks=f"path=/proc/self/fd/{disk}",
                net=["tap=,ip=192.0.2.1,mask=255.255.255.0", "tap=named,num_queues=4"],
                rng="src=/dev/urandom",
                console="null",
                serial="null",
                cpus="boot=2",
            ) as vm:
                vm.boot()
                assert len(taps()) == len(before_taps) + 2
                vm.shutdown()
        finally:
            os.close(disk)

    before_taps = taps()
    once()
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), threading.active_count(), mappings()
    for _ in range(50):
        once()
    gc.collect()
    assert taps() == before_taps
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before[:2]
    assert mappings() <= before[2] + 8


def mappings() -> int:
    return sum(1 for _ in open("/proc/self/maps", encoding="ascii"))


def test_a_disk_has_one_writer(disk: Path) -> None:
    with tiny_vm(FOREVER, disks=f"path={disk}") as first, tiny_vm(FOREVER, disks=f"path={disk}") as second:
        first.boot()
        with pytest.raises(ConfigError, match=r"disks\[0\]\.path"):
            second.boot()
        first.shutdown()
        second.boot()


def test_what_info_and_counters_say(disk: Path) -> None:
    with tiny_vm(FOREVER, disks=f"path={disk}", console="pty") as vm:
        vm.boot()
        tree = vm.info["device_tree"]
        assert {name: entry["pci_bdf"] for name, entry in tree.items()} == {
            "__console": "0000:00:01.0",
            "_disk0": "0000:00:02.0",
            "__rng": "0000:00:03.0",
        }
        assert vm.info["config"]["console"]["file"].startswith("/dev/pts/")
        assert vm.counters()["_disk0"]["read_ops"] == 0
        vm.pause()
        vm.resume()
        vm.reboot()
        assert vm.info["device_tree"] == tree
