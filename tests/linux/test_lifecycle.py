"""Pausing, rebooting and crashing Linux guests."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable

from chv import VmState
from chv.testing import Guest
from tests.linux.guests import assert_healthy, cpu_list, reboot


def test_pause_leaves_clock_and_load_intact(guest: Callable[..., Guest]) -> None:
    vm = guest(cpus=2)
    vm.run("(while sleep 0.05; do echo >> /dev/shm/ticks; done) &")
    vm.run("seq 1 200000 > /dev/shm/a; (while md5sum /dev/shm/a >> /dev/shm/sums; do :; done) &")
    before = float(vm.run("cut -d' ' -f1 /proc/uptime"))
    vm.pause()
    assert vm.state is VmState.PAUSED
    exits = vm.exits.count
    time.sleep(5)
    assert vm.exits.count == exits  # nothing ran
    vm.resume()
    started = time.monotonic()
    after = float(vm.run("cut -d' ' -f1 /proc/uptime"))
    assert after - before < 4 + (time.monotonic() - started)  # the five seconds did not happen
    time.sleep(3)
    first = int(vm.run("wc -l < /dev/shm/ticks"))
    time.sleep(1)
    assert int(vm.run("wc -l < /dev/shm/ticks")) > first
    assert vm.run("sort -u /dev/shm/sums | wc -l") == "1"  # the computation was not disturbed
    assert not vm.run("dmesg | grep -iE 'unstable|skew|lockup|stall' || true")
    assert_healthy(vm)


def test_reboot_leaks_nothing(guest: Callable[..., Guest]) -> None:
    vm = guest(cpus=2)
    reboot(vm)
    gc.collect()  # other tests' guests
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for command in ("reboot -f", "reboot", "echo b > /proc/sysrq-trigger"):
        reboot(vm, command)
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert cpu_list(vm, "online") == "0-1"


def test_reset_and_shutdown_from_outside(guest: Callable[..., Guest]) -> None:
    vm = guest()
    vm.run("touch /tmp/mark")
    vm.reboot()
    vm.wait_for_text("guest: ready")
    vm.wait_for_prompt()
    assert vm.run("ls /tmp/mark", check=False).endswith("No such file or directory")
    vm.shutdown()
    assert vm.state is VmState.SHUTDOWN
    vm.boot()
    vm.wait_for_text("guest: ready")
    vm.wait_for_prompt()
    assert vm.run("nproc") == "1"


def test_a_panic_is_seen_and_the_vm_can_be_reset(guest: Callable[..., Guest]) -> None:
    vm = guest(cmdline="quiet panic=0")
    vm.send("echo c > /proc/sysrq-trigger\n")
    vm.wait_for_line("Kernel panic - not syncing: sysrq triggered crash")
    assert vm.state is VmState.RUNNING
    vm.reboot()
    vm.wait_for_text("guest: ready")
    vm.wait_for_prompt()


def test_a_panic_with_a_timeout_reboots(guest: Callable[..., Guest]) -> None:
    vm = guest(cmdline="quiet panic=1")
    vm.send("echo c > /proc/sysrq-trigger\n")
    vm.wait_for_text("guest: ready")
    vm.wait_for_prompt()


def test_two_guests_at_once(guest: Callable[..., Guest]) -> None:
    first, second = guest(prompt=False, memory="256M"), guest(prompt=False, memory="256M")
    for vm, name in ((first, "one"), (second, "two")):
        vm.wait_for_prompt()
        vm.run(f"hostname {name}")
    assert (first.run("hostname"), second.run("hostname")) == ("one", "two")
