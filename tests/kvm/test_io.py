"""Port I/O from a guest: widths, string instructions, edges of ranges, ports that nobody claims."""

from __future__ import annotations

import pytest

from .guest import DATA, Recorder, TinyGuest, run_code

# mov dx, PORT; the access; out 0xf4, al
OUT = {1: "ee", 2: "66 ef", 4: "ef"}  # out dx, al / ax / eax
IN = {1: "ec", 2: "66 ed", 4: "ed"}  # in al / ax / eax, dx


def out_to(port: int, size: int) -> str:
    return f"""
        66 ba {port & 0xFF:02x} {port >> 8:02x}  ; mov dx, PORT
        b8 44 33 22 11                           ; mov eax, 0x11223344
        {OUT[size]}                              ; out dx, al / ax / eax
        e6 f4                                    ; out 0xf4, al
    """


def in_from(port: int, size: int) -> str:
    return f"""
        66 ba {port & 0xFF:02x} {port >> 8:02x}  ; mov dx, PORT
        b8 44 33 22 11                           ; mov eax, 0x11223344
        {IN[size]}                               ; in al / ax / eax, dx
        e6 f4                                    ; out 0xf4, al
    """


@pytest.mark.parametrize(("size", "value"), [(1, 0x44), (2, 0x3344), (4, 0x11223344)])
def test_out_brings_as_many_bytes_as_its_width(size: int, value: int) -> None:
    device = Recorder()
    run_code(out_to(0x300, size), pio={0x300: (4, device)})
    assert device.writes == [(0, size, value)]
    assert device.reads == []


@pytest.mark.parametrize(("size", "value"), [(1, 0x112233DD), (2, 0x1122CCDD), (4, 0xAABBCCDD)])
def test_in_changes_as_many_bytes_of_the_register_as_its_width(size: int, value: int) -> None:
    device = Recorder(0xAABBCCDD)
    registers = run_code(in_from(0x300, size), pio={0x300: (4, device)})
    assert registers["rax"] == value
    assert device.reads == [(0, size)]


def test_real_mode_reaches_ports_too() -> None:
    device = Recorder(0x5A)
    registers = run_code(
        """
        b0 01       ; mov al, 1
        e6 10       ; out 0x10, al
        e4 11       ; in al, 0x11
        e6 f4       ; out 0xf4, al
        """,
        mode="real",
        pio={0x10: (2, device)},
    )
    assert (device.writes, device.reads) == ([(0, 1, 1)], [(1, 1)])
    assert registers["rax"] & 0xFF == 0x5A


@pytest.mark.parametrize(("port", "offset"), [(0x300, 0), (0x302, 2), (0x303, 3)])
def test_offsets_count_from_the_range(port: int, offset: int) -> None:
    device = Recorder()
    run_code(out_to(port, 1), pio={0x300: (4, device)})
    assert device.writes == [(offset, 1, 0x44)]


@pytest.mark.parametrize(
    ("port", "size"),
    [(0x2FF, 1), (0x2FF, 2), (0x2FE, 4), (0x304, 1), (0x303, 2), (0x301, 4), (0xFFFF, 1), (0xFFFF, 4)],
)
def test_what_leaves_a_range_is_nobodys(port: int, size: int) -> None:
    device = Recorder(0)
    with TinyGuest(in_from(port, size)) as guest:
        guest.pio.add(0x300, 4, device, "device")
        registers = guest.run_to_done()
        exits = guest.exits()
    ones = (1 << 8 * size) - 1
    assert registers["rax"] == 0x11223344 & ~ones | ones
    assert device.reads == []
    assert exits.reasons["unclaimed-pio"].reads == 1
    assert "device" not in exits.devices


def test_writes_to_nobody_are_dropped_and_counted() -> None:
    with TinyGuest(out_to(0x300, 4)) as guest:
        guest.run_to_done()
        assert guest.exits().reasons["unclaimed-pio"].writes == 1


def test_an_access_over_two_neighbours_is_nobodys() -> None:
    low, high = Recorder(0), Recorder(0)
    registers = run_code(in_from(0x301, 2), pio={0x300: (2, low), 0x302: (2, high)})
    assert registers["rax"] == 0x1122FFFF
    assert low.reads == high.reads == []


