"""What the tests of Linux guests share."""

from __future__ import annotations

import time
from collections.abc import Iterable

from chv.testing import Guest
from tests.guests.cache import cache
from tests.support import require

BOOT_TIMEOUT = 180.0
PROBLEMS = r"ACPI (BIOS )?(Error|Warning)|Oops|BUG:|soft lockup|rcu.*stall|nobody cared|Hardware Error"


def guest_files(series: str, kind: str = "bzImage") -> dict[str, str]:
    """The kernel ("bzImage" or "vmlinux") and initramfs of a series, as chv.VM's keywords."""
    folder = cache() / "guests" / series
    files = {"kernel": str(folder / kind), "initramfs": str(folder / "initramfs")}
    require((folder / kind).exists(), f"guest kernel {series} is missing: run make setup")
    return files


def bring_online(vm: Guest, cpus: Iterable[int]) -> None:
    names = " ".join(str(cpu) for cpu in cpus)
    vm.run(f"for i in {names}; do echo 1 > /sys/devices/system/cpu/cpu$i/online || exit 1; done")


def cpu_list(vm: Guest, kind: str) -> str:
    """The guest's "online", "offline", "present" or "possible" CPUs."""
    return vm.run(f"cat /sys/devices/system/cpu/{kind}")


def wait_for_cpus(vm: Guest, kind: str, expected: str, seconds: float = 60) -> None:
    """Until the guest's own list is as expected."""
    deadline = time.monotonic() + seconds
    while (seen := cpu_list(vm, kind)) != expected:
        assert time.monotonic() < deadline, f"the guest's {kind} CPUs are {seen}, expected {expected}"
        time.sleep(0.2)


def grow(vm: Guest, total: int) -> None:
    """Resize to more vCPUs over Python and bring the new ones online in the guest."""
    before = sum(cpu.present for cpu in vm.cpus)
    vm.resize(desired_vcpus=total)
    wait_for_cpus(vm, "present", span(total))
    bring_online(vm, range(before, total))
    assert cpu_list(vm, "online") == span(total)


def shrink(vm: Guest, total: int) -> None:
    """Resize to fewer vCPUs and wait until the guest has given them back."""
    vm.resize(desired_vcpus=total)
    assert vm.wait_for(lambda v: not v.info["hotplug"]["removal_pending"], 60), vm.info["hotplug"]
    wait_for_cpus(vm, "present", span(total))
    assert cpu_list(vm, "online") == span(total)


def span(count: int) -> str:
    return "0" if count == 1 else f"0-{count - 1}"


def reboot(vm: Guest, command: str = "reboot -f") -> None:
    """Reboot from inside and wait for the new prompt."""
    vm.send(f"{command}\n")
    vm.wait_for_text("guest: ready")
    vm.wait_for_prompt()


def assert_healthy(vm: Guest) -> None:
    """No complaint of the kernel about the machine."""
    found = vm.run(f"dmesg | grep -E '{PROBLEMS}' || true")
    assert not found, found
