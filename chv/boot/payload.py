"""What a VM boots: read and checked once, placed into guest memory at each boot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType

from .. import layout
from ..errors import ConfigError, GuestMemoryError, ImageError
from ..memory import GuestMemory
from . import bzimage, decompress, elf, identify, linux, pvh
from .entry import EntryPoint
from .source import FileSource, Source, StrPath

_E820_RAM, _E820_RESERVED = 1, 2
_ZEROS = bytes(layout.MiB)


@dataclass(frozen=True, slots=True)
class _ElfKernel:
    """An ELF file, entered by PVH or, without a PVH note, the 64-bit way."""

    source: Source
    image: elf.Elf

    initrd_addr_max = layout.RAM_64BIT - 1

    def spans(self) -> list[tuple[int, int, str]]:
        return [(s.address, s.end, f"segment {s.index}") for s in self.image.segments]

    def place(self, memory: GuestMemory) -> None:
        for segment in self.image.segments:
            with memory.view(segment.address, segment.file_size) as target:
                self.source.copy_into(target, segment.offset)
            _clear(memory, segment.address + segment.file_size, segment.end)

    def enter(
        self,
        memory: GuestMemory,
        ram: list[tuple[int, int, int]],
        rsdp: int,
        initramfs: tuple[int, int] | None,
    ) -> EntryPoint:
        if self.image.pvh_entry is not None:
            start_info = pvh.write(memory, memory_map=ram, rsdp=rsdp, module=initramfs)
            return EntryPoint("pvh", self.image.pvh_entry, {"rbx": start_info})
        zero_page = linux.write(
            memory,
            header=linux.default_header(),
            code32_start=None,
            memory_map=ram,
            rsdp=rsdp,
            initramfs=initramfs,
        )
        stack = layout.BOOT_STACK
        return EntryPoint("linux64", self.image.entry, {"rsi": zero_page, "rsp": stack, "rbp": stack})


@dataclass(frozen=True, slots=True)
class _BzImageKernel:
    """A bzImage that unpacks itself in the guest."""

    source: Source
    header: bzimage.Header

    @property
    def initrd_addr_max(self) -> int:
        return self.header.initrd_addr_max

    def spans(self) -> list[tuple[int, int, str]]:
        code = (layout.HIGH_RAM, layout.HIGH_RAM + self.header.code_size, "its code")
        base = max(layout.HIGH_RAM, self.header.pref_address)
        return [code, (base, base + self.header.init_size, "the room to unpack itself")]

    def place(self, memory: GuestMemory) -> None:
        with memory.view(layout.HIGH_RAM, self.header.code_size) as target:
            self.source.copy_into(target, self.header.code_offset)

    def enter(
        self,
        memory: GuestMemory,
        ram: list[tuple[int, int, int]],
        rsdp: int,
        initramfs: tuple[int, int] | None,
    ) -> EntryPoint:
        zero_page = linux.write(
            memory,
            header=self.header.raw,
            code32_start=layout.HIGH_RAM,
            memory_map=ram,
            rsdp=rsdp,
            initramfs=initramfs,
        )
        return EntryPoint("linux32", layout.HIGH_RAM, {"rsi": zero_page, "rsp": layout.BOOT_STACK})


class Payload:
    """A kernel or firmware, an initramfs and a command line, ready to be placed.

    :meth:`place` changes nothing here, so one payload serves many VMs and threads. It keeps the files
    open until :meth:`close`; a context manager closes it too.
    """

    def __init__(
        self,
        kernel: _ElfKernel | _BzImageKernel,
        files: Sequence[FileSource],
        initramfs: FileSource | None,
        cmdline: bytes,
    ) -> None:
        self._kernel = kernel
        self._files = files
        self._initramfs = initramfs
        self._cmdline = cmdline

    def place(
        self, memory: GuestMemory, rsdp: int = layout.RSDP, reserved: Sequence[tuple[int, int]] = ()
    ) -> EntryPoint:
        """Write everything into ``memory`` and say where to enter it.

        ``rsdp`` is where the ACPI root pointer will be; ``reserved`` are (base, size) ranges that the memory
        map lists as reserved. Raises :class:`chv.errors.ImageError` when something does not fit or a file
        was changed meanwhile, :class:`chv.errors.ConfigError` when the memory is too small to boot at all.
        """
        ram = _memory_map(memory, reserved)
        for file in self._files:
            file.require_unchanged()
        _check_spans(memory, self._kernel)
        initramfs = self._place_initramfs(memory)
        self._kernel.place(memory)
        memory.write(layout.CMDLINE, self._cmdline + b"\0")
        return self._kernel.enter(memory, ram, rsdp, initramfs)

    def _place_initramfs(self, memory: GuestMemory) -> tuple[int, int] | None:
        source = self._initramfs
        if source is None:
            return None
        spans = [(start, end) for start, end, _ in self._kernel.spans()]
        limit = min(memory.regions[0].end, self._kernel.initrd_addr_max + 1)
        address = _highest_gap(spans, source.size, limit)
        if address is None:
            raise ImageError(_no_room(source, spans, self._kernel.initrd_addr_max + 1))
        with memory.view(address, source.size) as target:
            source.copy_into(target, 0)
        return address, source.size

    def close(self) -> None:
        """Close the files; :meth:`place` is over then."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Payload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def prepare(
    kernel: StrPath | None = None,
    firmware: StrPath | None = None,
    initramfs: StrPath | None = None,
    cmdline: str = "",
    *,
    memory_size: int | None = None,
) -> Payload:
    """Open, check and unpack what is to be booted: ``kernel`` or ``firmware``, one of the two.

    ``memory_size`` (bytes), when known, bounds what a compressed kernel may unpack to. Raises
    :class:`chv.errors.ImageError` for a file and :class:`chv.errors.ConfigError` for an argument.
    """
    if kernel is not None and firmware is not None:
        raise ConfigError("payload: kernel and firmware are both given; one of them boots the VM")
    main, role = (kernel, "kernel") if firmware is None else (firmware, "firmware")
    if main is None:
        raise ConfigError("payload: nothing to boot; give a kernel or a firmware")
    files: list[FileSource] = []
    try:
        files.append(FileSource(role, main))
        loadable, cmdline_max = _open_kernel(files[0], memory_size)
        text = _encode_cmdline(cmdline, cmdline_max)
        if initramfs is not None:
            files.append(FileSource("initramfs", initramfs))
        return Payload(loadable, files, files[1] if initramfs is not None else None, text)
    except BaseException:
        for file in files:
            file.close()
        raise


