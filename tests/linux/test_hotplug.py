"""vCPUs come and go while Linux runs."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from chv import ResizeError, ResizePending, VmState
from chv.testing import Guest
from tests.linux.guests import (
    assert_healthy,
    bring_online,
    cpu_list,
    grow,
    reboot,
    shrink,
    wait_for_cpus,
)


def test_grow_shrink_and_grow_with_reboots_between(guest: Callable[..., Guest], series: str) -> None:
    vm = guest(series, cpus="boot=4,max=8", memory="1G")
    assert vm.run("lscpu | grep list:").split() == ["On-line", "CPU(s)", "list:", "0-3"]

    vm.resize(desired_vcpus=8)
    wait_for_cpus(vm, "present", "0-7")
    assert [line.split()[-1] for line in vm.run("lscpu | grep list:").splitlines()] == ["0-3", "4-7"]
    assert [cpu.online for cpu in vm.cpus] == [True] * 4 + [False] * 4
    assert all(cpu.acknowledged for cpu in vm.cpus)
    bring_online(vm, range(4, 8))
    assert vm.run("lscpu | grep list:").split()[-1] == "0-7"
    assert [cpu.online for cpu in vm.cpus] == [True] * 8

    reboot(vm)
    assert cpu_list(vm, "online") == "0-7"

    shrink(vm, 2)
    assert [cpu.present for cpu in vm.cpus] == [True] * 2 + [False] * 6
    assert vm.cpus[7].ost == (3, 0)  # ejected, and said so
    grow(vm, 8)

    shrink(vm, 2)
    reboot(vm)
    assert cpu_list(vm, "online") == "0-1"
    assert_healthy(vm)


def test_twenty_rounds(guest: Callable[..., Guest]) -> None:
    vm = guest(cpus="boot=1,max=2")
    for _ in range(20):
        grow(vm, 2)
        shrink(vm, 1)
    assert_healthy(vm)


def test_up_to_thirty_two(guest: Callable[..., Guest]) -> None:
    vm = guest(cpus="boot=4,max=32", memory="1G")
    grow(vm, 32)
    assert vm.run("nproc") == "32"
    assert all(cpu.online for cpu in vm.cpus)
    assert_healthy(vm)


@pytest.mark.parametrize("moment", ["at once", "early", "late"])
def test_resize_while_linux_boots(guest: Callable[..., Guest], moment: str) -> None:
    vm = guest(cpus="boot=2,max=4", cmdline="", prompt=False)
    if moment == "early":
        vm.wait_for_text("Linux version")
    elif moment == "late":
        vm.wait_for_text("Run /init")
    vm.resize(desired_vcpus=4)
    vm.wait_for_prompt()
    wait_for_cpus(vm, "present", "0-3")
    for number in (2, 3):
        vm.run(f"[ $(cat /sys/devices/system/cpu/cpu{number}/online) = 1 ] || "
               f"echo 1 > /sys/devices/system/cpu/cpu{number}/online")  # fmt: skip
    assert cpu_list(vm, "online") == "0-3"
    shrink(vm, 1)
    assert_healthy(vm)


def test_what_is_refused(guest: Callable[..., Guest]) -> None:
    vm = guest(cpus="boot=2,max=4")
    for impossible in (0, 5, -1):
        with pytest.raises(ResizeError, match=r"desired_vcpus: .* allowed are 1 to 4"):
            vm.resize(desired_vcpus=impossible)
    # A vCPU stopped in its tracks cannot be given back, so this removal stays pending.
    vm.pause()
    vm.resize(desired_vcpus=1)
    with pytest.raises(ResizePending, match=r"vCPU 1 "):
        vm.resize(desired_vcpus=2)
    vm.resume()
    assert vm.wait_for(lambda v: not v.info["hotplug"]["removal_pending"], 60)
    grow(vm, 2)


def test_a_guest_without_the_event_driver_ignores_the_request(guest: Callable[..., Guest]) -> None:
    vm = guest(cpus="boot=1,max=2", cmdline="quiet initcall_blacklist=ged_driver_init")
    vm.resize(desired_vcpus=2)
    time.sleep(2)
    assert vm.info["hotplug"]["not_acknowledged"] == [1]
    assert vm.cpus[1].present
    assert not vm.cpus[1].acknowledged
    assert vm.state is VmState.RUNNING
    assert cpu_list(vm, "present") == "0"
    reboot(vm)  # the firmware tables now have it from the start
    assert cpu_list(vm, "present") == "0-1"
    assert vm.info["hotplug"]["not_acknowledged"] == []


def test_a_vcpu_that_linux_took_offline_is_present_but_not_online(guest: Callable[..., Guest]) -> None:
    vm = guest(cpus=2)
    vm.run("echo 0 > /sys/devices/system/cpu/cpu1/online")
    assert vm.wait_for(lambda v: v.cpus[1].online is False, 10)
    assert vm.cpus[1].present
    vm.run("echo 1 > /sys/devices/system/cpu/cpu1/online")
    assert vm.wait_for(lambda v: v.cpus[1].online is True, 10)
