"""Reading a FAT12, FAT16 or FAT32 file system that nobody vouches for.

Microsoft FAT Specification (August 30 2005): section 3 for the boot sector, 4 for the table, 6 for
directories. Every number is checked against the size of the file system, chains of clusters that come back
to themselves are found, and what is read for directories and tables is bounded, in memory and in time.
"""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import ImageError
from .disk import Region, printable
from .fat_directory import ENTRY_SIZE, Directory, Node

FILE_MAX = 1 << 30
"""The largest file that is read, unless told otherwise."""

DIRECTORY_MAX = 65536 * ENTRY_SIZE
"""The largest directory (section 6: 65536 entries)."""

DIRECTORIES_MAX = 4 * DIRECTORY_MAX
"""All directories of a file system that are read, together."""

CLUSTERS_MAX = 8 << 20
"""How many clusters of chains are followed in a file system: 4 GiB of 512 bytes each, 256 GiB of 32 KiB."""

DEPTH_MAX = 64
"""The most directories in a path."""

# Section 3.1: jump, OEM name, bytes per sector, sectors per cluster, reserved sectors, number of FATs, root
# entries, 16-bit number of sectors, media, 16-bit size of a FAT, 2 + 2 bytes of geometry, hidden sectors,
# 32-bit number of sectors.
_BPB = struct.Struct("<3s8sHBHBHHBH4xII")
_BPB32 = struct.Struct("<IHHI")  # section 3.3, at 36: size of a FAT, flags, version, root cluster
_MIRRORING_OFF, _ACTIVE_MASK = 0x80, 0x0F

_FAT12_CLUSTERS_MAX = 4084  # section 3.5
_FAT16_CLUSTERS_MAX = 65524
_FAT32_CLUSTERS_MAX = (1 << 28) - 12

_PAGE = 4096  # the table is read in pieces of this size
_PAGES_MAX = 8192
_COPY_PIECE = 1 << 20


def is_fat(sector: bytes) -> bool:
    """Whether a file system that begins with ``sector`` (512 bytes) is FAT, as far as its fields go."""
    if len(sector) < 512 or sector[510:512] != b"\x55\xaa":
        return False
    jump, _, bytes_per_sector, per_cluster, reserved, fats, _, _, media, _, _, _ = _BPB.unpack_from(sector)
    return (
        jump[0] in (0xEB, 0xE9)
        and bytes_per_sector in (512, 1024, 2048, 4096)
        and _power_of_two(per_cluster)
        and reserved > 0
        and fats > 0
        and (media == 0xF0 or media >= 0xF8)
    )


