"""What a VM boots: read and checked once, placed into guest memory at each boot."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from .. import layout
from ..errors import ConfigError, ImageError
from ..memory import GuestMemory
from . import room
from .entry import EntryPoint
from .kernel import Handover, Kernel, open_kernel
from .source import FileSource, StrPath

if TYPE_CHECKING:
    from pathlib import Path


class Payload:
    """A kernel or firmware, an initramfs and a command line, ready to be placed. Made by :func:`prepare`.

    :meth:`place` changes nothing here, so one payload serves many VMs and threads. Uncompressed files stay
    open until :meth:`close`; it is a context manager, too.
    """

    def __init__(self, kernel: Kernel, initramfs: FileSource | None, cmdline: bytes) -> None:
        self._kernel = kernel
        self._initramfs = initramfs
        self._cmdline = cmdline

    def place(
        self, memory: GuestMemory, rsdp: int = layout.RSDP, reserved: Sequence[tuple[int, int]] = ()
    ) -> EntryPoint:
        """Write everything into ``memory`` and say where to enter it.

        ``rsdp`` is where the ACPI root pointer will be; ``reserved`` are (base, size) ranges that the memory
        map lists as reserved. Raises :class:`chv.errors.ImageError` when something does not fit or a file
        was changed meanwhile, :class:`chv.errors.ConfigError` when the memory is too small to boot at all or
        ``reserved`` overlaps it. The memory is untouched when the kernel or the initramfs does not fit.
        """
        memory_map = room.memory_map(memory, reserved)
        kernel = self._kernel
        kernel.source.require_unchanged()
        for start, end, what in kernel.spans():
            room.require_ram(memory, start, end, f"{kernel.source.name}: {what}")
        initramfs = self._place_initramfs(memory)
        kernel.place(memory)
        memory.write(layout.CMDLINE, self._cmdline + b"\0")
        return kernel.enter(memory, Handover(memory_map, rsdp, initramfs))

    def _place_initramfs(self, memory: GuestMemory) -> tuple[int, int] | None:
        """Copy the initramfs as high as it may be, so that the kernel's own first allocations have room."""
        source = self._initramfs
        if source is None:
            return None
        source.require_unchanged()
        spans = [(start, end) for start, end, _ in self._kernel.spans()]
        limit = self._kernel.initrd_limit
        address = room.highest_gap(spans, source.size, min(memory.regions[0].end, limit))
        if address is None:
            raise ImageError(f"{source.name}: {room.why_no_gap(spans, source.size, limit)}")
        with memory.view(address, source.size) as target:
            source.copy_into(target, 0)
        return address, source.size

    def close(self) -> None:
        """Close the files; :meth:`place` is over then. Closing again does nothing."""
        self._kernel.source.close()
        if self._initramfs is not None:
            self._initramfs.close()

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
    cache_dir: StrPath | None = None,
    kernel_name: str | None = None,
    initramfs_name: str | None = None,
) -> Payload:
    """Open, check and unpack what is to be booted: ``kernel`` or ``firmware``, one of the two.

    ``memory_size`` (bytes), when known, bounds what a compressed kernel may unpack to. With ``cache_dir``,
    for example :func:`chv.boot.cache.default_directory`, unpacked kernels are kept in that folder and taken
    from it. ``kernel_name`` and ``initramfs_name`` stand for the paths in messages. Raises
    :class:`chv.errors.ImageError` for a file and :class:`chv.errors.ConfigError` for an argument.
    """
    if kernel is not None and firmware is not None:
        raise ConfigError("payload: kernel and firmware are both given; one of them boots the VM")
    main, role = (kernel, "kernel") if firmware is None else (firmware, "firmware")
    if main is None:
        raise ConfigError("payload: nothing to boot; give a kernel or a firmware")
    text = _encode(cmdline)
    with ExitStack() as opened:  # what is open when something fails
        file = FileSource(role, main, kernel_name)
        opened.callback(file.close)
        loadable, cmdline_max = open_kernel(file, memory_size, _folder(cache_dir))
        opened.callback(loadable.source.close)
        _require_length(text, cmdline_max)
        extra = None if initramfs is None else FileSource("initramfs", initramfs, initramfs_name)
        opened.pop_all()
    if loadable.source is not file:
        file.close()
    return Payload(loadable, extra, text)


def _folder(path: StrPath | None) -> Path | None:
    if path is None:
        return None
    from pathlib import Path

    return Path(path)


def prepare_image(
    path: StrPath,
    boot_entry: str | None = None,
    *,
    cmdline: str = "",
    memory_size: int | None = None,
    cache_dir: StrPath | None = None,
) -> Payload:
    """Open, check and unpack what a disk image boots: one of its boot entries, the default if that is None.

    ``cmdline`` follows the entry's own options, ``cache_dir`` is that of :func:`prepare`. The image is closed
    again when this returns. Raises :class:`chv.errors.ImageError` for an image that cannot be read or has no
    such entry.
    """
    from .image import open_image

    with open_image(path) as image, image.load(image.select(boot_entry)) as found:
        return prepare(
            kernel=found.kernel,
            initramfs=found.initramfs,
            cmdline=f"{found.cmdline} {cmdline}".strip(),
            memory_size=memory_size,
            cache_dir=cache_dir,
            kernel_name=found.kernel.name,
            initramfs_name=None if found.initramfs is None else found.initramfs.name,
        )


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


def _encode(cmdline: str) -> bytes:
    """The command line as bytes: UTF-8, and the bytes of arguments that are not UTF-8 as they were."""
    try:
        text = cmdline.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ConfigError(f"payload.cmdline: cannot be written as UTF-8 ({error.reason})") from error
    if b"\0" in text:
        raise ConfigError(f"payload.cmdline: has a NUL at byte {text.index(0)}; none is allowed")
    return text


def _require_length(text: bytes, kernel_max: int | None) -> None:
    area = layout.CMDLINE_MAX - 1
    limit, who = area, "there is room for"
    if kernel_max is not None and kernel_max < area:
        limit, who = kernel_max, "this kernel takes"
    if len(text) > limit:
        raise ConfigError(f"payload.cmdline: has {len(text)} bytes; {who} {limit} at most")