def test_the_last_port_can_be_claimed() -> None:
    device = Recorder(0x77)
    registers = run_code(in_from(0xFFFF, 1), pio={0xFFFF: (1, device)})
    assert registers["rax"] & 0xFF == 0x77


STRINGS = """
    {direction}                 ; cld or std
    66 ba 00 03                 ; mov dx, 0x300
    f3 {instruction}            ; rep outs / ins
    e6 f4                       ; out 0xf4, al
"""


def pattern(length: int) -> bytes:
    return bytes((i * 7 + 3) & 0xFF for i in range(length))


def elements(data: bytes, size: int) -> list[int]:
    return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]


@pytest.mark.parametrize(("size", "instruction"), [(1, "6e"), (2, "66 6f"), (4, "6f")])
@pytest.mark.parametrize("start", [DATA, DATA + 0xFFC, DATA + 0x800])
def test_rep_outs_brings_every_element_once_and_in_order(size: int, instruction: str, start: int) -> None:
    device, count = Recorder(), 3000
    code = STRINGS.format(direction="fc", instruction=instruction)
    with TinyGuest(code, registers={"rsi": start, "rcx": count}) as guest:
        guest.pio.add(0x300, 4, device)
        guest.memory.write(start, pattern(count * size))
        registers = guest.run_to_done()
    assert [value for _, _, value in device.writes] == elements(pattern(count * size), size)
    assert {write[:2] for write in device.writes} == {(0, size)}
    assert (registers["rcx"], registers["rsi"]) == (0, start + count * size)


class Counting(Recorder):
    """Reads as 1, 2, 3, ..."""

    def read(self, offset: int, size: int) -> int:
        super().read(offset, size)
        return len(self.reads) & (1 << 8 * size) - 1


@pytest.mark.parametrize(("size", "instruction"), [(1, "6c"), (2, "66 6d"), (4, "6d")])
@pytest.mark.parametrize("start", [DATA, DATA + 0xFFC])
def test_rep_ins_fills_memory_in_order(size: int, instruction: str, start: int) -> None:
    device, count = Counting(), 3000
    code = STRINGS.format(direction="fc", instruction=instruction)
    with TinyGuest(code, registers={"rdi": start, "rcx": count}) as guest:
        guest.pio.add(0x300, 4, device)
        registers = guest.run_to_done()
        found = elements(guest.memory.read(start, count * size), size)
    mask = (1 << 8 * size) - 1
    assert found == [i & mask for i in range(1, count + 1)]
    assert len(device.reads) == count
    assert (registers["rcx"], registers["rdi"]) == (0, start + count * size)


def test_backward_strings_run_down_in_memory() -> None:
    device = Recorder()
    with TinyGuest(
        STRINGS.format(direction="fd", instruction="66 6f"), registers={"rsi": DATA + 0x1008, "rcx": 0x20}
    ) as guest:
        guest.pio.add(0x300, 4, device)
        data = pattern(0x2000)
        guest.memory.write(DATA, data)
        registers = guest.run_to_done()
    expected = [int.from_bytes(data[a : a + 2], "little") for a in range(0x1008, 0x1008 - 0x40, -2)]
    assert [value for _, _, value in device.writes] == expected
    assert registers["rsi"] == DATA + 0x1008 - 0x40


def test_backward_input_runs_down_in_memory() -> None:
    with TinyGuest(
        STRINGS.format(direction="fd", instruction="6c"), registers={"rdi": DATA + 0x1003, "rcx": 8}
    ) as guest:
        guest.pio.add(0x300, 4, Counting())
        guest.run_to_done()
        assert guest.memory.read(DATA + 0xFFB, 10) == bytes([0, 8, 7, 6, 5, 4, 3, 2, 1, 0])


def test_a_repeat_of_zero_does_nothing() -> None:
    device = Recorder()
    run_code(STRINGS.format(direction="fc", instruction="6e"), pio={0x300: (4, device)}, registers={"rcx": 0})
    assert device.writes == []


def test_strings_from_nobody_read_all_ones() -> None:
    with TinyGuest(
        STRINGS.format(direction="fc", instruction="6c"), registers={"rdi": DATA, "rcx": 100}
    ) as guest:
        guest.run_to_done()
        assert guest.memory.read(DATA, 101) == b"\xff" * 100 + b"\0"