def _power_of_two(number: int) -> bool:
    return number > 0 and not number & (number - 1)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where things are in the file system, in bytes from its start."""

    bits: int
    """12, 16 or 32: how wide an entry of the table is."""
    cluster_size: int
    clusters: int
    """Valid cluster numbers are 2 to ``clusters + 1``."""
    table: int
    table_size: int
    root: int
    """Of the root directory: its first cluster (FAT32) or its offset."""
    root_size: int
    """Of the root directory where it is no chain of clusters; 0 for FAT32."""
    data: int
    """Where cluster 2 is."""


def _geometry(region: Region) -> Geometry:
    sector = region.read(0, min(region.size, 512))
    if not is_fat(sector):
        raise ImageError(f"{region.name}: {_what_else(region, sector)}")
    bpb = _BPB.unpack_from(sector)
    _, _, size, per_cluster, reserved, fats, root_entries, small, _, narrow, _, large = bpb
    wide_size, flags, _, root = _BPB32.unpack_from(sector, 36)
    # As Linux and EDK2 tell FAT32 from the others: small FAT32 file systems have too few clusters for the
    # rule of section 3.5.
    wide = narrow == 0
    per_fat = wide_size if wide else narrow
    sectors = small or large
    active = flags & _ACTIVE_MASK if wide and flags & _MIRRORING_OFF else 0
    root_sectors = 0 if wide else -(-root_entries * ENTRY_SIZE // size)
    first_data = reserved + fats * per_fat + root_sectors
    if not per_fat or active >= fats or first_data >= sectors or (not wide and not root_entries):
        raise ImageError(f"{region.name}: its FAT boot sector makes no sense: no room for tables and data")
    if sectors * size > region.size:
        raise ImageError(
            f"{region.name}: its FAT file system has {sectors * size} bytes, but there are only {region.size}"
        )
    clusters = (sectors - first_data) // per_cluster
    bits = 32 if wide else 12 if clusters <= _FAT12_CLUSTERS_MAX else 16
    limit = {12: _FAT12_CLUSTERS_MAX, 16: _FAT16_CLUSTERS_MAX, 32: _FAT32_CLUSTERS_MAX}[bits]
    if clusters > limit:
        raise ImageError(
            f"{region.name}: its FAT{bits} file system has {clusters} clusters; {limit} are possible"
        )
    table_size = per_fat * size
    root_offset = (reserved + fats * per_fat) * size
    return Geometry(
        bits=bits,
        cluster_size=per_cluster * size,
        clusters=min(clusters, table_size * 8 // bits - 2),
        table=(reserved + active * per_fat) * size,
        table_size=table_size,
        root=root if wide else root_offset,
        root_size=0 if wide else root_entries * ENTRY_SIZE,
        data=first_data * size,
    )


def _what_else(region: Region, sector: bytes) -> str:
    if sector[3:11] == b"EXFAT   ":
        found = "is an exFAT file system"
    elif sector[3:11] == b"NTFS    ":
        found = "is an NTFS file system"
    elif region.size >= 0x43A and region.read(0x438, 2) == b"\x53\xef":
        found = "is an ext2, ext3 or ext4 file system"
    else:
        found = "has no FAT boot sector"
    return f"{found}; a FAT12, FAT16 or FAT32 file system is needed"


class _Damaged(Exception):
    """What is wrong with a chain of clusters, without the name of the file."""


class Table:
    """The file allocation table: which cluster comes after which."""

    def __init__(self, region: Region, geometry: Geometry) -> None:
        self._region = region
        self._geometry = geometry
        self._pages: dict[int, memoryview] = {}
        self._bytes = b""
        if geometry.bits == 12:  # entries lie across the pages; all of it is 6 KiB
            used = ((geometry.clusters + 2) * 12 + 7) // 8
            self._bytes = region.read(geometry.table, min(used, geometry.table_size))
        self._end = {12: 0xFF8, 16: 0xFFF8, 32: 0x0FFFFFF8}[geometry.bits]

    def next(self, cluster: int) -> int:
        """The cluster after this valid one; 0 at the end of the chain."""
        value = self._entry(cluster)
        if 2 <= value < self._geometry.clusters + 2:
            return value
        if value >= self._end:
            return 0
        if value == self._end - 1:
            raise _Damaged(f"cluster {cluster} is followed by one that is marked bad")
        if value == 0:
            raise _Damaged(f"cluster {cluster} is free, so its chain has no end")
        raise _Damaged(
            f"cluster {cluster} is followed by {value}; there are 2 to {self._geometry.clusters + 1}"
        )

    def _entry(self, cluster: int) -> int:
        bits = self._geometry.bits
        if bits == 32:
            return self._page(cluster >> 10)[cluster & 0x3FF] & 0x0FFFFFFF
        if bits == 16:
            return self._page(cluster >> 11)[cluster & 0x7FF]
        start = cluster * 3 // 2
        pair = self._bytes[start] | self._bytes[start + 1] << 8
        return pair >> 4 if cluster & 1 else pair & 0xFFF

    def _page(self, number: int) -> memoryview:
        page = self._pages.get(number)
        if page is None:
            if len(self._pages) >= _PAGES_MAX:
                self._pages.clear()
            start = number * _PAGE
            length = min(_PAGE, self._geometry.table_size - start)
            data = self._region.read(self._geometry.table + start, length)
            page = memoryview(data).cast("I" if self._geometry.bits == 32 else "H")
            self._pages[number] = page
        return page


class Chain:
    """A chain of clusters as runs that lie behind each other on the disk."""

    def __init__(self, table: Table, geometry: Geometry, first: int, count: int | None, limit: int) -> None:
        """Follow the chain from ``first`` for ``count`` clusters (None: to its end, a directory).

        ``limit`` is how many clusters may be followed, also to find out that there is something wrong.
        A chain that ends early, leaves the file system or comes back to a cluster is damaged.
        """
        self.starts = array("I")  # the first cluster of each run
        self.indexes = array("I")  # how many clusters of the chain lie before each run
        self.length = 0
        self.steps = 0
        """How many clusters were followed."""
        if not 2 <= first < geometry.clusters + 2:
            raise _Damaged(f"its first cluster is {first}; there are 2 to {geometry.clusters + 1}")
        wanted = DIRECTORY_MAX // geometry.cluster_size if count is None else count
        # Brent's way to find a cycle: compare with a cluster that is moved up after 1, 2, 4, 8 ... steps. If
        # the clusters of a file have a cycle, it shows within 3 times as many steps. A chain that goes on
        # behind the file's end without a cycle is no damage that matters here.
        most = wanted + 1 if count is None else 4 * wanted + 16
        marked, until = 0, 1
        cluster, previous = first, 0
        while self.steps < most:
            if self.length < wanted:
                if cluster != previous + 1 or not self.length:
                    self.starts.append(cluster)
                    self.indexes.append(self.length)
                self.length += 1
            if cluster == marked:
                raise _Damaged(f"its chain of clusters is cyclic: it comes back to cluster {cluster}")
            if self.steps >= limit:
                raise _Damaged(f"more than {CLUSTERS_MAX} clusters would have to be followed in all")
            self.steps += 1
            if self.steps == until:
                marked, until = cluster, 2 * until
            previous = cluster
            cluster = table.next(cluster)
            if not cluster:
                break
        if count is None and self.steps > wanted:
            raise _Damaged(f"it has more than {DIRECTORY_MAX} bytes; no directory may have")
        if count is not None and self.length < count:
            raise _Damaged(f"its chain ends after {self.length} of {count} clusters")


class File:
    """An open file of the file system."""

    def __init__(self, fat: Fat, name: str, size: int, chain: Chain | None) -> None:
        self.name = name
        """The image's name, the partition and the path."""
        self.size = size
        self._fat = fat
        self._chain = chain

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes, or :class:`chv.errors.ImageError` where the file has no such bytes."""
        self._require(offset, length)
        data = bytearray(length)
        with memoryview(data) as target:
            self._read_into(target, offset)
        return bytes(data)

    def copy_to(self, fd: int, offset: int = 0, length: int | None = None) -> None:
        """Write ``length`` bytes from ``offset`` on (None: to the end) to the file descriptor ``fd``."""
        left = self.size - offset if length is None else length
        self._require(offset, left)
        buffer = memoryview(bytearray(min(left, _COPY_PIECE)))
        while left:
            piece = buffer[: min(left, _COPY_PIECE)]
            self._read_into(piece, offset)
            offset += len(piece)
            left -= len(piece)
            while piece:
                piece = piece[os.write(fd, piece) :]

    def _read_into(self, target: memoryview, offset: int) -> None:
        done = 0
        for place, length in self._extents(offset, len(target)):
            self._fat.region.read_into(target[done : done + length], place)
            done += length

    def _require(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ImageError(f"{self.name}: {length} bytes at {offset} lie beyond its end ({self.size})")

    def _extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(offset in the file system, bytes) of what lies at ``offset``, run by run."""
        chain, size = self._chain, self._fat.geometry.cluster_size
        if chain is None:
            return
        run = bisect_right(chain.indexes, offset // size) - 1
        while length:
            index = chain.indexes[run]
            end = chain.indexes[run + 1] if run + 1 < len(chain.indexes) else chain.length
            within = offset - index * size
            count = min(length, (end - index) * size - within)
            yield self._fat.place(chain.starts[run]) + within, count
            offset += count
            length -= count
            run += 1


class Fat:
    """A FAT file system, read-only. Directories and chains of clusters are read once and kept."""

    def __init__(self, region: Region, file_max: int = FILE_MAX) -> None:
        """Raises :class:`chv.errors.ImageError` if there is no FAT file system in ``region``."""
        self.region = region
        self.geometry = _geometry(region)
        self._file_max = file_max
        self._table = Table(region, self.geometry)
        self._directories: dict[int, Directory] = {}
        self._chains: dict[tuple[int, int | None], Chain] = {}
        self._directories_left = DIRECTORIES_MAX
        self._clusters_left = CLUSTERS_MAX

    def find(self, path: str) -> Node | None:
        """The file or directory at ``path``, from the root; None if there is none.

        ``/`` or ``\\`` separates names; case does not matter. Raises :class:`chv.errors.ImageError` for a
        path with ``..``, for one that is too deep, and for directories that are damaged.
        """
        names = [name for name in path.replace("\\", "/").split("/") if name not in ("", ".")]
        if ".." in names or len(names) > DEPTH_MAX:
            why = "contains .." if ".." in names else f"has more than {DEPTH_MAX} names"
            raise ImageError(f"{self.region.name}: the path {printable(path)} {why}")
        node = Node("", True, 0, 0)
        for name in names:
            if not node.is_directory:
                return None
            found = self._directory(node, path).find(name)
            if found is None:
                return None
            node = found
        return node

    def list(self, path: str) -> list[Node]:
        """What is in the directory ``path``; nothing if there is no such directory."""
        node = self.find(path)
        return self._directory(node, path).nodes if node is not None and node.is_directory else []

    def open(self, path: str) -> File:
        """The file ``path``. Raises :class:`chv.errors.ImageError` if there is none or it cannot be read."""
        name = f"{self.region.name}: {printable(path)}"
        node = self.find(path)
        if node is None:
            raise ImageError(f"{name}: there is no such file")
        if node.is_directory:
            raise ImageError(f"{name}: is a directory")
        if node.size > self._file_max:
            raise ImageError(f"{name}: has {node.size} bytes; {self._file_max} are allowed at most")
        count = -(-node.size // self.geometry.cluster_size)
        return File(self, name, node.size, self._chain(name, node.cluster, count) if count else None)

    def place(self, cluster: int) -> int:
        """Where a valid cluster is, in bytes from the start of the file system."""
        return self.geometry.data + (cluster - 2) * self.geometry.cluster_size

    def _chain(self, name: str, first: int, count: int | None) -> Chain:
        if count is not None and count > self.geometry.clusters:
            raise ImageError(f"{name}: has {count} clusters, more than there are ({self.geometry.clusters})")
        chain = self._chains.get((first, count))
        if chain is None:
            try:
                chain = Chain(self._table, self.geometry, first, count, self._clusters_left)
            except _Damaged as damage:
                raise ImageError(f"{name}: {damage}") from damage
            self._clusters_left -= chain.steps
            self._chains[first, count] = chain
        return chain

    def _directory(self, node: Node, path: str) -> Directory:
        """``node``'s entries; cluster 0 is the root (section 6.5). ``path`` is for messages."""
        known = self._directories.get(node.cluster)
        if known is None:
            name = f"{self.region.name}: a directory of {printable(path)}"
            data = self._read_directory(node.cluster, name)
            known = self._directories[node.cluster] = Directory(data, self.geometry.bits == 32)
        return known

    def _read_directory(self, cluster: int, name: str) -> bytes:
        geometry = self.geometry
        if not cluster and geometry.root_size:
            self._spend(geometry.root_size)
            return self.region.read(geometry.root, geometry.root_size)
        chain = self._chain(name, cluster or geometry.root, None)
        size = chain.length * geometry.cluster_size
        self._spend(size)
        return File(self, name, size, chain).read(0, size)

    def _spend(self, size: int) -> None:
        if size > self._directories_left:
            raise ImageError(
                f"{self.region.name}: its directories are too large; {DIRECTORIES_MAX} bytes are read at most"
            )
        self._directories_left -= size
