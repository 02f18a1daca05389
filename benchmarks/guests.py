"""The guests of the exit benchmarks: machine code that times its own exits.

A guest reads its TSC before and after the instruction that exits and keeps the difference, so what
is measured is what a guest sees, by the same bytes whoever runs them. At the end it writes all
samples to COM1 and then a byte to port 0xf4::

    "CHVX", case number, count, ``count`` differences, ... "CHVE"        (32-bit little-endian numbers)

The code runs in 32-bit protected mode at 1 MiB. :func:`rom` wraps it as a firmware image of 64 KiB,
which starts at the reset vector (Intel SDM vol. 3A, 10.1.4) and copies it there; :func:`elf` as a
program for the PVH entry (Xen's docs/misc/pvh.pandoc). Instructions are written as bytes, with the assembly
behind the ``;``. The accesses go to QEMU's pci-testdev, which the guest places: 256 ports and a page
of memory (docs/specs/pci-testdev.txt there). Other VMMs have a device of their own at those addresses.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kvm.guest import machine_code

PIO = 0xC000
MMIO = 0xD0000000
REGISTER = 16  # where in both ranges the device's register is; byte 0 chooses a test
REGISTER_SIZE = 16
COM1 = 0x3F8
DONE_PORT = 0xF4
# Where pci-testdev has its ioeventfds when test 1 ("wildcard") is chosen: the two halves of a BAR
# are the description and the data, and each test has the byte of its number.
PIO_EVENT = PIO + 128 + 4
MMIO_EVENT = MMIO + 2048 + 1
PCI_SLOT = 0x10

REPEATED = 4  # bytes of a rep outsb
WAKE_GSI = 10
TEST_EVENT = 1  # what byte 0 is told: the ioeventfds are needed
TEST_WAKE = 2  # the guest will halt and wants to be woken
MEMORY_SIZE = 32 << 20

ENTRY = 0x100000
_STACK = 0x90000
_AP_STACK = 0x98000
_TRAMPOLINE = 0x9000
# What guest and host tell each other while the guest runs.
MAILBOX = 0x80000
MAILBOX_READY = MAILBOX  # how often the guest was about to halt
MAILBOX_STAMP = MAILBOX + 4  # the low half of the guest's TSC when the interrupt was raised
_AP_STATE = MAILBOX + 8  # 1: up
_ACK = MAILBOX + 12  # inter-processor interrupts taken
_SCRATCH = MAILBOX + 16
_IDT = 0x88000
_SAMPLES = 0x200000
_SAMPLES_END = MEMORY_SIZE
_SETTLE_TICKS = 100_000_000  # of the TSC: 20 to 50 ms

_IOAPIC = 0xFEC00000
_APIC = 0xFEE00000
_WAKE_VECTOR = 0x40
_IPI_VECTOR = 0x41
_MISC_ENABLE = 0x1A0

_SAMPLE_MAGIC = b"CHVX"
END_MAGIC = b"CHVE"


def _le(value: int, size: int = 4) -> str:
    return value.to_bytes(size, "little").hex()


@dataclass(frozen=True)
class Case:
    """One kind of exit: ``code`` is what lies between the two stamps, ``prepare`` what goes before it all.

    ``userspace_exit``: whether the VMM's process handles it. ``start`` is the register that
    keeps the first stamp, esi or ebx; the code leaves it, ebp, edi and esp alone.
    """

    name: str
    userspace_exit: bool
    code: str
    prepare: str = ""
    start: str = "esi"
    group: str = "single"
    access: tuple[str, int] | None = None  # the bus and how many bytes, if it is the device that is accessed


def _port(name: str, instruction: str, size: int) -> Case:
    return Case(
        name, True, f"ba {_le(PIO + REGISTER)} ; mov edx, PIO + REGISTER\n{instruction}", access=("pio", size)
    )


CASES = (
    Case("stamp", False, f"ba {_le(PIO)} ; mov edx, PIO: no exit, but what else lies between the stamps"),
    _port("outl_to_user", "ef ; out dx, eax", 4),
    _port("outw_to_user", "66 ef ; out dx, ax", 2),
    _port("outb_to_user", "ee ; out dx, al", 1),
    _port("inl_from_user", "ed ; in eax, dx", 4),
    _port("inw_from_user", "66 ed ; in ax, dx", 2),
    _port("inb_from_user", "ec ; in al, dx", 1),
    Case(
        "rep_outsb_to_user",
        True,
        f"""b9 {_le(REPEATED)} ; mov ecx, REPEATED
            be {_le(ENTRY)} ; mov esi, ENTRY
            ba {_le(PIO + REGISTER)} ; mov edx, PIO + REGISTER
            f3 6e ; rep outsb""",
        start="ebx",
        access=("pio", 1),
    ),
    Case("mmio_write", True, f"a3 {_le(MMIO + REGISTER)} ; mov [MMIO + REGISTER], eax", access=("mmio", 4)),
    Case("mmio_read", True, f"a1 {_le(MMIO + REGISTER)} ; mov eax, [MMIO + REGISTER]", access=("mmio", 4)),
    Case(
        "ioeventfd_pio",
        False,
        f"""ba {_le(PIO_EVENT)} ; mov edx, PIO_EVENT
            ee ; out dx, al""",
        prepare=f"""ba {_le(PIO)} ; mov edx, PIO
            b0 {_le(TEST_EVENT, 1)} ; mov al, TEST_EVENT
            ee ; out dx, al""",
    ),
    Case(
        "ioeventfd_mmio",
        False,
        f"a2 {_le(MMIO_EVENT)} ; mov [MMIO_EVENT], al",
        prepare=f"c6 05 {_le(MMIO)} {_le(TEST_EVENT, 1)} ; mov byte [MMIO], TEST_EVENT",
    ),
    Case("cpuid", False, "31 c0 ; xor eax, eax\n0f a2 ; cpuid"),
    # The PICs' edge/level register takes single bytes only.
    Case("inl_from_kernel", False, f"ba {_le(0x4D0)} ; mov edx, ELCR1\nec ; in al, dx"),
    Case(
        "wrmsr",
        False,
        f"""b9 {_le(_MISC_ENABLE)} ; mov ecx, IA32_MISC_ENABLE
            a1 {_le(_SCRATCH)} ; mov eax, [SCRATCH]
            8b 15 {_le(_SCRATCH + 4)} ; mov edx, [SCRATCH + 4]
            0f 30 ; wrmsr""",
        prepare=f"""b9 {_le(_MISC_ENABLE)} ; mov ecx, IA32_MISC_ENABLE
            0f 32 ; rdmsr
            a3 {_le(_SCRATCH)} ; mov [SCRATCH], eax
            89 15 {_le(_SCRATCH + 4)} ; mov [SCRATCH + 4], edx""",
    ),
    Case("hlt_irqfd_wake", False, "", group="wake"),
    Case("ipi", False, "", group="ipi"),
)
BY_NAME = {case.name: case for case in CASES}
GROUPS = ("single", "wake", "ipi")


def cases_of(group: str) -> tuple[Case, ...]:
    """The cases of one guest: "single" on one vCPU, "wake" with the host's help, "ipi" on two vCPUs."""
    return tuple(case for case in CASES if case.group == group)