def load(
    memory: GuestMemory,
    *,
    kernel: StrPath | None,
    firmware: StrPath | None = None,
    initramfs: StrPath | None = None,
    cmdline: str = "",
    rsdp: int = layout.RSDP,
    reserved: Sequence[tuple[int, int]] = (),
) -> EntryPoint:
    """:func:`prepare` and :meth:`Payload.place` in one, for a boot that is not repeated."""
    with prepare(kernel, firmware, initramfs, cmdline, memory_size=memory.size) as payload:
        return payload.place(memory, rsdp, reserved)


def _open_kernel(file: FileSource, memory_size: int | None) -> tuple[_ElfKernel | _BzImageKernel, int]:
    """The kernel in ``file`` and how many bytes of command line it takes (0: unknown)."""
    head = file.read(0, min(file.size, identify.HEAD))
    if head.startswith(elf.MAGIC):
        image = elf.parse(file)
        return _ElfKernel(file, image), linux.COMMAND_LINE_MAX if image.is_linux else 0
    if not bzimage.is_bzimage(head):
        raise ImageError(
            f"{file.name}: {identify.describe(head)}; an ELF file or a bzImage for x86-64 is needed"
        )
    header = bzimage.parse(file)
    compressed = bzimage.payload(file, header, memory_size)
    if compressed is not None:
        try:
            unpacked = bzimage.unpack(file, compressed)
        except decompress.NoLibrary:
            return _BzImageKernel(file, header), header.cmdline_max
        image = elf.parse(unpacked)
        if image.pvh_entry is not None:
            return _ElfKernel(unpacked, image), header.cmdline_max
    return _BzImageKernel(file, header), header.cmdline_max


