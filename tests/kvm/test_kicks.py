"""Stopping a vCPU at any moment: nothing lost, nothing done twice, and its state can be read."""

from __future__ import annotations

import random
import threading
import time

import pytest

from .guest import CODE, DATA, Recorder, TinyGuest, eventually

MMIO = 0x20000000

COUNTER = DATA.to_bytes(4, "little").hex()
COUNT_PORT = """
    40              ; again: inc eax
    e7 40           ; out 0x40, eax
    e5 44           ; in eax, 0x44
    eb f9           ; jmp again
"""
COUNT_MMIO = """
    40              ; again: inc eax
    89 07           ; mov [edi], eax
    8b 47 04        ; mov eax, [edi + 4]
    eb f8           ; jmp again
"""


class Echo:
    """Holds the last number written; every write must be the one after the last."""

    def __init__(self) -> None:
        self.last = 0
        self.reads = 0
        self.wrong: list[tuple[int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.reads += 1
        return self.last

    def write(self, offset: int, size: int, value: int) -> None:
        if value != self.last + 1:
            self.wrong.append((self.last, value))
        self.last = value


def kick_often(guest: TinyGuest, count: int) -> None:
    for _ in range(count):
        guest.vcpus[0].run.kick()


@pytest.mark.parametrize("code", [COUNT_PORT, COUNT_MMIO], ids=["port", "mmio"])
def test_no_access_is_lost_or_doubled_by_kicks(code: str) -> None:
    device = Echo()
    with TinyGuest(code, registers={"rdi": MMIO}) as guest:
        guest.pio.add(0x40, 8, device)
        guest.mmio.add(MMIO, 8, device)
        guest.start()
        kickers = [threading.Thread(target=kick_often, args=(guest, 5000)) for _ in range(2)]
        for thread in kickers:
            thread.start()
        for thread in kickers:
            thread.join()
        before = device.last
        eventually(lambda: device.last > before + 100)
        guest.pause()
        registers = guest.vcpus[0].kvm.registers()
    assert device.wrong == []
    # eax is the number that was written last, or the next one if it is about to be written.
    assert registers["rax"] - device.last in (0, 1)
    assert device.last - device.reads in (0, 1)


@pytest.mark.parametrize("code", [COUNT_PORT, COUNT_MMIO], ids=["port", "mmio"])
def test_no_access_is_lost_or_doubled_by_pauses(code: str) -> None:
    device = Echo()
    dice = random.Random(1)
    with TinyGuest(code, registers={"rdi": MMIO}) as guest:
        guest.pio.add(0x40, 8, device)
        guest.mmio.add(MMIO, 8, device)
        guest.start()
        for _ in range(300):
            guest.pause()
            last, reads = device.last, device.reads
            registers = guest.vcpus[0].kvm.registers()
            assert registers["rax"] - last in (0, 1)
            assert last - reads in (0, 1)
            assert CODE <= registers["rip"] < CODE + 8
            guest.resume()
            if dice.random() < 0.3:
                time.sleep(dice.random() * 0.001)
        eventually(lambda: device.last > last)
        guest.pause()
    assert device.wrong == []


class PausedWhileReading:
    """Asks its vCPU to stand still while the guest waits for the answer."""

    def __init__(self, guest: TinyGuest, value: int) -> None:
        self.guest = guest
        self.value = value

    def read(self, offset: int, size: int) -> int:
        self.guest.vcpus[0].pause()
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.guest.vcpus[0].pause()


@pytest.mark.parametrize(
    ("code", "behind", "rax"),
    [
        ("e4 40           ; in al, 0x40", 2, 0x55AA00DD),
        ("66 e5 40        ; in ax, 0x40", 3, 0x55AACCDD),
        ("e5 40           ; in eax, 0x40", 2, 0xAABBCCDD),
        ("e7 40           ; out 0x40, eax", 2, 0x55AA0000),
        ("8a 07           ; mov al, [edi]", 2, 0x55AA00DD),
        ("8b 07           ; mov eax, [edi]", 2, 0xAABBCCDD),
        ("8b 87 fe 0f 00 00  ; mov eax, [edi + 0xffe] (two parts)", 6, 0xCCDDCCDD),
        ("0f b6 07        ; movzx eax, byte [edi]", 3, 0xDD),
        ("89 07           ; mov [edi], eax", 2, 0x55AA0000),
    ],
)
def test_a_pending_access_is_completed_before_state_is_read(code: str, behind: int, rax: int) -> None:
    with TinyGuest(code, registers={"rdi": MMIO, "rax": 0x55AA0000}) as guest:

        class Device(PausedWhileReading):
            def read(self, offset: int, size: int) -> int:
                return super().read(offset, size) & (1 << 8 * size) - 1

        device = Device(guest, 0xAABBCCDD)
        guest.pio.add(0x40, 4, device)
        guest.mmio.add(MMIO, 0x2000, device)
        guest.start()
        assert guest.vcpus[0].wait_parked(10)
        registers = guest.vcpus[0].kvm.registers()
        assert (registers["rip"] - CODE, registers["rax"]) == (behind, rax)


def test_a_string_stands_between_two_elements() -> None:
    with TinyGuest(
        "66 ba 40 00 ; mov dx, 0x40\n f3 6c ; rep insb\n e6 f4 ; out 0xf4, al",
        registers={"rdi": DATA, "rcx": 10000},
    ) as guest:

        class Device(PausedWhileReading):
            def read(self, offset: int, size: int) -> int:
                self.value += 1
                return super().read(offset, size) & 0xFF

        device = Device(guest, 0)
        guest.pio.add(0x40, 1, device)
        guest.start()
        rounds = 0
        while guest.reports.empty():
            assert guest.vcpus[0].wait_parked(10)
            registers = guest.vcpus[0].kvm.registers()
            assert registers["rdi"] - DATA == 10000 - registers["rcx"] == device.value
            rounds += 1
            guest.resume()
            time.sleep(0.0005)
        assert rounds > 2
        assert guest.wait().outcome == "done"
        assert guest.memory.read(DATA, 10000) == bytes(i & 0xFF for i in range(1, 10001))


def test_a_paused_guest_stands_still_until_it_is_resumed() -> None:
    device = Recorder()
    with TinyGuest(f"ff 05 {COUNTER} ; again: inc dword [DATA]\n eb f8 ; jmp again") as guest:
        guest.pio.add(0x40, 8, device)
        guest.start()
        for _ in range(5):
            eventually(lambda: guest.counter() > 0)
            guest.pause()
            before = guest.counter()
            time.sleep(0.02)
            assert guest.counter() == before
            guest.resume()
            eventually(lambda start=before: guest.counter() > start)


def test_a_vcpu_can_be_started_paused() -> None:
    with TinyGuest("e6 f4 ; out 0xf4, al") as guest:
        vcpu = guest.vcpus[0]
        vcpu.start(paused=True)
        assert vcpu.wait_parked(10)
        assert vcpu.kvm.registers()["rip"] == CODE
        vcpu.resume()
        assert guest.wait().outcome == "done"


def test_a_halted_vcpu_can_be_paused_resumed_and_stopped() -> None:
    with TinyGuest("fa ; cli\n f4 ; hlt") as guest:
        vcpu = guest.vcpus[0]
        guest.start()
        for _ in range(200):
            guest.pause()
            guest.resume()

        def halted() -> bool:
            guest.pause()
            state = vcpu.kvm.mp_state()
            guest.resume()
            time.sleep(0.001)
            return state == "halted"

        eventually(halted)
        guest.pause()
        assert vcpu.kvm.mp_state() == "halted"
        assert vcpu.kvm.registers()["rip"] == CODE + 2
        vcpu.stop()
        vcpu.join()
        assert not vcpu.running


def test_a_kick_before_run_is_not_lost() -> None:
    with TinyGuest("eb fe ; jmp $") as guest:
        run = guest.vcpus[0].run
        run.kick()
        assert run.run() == "kicked"
        assert run.run() == "kicked"
        run.rearm()
        timer = threading.Timer(0.05, run.kick)
        timer.start()
        assert run.run() == "kicked"
        timer.join()


def test_start_and_stop_race_with_pause_and_questions() -> None:
    with TinyGuest("eb fe ; jmp $") as guest:
        vcpu = guest.vcpus[0]
        over = threading.Event()

        def disturb() -> None:
            while not over.is_set():
                vcpu.pause()
                vcpu.ask_online()
                vcpu.resume()

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            for _ in range(100):
                vcpu.start()
                vcpu.stop()
                vcpu.join()
        finally:
            over.set()
            thread.join()
        assert not vcpu.running