def program(cases: Sequence[Case], iterations: int) -> bytes:
    """The code for 1 MiB: each case ``iterations`` times, all samples out, done.

    Raises ValueError when the samples do not fit into the guest's memory.
    """
    if len(cases) * (12 + 4 * iterations) + 4 > _SAMPLES_END - _SAMPLES:
        raise ValueError(f"iterations: {iterations} of {len(cases)} cases do not fit into the guest's memory")
    groups = {case.group for case in cases}
    if len(groups) != 1:
        raise ValueError(f"cases: of groups {', '.join(sorted(groups))}; one program has one")
    data = _gdt()
    # The GDT comes first, behind a jump, so that everything else knows where it is.
    code = bytes.fromhex("e9" + _le(len(data) + _GDTR_SIZE)) + data + _gdtr(ENTRY + _JUMP_SIZE)
    code += machine_code(
        f"""
        fa ; cli
        fc ; cld
        bc {_le(_STACK)} ; mov esp, STACK
        0f 01 15 {_le(ENTRY + _JUMP_SIZE + len(data))} ; lgdt
        66 b8 1000 ; mov ax, 0x10
        8e d8 ; mov ds, ax
        8e c0 ; mov es, ax
        8e d0 ; mov ss, ax
        {_place_testdev()}
        0f 31 ; rdtsc
        89 c6 ; mov esi, eax
        0f 31 ; rdtsc
        29 f0 ; sub eax, esi
        3d {_le(_SETTLE_TICKS)} ; cmp eax, SETTLE_TICKS
        72 f5 ; jb to the second rdtsc: who has started a guest is busy with that for a while
        bf {_le(_SAMPLES)} ; mov edi, SAMPLES"""
    )
    # The segment register's old contents may be another GDT's: load CS from this one.
    code += bytes.fromhex("ea" + _le(ENTRY + len(code) + 7) + "0800")
    for case in cases:
        code += _header(CASES.index(case), iterations)
        if case.group == "single":
            code += _single(case, iterations)
        elif case.group == "wake":
            code += _wake(len(code), iterations)
        else:
            code += _ipi(len(code), iterations)
    return code + _finish()


