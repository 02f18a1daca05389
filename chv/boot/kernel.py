"""The two things that can be entered: an ELF file, and a bzImage that unpacks itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from .. import layout
from ..errors import ImageError
from ..memory import GuestMemory
from . import bzimage, decompress, elf, identify, linux, pvh, room
from .entry import EntryPoint
from .source import BytesSource, FileSource, Source

if TYPE_CHECKING:
    from pathlib import Path

    from .cache import Cache

_ZEROS = bytes(layout.MiB)


class Handover(Struct, frozen=True):
    """What a kernel is told besides its command line. ``initramfs`` is (address, size)."""

    memory_map: list[room.Entry]
    rsdp: int
    initramfs: tuple[int, int] | None


class Kernel(Protocol):
    """A kernel or firmware that was checked; placing it changes nothing in it."""

    @property
    def source(self) -> Source:
        """What :meth:`place` reads."""

    @property
    def initrd_limit(self) -> int:
        """The initramfs must end at or below this address."""

    def spans(self) -> list[tuple[int, int, str]]:
        """(start, end, what it is) of the guest memory that it takes."""

    def place(self, memory: GuestMemory) -> None:
        """Copy it into ``memory``, where :meth:`spans` has been checked to be RAM."""

    def enter(self, memory: GuestMemory, handover: Handover) -> EntryPoint:
        """Write what it is told into ``memory``; where it is entered."""


class ElfKernel(Struct, frozen=True):
    """An ELF file, entered by PVH or, without a PVH note, the 64-bit way."""

    source: Source
    image: elf.Elf

    @property
    def initrd_limit(self) -> int:
        return layout.RAM_64BIT if self.image.pvh_entry is not None else linux.DEFAULT_INITRD_ADDR_MAX + 1

    def spans(self) -> list[tuple[int, int, str]]:
        return [(s.address, s.end, f"segment {s.index}") for s in self.image.segments]

    def place(self, memory: GuestMemory) -> None:
        for segment in self.image.segments:
            with memory.view(segment.address, segment.file_size) as target:
                self.source.copy_into(target, segment.offset)
            _clear(memory, segment.address + segment.file_size, segment.end)

    def enter(self, memory: GuestMemory, handover: Handover) -> EntryPoint:
        if self.image.pvh_entry is not None:
            start_info = pvh.write(memory, handover.memory_map, handover.rsdp, handover.initramfs)
            return EntryPoint("pvh", self.image.pvh_entry, {"rbx": start_info})
        zero_page = linux.write(
            memory, linux.default_header(), handover.memory_map, handover.rsdp, handover.initramfs
        )
        stack = layout.BOOT_STACK
        return EntryPoint("linux64", self.image.entry, {"rsi": zero_page, "rsp": stack, "rbp": stack})


class BzImageKernel(Struct, frozen=True):
    """A bzImage whose 32-bit code unpacks the kernel in the guest."""

    source: Source
    header: bzimage.Header

    @property
    def initrd_limit(self) -> int:
        return self.header.initrd_addr_max + 1

    def spans(self) -> list[tuple[int, int, str]]:
        code = (layout.HIGH_RAM, layout.HIGH_RAM + self.header.code_size, "its code")
        base = max(layout.HIGH_RAM, self.header.pref_address)
        return [code, (base, base + self.header.init_size, "the room to unpack itself")]

    def place(self, memory: GuestMemory) -> None:
        with memory.view(layout.HIGH_RAM, self.header.code_size) as target:
            self.source.copy_into(target, self.header.code_offset)

    def enter(self, memory: GuestMemory, handover: Handover) -> EntryPoint:
        header = linux.with_code_at(self.header.raw, layout.HIGH_RAM)
        zero_page = linux.write(memory, header, handover.memory_map, handover.rsdp, handover.initramfs)
        return EntryPoint("linux32", layout.HIGH_RAM, {"rsi": zero_page, "rsp": layout.BOOT_STACK})


def open_kernel(
    file: FileSource, memory_size: int | None, cache_dir: Path | None
) -> tuple[Kernel, int | None]:
    """The kernel in ``file`` and how many bytes of command line it takes (None: it does not say).

    When the kernel's source is not ``file``, ``file`` may be closed.
    """
    head = file.read(0, min(file.size, identify.HEAD))
    if head.startswith(elf.MAGIC):
        image = elf.parse(file)
        if image.pvh_entry is None:
            elf.check_64bit_entry(file, image)
        return ElfKernel(file, image), linux.COMMAND_LINE_MAX if image.is_linux else None
    if not bzimage.is_bzimage(head):
        raise ImageError(
            f"{file.name}: {identify.describe(head)}; an ELF file or a bzImage for x86-64 is needed"
        )
    header = bzimage.parse(file)
    compressed = bzimage.payload(file, header, memory_size)
    if compressed is not None:
        unpacked = _unpacked(file, compressed, cache_dir)
        if unpacked is not None:
            return unpacked, header.cmdline_max
    return BzImageKernel(file, header), header.cmdline_max


def _unpacked(file: FileSource, compressed: bzimage.Compressed, cache_dir: Path | None) -> Kernel | None:
    """The ELF kernel in a bzImage; None if it must unpack itself: no PVH entry, or no library here."""
    store = _cache(cache_dir)
    if store is not None and (cached := store.open(compressed, file.name)) is not None:
        image = elf.parse(cached)
        return ElfKernel(cached, image)
    try:
        data = decompress.unpack(compressed.data, compressed.format, compressed.size)
    except decompress.UnpackError as error:
        raise ImageError(f"{file.name}: {error}") from error
    except decompress.NoLibrary:
        return None
    source = BytesSource(f"{file.name} (unpacked)", data)
    image = elf.parse(source)
    if image.pvh_entry is None:
        return None
    if store is not None:
        store.add(compressed, data)
    return ElfKernel(source, image)


def _cache(directory: Path | None) -> Cache | None:
    if directory is None:
        return None
    from .cache import Cache

    return Cache(directory)


def _clear(memory: GuestMemory, start: int, end: int) -> None:
    while start < end:
        count = min(len(_ZEROS), end - start)
        memory.write(start, _ZEROS[:count])
        start += count
