"""Stock kernels boot, from each kind of file, and find the machine that was configured."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from chv import VmState
from chv.testing import Guest
from tests.linux.guests import assert_healthy, grow


@pytest.mark.parametrize("kind", ["bzImage", "vmlinux"])
def test_a_stock_kernel_boots(guest: Callable[..., Guest], series: str, kind: str) -> None:
    vm = guest(series, kind, cpus=2, memory="512M", cmdline="quiet test.word=here")
    assert vm.run("uname -r").startswith(f"{series}.")
    assert vm.run("nproc") == "2"
    assert "test.word=here" in vm.run("cat /proc/cmdline").split()
    assert 400_000 < int(vm.run("awk '/MemTotal/ {print $2}' /proc/meminfo")) <= 524_288
    assert_healthy(vm)


def test_the_machine_that_linux_sees(guest: Callable[..., Guest]) -> None:
    vm = guest(cpus="boot=2,max=4", memory="512M")
    interrupts = vm.run("cat /proc/interrupts")
    assert "ttyS0" in interrupts
    assert "ACPI:Ged" in interrupts
    assert "rtc0" in interrupts
    assert "16550A" in vm.run("dmesg | grep ttyS0")
    assert abs(int(vm.run("cat /sys/class/rtc/rtc0/since_epoch")) - time.time()) < 30
    assert abs(int(vm.run("date +%s")) - time.time()) < 30
    assert vm.run("cat /sys/devices/system/cpu/possible") == "0-3"
    assert "acpi_pm" in vm.run("cat /sys/devices/system/clocksource/clocksource0/available_clocksource")
    tables = vm.run("ls /sys/firmware/acpi/tables").split()
    assert {"DSDT", "FACP", "APIC"} <= set(tables)
    assert_healthy(vm)


def test_six_gib_on_both_sides_of_the_hole(guest: Callable[..., Guest]) -> None:
    vm = guest(memory="6G")
    assert int(vm.run("awk '/MemTotal/ {print $2}' /proc/meminfo")) > 5_900_000
    assert "100000000-1bfffffff : System RAM" in vm.run("cat /proc/iomem")
    # Linux hands out high memory first, so this is written to and read from beyond 4 GiB.
    vm.run(
        "head -c 50000000 /dev/urandom > /dev/shm/a && cp /dev/shm/a /dev/shm/b && cmp /dev/shm/a /dev/shm/b"
    )


def test_poweroff_from_inside(guest: Callable[..., Guest]) -> None:
    vm = guest()
    vm.send("poweroff -f\n")
    assert vm.wait(60)
    assert vm.state is VmState.SHUTDOWN


def test_power_button(guest: Callable[..., Guest], series: str) -> None:
    vm = guest(series)
    vm.power_button()
    assert vm.wait(60)
    assert vm.state is VmState.SHUTDOWN


def test_more_possible_vcpus_than_xapic_can_name(guest: Callable[..., Guest]) -> None:
    vm = guest(cpus="boot=2,max=300", memory="1G")
    assert vm.run("cat /sys/devices/system/cpu/possible") == "0-299"
    grow(vm, 3)
    assert len(vm.info["vcpus"]) == 300
    assert_healthy(vm)