_JUMP_SIZE = 5
_LOOP_HEAD = 5
_GDTR_SIZE = 6


def _gdt() -> bytes:
    """Null, flat 32-bit code at 8, flat data at 0x10 (Intel SDM vol. 3A, 3.4.5)."""
    return bytes(8) + bytes.fromhex("ffff0000009bcf00" + "ffff00000093cf00")


def _gdtr(base: int) -> bytes:
    return struct.pack("<HI", len(_gdt()) - 1, base)


def _place_testdev() -> str:
    """Give pci-testdev its addresses through configuration mechanism 1; without one nobody listens."""
    registers = ((0x10, MMIO), (0x14, PIO), (0x04, 3))
    return "\n".join(
        f"""ba {_le(0xCF8)} ; mov edx, CONFIG_ADDRESS
            b8 {_le(1 << 31 | PCI_SLOT << 11 | register)} ; mov eax, register
            ef ; out dx, eax
            ba {_le(0xCFC)} ; mov edx, CONFIG_DATA
            b8 {_le(value)} ; mov eax, value
            ef ; out dx, eax"""
        for register, value in registers
    )


def _header(number: int, count: int) -> bytes:
    words = (int.from_bytes(_SAMPLE_MAGIC, "little"), number, count)
    return b"".join(
        machine_code(f"c7 07 {_le(word)} ; mov dword [edi], word\n83 c7 04 ; add edi, 4") for word in words
    )


def _loop(body: bytes, count: int) -> bytes:
    """``body``, ``count`` times; it leaves ebp alone."""
    back = -(len(body) + 1 + 6)
    return bytes.fromhex("bd" + _le(count)) + body + bytes.fromhex("4d 0f85") + struct.pack("<i", back)


def _single(case: Case, count: int) -> bytes:
    keep, subtract = {"esi": ("89 c6", "29 f0"), "ebx": ("89 c3", "29 d8")}[case.start]
    body = f"""0f 31 ; rdtsc
        {keep} ; mov start, eax
        {case.code}
        0f 31 ; rdtsc
        {subtract} ; sub eax, start
        89 07 ; mov [edi], eax
        83 c7 04 ; add edi, 4"""
    return machine_code(case.prepare) + _loop(machine_code(body), count)


def _gate(vector: int, handler: int) -> str:
    """Write an interrupt gate (Intel SDM vol. 3A, 6.11)."""
    low = 8 << 16 | handler & 0xFFFF
    high = handler & 0xFFFF0000 | 0x8E00
    at = _IDT + 8 * vector
    return f"""c7 05 {_le(at)} {_le(low)} ; mov dword [gate], low
        c7 05 {_le(at + 4)} {_le(high)} ; mov dword [gate + 4], high"""


