"""Unpacked kernels kept on disk, by the content of what was unpacked.

A file is named by the SHA-256 of the compressed kernel, is written beside its final name and renamed, and
is used only from a folder that nobody else can write to. Deleting any file of it, or all, is harmless.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from ..errors import ConfigError, ImageError
from ..logs import Logger
from . import elf
from .bzimage import Compressed
from .source import Buffer, FileSource

_LOG = Logger(__name__)
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def default_directory() -> Path:
    """``chv/kernels`` under ``$XDG_CACHE_HOME`` (XDG Base Directory Specification; ``~/.cache`` if unset)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "chv" / "kernels"


class Cache:
    """A folder of unpacked kernels. It is created with mode 0700 if it is missing."""

    def __init__(self, directory: Path) -> None:
        """Raises :class:`chv.errors.ConfigError` if the folder cannot be used or others can write to it."""
        self.directory = directory
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
            status = directory.stat()
        except OSError as error:
            raise ConfigError(f"cache_dir: {directory} cannot be used ({error.strerror})") from error
        if status.st_uid != os.geteuid() or status.st_mode & _WRITABLE_BY_OTHERS:
            raise ConfigError(
                f"cache_dir: {directory} belongs to user {status.st_uid} and has mode "
                f"{stat.S_IMODE(status.st_mode):o}; it must be yours, and writable by you alone (700)"
            )

    def open(self, compressed: Compressed, name: str) -> FileSource | None:
        """The unpacked form of ``compressed``, if it is here and whole; ``name`` is for messages."""
        path = self._path(compressed)
        if not path.exists():
            return None
        try:
            source = FileSource("kernel", path, f"{name} (unpacked in {path})")
        except ImageError as error:
            self._drop(path, str(error))
            return None
        if source.size == compressed.size:
            try:
                if elf.parse(source).pvh_entry is not None:
                    return source
                reason = "it has no PVH entry"
            except ImageError as error:
                reason = str(error)
        else:
            reason = f"it has {source.size} bytes, not {compressed.size}"
        source.close()
        self._drop(path, reason)
        return None

    def add(self, compressed: Compressed, data: Buffer) -> None:
        """Keep ``data``. A full disk or the like is logged: the kernel boots without the cache."""
        import tempfile

        path = self._path(compressed)
        try:
            with tempfile.NamedTemporaryFile(dir=self.directory, prefix=".new-", delete=False) as file:
                try:
                    file.write(data)
                    file.flush()
                    os.rename(file.name, path)
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            _LOG.warning("kernel cache: %s was not written: %s", path, error)

    def _path(self, compressed: Compressed) -> Path:
        import hashlib

        digest = hashlib.sha256(compressed.data).hexdigest()
        return self.directory / f"{digest}-{compressed.size}.elf"

    def _drop(self, path: Path, reason: str) -> None:
        _LOG.warning("kernel cache: %s is removed: %s", path, reason)
        with contextlib.suppress(OSError):
            path.unlink()
