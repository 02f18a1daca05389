"""Interrupts from eventfds, and processors that start and interrupt each other."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from chv.interrupts import Irq

from .conftest import open_descriptors
from .guest import TinyGuest, eventually, machine_code

HANDLER = 0x3000
AP_CODE = 0x2000  # SIPI vector 2
STARTED = 0xF000  # set by the second vCPU, or the number of those that started
COUNT = 0xF002  # interrupts that the second vCPU took
READY = 0xF004

X2APIC_ON_32 = """
    b9 1b 00 00 00     ; mov ecx, IA32_APIC_BASE
    0f 32              ; rdmsr
    0d 00 04 00 00     ; or eax, 1 << 10 (x2APIC)
    0f 30              ; wrmsr
    b9 0f 08 00 00     ; mov ecx, 0x80f (spurious interrupt vector)
    b8 ff 01 00 00     ; mov eax, 0x1ff (on)
    31 d2              ; xor edx, edx
    0f 30              ; wrmsr
    b9 30 08 00 00     ; mov ecx, 0x830 (interrupt command)
"""
X2APIC_ON_16 = """
    66 b9 1b 00 00 00  ; mov ecx, IA32_APIC_BASE
    0f 32              ; rdmsr
    66 0d 00 04 00 00  ; or eax, 1 << 10 (x2APIC)
    0f 30              ; wrmsr
    66 b9 0f 08 00 00  ; mov ecx, 0x80f (spurious interrupt vector)
    66 b8 ff 01 00 00  ; mov eax, 0x1ff (on)
    66 31 d2           ; xor edx, edx
    0f 30              ; wrmsr
"""
BOOT_OTHER = (
    X2APIC_ON_32
    + """
    ba 01 00 00 00        ; mov edx, 1 (APIC id)
    b8 00 45 00 00        ; mov eax, INIT
    0f 30                 ; wrmsr
    b8 02 46 00 00        ; mov eax, SIPI, page 2
    0f 30                 ; wrmsr
    66 83 3d 00 f0 00 00 01  ; wait: cmp word [0xf000], 1
    75 f6                 ; jne wait
"""
)

# The second vCPU counts interrupts in real mode: KVM's emulator delivers none in protected mode.
LISTEN = (
    X2APIC_ON_16
    + """
    31 c0              ; xor ax, ax
    8e d0              ; mov ss, ax
    bc 00 70           ; mov sp, 0x7000
    c7 06 00 f0 01 00  ; mov word [STARTED], 1
    fb                 ; sti
    f4                 ; again: hlt
    eb fd              ; jmp again
"""
)
COUNT_AND_RETURN = """
    ff 06 02 f0        ; inc word [COUNT]
    66 b9 0b 08 00 00  ; mov ecx, 0x80b (end of interrupt)
    66 31 c0           ; xor eax, eax
    66 31 d2           ; xor edx, edx
    0f 30              ; wrmsr
    cf                 ; iret
"""
VECTOR = 0x41


def put_listener(guest: TinyGuest) -> None:
    """What the second vCPU does after its SIPI, and its handler in the real-mode interrupt table."""
    guest.memory.write(AP_CODE, machine_code(LISTEN))
    guest.memory.write(HANDLER, machine_code(COUNT_AND_RETURN))
    guest.memory.write(VECTOR * 4, struct.pack("<HH", HANDLER, 0))


@contextlib.contextmanager
def listening_guest(irq: Irq) -> Iterator[TinyGuest]:
    """A guest whose second vCPU is halted and counts the interrupts that come from ``irq``'s I/O APIC pin."""
    low = 0x10 + 2 * irq.gsi
    program = f"""
        c7 05 00 00 c0 fe {low + 1:02x} 00 00 00  ; mov dword [0xfec00000], high word of the pin's entry
        c7 05 10 00 c0 fe 00 00 00 01             ; mov dword [0xfec00010], destination 1
        c7 05 00 00 c0 fe {low:02x} 00 00 00      ; mov dword [0xfec00000], low word
        c7 05 10 00 c0 fe {VECTOR:02x} 00 00 00   ; mov dword [0xfec00010], edge, fixed, vector
        c6 05 04 f0 00 00 01                      ; mov byte [READY], 1
        f4                                        ; hlt
    """
    with TinyGuest(BOOT_OTHER + program, vcpus=2) as guest:
        put_listener(guest)
        irq.bind(guest.vm)
        guest.start()
        eventually(lambda: guest.counter(READY, 1) == 1)
        yield guest


