"""What ends a guest's run, and the report of it."""

from __future__ import annotations

import errno
import fcntl
import re
import struct

import pytest

from chv import crash
from chv._kvm import Kvm
from chv.errors import GuestCrash, KvmError
from chv.vcpu import Vcpu

from .guest import CODE, DATA, MEMORY_SIZE, STACK, Mode, TinyGuest

UD2 = "0f 0b  ; ud2"

# CPUID leaves of a hypervisor that offers the Hyper-V crash and reset registers
# (Microsoft's Hypervisor Top Level Functional Specification, 2.4 and 12).
HYPER_V = {
    0x40000000: (0x40000000, 0, 0, 0x40000005, 0x7263694D, 0x666F736F, 0x76482074),
    0x40000001: (0x40000001, 0, 0, 0x31237648, 0, 0, 0),
    0x40000003: (0x40000003, 0, 0, 1 << 7 | 1 << 5, 0, 0, 1 << 10),
    0x40000005: (0x40000005, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0, 0),
}


def run_to_report(guest: TinyGuest) -> GuestCrash:
    report = guest.run()
    assert (report.outcome, report.error) == ("unhandled", None)
    return crash.describe(report.vcpu, guest.memory)


def test_a_triple_fault_reports_registers_and_code() -> None:
    # bootstate leaves an empty interrupt table, so any exception ends in a third fault.
    with TinyGuest(
        f"""
        b8 78 56 34 12  ; mov eax, 0x12345678
        {UD2}
        """,
        registers={"rbx": 0xB0B0, "r15": 0xF00D},
    ) as guest:
        error = run_to_report(guest)
        assert guest.exits().reasons["shutdown"].count == 1
    text = str(error)
    assert text.startswith("vCPU 0: KVM exit shutdown (triple fault")
    # After a shutdown the registers are what the processor left, on AMD those of a reset.
    assert re.search(r"rax=[0-9a-f]{16}", text)
    assert re.search(r"r15=[0-9a-f]{16}", text)
    assert "cr0=" in text
    assert "idt: base=" in text
    assert "code at" in text


@pytest.mark.parametrize("mode", ["protected", "long"])
def test_an_instruction_that_kvm_cannot_emulate_is_named(mode: Mode) -> None:
    # On memory that is not RAM, so that the processor itself cannot run it either.
    code = """
        c4 e3 7b f0 06 08  ; rorx eax, [esi], 8 (BMI2)
    """
    with TinyGuest(code, mode=mode, registers={"rsi": 0x20000000, "rbx": 0xB0B0B0B0}) as guest:
        text = str(run_to_report(guest))
        details = guest.vcpus[0].run.exit_details()
        assert guest.exits().reasons["internal-error"].count == 1
    assert details["suberror"] == 1
    assert text.startswith("vCPU 0: KVM internal error, sub-error 1 (emulation failed)")
    assert "rbx=00000000b0b0b0b0" in text
    assert f"rip={CODE:016x}" in text
    assert f"rsp={STACK:016x}" in text
    assert f"code at {CODE:#x} (physical {CODE:#x}): c4 e3 7b f0 06 08" in text


def test_code_over_a_page_is_read_page_by_page() -> None:
    # Linear pages 0x11000 and 0x12000 are the physical pages 0x30000 and 0x20000.
    with TinyGuest(mode="long") as guest:
        table = 0x40000
        entries = [i << 12 | 3 for i in range(512)]
        entries[0x11], entries[0x12] = 0x30000 | 3, 0x20000 | 3
        guest.memory.write(table, b"".join(e.to_bytes(8, "little") for e in entries))
        directory = int.from_bytes(guest.memory.read(0xA000, 8), "little") & ~0xFFF
        guest.memory.write(directory, (table | 3).to_bytes(8, "little"))
        guest.memory.write(0x30FFC, bytes.fromhex("90 90 c4 e3"))
        guest.memory.write(0x20000, bytes.fromhex("7b f0 06 08 aa bb"))
        guest.vcpus[0].kvm.set_registers({"rip": 0x11FFC, "rflags": 2, "rsi": 0x20000000})
        text = str(run_to_report(guest))
    assert "code at 0x11ffe (physical 0x30ffe): c4 e3 7b f0 06 08 aa bb" in text


def test_code_that_is_not_mapped_is_said_to_be() -> None:
    with TinyGuest(mode="long") as guest:
        vcpu = guest.vcpus[0]
        vcpu.kvm.set_registers({"rip": 0x7000_0000_0000, "rflags": 2})
        assert "code at 0x700000000000: not mapped" in str(crash.describe(vcpu, guest.memory))
        vcpu.kvm.set_registers({"rip": 0x20000000, "rflags": 2})
        assert "code at 0x20000000 (physical 0x20000000): not in RAM" in str(
            crash.describe(vcpu, guest.memory)
        )
        vcpu.kvm.set_registers({"rip": MEMORY_SIZE - 2, "rflags": 2})
        assert "code at 0xffffe (physical 0xffffe): 00 00\n" in str(crash.describe(vcpu, guest.memory)) + "\n"


def test_hlt_stays_in_the_kernel() -> None:
    with TinyGuest("fa ; cli\n f4 ; hlt") as guest:
        guest.start()
        vcpu = guest.vcpus[0]
        guest.pause()
        guest.resume()
        with pytest.raises(AssertionError, match="did not end"):
            guest.wait(0.2)
        vcpu.ask_online()
        assert vcpu.online() is False
        guest.pause()
        assert vcpu.kvm.mp_state() == "halted"
        assert vcpu.kvm.registers()["rip"] == CODE + 2
        assert guest.exits().count == 0


