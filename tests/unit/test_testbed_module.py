"""The testbed's own copy of kvm-amd: which byte changes, and what is refused."""

from __future__ import annotations

from io import BytesIO

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from tests.guests import kernel
from tests.guests.modules import load_order
from tests.support import require
from tests.testbed.kvm_amd import ENDBR64, FUNCTION, SIGNATURE, unsigned, with_cr8_exits


@pytest.fixture(scope="module")
def module() -> bytes:
    try:
        found = kernel()
    except FileNotFoundError as error:
        require(False, str(error))
        raise
    return load_order(found, ["kvm_amd"])[-1].read_bytes()


def test_one_byte_of_the_function_changes_and_the_signature_is_gone(module: bytes) -> None:
    changed = with_cr8_exits(module)
    plain = unsigned(module)
    assert len(changed) == len(plain)
    different = [at for at, (new, old) in enumerate(zip(changed, plain, strict=True)) if new != old]
    assert len(different) == 1
    assert changed[different[0]] == 0xC3
    elf = ELFFile(BytesIO(module))
    symbols = elf.get_section_by_name(".symtab")
    assert isinstance(symbols, SymbolTableSection)
    [symbol] = symbols.get_symbol_by_name(FUNCTION) or []
    start = elf.get_section(symbol["st_shndx"])["sh_offset"] + symbol["st_value"]
    endbr = 4 if module[start : start + 4] == ENDBR64 else 0
    assert different[0] == start + endbr + 5, "behind what ftrace changes"


def test_a_module_that_is_not_as_expected_is_refused(module: bytes) -> None:
    with pytest.raises(ValueError, match="no function svm_update_cr8_intercept"):
        with_cr8_exits(module.replace(FUNCTION.encode(), FUNCTION.upper().encode()))
    with pytest.raises(ValueError, match="does not begin as expected"):
        with_cr8_exits(with_cr8_exits(module).replace(b"\xe8\0\0\0\0\xc3", b"\x90\0\0\0\0\xc3"))


def test_a_signature_is_cut_off_whole() -> None:
    signed = b"module" + b"s" * 300 + bytes(8) + (300).to_bytes(4, "big") + SIGNATURE
    assert unsigned(signed) == b"module"
    assert unsigned(b"module") == b"module"
