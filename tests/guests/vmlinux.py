"""The ELF kernel inside a bzImage.

Written with command-line tools and apart from chv.boot on purpose: the tests of
chv.boot compare their result with this one.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

from tests.guests.cache import write_whole

# Linux, Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length.
SETUP_SECTS = 0x1F1
PAYLOAD_OFFSET = 0x248
SECTOR = 512

TOOLS = {
    b"\x28\xb5\x2f\xfd": ["zstd", "-dcq"],
    b"\x02\x21\x4c\x18": ["lz4", "-dcq"],
    b"\x1f\x8b": ["gzip", "-dcq"],
    b"\xfd7zXZ\x00": ["xz", "-dcq"],
}


def unpack(bzimage: Path, vmlinux: Path) -> Path:
    """Write the ELF file inside ``bzimage`` to ``vmlinux`` unless it is there already."""
    if vmlinux.exists():
        return vmlinux
    image = bzimage.read_bytes()
    offset, length = struct.unpack_from("<II", image, PAYLOAD_OFFSET)
    start = (image[SETUP_SECTS] + 1) * SECTOR + offset
    # The kernel build appends the unpacked size, 4 bytes, to the compressed stream.
    payload, size = image[start : start + length - 4], image[start + length - 4 : start + length]
    tool = next((tool for magic, tool in TOOLS.items() if payload.startswith(magic)), None)
    if tool is None or not shutil.which(tool[0]):
        raise ValueError(f"{bzimage}: cannot unpack {payload[:4].hex()} (tool: {tool or 'none known'})")
    elf = subprocess.run(tool, input=payload, capture_output=True, check=False).stdout
    if len(elf) != int.from_bytes(size, "little") or not elf.startswith(b"\x7fELF"):
        raise ValueError(f"{bzimage}: unpacked to {len(elf)} bytes that are no ELF file")
    return write_whole(vmlinux, elf)