def test_hlt_with_nothing_to_wake_it_is_reported() -> None:
    with TinyGuest("fa ; cli\n f4 ; hlt", irqchip=False) as guest:
        vcpu = guest.vcpus[0]
        assert vcpu.run.run() == "unhandled"
        assert vcpu.run.exit_details() == {"reason": "hlt"}
        assert "KVM exit hlt (the guest halted with no interrupt controller" in str(
            crash.describe(vcpu, guest.memory)
        )


def hyper_v_guest(msr: int, low: int, high: int) -> TinyGuest:
    with Kvm() as kvm:
        if not fcntl.ioctl(kvm.fd, 0xAE03, 44):  # KVM_CHECK_EXTENSION(KVM_CAP_HYPERV)
            pytest.skip("this host's KVM has no Hyper-V interface, the one way to a system event on x86")
    return TinyGuest(
        f"""
        b9 {msr.to_bytes(4, "little").hex()}   ; mov ecx, MSR
        b8 {low.to_bytes(4, "little").hex()}   ; mov eax, LOW
        ba {high.to_bytes(4, "little").hex()}  ; mov edx, HIGH
        0f 30                                  ; wrmsr
        f4                                     ; hlt
        """,
        extra_cpuid=HYPER_V,
    )


def test_a_guest_that_reports_a_crash_is_reported() -> None:
    # HV_X64_MSR_CRASH_CTL with CrashNotify becomes KVM_EXIT_SYSTEM_EVENT, type 3.
    with hyper_v_guest(0x40000105, 0, 1 << 31) as guest:
        text = str(run_to_report(guest))
        assert guest.vcpus[0].run.exit_details() == {"reason": "system-event", "type": 3}
    assert "KVM exit system-event (the guest reported a crash), type 0x3" in text


def test_a_reset_by_system_event_is_a_reset() -> None:
    # HV_X64_MSR_RESET becomes KVM_EXIT_SYSTEM_EVENT, type 2.
    with hyper_v_guest(0x40000003, 1, 0) as guest:
        report = guest.run()
        assert (report.outcome, report.error) == ("reset", None)
        assert guest.exits().reasons["system-event"].count == 1


def test_a_run_that_the_kernel_refuses_is_an_error() -> None:
    with TinyGuest() as guest:
        guest.vcpus[0].kvm.close()
        report = guest.run()
    assert report.outcome == "exception"
    assert isinstance(report.error, KvmError)
    assert report.error.errno == errno.EBADF
    assert "KVM_RUN: Bad file descriptor" in str(report.error)


def set_guest_debug(vcpu: Vcpu, control: int) -> None:
    fcntl.ioctl(vcpu.kvm.fd, 0x4048AE9B, struct.pack("<II8Q", control, 0, *[0] * 8))  # KVM_SET_GUEST_DEBUG


def test_an_exit_that_chv_does_not_ask_for_is_reported() -> None:
    with TinyGuest("90 ; nop\n 90 ; nop\n e6 f4 ; out 0xf4, al") as guest:
        set_guest_debug(guest.vcpus[0], 1 | 2)  # KVM_GUESTDBG_ENABLE | SINGLESTEP
        text = str(run_to_report(guest))
        assert guest.exits().reasons["debug"].count == 1
        assert guest.vcpus[0].kvm.registers()["rip"] == CODE + 1
    assert text.startswith("vCPU 0: KVM exit debug (an exit that chv does not handle)")


def test_an_exit_without_a_name_is_reported_by_its_number() -> None:
    capability, reason_unknown_msr, read_msr = 188, 1 << 1, 29  # X86_USER_SPACE_MSR; KVM_EXIT_X86_RDMSR
    with TinyGuest("b9 00 00 00 66 ; mov ecx, 0x66000000\n 0f 32 ; rdmsr") as guest:
        fcntl.ioctl(  # KVM_ENABLE_CAP
            guest.vm.fd, 0x4068AEA3, struct.pack("<II4Q64x", capability, 0, reason_unknown_msr, 0, 0, 0)
        )
        text = str(run_to_report(guest))
        assert guest.exits().reasons[f"reason-{read_msr}"].count == 1
    assert text.startswith(f"vCPU 0: KVM exit reason-{read_msr} (an exit that chv does not handle)")


def test_a_vcpu_that_ended_can_be_started_again() -> None:
    with TinyGuest(UD2) as guest:
        assert guest.run().outcome == "unhandled"
        guest.vcpus[0].stop()
        guest.vcpus[0].join()
        guest.load("b0 07 ; mov al, 7\n e6 f4 ; out 0xf4, al")
        report = guest.run()
        assert (report.outcome, report.value) == ("done", 7)


def test_a_file_that_is_not_kvm_is_refused_and_closed() -> None:
    for path in ("/dev/null", "/dev/does-not-exist"):
        with pytest.raises(KvmError, match=path):
            Kvm(path)


def test_a_closed_vcpu_does_not_run() -> None:
    with TinyGuest("f4 ; hlt") as guest:
        vcpu = guest.vcpus[0]
        vcpu.close()
        assert vcpu.run.exit_details() == {"reason": "closed"}
        vcpu.run.kick()
        vcpu.run.close()
        assert vcpu.run.statistics() == {}
        with pytest.raises(RuntimeError, match="closed"):
            vcpu.run.run()


def test_memory_is_where_the_program_puts_it() -> None:
    with TinyGuest(
        f"""
        c7 05 {DATA.to_bytes(4, "little").hex()} 78 56 34 12  ; mov dword [DATA], 0x12345678
        e6 f4                                                 ; out 0xf4, al
        """
    ) as guest:
        guest.run_to_done()
        assert guest.counter() == 0x12345678
