"""The virtio devices among the examples, with a driver that is not as nice as Linux."""

from __future__ import annotations

import inspect
import os
import struct
from collections.abc import Iterator

import pytest

from chv import net
from examples.packet_filter import LARGEST, PacketFilter
from examples.ram_disk import RamDisk

from .virtio_machine import Machine, machine
from .virtio_net_bench import MAC, SocketWire

SECTOR = 512
SIZE = 64 * SECTOR
READ, WRITE, FLUSH = 0, 1, 4
OK, IO_ERROR, UNSUPPORTED, UNTOUCHED = b"\0", b"\1", b"\2", b"\xee"


# -- the RAM disk ---------------------------------------------------------------------------


@pytest.fixture
def disk() -> Iterator[Machine]:
    with machine(RamDisk(SIZE), ring_size=16) as found:
        yield found


def content(disk: Machine) -> bytearray:
    assert isinstance(disk.device, RamDisk)
    return disk.device.data


def request(
    disk: Machine, kind: int, sector: int, data: bytes = b"", room: int = 0, *, pieces: int = 1
) -> tuple[bytes, bytes, int]:
    """What was read, the status, and how much the device says it wrote."""
    ring = disk.rings[0]
    head = ring.add(
        readable=[struct.pack("<IIQ", kind, 0, sector), *split(data, pieces)],
        writable=[*map(len, split(bytes(room), pieces)), 1],
    )
    for address, length in ring._writable[head]:
        disk.memory.write(address, UNTOUCHED * length)
    disk.queues[0].kick()
    ((used, written),) = ring.wait()
    assert used == head
    answer = ring.written(head)
    return answer[:-1], answer[-1:], written