_IDT_LIMIT = 8 * 0x50 - 1
_LIDT = f"""66 c7 05 {_le(_SCRATCH + 16)} {_le(_IDT_LIMIT, 2)} ; mov word [SCRATCH + 16], limit
    c7 05 {_le(_SCRATCH + 18)} {_le(_IDT)} ; mov dword [SCRATCH + 18], IDT
    0f 01 1d {_le(_SCRATCH + 16)} ; lidt [SCRATCH + 16]"""
# The local APIC on, with its pins for the PICs masked (Intel SDM vol. 3A, 10.4.7.2).
_APIC_ON = f"""c7 05 {_le(_APIC + 0x350)} {_le(0x10000)} ; mov dword [LINT0], masked
    c7 05 {_le(_APIC + 0xF0)} {_le(0x1FF)} ; mov dword [SVR], enabled"""
# No IRET: KVM's instruction emulator, which runs such guests where there is no svm or vmx, has it for real
# mode only. So handlers drop EFLAGS, CS and EIP, and go on behind the point where they are expected.
_END_OF_INTERRUPT = f"c7 05 {_le(_APIC + 0xB0)} {_le(0)} ; mov dword [EOI], 0\n83 c4 0c ; add esp, 12"


def _behind_jump(code: bytes) -> bytes:
    return bytes.fromhex("e9" + _le(len(code))) + code


def _wake(at: int, count: int) -> bytes:
    """Halt, again and again; each interrupt takes its own latency from the stamp that came with it."""
    pin = 0x10 + 2 * WAKE_GSI
    setup = f"""ba {_le(PIO)} ; mov edx, PIO
        b0 {_le(TEST_WAKE, 1)} ; mov al, TEST_WAKE
        ee ; out dx, al
        {_LIDT}
        {_APIC_ON}
        b0 ff ; mov al, 0xff
        e6 21 ; out 0x21, al: both PICs masked
        e6 a1 ; out 0xa1, al
        c7 05 {_le(_IOAPIC)} {_le(pin + 1)} ; mov dword [IOREGSEL], the pin's upper half
        c7 05 {_le(_IOAPIC + 16)} {_le(0)} ; mov dword [IOWIN], APIC 0
        c7 05 {_le(_IOAPIC)} {_le(pin)} ; mov dword [IOREGSEL], its lower half
        c7 05 {_le(_IOAPIC + 16)} {_le(_WAKE_VECTOR)} ; mov dword [IOWIN], edge, fixed, the vector"""
    halt = machine_code(
        f"""ff 05 {_le(MAILBOX_READY)} ; inc dword [MAILBOX_READY]
        fb ; sti
        f4 ; hlt
        eb fd ; jmp to the hlt"""
    )
    handler = machine_code(
        f"""0f 31 ; rdtsc
        2b 05 {_le(MAILBOX_STAMP)} ; sub eax, [MAILBOX_STAMP]
        89 07 ; mov [edi], eax
        83 c7 04 ; add edi, 4
        {_END_OF_INTERRUPT}"""
    )
    before = machine_code(setup + "\n" + _gate(_WAKE_VECTOR, 0))
    handler_at = ENTRY + at + len(before) + _LOOP_HEAD + len(halt)
    return machine_code(setup + "\n" + _gate(_WAKE_VECTOR, handler_at)) + _loop(halt + handler, count)


