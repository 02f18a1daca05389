"""Port 0x80."""

from __future__ import annotations

import time

from chv.devices._debug_port import DebugPort


def test_it_gives_back_the_last_code() -> None:
    port = DebugPort()
    assert port.read(0, 1) == 0
    port.write(0, 1, 0x42)
    assert port.read(0, 1) == 0x42


def test_records_have_codes_and_times() -> None:
    port = DebugPort()
    before = time.monotonic_ns()
    for code in (0, 0x40, 0x41):
        port.write(0, 1, code)
    after = time.monotonic_ns()
    records = port.records()
    assert [code for code, _ in records] == [0, 0x40, 0x41]
    times = [ns for _, ns in records]
    assert times == sorted(times)
    assert before <= times[0]
    assert times[-1] <= after


def test_a_code_written_as_a_delay_is_one_record() -> None:
    port = DebugPort()
    for _ in range(1000):
        port.write(0, 1, 0x41)
    assert [code for code, _ in port.records()] == [0x41]
    assert port.writes == 1000


def test_a_guest_cannot_fill_the_hosts_memory() -> None:
    port = DebugPort()
    for i in range(10_000):
        port.write(0, 1, i & 0xFF)
    assert [code for code, _ in port.records()] == [i & 0xFF for i in range(10_000 - 256, 10_000)]


def test_save_load_and_reset() -> None:
    port = DebugPort()
    port.write(0, 1, 7)
    other = DebugPort()
    other.load(port.save())
    other.reset()
    assert other.read(0, 1) == 7
