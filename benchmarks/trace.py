"""The exit traces that benchmarks.dispatch replays: recorded ones as files, synthetic ones."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

RECORDED = Path(__file__).resolve().parent / "boot-6.12.json.gz"
SPACES = ("pio", "mmio")
SIZES = (1, 2, 4, 8)


class Access(NamedTuple):
    """One access of a guest that left KVM_RUN."""

    space: str  # "pio" or "mmio"
    address: int
    size: int
    is_write: bool


class Layout(NamedTuple):
    """(base, size) of the devices on both buses."""

    pio: list[tuple[int, int]]
    mmio: list[tuple[int, int]]


def write(accesses: Sequence[Access], layout: Layout) -> bytes:
    """As JSON: the layout, the different accesses once each, and their numbers in order."""
    kinds = sorted(set(accesses))
    number = {access: index for index, access in enumerate(kinds)}
    found = {"layout": layout._asdict(), "kinds": kinds, "accesses": [number[access] for access in accesses]}
    return json.dumps(found, separators=(",", ":")).encode()


def read(path: Path = RECORDED) -> tuple[list[Access], Layout]:
    """What :func:`write` wrote, from a file that gzip packed."""
    found = json.loads(gzip.decompress(path.read_bytes()))
    kinds = [Access(*kind) for kind in found["kinds"]]
    parts = {name: [(base, size) for base, size in ranges] for name, ranges in found["layout"].items()}
    return [kinds[index] for index in found["accesses"]], Layout(**parts)


def uniform(ranges: int, count: int, seed: int = 1) -> tuple[list[Access], Layout]:
    """Every range of a memory bus as likely as the others, each 16 bytes long and with room behind it."""
    chosen = random.Random(seed)
    layout = Layout([], [(0xD000_0000 + 0x1000 * index, 16) for index in range(ranges)])
    accesses = []
    for _ in range(count):
        base, size = chosen.choice(layout.mmio)
        width = chosen.choice(SIZES)
        offset = chosen.randrange(0, size, width)
        accesses.append(Access("mmio", base + offset, width, chosen.random() < 0.5))
    return accesses, layout