def _ipi(at: int, count: int) -> bytes:
    """Start the second vCPU, which spins; time the write to the ICR until its handler's answer is seen."""
    ap_at = ENTRY + at + _JUMP_SIZE
    ap = machine_code(
        f"""66 b8 1000 ; mov ax, 0x10
        8e d8 ; mov ds, ax
        8e c0 ; mov es, ax
        8e d0 ; mov ss, ax
        bc {_le(_AP_STACK)} ; mov esp, AP_STACK
        0f 01 1d {_le(_SCRATCH + 16)} ; lidt [SCRATCH + 16]
        {_APIC_ON}
        c7 05 {_le(_AP_STATE)} {_le(1)} ; mov dword [AP_STATE], 1
        fb ; sti
        f3 90 ; pause
        eb fc ; jmp to the pause"""
    )
    handler = machine_code(f"ff 05 {_le(_ACK)} ; inc dword [ACK]\n{_END_OF_INTERRUPT}")
    handler += bytes([0xEB, 0x100 - (len(handler) + 2 + 5)])  # jmp to the sti
    blob = ap + handler + _trampoline(ap_at)
    start = machine_code(
        f"""57 ; push edi
        be {_le(ap_at + len(ap + handler))} ; mov esi, the trampoline
        bf {_le(_TRAMPOLINE)} ; mov edi, TRAMPOLINE
        b9 {_le(len(_trampoline(0)))} ; mov ecx, its length
        f3 a4 ; rep movsb
        5f ; pop edi
        {_gate(_IPI_VECTOR, ap_at + len(ap))}
        {_LIDT}
        {_APIC_ON}
        c7 05 {_le(_APIC + 0x300)} {_le(0xC4500)} ; mov dword [ICR], INIT to all others
        b9 {_le(2000)} ; mov ecx, 2000
        49 ; dec ecx
        75 fd ; jnz to the dec
        c7 05 {_le(_APIC + 0x300)} {_le(0xC4600 | _TRAMPOLINE >> 12)} ; mov dword [ICR], SIPI to all others
        a1 {_le(_AP_STATE)} ; mov eax, [AP_STATE]
        85 c0 ; test eax, eax
        74 f7 ; jz to the mov
        31 db ; xor ebx, ebx"""
    )
    sample = machine_code(
        f"""43 ; inc ebx
        0f 31 ; rdtsc
        89 c6 ; mov esi, eax
        c7 05 {_le(_APIC + 0x300)} {_le(0xC4000 | _IPI_VECTOR)} ; mov dword [ICR], the vector to all others
        39 1d {_le(_ACK)} ; cmp [ACK], ebx
        75 f8 ; jne to the cmp
        0f 31 ; rdtsc
        29 f0 ; sub eax, esi
        89 07 ; mov [edi], eax
        83 c7 04 ; add edi, 4"""
    )
    return _behind_jump(blob) + start + _loop(sample, count)


def _trampoline(target: int) -> bytes:
    """Real mode code at _TRAMPOLINE, where a vCPU begins after a SIPI: to protected mode, to ``target``."""
    gdt = ENTRY + _JUMP_SIZE
    code = _protected_mode(26, target)
    return code.ljust(26, b"\x90") + _gdtr(gdt)


def _protected_mode(gdtr: int, target: int) -> bytes:
    """From real mode to protected mode, to ``target``; ``gdtr`` is where _gdtr() lies in this segment."""
    return machine_code(
        f"""fa ; cli
        66 2e 0f 01 16 {_le(gdtr, 2)} ; lgdt cs:[gdtr], 32-bit base
        0f 20 c0 ; mov eax, cr0
        0c 01 ; or al, 1
        0f 22 c0 ; mov cr0, eax
        66 ea {_le(target)} 0800 ; jmp 8:target"""
    )


def _finish() -> bytes:
    """All samples to COM1, then the done port, then nothing for ever."""
    return machine_code(
        f"""c7 07 {END_MAGIC.hex()} ; mov dword [edi], END_MAGIC
        83 c7 04 ; add edi, 4
        be {_le(_SAMPLES)} ; mov esi, SAMPLES
        89 f9 ; mov ecx, edi
        29 f1 ; sub ecx, esi
        ba {_le(COM1)} ; mov edx, COM1
        f3 6e ; rep outsb
        b0 00 ; mov al, 0
        e6 {_le(DONE_PORT, 1)} ; out DONE_PORT, al
        fa ; cli
        f4 ; hlt
        eb fd ; jmp to the hlt"""
    )


