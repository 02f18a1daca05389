"""The report of a vCPU that cannot go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import layout
from .errors import GuestCrash, GuestMemoryError, KvmError

if TYPE_CHECKING:
    from .memory import GuestMemory
    from .vcpu import Vcpu

# linux/kvm.h, KVM_INTERNAL_ERROR_*
_SUBERRORS = {
    1: "emulation failed",
    2: "simultaneous exceptions",
    3: "delivering an event failed",
    4: "unexpected exit reason",
}
_MEANINGS = {
    "shutdown": "triple fault: the guest could not handle an exception",
    "fail-entry": "the processor refused to enter the guest",
    "hlt": "the guest halted with no interrupt controller to wake it",
    "system-event": "the guest reported a crash",
}
_CODE_BYTES = 16


def describe(vcpu: Vcpu, memory: GuestMemory) -> GuestCrash:
    """The exception for the exit that ``vcpu`` stands at: what it was, the registers, the bytes at RIP."""
    details = vcpu.run.exit_details()
    registers = vcpu.kvm.registers()
    special = vcpu.kvm.special_registers()
    lines = [f"vCPU {vcpu.index}: {_headline(details)}", *_register_lines(registers, special)]
    lines.append(_code_line(vcpu, memory, special["cs"]["base"] + registers["rip"]))
    return GuestCrash("\n".join(lines))


def _headline(details: dict[str, Any]) -> str:
    reason = details["reason"]
    if reason == "internal-error":
        number = details["suberror"]
        data = " ".join(f"{word:#x}" for word in details["data"])
        meaning = _SUBERRORS.get(number, "unknown sub-error")
        return f"KVM internal error, sub-error {number} ({meaning})" + (f", data {data}" if data else "")
    rest = ", ".join(f"{name} {value:#x}" for name, value in details.items() if name != "reason")
    meaning = _MEANINGS.get(reason, "an exit that chv does not handle")
    return f"KVM exit {reason} ({meaning})" + (f", {rest}" if rest else "")


def _register_lines(registers: dict[str, int], special: dict[str, Any]) -> list[str]:
    names = list(registers)
    lines = [
        "  " + " ".join(f"{name:>6}={registers[name]:016x}" for name in names[i : i + 4])
        for i in range(0, len(names), 4)
    ]
    control = ("cr0", "cr2", "cr3", "cr4", "efer", "apic_base")
    lines.append("  " + " ".join(f"{name}={special[name]:x}" for name in control))
    for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr"):
        s = special[name]
        lines.append(
            f"  {name}: selector={s['selector']:04x} base={s['base']:x} limit={s['limit']:x} "
            f"type={s['type']:x} dpl={s['dpl']} db={s['db']} l={s['l']}"
        )
    lines.append(
        "  "
        + " ".join(f"{n}: base={special[n]['base']:x} limit={special[n]['limit']:x}" for n in ("gdt", "idt"))
    )
    return lines


def _code_line(vcpu: Vcpu, memory: GuestMemory, linear: int) -> str:
    try:
        physical = vcpu.kvm.translate(linear & (1 << 64) - 1)
    except KvmError as error:
        return f"  code at {linear:#x}: not readable ({error})"
    if physical is None:
        return f"  code at {linear:#x}: not mapped"
    code = _page_part(memory, physical, _CODE_BYTES)
    rest = _CODE_BYTES - len(code)
    if code and rest and (linear + len(code)) % layout.PAGE_SIZE == 0:
        # The next page may lie anywhere, or nowhere.
        following = vcpu.kvm.translate((linear + len(code)) & (1 << 64) - 1)
        if following is not None:
            code += _page_part(memory, following, rest)
    return f"  code at {linear:#x} (physical {physical:#x}): {code.hex(' ') or 'not in RAM'}"


def _page_part(memory: GuestMemory, physical: int, length: int) -> bytes:
    """Up to ``length`` bytes from ``physical`` to the end of its page; none if that is not RAM."""
    length = min(length, layout.PAGE_SIZE - physical % layout.PAGE_SIZE)
    try:
        return memory.read(physical, length)
    except GuestMemoryError:
        return b""
