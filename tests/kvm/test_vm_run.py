"""A VM while it runs: devices of the user, resizing, many VMs at once, hostile guests."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chv
from chv import layout
from chv.boot import decompress
from chv.config import VmState

from ..unit.boot_images import bzimage
from .guest import Recorder, eventually
from .kernels import (
    COUNT,
    FOREVER,
    HALT,
    MEMORY,
    POWER_OFF,
    RESET,
    booted_vm,
    counter,
    kernel_bytes,
    tiny_vm,
)

MMIO = 0xD0000000


def test_a_kernel_is_unpacked_for_the_first_of_its_vms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, folder = tmp_path / "vmlinuz", tmp_path / "cache"
    kernel.write_bytes(bzimage("zstd", kernel_bytes(POWER_OFF)))
    for _ in range(2):
        with chv.VM(kernel=kernel, memory=MEMORY, serial="off", cache_dir=folder) as vm:
            vm.boot()
            assert vm.wait(10)
            assert vm.state is VmState.SHUTDOWN
        assert len(list(folder.iterdir())) == 1

        def refuse(*_: object) -> bytes:
            raise AssertionError("unpacked again")

        monkeypatch.setattr(decompress, "unpack", refuse)


def test_devices_of_the_user_are_reached_on_both_buses() -> None:
    port, memory = Recorder(0x11), Recorder(0x22)
    code = f"""
        e4 40           ; in al, 0x40
        88 c3           ; mov bl, al
        a0 00 00 00 d0  ; mov al, [0xd0000000]
        00 d8           ; add al, bl
        e6 41           ; out 0x41, al
        a2 01 00 00 d0  ; mov [0xd0000001], al
        {POWER_OFF}
    """
    with tiny_vm(code) as vm:
        vm.add_pio(0x40, 2, port, "mine")
        vm.add_mmio(MMIO, 4, memory)
        vm.boot()
        assert vm.wait(10)
        exits = vm.exits
    assert port.writes == memory.writes == [(1, 1, 0x33)]
    assert (exits.devices["mine"].reads, exits.devices["mine"].writes) == (1, 1)
    assert exits.devices["Recorder"].count == 2


def test_a_device_can_be_added_while_the_guest_runs() -> None:
    device = Recorder()
    with booted_vm("e4 40 ; again: in al, 0x40\n eb fc ; jmp again") as vm:
        vm.add_pio(0x40, 1, device)
        eventually(lambda: len(device.reads) > 10)
        vm.reboot()
        count = len(device.reads)
        eventually(lambda: len(device.reads) > count + 10)


@pytest.mark.parametrize(
    ("base", "size", "other"),
    [
        (layout.COM1_PORT + 3, 1, "serial"),
        (0x600, 1, "acpi-power"),
        (0x5FF, 2, "acpi-power"),
        (layout.CPU_HOTPLUG_PORT, 4, "cpu-hotplug"),
        (layout.GED_PORT, 1, "ged"),
        (0x64, 1, "i8042"),
        (0x71, 1, "cmos"),
    ],
)
def test_ports_of_the_machine_are_taken(base: int, size: int, other: str) -> None:
    with booted_vm(FOREVER) as vm:
        with pytest.raises(chv.BusError, match=f"overlaps {other}"):
            vm.add_pio(base, size, Recorder())
        assert vm.state is VmState.RUNNING


def test_an_impossible_device_is_refused_when_added_and_forgotten() -> None:
    with tiny_vm(FOREVER) as vm:
        with pytest.raises(chv.BusError, match="overlaps acpi-power"):
            vm.add_pio(0x600, 1, Recorder())
        with pytest.raises(chv.BusError, match="does not lie in the pio space"):
            vm.add_pio(0xFFFF, 2, Recorder())
        with pytest.raises(chv.BusError, match="overlaps KVM's interrupt controllers"):
            vm.add_pio(0x21, 1, Recorder())
        with pytest.raises(chv.BusError, match="overlaps KVM's interrupt controllers"):
            vm.add_mmio(layout.LOCAL_APIC + 0x20, 4, Recorder())
        with pytest.raises(chv.BusError, match=r"no read\(\) method"):
            vm.add_pio(0x40, 1, object())  # type: ignore[arg-type]
        vm.boot()
        assert vm.state is VmState.RUNNING


def test_a_device_may_not_lie_in_ram() -> None:
    with tiny_vm(FOREVER) as vm, pytest.raises(chv.BusError, match="overlaps RAM"):
        vm.add_mmio(0x200000, 4, Recorder())


# -- resizing without a guest that listens -------------------------------------------------


def test_resizing_before_boot_changes_the_configuration() -> None:
    with tiny_vm(HALT, cpus={"boot": 1, "max": 4}) as vm:
        vm.resize(desired_vcpus=3)
        assert [cpu.present for cpu in vm.cpus] == [True, True, True, False]
        vm.boot()
        assert [cpu.present for cpu in vm.cpus] == [True, True, True, False]
        assert len([t for t in threading.enumerate() if t.name.startswith("vcpu")]) == 3


def test_a_guest_that_does_not_listen_leaves_the_vm_healthy() -> None:
    with booted_vm(COUNT, cpus={"boot": 1, "max": 4}) as vm:
        vm.resize(desired_vcpus=3)
        info = vm.info
        assert info["state"] == "Running"
        assert info["hotplug"]["present_vcpus"] == info["hotplug"]["desired_vcpus"] == 3
        assert {1, 2} <= set(info["hotplug"]["not_acknowledged"])
        assert [cpu.online for cpu in vm.cpus] == [True, False, False, False]
        vm.resize(desired_vcpus=2)
        assert vm.info["hotplug"]["removal_pending"] == [2]
        with pytest.raises(chv.ResizePending, match="vCPU 2"):
            vm.resize(desired_vcpus=4)
        before = counter(vm)
        eventually(lambda: counter(vm) > before)
        vm.pause()
        vm.resume()
        vm.reboot()
        # What was asked back goes with the reboot.
        assert vm.info["hotplug"]["removal_pending"] == []
        assert [cpu.present for cpu in vm.cpus] == [True, True, False, False]


@pytest.mark.parametrize("desired", [0, -1, 5, True, "2", 2.0])
def test_a_resize_out_of_range_is_refused(desired: object) -> None:
    with booted_vm(HALT, cpus={"boot": 1, "max": 4}) as vm:
        with pytest.raises(chv.ResizeError, match="allowed are 1 to 4"):
            vm.resize(desired_vcpus=desired)  # type: ignore[arg-type]
        assert vm.state is VmState.RUNNING


def test_a_resize_while_paused_starts_no_vcpu() -> None:
    with booted_vm(COUNT, cpus={"boot": 1, "max": 2}) as vm:
        vm.pause()
        vm.resize(desired_vcpus=2)
        before = counter(vm)
        assert vm.wait(0.05) is False
        assert counter(vm) == before
        vm.resume()
        eventually(lambda: counter(vm) > before)


def test_the_power_button_of_a_guest_that_does_not_listen_does_nothing() -> None:
    with booted_vm(COUNT) as vm:
        vm.power_button()
        before = counter(vm)
        eventually(lambda: counter(vm) > before)
        assert vm.state is VmState.RUNNING


# -- from many threads ---------------------------------------------------------------------


def test_ten_vms_run_in_one_process() -> None:
    vms = []
    try:
        for _ in range(10):
            context = booted_vm(COUNT)
            vms.append((context, context.__enter__()))
        for _, vm in vms:
            eventually(lambda vm=vm: counter(vm) > 0)
        for _, vm in vms[::2]:
            vm.pause()
        for _, vm in vms[1::2]:
            before = counter(vm)
            eventually(lambda vm=vm, before=before: counter(vm) > before)
    finally:
        for context, _ in vms:
            context.__exit__(None, None, None)


def test_calls_from_many_threads_keep_the_vm_whole() -> None:
    errors: list[BaseException] = []
    with booted_vm(COUNT, cpus={"boot": 2, "max": 4}) as vm:

        def disturb(seed: int) -> None:
            dice = random.Random(seed)
            actions: list[Callable[[], object]] = [
                vm.pause, vm.resume, vm.reboot, vm.shutdown, vm.boot, vm.power_button, vm.counters,
                lambda: vm.info, lambda: vm.cpus, lambda: vm.exits,
                lambda: vm.resize(desired_vcpus=dice.randint(1, 4)),
            ]  # fmt: skip
            for _ in range(25):
                try:
                    dice.choice(actions)()
                except (chv.StateError, chv.ResizeError):
                    continue  # not possible just now: what the caller is told
                except BaseException as error:
                    errors.append(error)

        threads = [threading.Thread(target=disturb, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a call hangs"
        assert errors == []
        if vm.state is VmState.SHUTDOWN or vm.state is VmState.PAUSED:
            vm.boot()
        before = counter(vm)
        eventually(lambda: counter(vm) != before)


def test_a_vm_can_be_deleted_while_it_resets_all_the_time() -> None:
    for _ in range(5):
        with booted_vm(RESET + FOREVER) as vm:
            vm.wait(0.02)
        assert not [t for t in threading.enumerate() if t.name.startswith("vcpu")]


# -- hostile guests --------------------------------------------------------------------------

# Writes eax to, and reads from, every port from edi to esi but those that reset and shut down, in each width.
ALL_PORTS = """
    89 fa                 ; mov edx, edi
    66 81 fa fd 05        ; next: cmp dx, 0x5fd
    72 07                 ; jb use
    66 81 fa 03 06        ; cmp dx, 0x603
    76 19                 ; jbe skip
    66 83 fa 61           ; use: cmp dx, 0x61
    72 06                 ; jb all
    66 83 fa 64           ; cmp dx, 0x64
    76 0d                 ; jbe skip
    66 81 fa f9 0c        ; all: cmp dx, 0xcf9
    74 06                 ; je skip
    ee                    ; out dx, al
    66 ef                 ; out dx, ax
    ef                    ; out dx, eax
    ec                    ; in al, dx
    ed                    ; in eax, dx
    42                    ; skip: inc edx
    39 f2                 ; cmp edx, esi
    75 d4                 ; jne next
