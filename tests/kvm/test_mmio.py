"""Memory-mapped I/O from a guest: widths, edges, accesses that KVM hands over in parts."""

from __future__ import annotations

import pytest

from .guest import DATA, Mode, Recorder, TinyGuest, run_code

BASE = 0x20000000  # beyond RAM, inside the GiB that 64-bit programs have mapped
RDI = {"rdi": BASE}

WRITES: dict[int, tuple[Mode, str]] = {
    1: ("protected", "88 07     ; mov [edi], al"),
    2: ("protected", "66 89 07  ; mov [edi], ax"),
    4: ("protected", "89 07     ; mov [edi], eax"),
    8: ("long", "48 89 07  ; mov [rdi], rax"),
}
READS: dict[int, tuple[Mode, str]] = {
    1: ("protected", "8a 07     ; mov al, [edi]"),
    2: ("protected", "66 8b 07  ; mov ax, [edi]"),
    4: ("protected", "8b 07     ; mov eax, [edi]"),
    8: ("long", "48 8b 07  ; mov rax, [rdi]"),
}
END = "\n e6 f4 ; out 0xf4, al"


class Bytes:
    """Plain memory behind a bus, with a log of its accesses."""

    def __init__(self, size: int) -> None:
        self.data = bytearray((i * 11 + 5) & 0xFF for i in range(size))
        self.log: list[tuple[str, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("read", offset, size))
        assert offset + size <= len(self.data)
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("write", offset, size))
        assert offset + size <= len(self.data)
        self.data[offset : offset + size] = value.to_bytes(size, "little")


@pytest.mark.parametrize("size", WRITES)
def test_a_write_brings_as_many_bytes_as_its_width(size: int) -> None:
    mode, code = WRITES[size]
    device = Recorder()
    value = 0x8877665544332211 if mode == "long" else 0x44332211
    run_code(code + END, mode=mode, mmio={BASE: (8, device)}, registers={**RDI, "rax": value})
    assert device.writes == [(0, size, value & (1 << 8 * size) - 1)]


@pytest.mark.parametrize("size", READS)
def test_a_read_brings_as_many_bytes_as_its_width(size: int) -> None:
    mode, code = READS[size]
    device = Recorder(0xF8E7D6C5B4A39281)
    registers = run_code(code + END, mode=mode, mmio={BASE: (8, device)}, registers=RDI)
    assert device.reads == [(0, size)]
    assert registers["rax"] == 0xF8E7D6C5B4A39281 & (1 << 8 * size) - 1


def test_a_read_and_a_write_in_one_instruction() -> None:
    memory = Bytes(8)
    before = int.from_bytes(memory.data[:4], "little")
    run_code("83 07 05  ; add dword [edi], 5" + END, mmio={BASE: (8, memory)}, registers=RDI)
    assert memory.log == [("read", 0, 4), ("write", 0, 4)]
    assert int.from_bytes(memory.data[:4], "little") == before + 5


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("before_page", range(1, 8))
def test_an_access_across_a_page_is_whole(size: int, before_page: int) -> None:
    # KVM brings it in two parts, of 1 to 7 bytes each.
    memory = Bytes(0x2000)
    offset = 0x1000 - before_page
    mode, code = READS[size]
    expected = int.from_bytes(memory.data[offset : offset + size], "little")
    registers = run_code(
        code + END, mode=mode, mmio={BASE: (0x2000, memory)}, registers={"rdi": BASE + offset}
    )
    assert registers["rax"] == expected
    assert all(length in (1, 2, 4, 8) for _, _, length in memory.log)
    assert sum(length for _, _, length in memory.log) == size

    memory = Bytes(0x2000)
    mode, code = WRITES[size]
    value = 0x8877665544332211 if mode == "long" else 0x44332211
    run_code(
        code + END,
        mode=mode,
        mmio={BASE: (0x2000, memory)},
        registers={"rdi": BASE + offset, "rax": value},
    )
    expected_data = Bytes(0x2000).data
    expected_data[offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    assert memory.data == expected_data


@pytest.mark.parametrize("offset", [-1, -3, 0x0D, 0x0F, 0x10])
def test_what_leaves_a_range_is_nobodys(offset: int) -> None:
    device = Recorder(0)
    with TinyGuest(READS[4][1] + END, registers={"rdi": BASE + 0x100 + offset}) as guest:
        guest.mmio.add(BASE + 0x100, 0x10, device, "device")
        registers = guest.run_to_done()
        exits = guest.exits()
    assert registers["rax"] == 0xFFFFFFFF
    assert device.reads == []
    assert exits.reasons["unclaimed-mmio"].reads == 1


@pytest.mark.parametrize("offset", [0, 1, 5, 0x0C])
def test_the_whole_range_is_the_devices(offset: int) -> None:
    memory = Bytes(0x10)
    registers = run_code(
        READS[4][1] + END, mmio={BASE + 0x100: (0x10, memory)}, registers={"rdi": BASE + 0x100 + offset}
    )
    assert registers["rax"] == int.from_bytes(memory.data[offset : offset + 4], "little")


def test_an_access_over_a_page_and_out_of_the_range_is_half_answered() -> None:
    # The range ends with the page, where KVM cuts the access: the first part is the device's.
    device = Recorder(0)
    registers = run_code(READS[4][1] + END, mmio={BASE: (0x1000, device)}, registers={"rdi": BASE + 0xFFE})
    assert registers["rax"] == 0xFFFF0000
    assert device.reads == [(0xFFE, 2)]


def test_writes_to_nobody_are_dropped_and_counted() -> None:
    with TinyGuest(WRITES[4][1] + END, registers=RDI) as guest:
        guest.run_to_done()
        assert guest.exits().reasons["unclaimed-mmio"].writes == 1


@pytest.mark.parametrize(("size", "instruction"), [(1, "a4"), (2, "66 a5"), (4, "a5")])
def test_rep_movs_from_a_device_to_memory(size: int, instruction: str) -> None:
    device, count = Bytes(0x2000), 100
    start = 0x1000 - 40 * size  # over a page
    code = f"""
        fc              ; cld
        f3 {instruction}  ; rep movs
        e6 f4           ; out 0xf4, al
    """
    with TinyGuest(code, registers={"rsi": BASE + start, "rdi": DATA, "rcx": count}) as guest:
        guest.mmio.add(BASE, 0x2000, device)
        guest.run_to_done()
        assert guest.memory.read(DATA, count * size) == device.data[start : start + count * size]


def test_rep_movs_from_memory_to_a_device() -> None:
    device = Bytes(0x2000)
    code = """
        fc              ; cld
        f3 a4           ; rep movsb
        e6 f4           ; out 0xf4, al
    """
    with TinyGuest(code, registers={"rsi": DATA, "rdi": BASE + 0xFF0, "rcx": 0x20}) as guest:
        guest.mmio.add(BASE, 0x2000, device)
        guest.memory.write(DATA, bytes(range(0x20)))
        guest.run_to_done()
    assert device.data[0xFF0:0x1010] == bytes(range(0x20))
    assert len(device.log) == 0x20


def test_ports_and_memory_are_two_spaces() -> None:
    port, memory = Recorder(1), Recorder(2)
    registers = run_code(
        """
        e5 40           ; in eax, 0x40
        89 c3           ; mov ebx, eax
        8b 07           ; mov eax, [edi]
        e6 f4           ; out 0xf4, al
        """,
        pio={0x40: (4, port)},
        mmio={BASE: (4, memory)},
        registers=RDI,
    )
    assert (registers["rbx"], registers["rax"]) == (1, 2)
