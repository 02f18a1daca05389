"""bzImage: the setup header and the compressed kernel behind it.

Source: Linux, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
"""

from __future__ import annotations

import struct

from msgspec import Struct

from .. import layout
from ..errors import ImageError
from . import decompress, linux
from .room import mib
from .source import Source

_SECTOR = 512
_DEFAULT_SETUP_SECTORS = 4
_VERSION_MIN = 0x206  # the first with cmdline_size
_VERSION_PAYLOAD = 0x208
_VERSION_INIT_SIZE = 0x20A
_LOADED_HIGH = 1 << 0
_UNPACKED_MIN = 64  # an ELF header
_UNPACKED_MAX = 1 * layout.GiB  # KERNEL_IMAGE_SIZE, the most that a kernel's mapping of itself spans
_TRAILER = 4  # the unpacked size


class Header(Struct, frozen=True):
    """The setup header's fields that matter here; addresses are guest-physical, sizes in bytes."""

    raw: bytes  # from offset 0x1f1 on
    version: int
    code_offset: int  # of the 32-bit code in the file
    code_size: int
    payload_offset: int  # in the file; 0 if the version has no such field
    payload_size: int
    initrd_addr_max: int
    cmdline_max: int
    pref_address: int
    init_size: int


def is_bzimage(head: bytes) -> bool:
    """Whether a file that starts with ``head`` (0x206 bytes or more) has a Linux setup header."""
    return head[0x202:0x206] == b"HdrS" and head[0x1FE:0x200] == b"\x55\xaa"


def parse(source: Source) -> Header:
    """Read and check the setup header of ``source``; :class:`chv.errors.ImageError` if it cannot be used."""
    if source.size < linux.HEADER_MAX_END:
        raise ImageError(f"{source.name}: the file is truncated: {source.size} bytes hold no setup header")
    head = source.read(0, linux.HEADER_MAX_END)
    if not is_bzimage(head):
        raise ImageError(f"{source.name}: is not a bzImage: it has no setup header (HdrS at 0x202)")
    version = int.from_bytes(head[0x206:0x208], "little")
    if version < _VERSION_MIN:
        raise ImageError(
            f"{source.name}: boot protocol {version >> 8}.{version & 0xFF:02}; "
            f"{_VERSION_MIN >> 8}.{_VERSION_MIN & 0xFF:02} (Linux 2.6.22) or later is needed"
        )
    if not head[0x211] & _LOADED_HIGH:
        raise ImageError(f"{source.name}: is a zImage, which loads below 1 MiB; a bzImage is needed")
    code_offset = ((head[0x1F1] or _DEFAULT_SETUP_SECTORS) + 1) * _SECTOR
    code_size = int.from_bytes(head[0x1F4:0x1F8], "little") * 16  # syssize
    if not code_size or code_offset + code_size > source.size:
        raise ImageError(
            f"{source.name}: the file is truncated: {code_offset + code_size} bytes are needed, "
            f"it has {source.size}"
        )
    payload_offset, payload_size = struct.unpack_from("<II", head, 0x248)
    pref_address, init_size = struct.unpack_from("<QI", head, 0x258)
    with_init_size = version >= _VERSION_INIT_SIZE
    header = Header(
        raw=head[linux.HEADER : max(linux.HEADER, min(0x202 + head[0x201], linux.HEADER_MAX_END))],
        version=version,
        code_offset=code_offset,
        code_size=source.size - code_offset,
        payload_offset=code_offset + payload_offset if version >= _VERSION_PAYLOAD else 0,
        payload_size=payload_size if version >= _VERSION_PAYLOAD else 0,
        initrd_addr_max=int.from_bytes(head[0x22C:0x230], "little"),
        cmdline_max=int.from_bytes(head[0x238:0x23C], "little"),
        pref_address=pref_address if with_init_size else layout.HIGH_RAM,
        init_size=init_size if with_init_size else code_size,
    )
    _check_payload(source, header)
    return header


def _check_payload(source: Source, header: Header) -> None:
    if header.payload_size and header.payload_offset + header.payload_size > source.size:
        raise ImageError(
            f"{source.name}: the file is truncated: its compressed kernel ends at "
            f"{header.payload_offset + header.payload_size}, the file at {source.size}"
        )


class Compressed(Struct, frozen=True):
    """The compressed kernel of a bzImage, without the size that follows it."""

    data: memoryview
    format: str
    size: int  # unpacked


def payload(source: Source, header: Header, limit: int | None) -> Compressed | None:
    """The kernel in a bzImage; None if there is none or its compression is unknown.

    ``limit`` is the most that it may unpack to: the guest's memory.
    """
    if header.payload_size <= _TRAILER:
        return None
    data = memoryview(source.read(header.payload_offset, header.payload_size))
    name = decompress.format_of(data)
    if name is None:
        return None
    size = int.from_bytes(data[-_TRAILER:], "little")
    most = _UNPACKED_MAX
    if header.version >= _VERSION_INIT_SIZE:
        most = min(most, header.init_size)  # it is unpacked within that space
    if not _UNPACKED_MIN <= size <= most:
        raise ImageError(
            f"{source.name}: says that its kernel unpacks to {size} bytes; "
            f"{_UNPACKED_MIN} to {most} are possible"
        )
    if limit is not None and size > limit:
        raise ImageError(
            f"{source.name}: unpacks to {mib(size)} MiB, more than the guest's memory: "
            f"{limit // layout.MiB} MiB (memory.size)"
        )
    # gzip's trailer is part of its format.
    return Compressed(data if name == "gzip" else data[:-_TRAILER], name, size)
