"""virtio-net on a real tap, in network namespaces of the tests' own; the guest is a driver in Python."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pyroute2 import IPRoute

from chv import net
from chv.config import NetConfig
from chv.errors import ConfigError
from chv.virtio.net import (
    F_CTRL_GUEST_OFFLOADS,
    F_CTRL_VQ,
    F_GUEST_CSUM,
    F_GUEST_TSO4,
    F_MQ,
    F_MRG_RXBUF,
    Net,
    check,
)
from tests import netns
from tests.netns import in_namespace

from .virtio_net_bench import HEADER, MAC, Bench, eventually, frame

HOST = "192.168.249.1"
GUEST = "192.168.249.2"
NEEDS_CSUM = 1  # virtio_net_hdr.flags (virtio 1.2, 5.1.6)
GSO_TCPV4 = 1
GSO_UDP = 3
CSUM_FEATURES = F_MRG_RXBUF | F_CTRL_VQ | F_CTRL_GUEST_OFFLOADS | F_GUEST_CSUM


class TapBench(Bench):
    """A bench whose wire is a tap."""

    def __init__(self, size: int = 256, **config: Any) -> None:
        values = NetConfig(queue_size=size, **config)
        check(values, "net[0]", 8)
        device = Net.open(values, "net[0]", "_net0")
        super().__init__(device.pairs, size)
        self.device.close()
        self.device = device


@contextmanager
def packets(name: str, protocol: int = 0x88B5) -> Iterator[socket.socket]:
    """A socket that sees what comes from the guest, and sends to it."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol)) as wire:
        wire.bind((name, protocol))
        wire.settimeout(30)
        yield wire


def name_of(bench: Bench) -> str:
    wire = bench.device.wire
    assert isinstance(wire, net.Tap)
    return wire.name


def receive(bench: Bench, protocol: bytes = b"\x88\xb5", queue: int = 0) -> tuple[bytes, bytes]:
    """The next frame of a kind; the host sends others, too (IPv6's)."""
    while True:
        header, data = bench.receive(queue)
        bench.offer(*[2000] * struct.unpack("<H", header[10:])[0], queue=queue)
        if data[12:14] == protocol:
            return header, data


def checksum(data: bytes) -> int:
    """Of the Internet (RFC 1071)."""
    words = struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2))
    total: int = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def know_the_guest(name: str, mac: bytes = MAC) -> None:
    """The host need not ask for the guest's MAC address."""
    with IPRoute() as ip:
        index = ip.link_lookup(ifname=name)[0]
        ip.neigh("replace", dst=GUEST, lladdr=net.format_mac(mac), ifindex=index, state=128)  # NUD_PERMANENT


@in_namespace
@pytest.mark.parametrize("tap", ["", "mine0"])
def test_frames_both_ways_and_nothing_left_behind(tap: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with TapBench(tap=tap, ip=HOST, mask="255.255.255.0", mac="", mtu=9000) as bench:
        name = name_of(bench)
        assert name == tap or name == "vmtap0"
        assert bench.device.config()[10:12] == struct.pack("<H", 9000)
        found = netns.link(name)
        assert found is not None
        assert (found["mtu"], found["addresses"], found["up"]) == (9000, {f"{HOST}/24"}, True)
        with packets(name) as wire:
            bench.start()
            bench.offer(*[2000] * 64)
            for length in (60, 1514, 9014):
                bench.send([HEADER + frame(length)])
                assert wire.recv(70000) == frame(length)
                wire.send(frame(length, seed=1))
                assert receive(bench)[1] == frame(length, seed=1)
    assert netns.links() == set()
    assert set(os.listdir("/proc/self/fd")) == before


@in_namespace
def test_generated_macs_are_not_filtered_and_given_ones_are() -> None:
    with TapBench() as bench, packets(name_of(bench)) as wire:
        assert bench.device.mac[0] & 3 == 2
        bench.start()
        bench.send([HEADER + frame(60)])
        assert wire.recv(2000) == frame(60)
    with TapBench(mac="02:00:00:00:00:0a") as bench, packets(name_of(bench)) as wire:
        assert bench.device.mac == MAC
        bench.start()
        bench.send([HEADER + frame(60, source=b"\2\2\2\2\2\2")])
        bench.send([HEADER + frame(60, seed=1)])
        assert wire.recv(2000) == frame(60, seed=1)
        assert bench.device.counters()["tx_spoofed"] == 1


@in_namespace
@pytest.mark.parametrize("offload", [True, False])
def test_checksums_are_left_to_a_guest_that_takes_them(offload: bool) -> None:
    with TapBench(ip=HOST, mask="255.255.255.0", mac=net.format_mac(MAC)) as bench:
        know_the_guest(name_of(bench))
        bench.start(CSUM_FEATURES if offload else F_MRG_RXBUF)
        bench.offer(*[2000] * 64)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"payload!", (GUEST, 9))
        while True:
            header, data = receive(bench, b"\x08\x00")
            if data[23] == socket.IPPROTO_UDP:
                break
        segment = data[34:]
        pseudo = data[26:34] + struct.pack(">HH", socket.IPPROTO_UDP, len(segment))
        if offload:
            assert header[0] & NEEDS_CSUM
            assert struct.unpack("<HH", header[6:10]) == (34, 6)  # csum_start, csum_offset
        else:
            assert header[0] == 0
            assert checksum(pseudo + segment) == 0xFFFF


