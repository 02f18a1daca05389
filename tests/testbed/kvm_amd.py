"""kvm-amd as the testbed loads it: CR8 writes of guests always leave the guest.

QEMU's emulated SVM ends with an assertion (``tcg_handle_interrupt``, seen in 7.2 and in 10.0)
when a nested guest writes CR8 while its hypervisor waits for an interrupt window. KVM lets guests
write CR8 themselves unless an interrupt waits that the write could let through, which
``svm_update_cr8_intercept`` decides anew each time. Without that function the interception that
every vCPU begins with stays: slower by an exit for each write, and otherwise the same. EDK2's
interrupt handlers write CR8; Linux does so too seldom to meet it.

Only the testbed's own copy is changed. Guests, their kernels and chv are what they are everywhere.
"""

from __future__ import annotations

from io import BytesIO

from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import Section, SymbolTableSection

FUNCTION = "svm_update_cr8_intercept"
ENDBR64 = b"\xf3\x0f\x1e\xfa"
# The call of __fentry__ that ftrace turns into a no-op when the module is loaded: it must stay.
FENTRY_BYTES = 5
RETURN = b"\xc3"
SIGNATURE = b"~Module signature appended~\n"


def with_cr8_exits(module: bytes) -> bytes:
    """The module with a function that returns at once, and without the signature that it then had not.

    Raises ``ValueError`` if the module is not as this expects it.
    """
    elf = ELFFile(BytesIO(module))
    symbols = elf.get_section_by_name(".symtab")
    found = symbols.get_symbol_by_name(FUNCTION) if isinstance(symbols, SymbolTableSection) else None
    if not found:
        raise ValueError(f"kvm-amd has no function {FUNCTION}")
    section, start = elf.get_section(found[0]["st_shndx"]), found[0]["st_value"]
    code = section.data()[start : start + found[0]["st_size"]]
    offset = (len(ENDBR64) if code.startswith(ENDBR64) else 0) + FENTRY_BYTES
    if code[offset - FENTRY_BYTES] != 0xE8 or len(code) <= offset or relocated(elf, section, start + offset):
        raise ValueError(f"{FUNCTION} of kvm-amd does not begin as expected: {code[:16].hex(' ')}")
    at = section["sh_offset"] + start + offset
    return unsigned(module[:at] + RETURN + module[at + 1 :])


def relocated(elf: ELFFile, section: Section, offset: int) -> bool:
    """Whether the loader writes to the byte at this offset of a section."""
    table = elf.get_section_by_name(f".rela{section.name}")
    if not isinstance(table, RelocationSection):
        return False
    return any(entry["r_offset"] <= offset < entry["r_offset"] + 4 for entry in table.iter_relocations())


def unsigned(module: bytes) -> bytes:
    """A module without its signature: a wrong one is refused, a missing one is not."""
    if not module.endswith(SIGNATURE):
        return module
    # struct module_signature (Linux, include/linux/module_signature.h): 12 bytes, the last 4 the length.
    end = len(module) - len(SIGNATURE)
    return module[: end - 12 - int.from_bytes(module[end - 4 : end], "big")]
