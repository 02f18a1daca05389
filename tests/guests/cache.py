"""Where fetched and built files are kept: ``.cache/`` in the checkout, or ``$CHV_CACHE``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def cache() -> Path:
    """The folder for everything that can be fetched or built again."""
    return Path(os.environ.get("CHV_CACHE") or CHECKOUT / ".cache")


def digest(parts: Iterable[bytes]) -> str:
    """A short name for a content: the same parts give the same name."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()[:16]


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file so that no other process ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(data)
    draft.replace(path)
    return path


def link(path: Path, target: Path) -> None:
    """Make ``path`` a symbolic link to ``target``, relative, replacing what was there."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(os.path.relpath(target, path.parent))
    draft.replace(path)