@in_namespace
def test_the_control_queue_changes_the_taps_offloads() -> None:
    with TapBench(ip=HOST, mask="255.255.255.0", mac=net.format_mac(MAC)) as bench:
        know_the_guest(name_of(bench))
        bench.start(CSUM_FEATURES)
        bench.offer(*[2000] * 64)
        for offloads, flags in ((0, 0), (F_GUEST_CSUM, NEEDS_CSUM), (0, 0)):
            assert bench.command(struct.pack("<BBQ", 5, 0, offloads)) == b"\0"
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"payload!", (GUEST, 9))
            while True:
                header, data = receive(bench, b"\x08\x00")
                if data[23] == socket.IPPROTO_UDP:
                    break
            assert header[0] & NEEDS_CSUM == flags


def tcp_frame(payload: int) -> bytes:
    """A TCP segment from the guest to the host, its checksum as a guest leaves it."""
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 40 + payload, 1, 0, 64, 6, 0)
    ip += socket.inet_aton(GUEST) + socket.inet_aton(HOST)
    ip = ip[:10] + struct.pack(">H", 0xFFFF - checksum(ip)) + ip[12:]
    pseudo = ip[12:20] + struct.pack(">HH", 6, 20 + payload)
    tcp = struct.pack(">HHIIBBHHH", 1, 9, 1, 1, 0x50, 0x10, 1000, checksum(pseudo), 0)
    return b"\xff" * 6 + MAC + b"\x08\x00" + ip + tcp + frame(payload, source=MAC)


@in_namespace
def test_a_segment_of_64_kib_leaves_in_one_piece() -> None:
    with (
        TapBench(ip=HOST, mask="255.255.255.0", mac=net.format_mac(MAC)) as bench,
        packets(name_of(bench), 0x0800) as wire,
    ):
        bench.start()
        data = tcp_frame(60000)
        header = struct.pack("<BBHHHHH", NEEDS_CSUM, GSO_TCPV4, 54, 1460, 34, 16, 0)
        bench.send([header, data[:54], data[54:30000], data[30000:]])
        assert wire.recv(70000)[54:] == data[54:]


@in_namespace
def test_headers_that_lie_are_refused_by_the_tap_and_counted() -> None:
    plain = frame(100)
    lies = [
        struct.pack("<BBHHHHH", NEEDS_CSUM, 0, 0, 0, 5000, 16, 0) + plain,  # a checksum behind the frame
        struct.pack("<BBHHHHH", NEEDS_CSUM, 0, 0, 0, 0xFFFF, 0xFFFF, 0) + plain,
        struct.pack("<BBHHHHH", 0, GSO_TCPV4, 0xFFFF, 1, 0, 0, 0) + plain,  # headers longer than the frame
        struct.pack("<BBHHHHH", 0, GSO_TCPV4, 54, 0, 0, 0, 0) + plain,  # segments of no bytes
        struct.pack("<BBHHHHH", 0, 0x55, 0, 1, 0, 0, 0) + plain,  # an unknown kind of segments
        struct.pack("<BBHHHHH", NEEDS_CSUM, GSO_UDP, 0xFFFF, 1, 0, 0, 0) + plain,
    ]
    with TapBench() as bench, packets(name_of(bench)) as wire:
        bench.start()
        for lie in lies:
            bench.send([lie])
        bench.send([HEADER + frame(60)])
        bench.tx.wait(len(lies) + 1)
        assert wire.recv(2000) == frame(60)
        counters = bench.counters()
        assert counters["tx_errors"] == len(lies)
        assert counters["tx_frames"] == 1


