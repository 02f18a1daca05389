"""Finding the boot entries of a file system: snippets and unified kernel images, and what they name.

Boot Loader Specification of the UAPI group: "Type #1 Boot Loader Entry Keys" and "Type #2 EFI Unified Kernel
Images". An entry that cannot be booted is an entry all the same, with the reason in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..errors import ImageError
from . import uki
from .disk import printable
from .fat import Fat
from .loader_entries import ARCHITECTURE, BootEntry, Snippet, parse_snippet, split_name

ENTRIES = "/loader/entries"
UNIFIED = "/EFI/Linux"

ENTRIES_MAX = 256
"""The most entries in a folder."""

TEXT_MAX = 64 << 10
"""The largest text file, in bytes."""

INITRDS_MAX = 32
"""The most initrds of an entry."""


def read_entries(volume: Fat, where: str, number: int) -> Iterator[BootEntry]:
    """The entries of the file system ``volume``, in no order.

    ``where`` begins their ``source``, ``number`` is their ``volume``. Raises
    :class:`chv.errors.ImageError` when a folder cannot be read or has too many entries.
    """
    for folder, kind, read in ((ENTRIES, "conf", _read_snippet), (UNIFIED, "efi", _read_unified)):
        for name in _names(volume, folder, f".{kind}"):
            path = f"{folder}/{name}"
            ident, left, done = split_name(name)
            entry = BootEntry(
                ident, "", "", "", (), "", where + path, kind, tries_left=left, tries_done=done, volume=number
            )
            try:
                yield read(volume, entry, path)
            except ImageError as error:
                yield replace(entry, problem=_reason(volume, error))


def read_text(volume: Fat, path: str) -> bytes:
    """The content of a text file."""
    file = volume.open(path)
    if file.size > TEXT_MAX:
        raise ImageError(f"{file.name}: has {file.size} bytes; {TEXT_MAX} are allowed at most")
    return file.read(0, file.size)


def _names(volume: Fat, folder: str, suffix: str) -> list[str]:
    names = [node.name for node in volume.list(folder) if not node.is_directory]
    names = [name for name in names if name.casefold().endswith(suffix) and not name.startswith(".")]
    if len(names) > ENTRIES_MAX:
        raise ImageError(
            f"{volume.region.name}: {folder} has {len(names)} boot entries; {ENTRIES_MAX} are allowed at most"
        )
    return names


def _reason(volume: Fat, error: ImageError) -> str:
    """The message of ``error`` without the name of the file system, which the entry has already."""
    return str(error).removeprefix(f"{volume.region.name}: ")


# -- type 1: snippets --------------------------------------------------------------------


def _read_snippet(volume: Fat, entry: BootEntry, path: str) -> BootEntry:
    snippet = parse_snippet(read_text(volume, path))
    values = snippet.values
    entry = replace(
        entry,
        title=values.get("title", ""),
        version=values.get("version", ""),
        machine_id=values.get("machine-id", ""),
        sort_key=values.get("sort-key", ""),
        linux=values.get("linux") or values.get("uki") or values.get("efi") or "",
        initrds=snippet.initrds,
        options=snippet.options,
    )
    try:
        problem = _why_not(volume, entry, snippet)
        if problem or "linux" in values:
            return replace(entry, problem=problem)
        return _as_unified(volume, entry)
    except ImageError as error:
        return replace(entry, problem=_reason(volume, error))


def _why_not(volume: Fat, entry: BootEntry, snippet: Snippet) -> str:
    """Why the entry cannot be booted, as far as its text and the names of files tell; empty if it can."""
    architecture = snippet.values.get("architecture", ARCHITECTURE)
    if architecture.casefold() != ARCHITECTURE:
        return f"it is for the architecture {printable(architecture)}, not for {ARCHITECTURE}"
    if not entry.linux:
        what = "an image in the network" if "uki-url" in snippet.values else "no kernel"
        return f"it names {what}; the key linux is needed"
    if len(entry.initrds) > INITRDS_MAX:
        return f"it has {len(entry.initrds)} initrds; {INITRDS_MAX} are allowed at most"
    if "\0" in entry.options:
        return "its options contain a NUL"
    for key, path in (("kernel", entry.linux), *(("initrd", initrd) for initrd in entry.initrds)):
        node = volume.find(path)
        if node is None or node.is_directory:
            what = "missing" if node is None else "a directory"
            return f"its {key} {printable(path)} is {what}"
    return ""


def _as_unified(volume: Fat, entry: BootEntry) -> BootEntry:
    """An entry with the key ``efi`` or ``uki``: it boots here if the program is a unified kernel image."""
    unified = uki.parse(volume.open(entry.linux))
    if unified is None:
        return replace(
            entry,
            problem=f"it starts the EFI program {printable(entry.linux)}, which is no unified kernel image: "
            "that needs firmware",
        )
    return replace(entry, options=entry.options or unified.cmdline)


# -- type 2: unified kernel images -------------------------------------------------------


def _read_unified(volume: Fat, entry: BootEntry, path: str) -> BootEntry:
    unified = uki.parse(volume.open(path))
    if unified is None:
        return replace(entry, problem="it is no unified kernel image: it has no PE section .linux")
    release = unified.os_release

    def first(*names: str) -> str:
        return next((release[name] for name in names if release.get(name)), "")

    # The specification names the first of each row; the others are what systemd takes where that is missing.
    return replace(
        entry,
        title=first("PRETTY_NAME", "IMAGE_ID", "NAME", "ID"),
        version=first("IMAGE_VERSION", "VERSION_ID", "VERSION", "BUILD_ID"),
        sort_key=first("IMAGE_ID", "ID"),
        linux=path,
        options=unified.cmdline,
    )
