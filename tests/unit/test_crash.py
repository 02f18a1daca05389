"""Reports of exits that chv cannot handle, made from a shared area that the test fills in."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from chv import crash
from chv._bus import Bus, SlotNames
from chv._kvm import GENERAL_REGISTERS
from chv._kvmrun import VcpuRun
from chv.errors import GuestCrash, KvmError
from chv.memory import GuestMemory
from chv.vcpu import Vcpu

PAGE = 4096
# struct kvm_run (linux/kvm.h): exit_reason at 8, the union with the exit's details at 32.
REASON, DETAILS = 8, 32


class SharedArea:
    """A file that takes the place of a vCPU's shared area."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("kvm_run")
        os.ftruncate(self.fd, PAGE)
        names = SlotNames()
        self.run = VcpuRun(self.fd, PAGE, Bus("pio", 0x10000, names), Bus("mmio", 0, names))

    def put(self, reason: int, details: bytes = b"") -> None:
        os.pwrite(self.fd, bytes(PAGE), 0)
        os.pwrite(self.fd, struct.pack("<I", reason), REASON)
        os.pwrite(self.fd, details, DETAILS)

    def close(self) -> None:
        self.run.close()
        os.close(self.fd)


@pytest.fixture
def area() -> Iterator[SharedArea]:
    area = SharedArea()
    yield area
    area.close()


