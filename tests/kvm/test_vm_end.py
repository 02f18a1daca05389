"""How a VM's run ends: power-off, reset, crash, a device that raises."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest

import chv
from chv.config import VmState

from .conftest import open_descriptors
from .guest import Recorder, eventually
from .kernels import (
    COUNT,
    FOREVER,
    HALT,
    POWER_OFF,
    RESET,
    SCRATCH,
    booted_vm,
    counter,
    kernel_bytes,
    tiny_vm,
)

I8042_RESET = """
    b0 fe           ; mov al, 0xfe
    e6 64           ; out 0x64, al
"""
TRIPLE_FAULT = "0f 0b ; ud2"


def test_writing_s5_to_the_sleep_register_shuts_down() -> None:
    with booted_vm(POWER_OFF + FOREVER) as vm:
        assert vm.wait(10)
        assert vm.state is VmState.SHUTDOWN
        vm.boot()
        assert vm.wait(10)
        assert vm.state is VmState.SHUTDOWN


class Boots:
    """Port 0x40 reads 1 for so many boots, then 0."""

    def __init__(self, resets: int) -> None:
        self.left = resets
        self.boots = 0

    def read(self, offset: int, size: int) -> int:
        self.boots += 1
        self.left -= 1
        return int(self.left >= 0)

    def write(self, offset: int, size: int, value: int) -> None:
        raise AssertionError("nobody writes")


def reset_while(reset: str) -> str:
    length = len([part for line in reset.splitlines() for part in line.split(";")[0].split()]) + 2
    return f"""
        e4 40            ; in al, 0x40
        84 c0            ; test al, al
        74 {length:02x}  ; jz past the reset
        {reset}
        {FOREVER}
        {POWER_OFF}
        {FOREVER}
    """


@pytest.mark.parametrize("reset", [RESET, I8042_RESET], ids=["acpi", "i8042"])
def test_a_reset_starts_the_kernel_anew(reset: str) -> None:
    device = Boots(3)
    with tiny_vm(reset_while(reset)) as vm:
        vm.add_pio(0x40, 1, device)
        vm.boot()
        assert vm.wait(20)
        assert vm.state is VmState.SHUTDOWN
    assert device.boots == 4


def test_a_reset_clears_memory_and_registers() -> None:
    # Each boot reports what it finds in memory and leaves something there.
    address = SCRATCH.to_bytes(4, "little").hex()
    code = f"""
        a1 {address}                  ; mov eax, [SCRATCH]
        e7 44                         ; out 0x44, eax
        c7 05 {address} 78 56 34 12   ; mov dword [SCRATCH], 0x12345678
        {reset_while(RESET)}
    """
    seen = Recorder()
    with tiny_vm(code) as vm:
        vm.add_pio(0x40, 1, Boots(2))
        vm.add_pio(0x44, 4, seen)
        vm.boot()
        assert vm.wait(20)
    assert [value for _, _, value in seen.writes] == [0, 0, 0]


def test_a_triple_fault_is_a_crash() -> None:
    with booted_vm(TRIPLE_FAULT) as vm:
        with pytest.raises(chv.GuestCrash, match="triple fault") as caught:
            vm.wait(10)
        assert vm.state is VmState.SHUTDOWN
        assert "code at" in str(caught.value)
        assert "rip=" in str(caught.value)
        with pytest.raises(chv.GuestCrash):
            vm.wait(10)


def test_what_kvm_cannot_emulate_is_a_crash_with_the_code() -> None:
    code = "be 00 00 00 d0 ; mov esi, 0xd0000000\n c4 e3 7b f0 06 08 ; rorx eax, [esi], 8"
    with booted_vm(code) as vm:
        with pytest.raises(chv.GuestCrash) as caught:
            vm.wait(10)
        assert "sub-error 1 (emulation failed)" in str(caught.value)
        assert "code at 0x100005 (physical 0x100005): c4 e3 7b f0 06 08" in str(caught.value)


def test_a_vm_that_crashed_can_be_booted_again() -> None:
    with booted_vm(TRIPLE_FAULT) as vm:
        for _ in range(2):
            with pytest.raises(chv.GuestCrash):
                vm.wait(10)
            vm.boot()


@pytest.mark.parametrize("kind", [RuntimeError, ZeroDivisionError, chv.DeviceError, KeyboardInterrupt])
def test_what_a_device_raises_is_raised_by_wait(kind: type[BaseException]) -> None:
    error = kind("the disk is on fire")

    class Device:
        def read(self, offset: int, size: int) -> int:
            raise error

        def write(self, offset: int, size: int, value: int) -> None: ...

    with tiny_vm("e4 40 ; in al, 0x40\n" + FOREVER) as vm:
        vm.add_pio(0x40, 1, Device())
        vm.boot()
        with pytest.raises(kind) as caught:
            vm.wait(10)
        assert vm.state is VmState.SHUTDOWN
    assert caught.value is error
    handler = [(f.filename, f.name) for f in traceback.extract_tb(error.__traceback__)]
    assert (__file__, "read") in handler


def test_a_device_that_returns_junk_is_named_by_wait() -> None:
    class Broken:
        def read(self, offset: int, size: int) -> int:
            return None  # type: ignore[return-value]

        def write(self, offset: int, size: int, value: int) -> None: ...

    with tiny_vm("e4 40 ; in al, 0x40\n" + FOREVER) as vm:
        vm.add_pio(0x40, 1, Broken())
        vm.boot()
        with pytest.raises(chv.DeviceError, match=r"Broken\.read\(0x0, 1\) returned None"):
            vm.wait(10)


@pytest.mark.parametrize("call", ["pause", "reboot", "shutdown", "delete", "power_button"])
def test_a_device_that_calls_its_vm_gets_an_error_and_no_deadlock(call: str) -> None:
    class Meddler:
        def read(self, offset: int, size: int) -> int:
            getattr(vm, call)()
            return 0

        def write(self, offset: int, size: int, value: int) -> None: ...

    with tiny_vm("e4 40 ; in al, 0x40\n" + FOREVER) as vm:
        vm.add_pio(0x40, 1, Meddler())
        vm.boot()
        with pytest.raises(chv.StateError, match="a device handler may not call"):
            vm.wait(10)


def test_wait_returns_false_when_time_is_up() -> None:
    with booted_vm(FOREVER) as vm:
        assert vm.wait(0.05) is False
        assert vm.state is VmState.RUNNING


def test_delete_ends_a_wait() -> None:
    with booted_vm(FOREVER) as vm:
        timer = threading.Timer(0.1, vm.delete)
        timer.start()
        assert vm.wait(10)
        timer.join()
    with pytest.raises(chv.StateError):
        vm.boot()


FORGETFUL = """
import sys, chv
vm = chv.VM(kernel=sys.argv[1], memory=16 << 20, cpus=2, serial="null")
vm.boot()
vm.resize(desired_vcpus=1)
print(vm.state.value)
"""


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "vm = None; import gc; gc.collect()"])
def test_a_process_that_forgets_its_vm_ends(tmp_path: Path, ending: str) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(kernel_bytes(COUNT))
    done = subprocess.run(
        [sys.executable, "-c", FORGETFUL + ending, str(kernel)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Running\n", "")


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_fifty_reboots_leave_nothing_behind() -> None:
    with booted_vm(HALT, cpus={"boot": 2, "max": 4}) as vm:
        for _ in range(5):
            vm.reboot()
        gc.collect()
        descriptors, threads, memory = open_descriptors(), threading.active_count(), resident()
        for _ in range(50):
            vm.reboot()
        gc.collect()
        assert sorted(open_descriptors().values()) == sorted(descriptors.values())
        assert threading.active_count() == threads
        assert resident() - memory < 8 << 20


def test_fifty_resets_by_the_guest_leave_nothing_behind() -> None:
    device = Boots(55)
    with tiny_vm(reset_while(RESET)) as vm:
        vm.add_pio(0x40, 1, device)
        vm.boot()
        before = len(open_descriptors())
        threads = threading.active_count()
        eventually(lambda: device.boots >= 50, 30)
        assert abs(len(open_descriptors()) - before) <= 16  # a reboot may be under way
        assert threading.active_count() <= threads + 1
        assert vm.wait(20)
    assert device.boots == 56


def test_deleted_and_shut_down_vms_give_everything_back() -> None:
    def once() -> None:
        with booted_vm(HALT, cpus=3) as vm:
            vm.shutdown()
            vm.boot()

    once()
    gc.collect()
    before = open_descriptors()
    for _ in range(10):
        once()
    gc.collect()
    assert open_descriptors() == before


def test_a_boot_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_vm(HALT, cpus={"boot": 1, "max": 4}) as vm:
        before = open_descriptors()

        def refuse(*arguments: object) -> None:
            raise chv.KvmError(errno.ENOMEM, "no memory")

        monkeypatch.setattr("chv.bootstate.enter", refuse)
        with pytest.raises(chv.KvmError, match="no memory"):
            vm.boot()
        assert vm.state is VmState.CREATED
        gc.collect()
        assert open_descriptors() == before
        monkeypatch.undo()
        vm.boot()
        assert vm.info["state"] == "Running"


def test_counting_goes_on_over_a_pause() -> None:
    with booted_vm(COUNT) as vm:
        eventually(lambda: counter(vm) > 0)
        vm.pause()
        before = counter(vm)
        assert vm.info["state"] == "Paused"
        assert vm.wait(0.05) is False
        assert counter(vm) == before
        vm.resume()
        eventually(lambda: counter(vm) > before)
        vm.pause()
        vm.boot()  # a paused VM goes on
        assert vm.info["state"] == "Running"
        vm.pause()
        vm.shutdown()
        assert vm.info["state"] == "Shutdown"