"""


def hotplug_storm(values: list[tuple[int, int, int]]) -> str:
    """``values``: port, width and what to write there; each is read afterwards."""
    lines = []
    for port, size, value in values:
        out = {1: "ee", 2: "66 ef", 4: "ef"}[size]
        into = {1: "ec", 2: "66 ed", 4: "ed"}[size]
        lines.append(f"""
            66 ba {port.to_bytes(2, "little").hex()}  ; mov dx, PORT
            b8 {value.to_bytes(4, "little").hex()}    ; mov eax, VALUE
            {out}                                     ; out dx, al / ax / eax
            {into}                                    ; in al / ax / eax, dx
        """)
    return "".join(lines)


MACHINE_PORTS = [
    *range(layout.COM1_PORT - 1, layout.COM1_PORT + 9),
    *range(layout.CPU_HOTPLUG_PORT - 1, layout.CPU_HOTPLUG_PORT + layout.CPU_HOTPLUG_SIZE + 1),
    *range(layout.CMOS_PORT, layout.CMOS_PORT + 2),
    layout.DEBUG_PORT,
    *range(layout.PM_TIMER_PORT, layout.PM_TIMER_PORT + 4),
    layout.GED_PORT,
    0xCF8,
    *range(0xCFA, 0xD00),  # 0xcf9 resets
]


@given(
    writes=st.lists(
        st.tuples(
            st.sampled_from(MACHINE_PORTS),
            st.sampled_from([1, 2, 4]),
            st.one_of(st.integers(0, 0xFFFFFFFF), st.sampled_from([0, 1, 2, 4, 8, 0xF, 0xFF, 0xFFFFFFFF])),
        ),
        min_size=20,
        max_size=200,
    )
)
@settings(
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)
def test_no_write_to_a_register_brings_the_vm_down(writes: list[tuple[int, int, int]]) -> None:
    with tiny_vm(hotplug_storm(writes) + POWER_OFF + FOREVER, cpus={"boot": 2, "max": 4}) as vm:
        vm.boot()
        vm.resize(desired_vcpus=4)  # at any moment, also after the guest's end
        assert vm.wait(10)
        assert vm.state is VmState.SHUTDOWN
        vm.resize(desired_vcpus=2)


@pytest.mark.parametrize(
    ("value", "end"), [(0xFFFFFFFF, 0x10000), (0, 0x1000), (0x0F0F0F0F, 0x1000), (0x5A5A0102, 0x1000)]
)
def test_garbage_on_every_port_does_not_bring_the_vm_down(value: int, end: int) -> None:
    code = f"""
        bf 00 00 00 00  ; mov edi, 0
        be {end.to_bytes(4, "little").hex()}    ; mov esi, END
        b8 {value.to_bytes(4, "little").hex()}  ; mov eax, VALUE
        {ALL_PORTS}
        {POWER_OFF}
        {FOREVER}
    """
    with tiny_vm(code, cpus={"boot": 1, "max": 4}) as vm:
        vm.boot()
        assert vm.wait(60)
        assert vm.state is VmState.SHUTDOWN
        assert vm.exits.reasons["io"].count > 4 * (end - 0x100)


def test_random_code_ends_in_a_crash_or_runs_but_never_in_another_error() -> None:
    dice = random.Random(7)
    for _ in range(25):
        code = dice.randbytes(200).hex() + " ; anything"
        # Anything else that wait() raises fails the test.
        with booted_vm(code) as vm, contextlib.suppress(chv.GuestCrash):
            vm.wait(0.05)


# -- what the guest is told -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpus", "threads", "shift", "count"),
    [
        ({"boot": 1, "max": 1}, 1, 0, 1),
        ({"boot": 1, "max": 8}, 1, 3, 8),
        ({"boot": 1, "max": 254}, 1, 8, 254),
        ({"boot": 1, "max": 300}, 1, 9, 300),
        ({"boot": 1, "max": 8, "topology": "2:4:1:1"}, 2, 3, 8),
    ],
)
def test_the_cpuid_instruction_tells_the_topology(
    cpus: dict[str, object], threads: int, shift: int, count: int
) -> None:
    code = f"""
        b8 0b 00 00 00  ; mov eax, 0xb
        b9 00 00 00 00  ; mov ecx, 0
        0f a2           ; cpuid
        89 d8           ; mov eax, ebx
        e7 40           ; out 0x40, eax
        b8 0b 00 00 00  ; mov eax, 0xb
        b9 01 00 00 00  ; mov ecx, 1
        0f a2           ; cpuid
        e7 40           ; out 0x40, eax
        89 d8           ; mov eax, ebx
        e7 40           ; out 0x40, eax
        89 d0           ; mov eax, edx
        e7 40           ; out 0x40, eax
        {POWER_OFF}
        {FOREVER}
    """
    device = Recorder()
    with tiny_vm(code, cpus=cpus) as vm:
        vm.add_pio(0x40, 4, device)
        vm.boot()
        assert vm.wait(10)
    assert [value for _, _, value in device.writes] == [threads, shift, count, 0]


def test_the_kernel_finds_its_start_information() -> None:
    # PVH: ebx points to the start info, whose first word is its magic (Xen's start_info.h).
    code = f"""
        8b 03           ; mov eax, [ebx]
        e7 40           ; out 0x40, eax
        a1 00 00 0a 00  ; mov eax, [0xa0000] (RSDP: "RSD ")
        e7 40           ; out 0x40, eax
        {POWER_OFF}
        {FOREVER}
    """
    device = Recorder()
    with tiny_vm(code) as vm:
        vm.add_pio(0x40, 4, device)
        vm.boot()
        assert vm.wait(10)
    assert [value for _, _, value in device.writes] == [0x336EC578, int.from_bytes(b"RSD ", "little")]
