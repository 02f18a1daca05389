"""Damage disk images and look at them: ``python -m tests.fuzz_image --seconds 600``.

Whatever is in an image, the outcome is an entry or an ImageError. What makes lines of chv/boot run one after
the other that have not done so before is kept and damaged further. An image with another outcome is written
to a file, and the program ends with status 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import struct
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from chv import boot
from chv.boot.image import BootEntry, Image, open_image
from chv.errors import ImageError
from chv.image_cli import as_json, as_table
from tests.unit.disk_images import (
    ENTRY,
    ESP,
    KERNEL,
    XBOOTLDR,
    esp,
    gpt,
    mbr,
    pe,
    unified,
    usual_files,
)

BLOCK = 512
FILE_MAX = 1 << 20
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFF7, 0xFFFF, 0xFFFFFF7, 0xFFFFFFF, (1 << 32) - 1, 1 << 63)
WORDS = (
    b"linux ",
    b"initrd ",
    b"efi ",
    b"options ",
    b"default ",
    b"/..",
    b"\n",
    b"\0",
    b"*",
    b"\xff",
    b"/k ",
)
CORPUS_MAX = 400
ENTRIES_USED = 6
HANGS_AFTER = 120  # seconds for one image, while every line is traced


def seeds() -> list[bytes]:
    """Images of all kinds that are as they should be."""
    files = {
        **usual_files(),
        "loader/entries/old+3-1.conf": b"sort-key a\nversion 1~rc1\n" + ENTRY,
        "loader/entries/win.conf": b"efi /EFI/Linux/a.efi\narchitecture x64\n",
        "EFI/Linux/a.efi": unified(KERNEL, initrd=b"i" * 700, ucode=b"u"),
        "EFI/Linux/p.efi": pe([(".linux", b"k"), (".profile", b"ID=a"), (".cmdline", b"c")]),
    }
    return [
        gpt([(ESP, esp(files, bits=12))]),
        gpt([(ESP, esp(files, bits=12, stride=2, per_cluster=2))]),
        gpt([(XBOOTLDR, esp(bits=12, clusters=60)), (ESP, esp(files, clusters=100))], slots=8),
        gpt([(ESP, esp(files, sector=4096, clusters=60))], sector=4096, slots=32),
        mbr([(0xEF, 1, 4267)]) + esp(files, bits=16),
        esp(files, active=1, clusters=100),
    ]


def hot_blocks(image: bytes) -> list[int]:
    """Where an image has anything but zeros."""
    zeros = bytes(BLOCK)
    return [start for start in range(0, len(image), BLOCK) if image[start : start + BLOCK] != zeros]


def put(image: bytearray, offset: int, value: bytes) -> None:
    end = min(offset + len(value), len(image))
    image[offset:end] = value[: end - offset]


def damage(image: bytes, choice: random.Random) -> bytes:
    """The image with a few changes where it matters; mostly with checksums that fit again."""
    changed, blocks = bytearray(image), hot_blocks(image) or [0]
    for _ in range(choice.randint(1, 5)):
        offset = choice.choice(blocks) + choice.randrange(BLOCK)
        kind = choice.randrange(6)
        if kind == 0:
            put(changed, offset, bytes([choice.randrange(256)]))
        elif kind in (1, 2):
            width = choice.choice((1, 2, 4, 8))
            number = choice.choice((*NUMBERS, choice.randrange(700), choice.getrandbits(64)))
            put(changed, offset & -width, (number & (1 << 8 * width) - 1).to_bytes(width, "little"))
        elif kind == 3:
            put(changed, offset, choice.choice(WORDS))
        elif kind == 4:
            start = choice.choice(blocks) + choice.randrange(BLOCK)
            put(changed, offset & -32, bytes(changed[start & -32 : (start & -32) + 32]))
        else:
            put(changed, choice.choice(blocks), bytes(changed[offset & -BLOCK : (offset & -BLOCK) + BLOCK]))
    if choice.random() < 0.85:
        repair_checksums(changed)
    if choice.random() < 0.03:
        del changed[choice.randrange(len(changed)) :]
    return bytes(changed)


def repair_checksums(image: bytearray) -> None:
    """Make the checksums of partition tables right, so that what they protect is looked at."""
    for size in (512, 4096):
        for start in (size, len(image) // size * size - size):
            if start < size or image[start : start + 8] != b"EFI PART":
                continue
            length = struct.unpack_from("<I", image, start + 12)[0]
            table, count, entry = struct.unpack_from("<QII", image, start + 72)
            if table * size + count * entry <= len(image):
                array = image[table * size : table * size + count * entry]
                struct.pack_into("<I", image, start + 88, zlib.crc32(array))
            struct.pack_into("<I", image, start + 16, 0)
            if length <= size:
                struct.pack_into("<I", image, start + 16, zlib.crc32(image[start : start + length]))


def use(path: str) -> str:
    """All that is done with an image; what came of it. Anything but an ImageError goes through."""
    try:
        with open_image(path, max_file_size=FILE_MAX) as image:
            assert all(line.isprintable() for line in as_table(image).split("\n"))
            as_json(image)
            loaded = [_load(image, entry) for entry in image.entries[:ENTRIES_USED]]
            _ = image.default
    except ImageError as error:
        _check_message(error, path)
        return "refused"
    return "loaded" if any(loaded) else "listed"


def _load(image: Image, entry: BootEntry) -> bool:
    try:
        with image.load(entry) as loaded:
            for file in filter(None, (loaded.kernel, loaded.initramfs)):
                assert len(os.pread(file.fileno(), FILE_MAX + 1, 0)) == file.size <= FILE_MAX
    except ImageError as error:
        _check_message(error, image.name.removeprefix("disk image "))
        return False
    return True


def _check_message(error: ImageError, path: str) -> None:
    message = str(error)
    assert message.startswith(f"disk image {path}: "), message
    assert message.isprintable(), repr(message)


class Coverage:
    """Which lines of chv/boot ran after which."""

    def __init__(self) -> None:
        self.seen: set[tuple[Any, int, int]] = set()
        self._new = 0
        self._folder = str(Path(boot.__file__).parent)

    def of(self, path: str) -> tuple[str, int]:
        """Use the image; the outcome, and how much ran that never ran before."""
        self._new = 0
        sys.settrace(self._call)
        try:
            return use(path), self._new
        finally:
            sys.settrace(None)

    def _call(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(self._folder):
            return None
        last = 0

        def line(frame: FrameType, event: str, _argument: Any) -> Any:
            nonlocal last
            step = (code, last, frame.f_lineno)
            if step not in self.seen:
                self.seen.add(step)
                self._new += 1
            last = frame.f_lineno
            return line

        return line


def run(seconds: float, seed: int, path: Path) -> int:
    """Fuzz for ``seconds`` with images at ``path``; the exit status."""
    choice, coverage = random.Random(seed), Coverage()
    corpus, outcomes = seeds(), Counter[str]()
    slowest, end, shown = 0.0, time.monotonic() + seconds, time.monotonic()
    for image in corpus:
        path.write_bytes(image)
        assert coverage.of(str(path))[0] == "loaded"
    while (now := time.monotonic()) < end:
        image = damage(choice.choice(corpus), choice)
        path.write_bytes(image)
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
        try:
            outcome, new = coverage.of(str(path))
        except Exception:
            traceback.print_exc()
            print(f"fuzz_image: seed {seed}: the image is {path}", file=sys.stderr)
            return 1
        finally:
            faulthandler.cancel_dump_traceback_later()
        outcomes[outcome] += 1
        slowest = max(slowest, time.monotonic() - now)
        if new and len(corpus) < CORPUS_MAX:
            corpus.append(image)
        if now - shown > 10:
            shown = now
            print(_summary(outcomes, coverage, corpus, slowest), flush=True)
    print(_summary(outcomes, coverage, corpus, slowest))
    path.unlink()
    return 0


def _summary(outcomes: Counter[str], coverage: Coverage, corpus: Sequence[bytes], slowest: float) -> str:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    return (
        f"{sum(outcomes.values())} images ({counts}), {len(coverage.seen)} steps between lines, "
        f"{len(corpus)} images kept, slowest {slowest:.2f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="how long [default: 60]")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument(
        "--image", type=Path, default=Path("fuzz.img"), help="file to use [default: fuzz.img]"
    )
    parser.add_argument("--input", type=Path, metavar="FILE", help="use only this image, which is kept")
    options = parser.parse_args()
    if options.input is not None:
        print(use(str(options.input)))
        return 0
    print(f"fuzz_image: seed {options.seed}", flush=True)
    return run(options.seconds, options.seed, options.image)


if __name__ == "__main__":
    sys.exit(main())
