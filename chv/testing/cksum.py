"""The checksum that POSIX's cksum prints: the guest has that command, whatever its system."""

from __future__ import annotations

from typing import Final

_POLYNOMIAL: Final = 0x04C11DB7  # POSIX.1-2017, cksum: the one of ISO/IEC 8802-3 (Ethernet)


def _entry(index: int) -> int:
    crc = index << 24
    for _ in range(8):
        crc = (crc << 1) ^ (_POLYNOMIAL if crc & 0x80000000 else 0)
    return crc & 0xFFFFFFFF


_TABLE: Final = tuple(_entry(index) for index in range(256))


def cksum(data: bytes) -> int:
    """The CRC of the data followed by its length, least significant byte first, inverted."""
    crc = 0
    length = len(data)
    for byte in data + length.to_bytes((length.bit_length() + 7) // 8, "little"):
        crc = ((crc << 8) & 0xFFFFFFFF) ^ _TABLE[(crc >> 24) ^ byte]
    return crc ^ 0xFFFFFFFF
