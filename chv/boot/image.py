"""Booting a disk image without firmware: its boot entries, and the files that one of them names.

The image is opened for reading only and is not trusted: whatever it holds, the outcome is an entry or a
:class:`chv.errors.ImageError` that names the image and what is wrong with it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

from ..errors import ImageError
from . import uki
from .disk import Disk, printable
from .entry_files import ENTRIES, UNIFIED, read_entries, read_text
from .fat import FILE_MAX, Fat, File
from .loaded import LoadedEntry, LoadedFile
from .loader_entries import BootEntry, default_entry, default_pattern, in_order, matching
from .partitions import boot_partitions
from .source import StrPath

__all__ = ["BootEntry", "Image", "LoadedEntry", "LoadedFile", "open_image"]

LOADER_CONF = "/loader/loader.conf"
FIRMWARE_BOOTS = "/EFI/BOOT/BOOTX64.EFI"  # UEFI 2.10, 3.5.1.1

# Between cpio archives there may be zeros up to this; an archive that is not so aligned is not found (Linux,
# Documentation/driver-api/early-userspace/buffer-format.rst).
_INITRD_ALIGNMENT = 4
_LISTED_MAX = 20


def open_image(path: StrPath, *, max_file_size: int = FILE_MAX) -> Image:
    """Open the raw disk image or block device ``path`` for reading and find its boot entries.

    ``max_file_size`` (bytes) bounds each file that is read, and the initrds of an entry together. Raises
    :class:`chv.errors.ImageError`: no image, no EFI system partition, no entries, or damage.
    """
    disk = Disk(path)
    try:
        return Image(disk, max_file_size)
    except BaseException:
        disk.close()
        raise


class Image:
    """A disk image with boot entries. Made by :func:`open_image`; a context manager."""

    def __init__(self, disk: Disk, file_max: int = FILE_MAX) -> None:
        self.name = disk.name
        """How messages begin: ``disk image`` and the path."""
        self._disk = disk
        self._file_max = file_max
        self._volumes: list[Fat] = []
        self._unreadable: list[ImageError] = []  # partitions without a FAT file system
        entries: list[BootEntry] = []
        for partition in boot_partitions(disk):
            try:
                volume = Fat(partition.region, file_max)
            except ImageError as error:
                self._unreadable.append(error)
                continue
            where = f"partition {partition.number}: " if partition.number else ""
            entries.extend(read_entries(volume, where, len(self._volumes)))
            self._volumes.append(volume)
        if not entries:
            raise self._no_entries()
        self.entries: list[BootEntry] = in_order(entries)
        """All entries in boot order, also those that cannot be booted here (:attr:`BootEntry.problem`)."""
        self._default = default_entry(self.entries, self._default_pattern())

    def _default_pattern(self) -> str | None:
        """``default`` of the EFI system partition, which is the last one, or of another partition."""
        for volume in reversed(self._volumes):
            try:
                if volume.find(LOADER_CONF) is not None:
                    return default_pattern(read_text(volume, LOADER_CONF))
            except ImageError:
                continue  # like a loader.conf that is missing: there is an order without it
        return None

    def _no_entries(self) -> ImageError:
        if not self._volumes:
            return self._unreadable[-1]
        reason = f"has no boot entries: neither {ENTRIES}/*.conf nor {UNIFIED}/*.efi"
        if any(volume.find(FIRMWARE_BOOTS) is not None for volume in self._volumes):
            reason += f"; it has {FIRMWARE_BOOTS}, which needs firmware to boot"
        others = (str(error).removeprefix(f"{self.name}: ") for error in self._unreadable)
        return ImageError("; ".join((f"{self.name}: {reason}", *others)))

    @property
    def default(self) -> BootEntry:
        """The entry that boots when nobody chooses: ``default`` of loader.conf, else the first in order.

        Raises :class:`chv.errors.ImageError` if no entry can be booted here.
        """
        if self._default is None:
            reasons = "; ".join(f"{printable(e.id)}: {e.problem}" for e in self.entries[:_LISTED_MAX])
            raise ImageError(f"{self.name}: none of its boot entries can be booted: {reasons}")
        return self._default

    def select(self, boot_entry: str | None = None) -> BootEntry:
        """The entry with that id, with or without its suffix, or the first that matches a glob.

        None is :attr:`default`. Raises :class:`chv.errors.ImageError`, listing what there is, for a name
        that no entry has, and for an entry that cannot be booted.
        """
        if boot_entry is None:
            return self.default
        found = matching(self.entries, boot_entry)
        if not found:
            listed = ", ".join(printable(entry.id) for entry in self.entries[:_LISTED_MAX])
            more = len(self.entries) - _LISTED_MAX
            raise ImageError(
                f"{self.name}: has no boot entry {printable(boot_entry)}; it has {listed}"
                + (f" and {more} more" if more > 0 else "")
            )
        entry = next((entry for entry in found if entry.is_bootable), found[0])
        self._require_bootable(entry)
        return entry

    def load(self, entry: BootEntry | None = None) -> LoadedEntry:
        """Read the kernel and the initrds of ``entry`` (None: :attr:`default`) into memory.

        Raises :class:`chv.errors.ImageError` when one of them cannot be read. The image may be closed
        afterwards.
        """
        entry = entry or self.default
        self._require_bootable(entry)
        volume = self._volumes[entry.volume]
        file = volume.open(entry.linux)
        unified = uki.parse(file)
        if unified is None:
            kernel, initrds = _Part(file, 0, file.size), []
        else:
            kernel = _Part(file, unified.linux.offset, unified.linux.size)
            initrds = [_Part(file, section.offset, section.size) for section in unified.initrds]
        others = [volume.open(path) for path in entry.initrds]
        initrds += [_Part(other, 0, other.size) for other in others]
        with ExitStack() as opened:  # what is open when something fails
            loaded = self._load(entry, "kernel", [kernel])
            opened.callback(loaded.close)
            initramfs = self._load(entry, "initrd", initrds) if initrds else None
            opened.pop_all()
        return LoadedEntry(entry, loaded, initramfs, entry.options)

    def _load(self, entry: BootEntry, role: str, parts: list[_Part]) -> LoadedFile:
        """``parts`` behind each other in one file."""
        what = f"boot entry {printable(entry.id)}: its {role}"
        sizes = [part.size + -part.size % _INITRD_ALIGNMENT for part in parts[:-1]] + [parts[-1].size]
        if sum(sizes) > self._file_max:
            raise ImageError(
                f"{self.name}: {what}s have {sum(sizes)} bytes together; {self._file_max} are allowed at most"
            )
        if not sum(sizes):
            raise ImageError(f"{self.name}: {what} is empty")

        def fill(fd: int) -> None:
            for part, size in zip(parts, sizes, strict=True):
                part.file.copy_to(fd, part.offset, part.size)
                os.write(fd, bytes(size - part.size))

        name = f"{role} {parts[0].file.name.removeprefix('disk image ')}"
        return LoadedFile(name if len(parts) == 1 else f"{name} and {len(parts) - 1} more", fill)

    def _require_bootable(self, entry: BootEntry) -> None:
        if entry.problem:
            raise ImageError(f"{self.name}: boot entry {printable(entry.id)}: {entry.problem}")

    def close(self) -> None:
        """Close the image; what was loaded from it stays. Closing again does nothing."""
        self._disk.close()

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Part:
    """A stretch of a file, in bytes."""

    file: File
    offset: int
    size: int
