"""Handlers as a guest meets them: in C, in Python, ones that raise and ones that break their contract."""

from __future__ import annotations

import gc
import sys
import threading
import traceback

import pytest

from chv.devices._timer import PmTimer
from chv.errors import BusError, DeviceError

from .guest import DATA, Recorder, TinyGuest, eventually, run_code

MMIO = 0x20000000

READ_PORT = """
    e5 40           ; in eax, 0x40
    e6 f4           ; out 0xf4, al
"""
WRITE_PORT = """
    e7 40           ; out 0x40, eax
    e6 f4           ; out 0xf4, al
"""
READ_MMIO = """
    8b 07           ; mov eax, [edi]
    e6 f4           ; out 0xf4, al
"""
WRITE_MMIO = """
    89 07           ; mov [edi], eax
    e6 f4           ; out 0xf4, al
"""
ACCESSES = {"port read": READ_PORT, "port write": WRITE_PORT, "read": READ_MMIO, "write": WRITE_MMIO}

# count in [DATA] how often port 0x40 was read
COUNT_READS = f"""
    e4 40                                        ; again: in al, 0x40
    ff 05 {DATA.to_bytes(4, "little").hex()}     ; inc dword [DATA]
    eb f6                                        ; jmp again
"""


class Failing:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def read(self, offset: int, size: int) -> int:
        raise self.error

    def write(self, offset: int, size: int, value: int) -> None:
        raise self.error


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("kind", [RuntimeError, DeviceError, KeyboardInterrupt, SystemExit])
def test_what_a_handler_raises_stops_the_vcpu_and_is_reported(access: str, kind: type[BaseException]) -> None:
    error = kind("the disk is on fire")
    with TinyGuest(ACCESSES[access], registers={"rdi": MMIO}) as guest:
        guest.pio.add(0x40, 4, Failing(error))
        guest.mmio.add(MMIO, 4, Failing(error))
        report = guest.run()
        with pytest.raises(RuntimeError, match="no handler raised"):
            guest.vcpus[0].run.take_exception()
    assert report.outcome == "exception"
    assert report.error is error
    frames = traceback.extract_tb(error.__traceback__)
    assert (frames[-1].filename, frames[-1].name) == (__file__, "read" if "read" in access else "write")


def test_an_exception_that_nobody_takes_is_given_back() -> None:
    error = RuntimeError()
    before = sys.getrefcount(error)
    device = Failing(error)
    with TinyGuest(COUNT_READS) as guest:
        guest.pio.add(0x40, 4, device)
        assert guest.vcpus[0].run.run() == "exception"
        assert guest.vcpus[0].run.run() == "exception"
    del guest
    error.__traceback__ = None
    device.error = ValueError()
    gc.collect()
    assert sys.getrefcount(error) <= before