def rom(code: bytes) -> bytes:
    """A firmware image of 64 KiB that starts ``code``; it lies below 1 MiB, and may also lie below 4 GiB."""
    if len(code) > 0xF000:
        raise ValueError(f"code: {len(code)} bytes; at most {0xF000} fit into the image")
    image = bytearray(b"\xff" * 0x10000)
    image[: len(code)] = code
    start = 0xFF00
    enter = _protected_mode(0xFF80, 0xF0000 + start + 0x20)
    copy = machine_code(
        f"""66 b8 1000 ; mov ax, 0x10
        8e d8 ; mov ds, ax
        8e c0 ; mov es, ax
        fc ; cld
        be {_le(0xF0000)} ; mov esi, this image
        bf {_le(ENTRY)} ; mov edi, ENTRY
        b9 {_le((len(code) + 3) // 4)} ; mov ecx, length
        f3 a5 ; rep movsd
        b8 {_le(ENTRY)} ; mov eax, ENTRY
        ff e0 ; jmp eax"""
    )
    image[start : start + len(enter)] = enter
    image[start + 0x20 : start + 0x20 + len(copy)] = copy
    image[0xFF80:0xFF86] = _gdtr(0xF0000 + 0xFF90)
    image[0xFF90 : 0xFF90 + len(_gdt())] = _gdt()
    image[0xFFF0:0xFFF3] = b"\xe9" + struct.pack("<H", (start - 0xFFF3) & 0xFFFF)
    return bytes(image)


def elf(code: bytes) -> bytes:
    """An ELF program for the PVH entry: ``code`` at 1 MiB, and Xen's note that says so."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", ENTRY)  # XEN_ELFNOTE_PHYS32_ENTRY
    headers = 64 + 2 * 56
    code_at = 0x1000
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        2,
        62,
        1,
        ENTRY,
        64,
        0,
        0,
        64,
        56,
        2,
        0,
        0,
        0,
    )
    load = struct.pack("<IIQQQQQQ", 1, 7, code_at, ENTRY, ENTRY, len(code), len(code), 0x1000)
    where = struct.pack("<IIQQQQQQ", 4, 4, headers, 0, 0, len(note), len(note), 4)
    return (header + load + where + note).ljust(code_at, b"\0") + code


@dataclass(frozen=True)
class Guest:
    """A program in the forms that contestants take; ``rom`` and ``elf`` are files."""

    group: str
    iterations: int
    rom: str
    elf: str

    @property
    def cpus(self) -> int:
        """How many vCPUs it needs."""
        return 2 if self.group == "ipi" else 1

    @property
    def wakes(self) -> int:
        """How often it wants to be woken."""
        return self.iterations if self.group == "wake" else 0


def write_guest(folder: Path, group: str, iterations: int) -> Guest:
    """Make the program of a group, and its two files in ``folder``."""
    code = program(cases_of(group), iterations)
    paths = []
    for kind, image in (("rom", rom(code)), ("elf", elf(code))):
        path = folder / f"{group}-{iterations}.{kind}"
        path.write_bytes(image)
        paths.append(str(path))
    return Guest(group, iterations, *paths)


def samples(output: bytes) -> dict[str, list[int]]:
    """The differences by case name, in ticks, from what a guest wrote to COM1.

    Bytes before the first sample are somebody else's. Raises ValueError when the end is missing.
    """
    found: dict[str, list[int]] = {}
    at = output.find(_SAMPLE_MAGIC)
    while at >= 0 and output[at : at + 4] == _SAMPLE_MAGIC and len(output) >= at + 12:
        number, count = struct.unpack_from("<II", output, at + 4)
        end = at + 12 + 4 * count
        if number >= len(CASES) or end > len(output):
            break
        found[CASES[number].name] = list(struct.unpack_from(f"<{count}I", output, at + 12))
        at = end
    if at < 0 or output[at : at + 4] != END_MAGIC:
        raise ValueError(f"the guest's samples end after {len(output)} bytes: {output[-80:]!r}")
    return found


def is_complete(output: bytes) -> bool:
    """Whether a guest has written all its samples."""
    try:
        samples(output)
    except ValueError:
        return False
    return True