class FakeKvm:
    def __init__(self, translate: Callable[[int], int | None]) -> None:
        self.translate = translate
        self.rip = 0

    def registers(self) -> dict[str, int]:
        values = {name: 0x1111 * number for number, name in enumerate(GENERAL_REGISTERS)}
        return {**values, "rip": self.rip, "rflags": 0x2}

    def special_registers(self) -> dict[str, Any]:
        segment = {"base": 0, "limit": 0xFFFFFFFF, "selector": 0x10, "type": 3, "dpl": 0, "db": 1, "l": 0}
        result: dict[str, Any] = {name: dict(segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr")}
        result.update(gdt={"base": 0x500, "limit": 31}, idt={"base": 0x520, "limit": 7})
        result.update(cr0=0x11, cr2=0xDEAD0000, cr3=0x9000, cr4=0x20, efer=0x500, apic_base=0xFEE00900)
        return result


class FakeVcpu:
    def __init__(
        self, run: VcpuRun, translate: Callable[[int], int | None] = lambda address: address
    ) -> None:
        self.index = 3
        self.run = run
        self.kvm = FakeKvm(translate)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(16 * PAGE)
    memory.write(0, bytes(i & 0xFF for i in range(16 * PAGE)))
    yield memory
    memory.close()


def report(vcpu: FakeVcpu, memory: GuestMemory) -> list[str]:
    error = crash.describe(cast(Vcpu, vcpu), memory)
    assert isinstance(error, GuestCrash)
    return str(error).split("\n")


@pytest.mark.parametrize(
    ("reason", "details", "expected"),
    [
        (
            17,
            struct.pack("<II2Q", 1, 2, 0xAB, 0xCD),
            "KVM internal error, sub-error 1 (emulation failed), data 0xab 0xcd",
        ),
        (17, struct.pack("<II", 2, 0), "KVM internal error, sub-error 2 (simultaneous exceptions)"),
        (
            17,
            struct.pack("<IIQ", 3, 1, 5),
            "KVM internal error, sub-error 3 (delivering an event failed), data 0x5",
        ),
        (17, struct.pack("<II", 4, 0), "KVM internal error, sub-error 4 (unexpected exit reason)"),
        (17, struct.pack("<II", 99, 0), "KVM internal error, sub-error 99 (unknown sub-error)"),
        (8, b"", "KVM exit shutdown (triple fault: the guest could not handle an exception)"),
        (
            9,
            struct.pack("<QI", 0x80000021, 1),
            "KVM exit fail-entry (the processor refused to enter the guest), hardware_reason 0x80000021",
        ),
        (
            0,
            struct.pack("<Q", 0x30),
            "KVM exit unknown (an exit that chv does not handle), hardware_reason 0x30",
        ),
        (
            1,
            struct.pack("<II", 13, 0x18),
            "KVM exit exception (an exit that chv does not handle), vector 0xd, error_code 0x18",
        ),
        (5, b"", "KVM exit hlt (the guest halted with no interrupt controller to wake it)"),
        (24, struct.pack("<I", 3), "KVM exit system-event (the guest reported a crash), type 0x3"),
        (3, b"", "KVM exit hypercall (an exit that chv does not handle)"),
        (4, b"", "KVM exit debug (an exit that chv does not handle)"),
        (777, b"", "KVM exit reason-777 (an exit that chv does not handle)"),
    ],
)
def test_the_first_line_says_what_happened(
    area: SharedArea, memory: GuestMemory, reason: int, details: bytes, expected: str
) -> None:
    area.put(reason, details)
    assert report(FakeVcpu(area.run), memory)[0] == f"vCPU 3: {expected}"


def test_more_data_than_there_is_room_for_is_not_read(area: SharedArea) -> None:
    area.put(17, struct.pack("<II16Q", 1, 0xFFFFFFFF, *range(16)) + b"\xff" * 64)
    assert area.run.exit_details()["data"] == list(range(16))


def test_all_registers_are_in_the_report(area: SharedArea, memory: GuestMemory) -> None:
    area.put(8)
    vcpu = FakeVcpu(area.run)
    vcpu.kvm.rip = 0x1234
    text = "\n".join(report(vcpu, memory))
    for name, value in vcpu.kvm.registers().items():
        assert f"{name}={value:016x}" in text
    for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr"):
        assert f"\n  {name}: selector=0010 base=0 limit=ffffffff type=3 dpl=0 db=1 l=0" in text
    for part in ("cr0=11", "cr2=dead0000", "cr3=9000", "cr4=20", "efer=500", "apic_base=fee00900"):
        assert part in text
    assert "gdt: base=500 limit=1f idt: base=520 limit=7" in text


def code_line(vcpu: FakeVcpu, memory: GuestMemory, rip: int) -> str:
    vcpu.kvm.rip = rip
    return report(vcpu, memory)[-1].strip()


def test_the_bytes_at_rip_are_in_the_report(area: SharedArea, memory: GuestMemory) -> None:
    vcpu = FakeVcpu(area.run)
    expected = " ".join(f"{i:02x}" for i in range(0x20, 0x30))
    assert code_line(vcpu, memory, 0x1020) == f"code at 0x1020 (physical 0x1020): {expected}"


def test_a_code_segments_base_counts(area: SharedArea, memory: GuestMemory) -> None:
    vcpu = FakeVcpu(area.run)
    special = vcpu.kvm.special_registers()
    special["cs"]["base"] = 0x2000
    vcpu.kvm.special_registers = lambda: special  # type: ignore[method-assign]
    assert code_line(vcpu, memory, 0x10).startswith("code at 0x2010 (physical 0x2010): 10 11 12")


def test_code_over_a_page_follows_the_translation(area: SharedArea, memory: GuestMemory) -> None:
    pages = {0x7000: 0x3000, 0x8000: 0x1000}
    vcpu = FakeVcpu(area.run, lambda a: pages.get(a & ~0xFFF, 0) + (a & 0xFFF))
    memory.write(0x1000, b"\xaa\xbb\xcc\xdd")
    line = code_line(vcpu, memory, 0x7FF4)
    assert line == "code at 0x7ff4 (physical 0x3ff4): f4 f5 f6 f7 f8 f9 fa fb fc fd fe ff aa bb cc dd"


def test_code_ends_with_what_is_mapped(area: SharedArea, memory: GuestMemory) -> None:
    vcpu = FakeVcpu(area.run, lambda a: a if a < 0x8000 else None)
    assert code_line(vcpu, memory, 0x7FFE) == "code at 0x7ffe (physical 0x7ffe): fe ff"
    assert code_line(vcpu, memory, 0x8000) == "code at 0x8000: not mapped"


def test_code_ends_with_ram(area: SharedArea, memory: GuestMemory) -> None:
    vcpu = FakeVcpu(area.run)
    assert code_line(vcpu, memory, 16 * PAGE - 2) == "code at 0xfffe (physical 0xfffe): fe ff"
    assert code_line(vcpu, memory, 16 * PAGE) == "code at 0x10000 (physical 0x10000): not in RAM"
    assert code_line(vcpu, memory, 0xFFFFFFF0) == "code at 0xfffffff0 (physical 0xfffffff0): not in RAM"


def test_an_address_beyond_64_bits_wraps(area: SharedArea, memory: GuestMemory) -> None:
    vcpu = FakeVcpu(area.run)
    special = vcpu.kvm.special_registers()
    special["cs"]["base"] = 0x1000
    vcpu.kvm.special_registers = lambda: special  # type: ignore[method-assign]
    assert "physical 0x20): 20 21" in code_line(vcpu, memory, (1 << 64) - 0xFE0)


def test_a_translation_that_fails_does_not_hide_the_report(area: SharedArea, memory: GuestMemory) -> None:
    def refuse(address: int) -> int | None:
        raise KvmError(errno.EINVAL, "KVM_TRANSLATE: Invalid argument")

    line = code_line(FakeVcpu(area.run, refuse), memory, 0x10)
    assert line == "code at 0x10: not readable ([Errno 22] KVM_TRANSLATE: Invalid argument)"


# -- the run loop without KVM ------------------------------------------------------------------


def test_an_ioctl_that_fails_names_kvm_run(area: SharedArea) -> None:
    with pytest.raises(KvmError, match="KVM_RUN: Inappropriate ioctl for device") as caught:
        area.run.run()
    assert caught.value.errno == errno.ENOTTY
    assert area.run.statistics() == {}


def test_what_cannot_be_mapped_is_an_error() -> None:
    names = SlotNames()
    reading, writing = os.pipe()
    try:
        with pytest.raises(KvmError, match="mapping a vCPU's shared area"):
            VcpuRun(reading, PAGE, Bus("pio", 0x10000, names), Bus("mmio", 0, names))
    finally:
        os.close(reading)
        os.close(writing)


def test_a_run_that_is_forgotten_gives_its_mapping_back() -> None:
    def mapped() -> int:
        with open("/proc/self/maps", encoding="ascii") as file:
            return sum("memfd:kvm_run" in line for line in file)

    area = SharedArea()
    assert mapped() == 1
    del area.run
    assert mapped() == 0
    os.close(area.fd)