def test_an_exception_in_the_middle_of_a_string_drops_the_rest() -> None:
    class Third(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            super().write(offset, size, value)
            if len(self.writes) == 3:
                raise RuntimeError("third")

    device = Third()
    code = "66 ba 40 00 ; mov dx, 0x40\n f3 6e ; rep outsb"
    with TinyGuest(code, registers={"rsi": DATA, "rcx": 10}) as guest:
        guest.pio.add(0x40, 4, device)
        report = guest.run()
    assert str(report.error) == "third"
    assert len(device.writes) == 3


class Returns:
    def __init__(self, value: object) -> None:
        self.value = value

    def read(self, offset: int, size: int) -> object:
        return self.value

    def write(self, offset: int, size: int, value: int) -> object:
        return self.value


@pytest.mark.parametrize(
    "value", [None, -1, 1 << 32, 1 << 64, 1 << 200, "12", b"\0\0\0\0", 1.0, [], object()]
)
@pytest.mark.parametrize("access", ["port read", "read"])
def test_a_read_that_returns_no_number_of_its_width_names_the_handler(access: str, value: object) -> None:
    with TinyGuest(ACCESSES[access], registers={"rdi": MMIO}) as guest:
        guest.pio.add(0x40, 4, Returns(value))  # type: ignore[arg-type]
        guest.mmio.add(MMIO, 4, Returns(value))  # type: ignore[arg-type]
        report = guest.run()
    assert report.outcome == "exception"
    assert isinstance(report.error, DeviceError)
    text = str(report.error)
    assert "Returns.read(0x0, 4) returned" in text
    assert "allowed is an integer from 0 to 0xffffffff" in text


@pytest.mark.parametrize("value", [0, 1, True, (1 << 32) - 1])
def test_the_edges_of_a_width_are_allowed(value: int) -> None:
    assert run_code(READ_PORT, pio={0x40: (4, Returns(value))})["rax"] == value  # type: ignore[dict-item]


def test_what_write_returns_does_not_matter() -> None:
    run_code(WRITE_PORT, pio={0x40: (4, Returns("junk"))})  # type: ignore[dict-item]


def test_handlers_in_c_and_in_python_side_by_side() -> None:
    python = Recorder(0x5A)
    code = f"""
        66 ba 08 06     ; mov dx, 0x608
        ed              ; in eax, dx
        89 c3           ; mov ebx, eax
        e4 40           ; in al, 0x40
        ed              ; in eax, dx
        ff 05 {DATA.to_bytes(4, "little").hex()}  ; inc dword [DATA]
        83 3d {DATA.to_bytes(4, "little").hex()} 64  ; cmp dword [DATA], 100
        75 eb           ; jne to the first in
        e6 f4           ; out 0xf4, al
    """
    with TinyGuest(code) as guest:
        guest.pio.add(0x608, 4, PmTimer(), "pm-timer")
        guest.pio.add(0x40, 1, python, "python")
        registers = guest.run_to_done()
        exits = guest.exits()
    assert registers["rax"] > registers["rbx"]
    assert len(python.reads) == exits.devices["python"].reads == 100
    assert exits.devices["pm-timer"].reads == 200


def test_an_overlap_is_refused_and_the_guest_goes_on() -> None:
    with TinyGuest(COUNT_READS) as guest:
        guest.pio.add(0x40, 4, Recorder(), "first")
        guest.start()
        for base, size in ((0x40, 4), (0x3F, 2), (0x43, 1), (0, 0x10000)):
            with pytest.raises(BusError, match="overlaps"):
                guest.pio.add(base, size, Recorder(), "second")
        before = guest.counter()
        eventually(lambda: guest.counter() > before)


def test_a_range_added_while_the_guest_runs_is_used() -> None:
    # al keeps what port 0x40 gave last: all ones until something claims it.
    code = f"""
        e4 40                                     ; again: in al, 0x40
        a2 {DATA.to_bytes(4, "little").hex()}     ; mov [DATA], al
        eb f7                                     ; jmp again
    """
    with TinyGuest(code) as guest:
        guest.start()
        eventually(lambda: guest.counter(size=1) == 0xFF)
        guest.pio.add(0x40, 1, Recorder(0x11))
        eventually(lambda: guest.counter(size=1) == 0x11)
        guest.pio.remove(0x40)
        eventually(lambda: guest.counter(size=1) == 0xFF)
        guest.pio.add(0x3F, 2, Recorder(0x22))
        eventually(lambda: guest.counter(size=1) == 0x22)


def test_ranges_come_and_go_under_load() -> None:
    device = Recorder()
    with TinyGuest(COUNT_READS) as guest:
        guest.pio.add(0x40, 1, device, "device")
        guest.start()
        for round_ in range(300):
            guest.pio.add(0x100 + round_ % 7 * 16, 16, Recorder(), "moving")
            guest.pio.remove(0x100 + round_ % 7 * 16)
        eventually(lambda: len(device.reads) > 100)
        guest.pause()
        # The pending read was carried out, so at most its inc is still to come.
        assert len(device.reads) - guest.counter() in (0, 1)


def test_handlers_may_be_called_by_several_vcpus_at_once() -> None:
    inside = threading.Semaphore(0)
    seen: list[int] = []

    class Slow:
        """Answers one vCPU only while the other one waits in here too."""

        def read(self, offset: int, size: int) -> int:
            seen.append(threading.get_ident())
            inside.release()
            eventually(lambda: len(seen) >= 2)
            return 0

        def write(self, offset: int, size: int, value: int) -> None:
            raise AssertionError("nobody writes")

    device = Slow()
    with TinyGuest("e4 40 ; in al, 0x40\n e6 f4 ; out 0xf4, al", vcpus=2, mode="real") as guest:
        guest.pio.add(0x40, 1, device)
        second = guest.vcpus[1].kvm
        special = second.special_registers()
        special["cs"].update(base=0, selector=0)
        second.set_special_registers(special)
        second.set_registers({"rip": 0x1000, "rflags": 2})
        second.set_mp_state("runnable")
        guest.run_to_done()
    assert len(set(seen)) == 2