@pytest.fixture
def irq() -> Iterator[Irq]:
    irq = Irq(5)
    yield irq
    irq.close()


def count(guest: TinyGuest) -> int:
    return guest.counter(COUNT, 2)


@pytest.mark.parametrize("gsi", [1, 4, 5, 8, 23])
def test_an_eventfd_wakes_a_halted_vcpu(gsi: int) -> None:
    irq = Irq(gsi)
    try:
        with listening_guest(irq) as guest:
            for expected in range(1, 51):
                irq.pulse()
                eventually(lambda expected=expected: count(guest) == expected)
            time.sleep(0.02)
            assert count(guest) == 50
            assert guest.exits().count == 0
    finally:
        irq.close()


def test_any_thread_may_pulse(irq: Irq) -> None:
    with listening_guest(irq) as guest:
        threads = [threading.Thread(target=irq.pulse) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Edges that come while one is pending are one.
        eventually(lambda: 1 <= count(guest) <= 8)


def test_what_was_raised_before_binding_is_forgotten(irq: Irq) -> None:
    irq.pulse()
    with listening_guest(irq) as guest:
        time.sleep(0.05)
        assert count(guest) == 0
        irq.pulse()
        eventually(lambda: count(guest) == 1)


def test_an_interrupt_serves_one_machine_after_another(irq: Irq) -> None:
    for _ in range(3):
        with listening_guest(irq) as guest:
            irq.pulse()
            eventually(lambda guest=guest: count(guest) == 1)


def test_an_interrupt_waits_while_the_guest_is_paused(irq: Irq) -> None:
    with listening_guest(irq) as guest:
        guest.pause()
        irq.pulse()
        time.sleep(0.02)
        assert count(guest) == 0
        guest.resume()
        eventually(lambda: count(guest) == 1)


def test_a_closed_interrupt_gives_its_descriptor_back() -> None:
    before = open_descriptors()
    irq = Irq(5)
    assert irq.fd >= 0
    irq.close()
    irq.close()
    assert open_descriptors() == before


def test_the_old_interrupt_controller_reaches_the_boot_vcpu(irq: Irq) -> None:
    # Real mode and the PIC, as a PC's firmware leaves them: LINT0 takes external interrupts.
    code = """
        b0 11  ; mov al, 0x11
        e6 20  ; out 0x20, al (ICW1)
        b0 20  ; mov al, 0x20
        e6 21  ; out 0x21, al (ICW2: vectors from 0x20)
        b0 04  ; mov al, 4
        e6 21  ; out 0x21, al (ICW3)
        b0 01  ; mov al, 1
        e6 21  ; out 0x21, al (ICW4)
        b0 00  ; mov al, 0
        e6 21  ; out 0x21, al (nothing masked)
        fb     ; sti
        f4     ; again: hlt
        eb fd  ; jmp again
    """
    with TinyGuest(code, mode="real") as guest:
        guest.memory.write(0x25 * 4, struct.pack("<HH", HANDLER, 0))
        guest.memory.write(HANDLER, machine_code("b0 2a ; mov al, 42\n e6 f4 ; out 0xf4, al"))
        irq.bind(guest.vm)
        guest.start()
        time.sleep(0.02)
        irq.pulse()
        report = guest.wait()
        assert (report.outcome, report.value) == ("done", 42)


# -- several vCPUs --------------------------------------------------------------------


def test_init_and_sipi_start_a_vcpu_and_ipis_reach_it() -> None:
    send = f"""
        31 f6                 ; xor esi, esi
        b8 {VECTOR:02x} 40 00 00  ; again: mov eax, fixed, vector
        0f 30                 ; wrmsr
        46                    ; inc esi
        66 39 35 02 f0 00 00  ; wait: cmp [COUNT], si
        75 f7                 ; jne wait
        83 fe 64              ; cmp esi, 100
        75 ea                 ; jne again
        e6 f4                 ; out 0xf4, al
    """
    with TinyGuest(BOOT_OTHER + send, vcpus=2) as guest:
        put_listener(guest)
        assert guest.vcpus[1].kvm.mp_state() == "uninitialized"
        guest.run_to_done(30)
        assert count(guest) == 100
        assert guest.vcpus[1].kvm.mp_state() in ("halted", "runnable")


def test_online_tells_waiting_running_and_stopped_processors_apart() -> None:
    # The second vCPU runs, then halts with interrupts off, as Linux leaves an offline CPU.
    with TinyGuest(BOOT_OTHER + "eb fe ; jmp $", vcpus=3) as guest:
        guest.memory.write(
            AP_CODE,
            machine_code("""
                c7 06 00 f0 01 00  ; mov word [STARTED], 1
                83 3e 04 f0 00     ; wait: cmp word [READY], 0
                74 f9              ; je wait
                fa                 ; cli
                f4                 ; hlt
            """),
        )
        guest.start()

        def online() -> list[bool | None]:
            for vcpu in guest.vcpus:
                vcpu.ask_online()
            return [vcpu.online() for vcpu in guest.vcpus]

        eventually(lambda: online() == [True, True, False])
        guest.memory.write(READY, b"\1\0")
        eventually(lambda: online() == [True, False, False])
        guest.vcpus[0].stop()
        guest.vcpus[0].join()
        assert online() == [False, False, False]


def test_a_vcpu_that_was_powered_up_again_waits_for_init() -> None:
    with TinyGuest(BOOT_OTHER + "e6 f4 ; out 0xf4, al", vcpus=2) as guest:
        other = guest.vcpus[1]
        guest.memory.write(AP_CODE, machine_code("c7 06 00 f0 01 00 ; mov word [STARTED], 1\n eb fe ; jmp $"))
        for _ in range(3):
            guest.memory.write(STARTED, b"\0\0")
            guest.run_to_done()
            assert guest.counter(STARTED, 2) == 1
            assert other.kvm.mp_state() == "runnable"
            for vcpu in guest.vcpus:
                vcpu.stop()
                vcpu.join()
            other.power_up()
            assert other.kvm.mp_state() == "uninitialized"
            guest.load(BOOT_OTHER + "e6 f4 ; out 0xf4, al")


def test_254_vcpus_are_created_started_and_stopped() -> None:
    # All but the first get INIT and SIPI at once, count themselves and halt.
    descriptors, threads = len(open_descriptors()), threading.active_count()
    code = """
        c7 05 f0 00 e0 fe ff 01 00 00  ; mov dword [0xfee000f0], 0x1ff
        c7 05 00 03 e0 fe 00 45 0c 00  ; mov dword [0xfee00300], INIT to all others
        c7 05 00 03 e0 fe 02 46 0c 00  ; mov dword [0xfee00300], SIPI to all others
        66 81 3d 00 f0 00 00 fd 00     ; wait: cmp word [STARTED], 253
        75 f5                          ; jne wait
        e6 f4                          ; out 0xf4, al
    """
    start = time.monotonic()
    with TinyGuest(code, vcpus=254) as guest:
        guest.memory.write(
            AP_CODE,
            machine_code("f0 ff 06 00 f0 ; lock inc word [STARTED]\n fa ; cli\n f4 ; hlt"),
        )
        created = time.monotonic()
        # One descriptor for each, and KVM's two.
        assert len(open_descriptors()) == descriptors + 256
        guest.run_to_done(30)
        ran = time.monotonic()
        assert guest.counter(STARTED, 2) == 253
        assert threading.active_count() == threads + 254
    stopped = time.monotonic()
    print(f"created {created - start:.2f} s, ran {ran - created:.2f} s, stopped {stopped - ran:.2f} s")
    assert len(open_descriptors()) == descriptors
    assert threading.active_count() == threads
    assert stopped - start < 20


def resident_pages() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1])


def test_fifty_machines_leave_nothing_behind() -> None:
    def once() -> None:
        irq = Irq(5)
        with TinyGuest("e4 40 ; in al, 0x40\n e6 f4 ; out 0xf4, al", vcpus=3) as guest:
            irq.bind(guest.vm)
            guest.run_to_done()
        irq.close()

    for _ in range(5):
        once()
    descriptors, threads, pages = open_descriptors(), threading.active_count(), resident_pages()
    for _ in range(50):
        once()
    assert open_descriptors() == descriptors
    assert threading.active_count() == threads
    assert (resident_pages() - pages) * os.sysconf("SC_PAGE_SIZE") < 8 << 20