def _encode_cmdline(cmdline: str, kernel_max: int) -> bytes:
    try:
        text = cmdline.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ConfigError(f"payload.cmdline: cannot be written as UTF-8 ({error.reason})") from error
    if b"\0" in text:
        raise ConfigError(f"payload.cmdline: has a NUL at byte {text.index(0)}; none is allowed")
    area = layout.CMDLINE_MAX - 1
    limit = min(kernel_max or area, area)
    if len(text) > limit:
        who = "this kernel takes" if limit < area else "there is room for"
        raise ConfigError(f"payload.cmdline: has {len(text)} bytes; {who} {limit} at most")
    return text


def _memory_map(memory: GuestMemory, reserved: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    if memory.regions[0].end < layout.HIGH_RAM + layout.MiB:
        raise ConfigError(f"memory.size: {memory.size} bytes; booting takes at least {2 * layout.MiB}")
    entries = [(base, size, _E820_RAM) for base, size in memory.memory_map()]
    entries += [(base, size, _E820_RESERVED) for base, size in reserved]
    entries.sort()
    for base, size, _ in entries:
        if base < 0 or size <= 0 or base + size > 1 << 64:
            raise ConfigError(f"memory map: {size:#x} bytes at {base:#x} are no range of addresses")
    for (base, size, _), (following, _, _) in pairwise(entries):
        if base + size > following:
            raise ConfigError(f"memory map: the ranges at {base:#x} and {following:#x} overlap")
    return entries


def _check_spans(memory: GuestMemory, kernel: _ElfKernel | _BzImageKernel) -> None:
    for start, end, what in kernel.spans():
        try:
            memory.find(start, end - start)
        except GuestMemoryError as error:
            raise ImageError(f"{kernel.source.name}: {what}: {_outside(memory, start, end)}") from error


def _outside(memory: GuestMemory, start: int, end: int) -> str:
    where = f"{start:#x} to {end - 1:#x}"
    if end <= layout.RAM_32BIT_END:
        return (
            f"takes guest memory from {where}, which has {memory.size // layout.MiB} MiB; "
            f"at least {_mib(end)} MiB are needed (memory.size)"
        )
    if start < layout.RAM_64BIT:
        return f"loads at {where}; RAM ends at {layout.RAM_32BIT_END:#x}, then devices follow up to 4 GiB"
    return f"loads at {where}, which is not in the guest's memory ({memory.size // layout.MiB} MiB)"


def _highest_gap(spans: Iterable[tuple[int, int]], size: int, limit: int) -> int | None:
    """The highest page-aligned address below ``limit`` where ``size`` bytes touch none of ``spans``."""
    top = limit
    for start, end in sorted(spans, key=lambda span: span[1], reverse=True):
        address = _page_down(top - size)
        if address >= max(end, layout.HIGH_RAM):
            return address
        top = min(top, start)
    address = _page_down(top - size)
    return address if address >= layout.HIGH_RAM else None


def _no_room(source: Source, spans: Iterable[tuple[int, int]], limit: int) -> str:
    """Why the initramfs does not fit, and what would do."""
    end = max((end for _, end in spans if end <= layout.RAM_32BIT_END), default=layout.HIGH_RAM)
    needed = _page_up(end) + _page_up(source.size)
    if needed > min(layout.RAM_32BIT_END, limit):
        most = min(layout.RAM_32BIT_END, limit) - _page_up(end)
        return (
            f"{source.name}: has {_mib(source.size)} MiB; "
            f"beside this kernel {most // layout.MiB} MiB are possible"
        )
    return (
        f"{source.name}: has {_mib(source.size)} MiB and does not fit beside the kernel; "
        f"at least {_mib(needed)} MiB of memory are needed (memory.size)"
    )


def _clear(memory: GuestMemory, start: int, end: int) -> None:
    while start < end:
        count = min(len(_ZEROS), end - start)
        memory.write(start, _ZEROS[:count])
        start += count


def _page_down(address: int) -> int:
    return address - address % layout.PAGE_SIZE


def _page_up(address: int) -> int:
    return _page_down(address + layout.PAGE_SIZE - 1)


def _mib(size: int) -> int:
    return -(-size // layout.MiB)