@in_namespace
def test_a_link_that_goes_down_and_up() -> None:
    with TapBench() as bench:
        name = name_of(bench)
        bench.start()
        netns.set_link(name, state="down")
        bench.send([HEADER + frame(60)])
        bench.tx.wait(1)
        assert bench.counters() == {"tx_errors": 1}
        netns.set_link(name, state="up")
        with packets(name) as wire:
            bench.send([HEADER + frame(60, seed=1)])
            assert wire.recv(2000) == frame(60, seed=1)


@in_namespace
def test_an_interface_that_is_deleted_while_it_is_used() -> None:
    with TapBench() as bench:
        bench.start(CSUM_FEATURES)
        bench.offer(*[2000] * 64)
        with IPRoute() as ip:
            ip.link("del", index=ip.link_lookup(ifname=name_of(bench))[0])
        eventually(lambda: bench.device.counters()["rx_errors"])
        bench.send([HEADER + frame(60)])
        bench.tx.wait(1)
        assert bench.device.counters()["tx_errors"] == 1
        assert bench.command(struct.pack("<BBQ", 5, 0, 0)) == b"\1"
        assert bench.device.counters()["rx_errors"] < 100  # it does not try all the time
        bench.device.stop()
        bench.device.reset()
        bench.device.start(bench.queues, CSUM_FEATURES)


@in_namespace
def test_several_pairs() -> None:
    with TapBench(num_queues=6) as bench, packets(name_of(bench)) as wire:
        bench.start(F_MRG_RXBUF | F_CTRL_VQ | F_MQ)
        for pair in range(3):
            bench.offer(*[2000] * 16, queue=2 * pair)
        for count in (3, 1, 2):
            assert bench.command(struct.pack("<BBH", 4, 0, count)) == b"\0"
            for pair in range(count):
                bench.send([HEADER + frame(60, seed=pair)], 2 * pair + 1)
                assert wire.recv(2000) == frame(60, seed=pair)
        assert bench.command(struct.pack("<BBH", 4, 0, 1)) == b"\0"
        wire.send(frame(60))
        assert receive(bench)[1] == frame(60)


@in_namespace
def test_a_tap_lives_over_reboots_and_frames_for_the_last_driver_are_gone() -> None:
    with TapBench() as bench, packets(name_of(bench)) as wire:
        for number in range(3):
            bench.start(F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4)
            bench.offer(*[2000] * 8)
            wire.send(frame(60, seed=number))
            assert receive(bench)[1] == frame(60, seed=number)
            bench.device.stop()
            wire.send(frame(60, seed=99))
            bench.device.reset()
            for ring in bench.rings:
                ring.clear()
            bench.backlog[0].clear()
        assert netns.links() == {"vmtap0"}


@in_namespace
def test_an_open_descriptor() -> None:
    theirs = netns.make_tap("fd0", flags=net.IFF_TAP | net.IFF_NO_PI | net.IFF_VNET_HDR, persist=False)
    netns.set_link("fd0", state="up")
    with TapBench(fds=[theirs], mtu=2000) as bench, packets("fd0") as wire:
        bench.start()
        bench.send([HEADER + frame(60)])
        assert wire.recv(2000) == frame(60)
        assert bench.device.mtu == 2000
    assert netns.links() == {"fd0"}
    os.close(theirs)


@in_namespace
def test_errors_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = netns.make_tap("busy0", persist=False)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r"^net\[0\]\.tap: 'busy0' is in use"):
        Net.open(NetConfig(tap="busy0"), "net[0]", "_net0")
    with pytest.raises(ConfigError, match=r"^net\[0\]\.mtu: cannot give 'vmtap0' an MTU of 65535"):
        Net.open(NetConfig(mtu=65535), "net[0]", "_net0")
    monkeypatch.setattr("chv.virtio.net.Receiver", lambda fd: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Net.open(NetConfig(), "net[0]", "_net0")
    assert netns.links() == {"busy0"}
    assert set(os.listdir("/proc/self/fd")) == before
    os.close(busy)