def split(data: bytes, pieces: int) -> list[bytes]:
    step = -(-len(data) // pieces) or 1
    return [data[at : at + step] for at in range(0, len(data), step)]


@pytest.mark.parametrize("pieces", [1, 3])
def test_what_is_written_is_read_back(disk: Machine, pieces: int) -> None:
    data = os.urandom(3 * SECTOR)
    assert request(disk, WRITE, 5, data, pieces=pieces) == (b"", OK, 1)
    assert request(disk, READ, 5, room=3 * SECTOR, pieces=pieces) == (data, OK, 3 * SECTOR + 1)
    assert content(disk)[5 * SECTOR : 8 * SECTOR] == data
    assert disk.device.config() == struct.pack("<Q", 64)


def test_the_last_sector_is_the_last(disk: Machine) -> None:
    assert request(disk, WRITE, 63, b"z" * SECTOR)[1] == OK
    for sector in (64, 1 << 40, (1 << 64) - 1):
        assert request(disk, WRITE, sector, b"y" * SECTOR)[1:] == (IO_ERROR, 0)
        assert request(disk, READ, sector, room=SECTOR)[1:] == (IO_ERROR, 0)
    assert request(disk, WRITE, 63, b"x" * 2 * SECTOR)[1] == IO_ERROR
    assert request(disk, READ, 63, room=2 * SECTOR)[1] == IO_ERROR
    assert content(disk) == bytes(63 * SECTOR) + b"z" * SECTOR


def test_what_it_cannot_do_it_says(disk: Machine) -> None:
    assert request(disk, FLUSH, 0)[1:] == (UNSUPPORTED, 0)
    assert request(disk, 99, 0, b"abc", 7) == (UNTOUCHED * 7, UNSUPPORTED, 0)
    assert request(disk, WRITE, 0, b"a" * SECTOR, 7)[1] == IO_ERROR, (
        "nothing is written to a guest that writes"
    )


def test_requests_without_a_header_or_a_status_come_back(disk: Machine) -> None:
    ring = disk.rings[0]
    heads = [
        ring.add(readable=[bytes(15)], writable=[1]),
        ring.add(writable=[1]),
        ring.add(readable=[bytes(16)]),
    ]
    disk.queues[0].kick()
    assert ring.wait(3) == [(head, 0) for head in heads]
    assert request(disk, READ, 0, room=SECTOR)[1] == OK


def test_terabytes_that_are_the_same_memory_over_and_over(disk: Machine) -> None:
    """Each descriptor names all of RAM: nothing of that size is ever made."""
    ring, half = disk.rings[0], 4 << 20
    disk.memory.write(0x1000, struct.pack("<IIQ", WRITE, 0, 0))
    buffers = [(0x1000, 16, 0), *[(0, half, 0)] * 14, (0x2000, 1, 2)]
    head = ring.add_buffers(buffers)
    disk.queues[0].kick()
    assert ring.wait() == [(head, 0)]
    assert disk.memory.read(0x2000, 1) == IO_ERROR
    head = ring.add_buffers([(0x1000, 16, 0), *[(4 << 20, half, 2)] * 14, (0x2000, 1, 2)])
    disk.queues[0].kick()
    assert ring.wait() == [(head, 0)]


def test_it_is_as_short_as_promised() -> None:
    assert len(inspect.getsource(RamDisk).splitlines()) < 40


# -- the packet filter -----------------------------------------------------------------------

HEADER = bytes(net.HEADER_SIZE)
ARP = b"\xff" * 6 + MAC + b"\x08\x06" + bytes(28)


def ip(protocol: int, payload: bytes, *, fragment: int = 0x4000, options: bytes = b"") -> bytes:
    words = 5 + len(options) // 4
    header = struct.pack(
        ">BBHHHBBH4s4s", 0x40 | words, 0, 0, 0, fragment, 64, protocol, 0, bytes(4), bytes(4)
    )
    return b"\xff" * 6 + MAC + b"\x08\x00" + header + options + payload


def ports(destination: int, source: int = 40000) -> bytes:
    return struct.pack(">HH", source, destination) + bytes(16)


PASS = {
    "arp": ARP,
    "ping": ip(1, bytes(8)),
    "tcp": ip(6, ports(22)),
    "udp": ip(17, ports(53)),
    "options": ip(6, ports(22), options=bytes(8)),
}
STOP = {
    "another port": ip(6, ports(80)),
    "only the source's port": ip(6, ports(80, 22)),
    "another protocol": ip(47, ports(22)),
    "a first fragment": ip(6, ports(22), fragment=0x2000),
    "a later fragment": ip(6, ports(22), fragment=0x0001),
    "a late fragment": ip(6, ports(22), fragment=0x1F00),
    "a port that is cut off": ip(6, ports(22)[:3]),
    "a port within the options": ip(6, ports(80), options=ports(22)[:4]),
    "a header that is too short": ip(6, ports(22)).replace(b"\x45", b"\x44", 1),
    "IPv6": b"\xff" * 6 + MAC + b"\x86\xdd" + bytes(60),
    "a VLAN": b"\xff" * 6 + MAC + b"\x81\x00\x00\x01" + ip(6, ports(22))[12:],
    "nothing": b"",
    "half a header": ARP[:13],
}


@pytest.fixture
def card() -> Iterator[Machine]:
    device = PacketFilter("filter", SocketWire(), mac=MAC, queue_size=16)
    device.ports = frozenset((22, 53))
    try:
        with machine(device, ring_size=16) as found:
            yield found
    finally:
        device.close()


def far(card: Machine) -> SocketWire:
    assert isinstance(card.device, PacketFilter)
    assert isinstance(card.device.wire, SocketWire)
    return card.device.wire


def send(card: Machine, frame: bytes) -> None:
    head = card.rings[1].add(readable=[HEADER, frame] if frame else [HEADER])
    card.queues[1].kick()
    assert card.rings[1].wait() == [(head, 0)]


@pytest.mark.parametrize("name", PASS)
def test_what_may_leave(card: Machine, name: str) -> None:
    send(card, PASS[name])
    assert far(card).far[0].recv(65536) == HEADER + PASS[name]
    assert card.device.counters()["tx_refused"] == 0


@pytest.mark.parametrize("name", STOP)
def test_what_may_not(card: Machine, name: str) -> None:
    send(card, STOP[name])
    assert card.device.counters()["tx_refused"] == 1
    send(card, ARP)
    assert far(card).far[0].recv(65536) == HEADER + ARP, "it goes on, and nothing came before"


def test_frames_that_are_too_long_do_not_leave(card: Machine) -> None:
    send(card, PASS["tcp"] + bytes(LARGEST))
    assert card.device.counters()["tx_refused"] == 1


def test_what_comes_in_is_not_looked_at(card: Machine) -> None:
    head = card.rings[0].add(writable=[2048])
    card.queues[0].kick()
    far(card).far[0].send(HEADER + STOP["another port"])
    ((used, length),) = card.rings[0].wait()
    assert used == head
    frame = card.rings[0].written(head)[:length]
    assert frame[net.HEADER_SIZE :] == STOP["another port"]
