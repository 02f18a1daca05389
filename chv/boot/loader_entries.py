"""Boot entries: what a boot loader's menu would show, in its order, and the one that it would boot.

Boot Loader Specification of the UAPI group: "Type #1 Boot Loader Entry Keys", "Boot counting" and "Sorting";
loader.conf(5) of systemd-boot for ``default``. Nothing is read from a disk here.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from . import version_order

ARCHITECTURE = "x64"

_SORTED_BY = 256  # characters of a field that count for the order

_COUNTERS = re.compile(r"\+([0-9]{1,9})(?:-([0-9]{1,9}))?$")
_SUFFIX = re.compile(r"\.(?:conf|efi)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class BootEntry:
    """One entry. Its text is out of the image, so it may hold any character."""

    id: str
    """The name of its file, with ``.conf`` or ``.efi`` and without counters."""
    title: str
    """Empty if it has none."""
    version: str
    linux: str
    """The kernel's path in the partition, or that of a unified kernel image; empty if there is none."""
    initrds: tuple[str, ...]
    options: str
    """The kernel's command line."""
    source: str
    """Its file: the partition and the path."""
    kind: str = "conf"
    """``conf`` (type 1 of the specification) or ``efi`` (type 2: a unified kernel image)."""
    problem: str = ""
    """Why it cannot be booted here; empty if it can."""
    machine_id: str = ""
    sort_key: str = ""
    tries_left: int | None = None
    """Boot counting: attempts that are left; None if boots are not counted."""
    tries_done: int = 0
    volume: int = 0
    """Which of the image's partitions it is in, for :meth:`chv.boot.image.Image.load`."""

    @property
    def is_bootable(self) -> bool:
        return not self.problem

    @property
    def is_bad(self) -> bool:
        """Whether all its attempts to boot have failed."""
        return self.tries_left == 0


def split_name(file_name: str) -> tuple[str, int | None, int]:
    """A file's name as (id, tries left, tries done): ``a+3-1.conf`` is (``a.conf``, 3, 1)."""
    suffix = _SUFFIX.search(file_name)
    stem = file_name[: suffix.start()] if suffix else file_name
    counters = _COUNTERS.search(stem)
    if counters is None:
        return file_name, None, 0
    return stem[: counters.start()] + file_name[len(stem) :], int(counters[1]), int(counters[2] or 0)


def key_values(data: bytes) -> Iterable[tuple[str, str]]:
    """The lines ``key value`` of a file, without comments. What is not UTF-8 is kept as surrogates."""
    text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    for line in re.split(r"[\n\r]+", text):
        words = line.strip(" \t").split(None, 1)
        if len(words) == 2 and not words[0].startswith("#"):
            yield words[0], words[1]


@dataclass(frozen=True, slots=True)
class Snippet:
    """What a file of type 1 says, before anybody looks for the files that it names."""

    values: dict[str, str]
    """Keys that count once; the last one does."""
    initrds: tuple[str, ...]
    options: str


def parse_snippet(data: bytes) -> Snippet:
    """The keys of a file in ``/loader/entries``."""
    values: dict[str, str] = {}
    initrds: list[str] = []
    options: list[str] = []
    for key, value in key_values(data):
        if key == "initrd":
            initrds.append(value)
        elif key == "options":
            options.append(value)
        else:
            values[key] = value
    return Snippet(values, tuple(initrds), " ".join(options))


def default_pattern(data: bytes) -> str | None:
    """``default`` of ``/loader/loader.conf``; None if it does not say."""
    return dict(key_values(data)).get("default")


# -- order -------------------------------------------------------------------------------


def in_order(entries: Iterable[BootEntry]) -> list[BootEntry]:
    """``entries`` as the specification sorts them: the one to boot first at the front."""
    return sorted(entries, key=functools.cmp_to_key(_compare))


def _compare(a: BootEntry, b: BootEntry) -> int:
    order = (
        _sign(a.is_bad, b.is_bad)
        or _sign(not a.sort_key, not b.sort_key)
        or (_compare_keys(a, b) if a.sort_key else 0)
        or -version_order.compare(_stem(a.id)[:_SORTED_BY], _stem(b.id)[:_SORTED_BY])
    )
    return order or _sign(a.tries_done, b.tries_done)


def _compare_keys(a: BootEntry, b: BootEntry) -> int:
    return (
        _compare_text(a.sort_key, b.sort_key)
        or _compare_text(a.machine_id, b.machine_id)
        or -version_order.compare(a.version[:_SORTED_BY], b.version[:_SORTED_BY])
    )


def _compare_text(a: str, b: str) -> int:
    first, second = (text[:_SORTED_BY].encode("utf-8", "surrogatepass") for text in (a, b))
    return (first > second) - (first < second)


def _sign(a: int, b: int) -> int:
    return (a > b) - (a < b)


def _stem(name: str) -> str:
    return _SUFFIX.sub("", name)


# -- choice ------------------------------------------------------------------------------


def matching(entries: Sequence[BootEntry], wanted: str) -> list[BootEntry]:
    """The entries that ``wanted`` names, in order: by id, with or without suffix, else as a glob (fnmatch).

    Case does not matter. A name with its boot counters means the entry without them.
    """
    name = split_name(wanted)[0].casefold()
    exact = [entry for entry in entries if name in _names(entry)]
    if exact:
        return exact
    glob = re.compile(fnmatch.translate(wanted.casefold()))
    return [entry for entry in entries if any(glob.match(name) for name in _names(entry))]


def _names(entry: BootEntry) -> tuple[str, str]:
    full = entry.id.casefold()
    return full, _stem(full)


def default_entry(entries: Sequence[BootEntry], pattern: str | None) -> BootEntry | None:
    """The entry to boot when nobody chooses: the first bootable one that ``pattern`` matches, else the first.

    As in systemd-boot, entries that have failed too often come last. None if no entry is bootable.
    """
    candidates = matching(entries, pattern[:_SORTED_BY]) if pattern is not None else []
    return next((entry for entry in (*candidates, *entries) if entry.is_bootable), None)
