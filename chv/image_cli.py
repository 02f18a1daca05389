"""``chv image``: look into disk images."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .boot.image import BootEntry, Image

_COLUMNS = ("", "ID", "TITLE", "VERSION", "KERNEL")


def main(argv: Sequence[str]) -> int:
    """Run ``chv image`` with ``argv``, what stands behind ``image``; the exit status.

    Raises :class:`chv.errors.ImageError` for an image that cannot be used.
    """
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 0

    from .boot.image import open_image

    with open_image(options.file) as image:
        print(json.dumps(as_json(image), indent=2) if options.json else as_table(image))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chv image", description="Look into disk images. Nothing is written to them.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    entries = commands.add_parser(
        "entries",
        help="list the boot entries",
        description="List the boot entries of a disk image in boot order. "
        "The one marked with * is booted when none is chosen.",
        allow_abbrev=False,
    )
    entries.add_argument("file", metavar="FILE", help="raw disk image or block device")
    entries.add_argument("--json", action="store_true", help="print all that is known of each entry, as JSON")
    return parser


def as_json(image: Image) -> list[dict[str, Any]]:
    """The entries in boot order: the fields of ``BootEntry``, ``bootable`` and ``default``."""
    return [
        {
            **{name: value for name, value in dataclasses.asdict(entry).items() if name != "volume"},
            "bootable": entry.is_bootable,
            "default": entry is _default(image),
        }
        for entry in image.entries
    ]


def as_table(image: Image) -> str:
    """The entries in boot order, a line each; below an entry that cannot be booted, why not."""
    rows = [_row(entry, entry is _default(image)) for entry in image.entries]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    lines = [_line(_COLUMNS, widths)]
    for entry, row in zip(image.entries, rows, strict=True):
        lines.append(_line(row, widths))
        if entry.problem:
            lines.append(f"  cannot be booted: {entry.problem}")
    return "\n".join(lines)


def _row(entry: BootEntry, is_default: bool) -> tuple[str, ...]:
    from .boot.disk import printable

    texts = (entry.id, entry.title, entry.version, entry.linux)
    return ("*" if is_default else "", *(printable(text) or "-" for text in texts))


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{text:{max(width, 1)}}" for text, width in zip(row, widths, strict=True)).rstrip()


def _default(image: Image) -> BootEntry | None:
    return image.default if any(entry.is_bootable for entry in image.entries) else None
