"""A writer of newc cpio archives: what the kernel unpacks as an initramfs.

Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat


class Archive:
    """Collects files, all owned by root and dated 1970, so that the same content gives the same bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._folders: set[str] = set()
        self._inode = 0

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file; the folders above it are made."""
        self._parents(path)
        self._entry(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._parents(path)
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def folder(self, path: str, mode: int = 0o755) -> None:
        """A folder, unless it was made already."""
        if path not in self._folders:
            self._parents(path)
            self._folders.add(path)
            self._entry(path, stat.S_IFDIR | mode, b"")

    def device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A character device."""
        self._parents(path)
        self._entry(path, stat.S_IFCHR | mode, b"", (major, minor))

    def data(self) -> bytes:
        """The whole archive."""
        return b"".join([*self._parts, self._header("TRAILER!!!", 0, 0, (0, 0))])

    def _parents(self, path: str) -> None:
        if "/" in path:
            self.folder(path.rpartition("/")[0])

    def _entry(self, path: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        self._parts += [self._header(path, mode, len(data), device), data, bytes(-len(data) % 4)]

    def _header(self, path: str, mode: int, size: int, device: tuple[int, int]) -> bytes:
        name = path.encode() + b"\0"
        #        inode        mode  uid gid links mtime size  dev   rdev     name size  checksum
        fields = (self._inode, mode, 0, 0, 1, 0, size, 0, 0, *device, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + name
        return header + bytes(-len(header) % 4)
