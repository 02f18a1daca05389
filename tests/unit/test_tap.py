"""Taps and their addresses, in network namespaces of the tests' own."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import ipaddress
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2 import IPRoute

from chv import net
from chv.errors import ConfigError
from chv.net import Address, Settings, Tap
from tests import netns
from tests.netns import in_namespace

ETH_P_ALL = 3
BROADCAST = b"\xff" * 6
FRAME = BROADCAST + bytes.fromhex("02000000000a88b5") + b"x" * 50  # 88b5: for experiments (IEEE 802)
HEADER = bytes(net.HEADER_SIZE)

MULTI = net.IFF_TAP | net.IFF_NO_PI | net.IFF_MULTI_QUEUE
WITH_HEADER = net.IFF_TAP | net.IFF_NO_PI | net.IFF_VNET_HDR


def descriptors() -> set[str]:
    gc.collect()  # an exception that was caught may keep the frames that it went through, and their sockets
    return set(os.listdir("/proc/self/fd"))


def packet_socket(name: str) -> socket.socket:
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    wire.bind((name, 0))
    wire.settimeout(10)
    return wire


def receive(wire: socket.socket, wanted: bytes = FRAME) -> bytes:
    """The frame when it comes; the host sends others, too (IPv6's)."""
    while True:
        frame = wire.recv(65536)
        if frame[12:14] == wanted[12:14]:
            return frame


def read_frame(fd: int) -> bytes:
    """The frame of ours that is in a tap's queue."""
    while True:
        data = os.read(fd, 65536)
        if data[24:26] == FRAME[12:14]:
            return data


# -- addresses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a MAC address like 12:34"),
        ("12:34:56:78:9a", "is not a MAC address"),
        ("12:34:56:78:9a:bc:de", "is not a MAC address"),
        ("12:34:56:78:9a:b", "is not a MAC address"),
        ("12:34:56:78:9a:bg", "is not a MAC address"),
        ("12:34:56:78:9a:+1", "is not a MAC address"),
        ("12-34-56-78-9a-bc", "is not a MAC address"),
        ("1234.5678.9abc", "is not a MAC address"),
        ("01:00:5e:00:00:01", "multicast address: the first byte must be even"),
        ("ff:ff:ff:ff:ff:ff", "multicast address"),
        ("00:00:00:00:00:00", "address of nobody"),
    ],
)
def test_bad_macs(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^net\[1\]\.mac: .*{words}"):
        net.parse_mac(text, "net[1].mac")


@given(st.binary(min_size=6, max_size=6).filter(lambda mac: any(mac) and not mac[0] & 1))
def test_macs_are_read_as_they_are_written(mac: bytes) -> None:
    assert net.parse_mac(net.format_mac(mac), "f") == mac
    assert net.parse_mac(net.format_mac(mac).upper(), "f") == mac


def test_random_macs_are_local_and_differ() -> None:
    macs = {net.random_mac() for _ in range(100)}
    assert len(macs) == 100
    assert {mac[0] & 3 for mac in macs} == {2}


@given(st.text(max_size=20))
def test_any_text_is_a_mac_or_an_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert net.format_mac(net.parse_mac(text, "f")) == text.lower()


@pytest.mark.parametrize(
    ("ip", "mask", "words"),
    [
        ("192.168.249.1", None, r"net\[0\]\.mask: required with net\[0\]\.ip, for example 255\.255\.255\.0"),
        ("192.168.249.1", "", r"net\[0\]\.mask: required"),
        (None, "255.255.255.0", r"net\[0\]\.ip: required with net\[0\]\.mask"),
        ("192.168.249", "255.255.255.0", r"net\[0\]\.ip: '192\.168\.249' is not an IP address"),
        ("192.168.249.1/24", "255.255.255.0", r"net\[0\]\.ip: .* is not an IP address"),
        ("192.168.249.256", "255.255.255.0", r"net\[0\]\.ip: .* is not an IP address"),
        ("fe80::1%eth0", "ffff::", r"net\[0\]\.ip: .* is not an IP address"),
        ("host", "255.255.255.0", r"net\[0\]\.ip: 'host' is not an IP address"),
        ("0.0.0.0", "255.0.0.0", r"net\[0\]\.ip: 0\.0\.0\.0 is not the address of one host"),
        ("224.0.0.1", "255.0.0.0", r"net\[0\]\.ip: 224\.0\.0\.1 is not the address of one host"),
        ("255.255.255.255", "255.0.0.0", r"net\[0\]\.ip: .* is not the address of one host"),
        ("10.0.0.1", "24", r"net\[0\]\.mask: '24' is not an IP address like 255\.255\.255\.0"),
        (
            "10.0.0.1",
            "255.0.255.0",
            r"net\[0\]\.mask: 255\.0\.255\.0 is not a netmask: its ones must come first",
        ),
        ("10.0.0.1", "0.0.0.255", r"net\[0\]\.mask: 0\.0\.0\.255 is not a netmask"),
        ("10.0.0.1", "ffff::", r"net\[0\]\.mask: ffff:: is of IPv6, net\[0\]\.ip of IPv4"),
        ("fd00::1", "255.255.255.0", r"net\[0\]\.mask: 255\.255\.255\.0 is of IPv4, net\[0\]\.ip of IPv6"),
    ],
)
def test_bad_addresses(ip: str | None, mask: str | None, words: str) -> None:
    with pytest.raises(ConfigError, match="^" + words):
        net.parse_address(ip, mask, "net[0]")


@pytest.mark.parametrize(
    ("ip", "mask", "text"),
    [
        ("192.168.249.1", "255.255.255.0", "192.168.249.1/24"),
        ("10.1.2.3", "255.255.255.255", "10.1.2.3/32"),
        ("10.1.2.3", "0.0.0.0", "10.1.2.3/0"),
        ("fd00::1", "ffff:ffff:ffff:ffff::", "fd00::1/64"),
    ],
)
def test_addresses(ip: str, mask: str, text: str) -> None:
    assert str(net.parse_address(ip, mask, "net[0]")) == text


def test_no_address() -> None:
    assert net.parse_address(None, None, "f") is None
    assert net.parse_address("", "", "f") is None


@given(st.integers(0, 32))
def test_masks_of_each_length(prefix: int) -> None:
    mask = str(ipaddress.ip_network(f"0.0.0.0/{prefix}").netmask)
    address = net.parse_address("10.0.0.1", mask, "f")
    assert address is not None
    assert address.prefix == prefix


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a" * 16, "is too long: an interface's name has at most 15 bytes"),
        ("ö" * 8, "is too long"),
        ("a/b", "is no name of an interface"),
        ("a:b", "is no name of an interface"),
        ("a b", "is no name of an interface"),
        ("a\0b", "is no name of an interface"),
        ("", "is no name of an interface"),
        (".", "is no name of an interface"),
        ("..", "is no name of an interface"),
        ("tap%s", "has a '%' that is not one '%d'"),
        ("tap%d%d", "has a '%' that is not one '%d'"),
    ],
)
def test_bad_names(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^net\[0\]\.tap: .*{words}"):
        net.check_name(name, "net[0].tap")


@pytest.mark.parametrize("name", ["tap0", "a" * 15, "tap%d", "...", "ö" * 7])
def test_good_names(name: str) -> None:
    net.check_name(name, "net[0].tap")


# -- new taps ---------------------------------------------------------------------------------


@in_namespace
def test_a_new_tap_is_up_and_goes_away_with_close() -> None:
    before = descriptors()
    tap = Tap.open(None, 1, Settings(), "net[0]")
    try:
        assert tap.name == "vmtap0"
        assert netns.links() == {"vmtap0"}
        found = netns.link("vmtap0")
        assert found is not None
        assert found["up"]
        assert found["addresses"] == set()
        assert len(tap.fds) == 1
        assert not os.get_blocking(tap.fds[0])
        assert not os.get_inheritable(tap.fds[0])
    finally:
        tap.close()
    tap.close()
    assert netns.links() == set()
    assert descriptors() == before


@in_namespace
def test_new_taps_get_one_number_after_another() -> None:
    taps = [Tap.open(name, 1, Settings(), "net[0]") for name in (None, "", "mine%d", "mine%d")]
    try:
        assert [tap.name for tap in taps] == ["vmtap0", "vmtap1", "mine0", "mine1"]
    finally:
        for tap in taps:
            tap.close()


@in_namespace
def test_the_host_side_gets_what_is_asked_for() -> None:
    settings = Settings(
        address=Address(ipaddress.ip_address("192.168.249.1"), 24),
        mac=bytes.fromhex("020000000001"),
        mtu=3000,
    )
    tap = Tap.open("lan0", 1, settings, "net[0]")
    try:
        assert netns.link("lan0") == {
            "mac": "02:00:00:00:00:01",
            "mtu": 3000,
            "up": True,
            "addresses": {"192.168.249.1/24"},
        }
    finally:
        tap.close()
    assert netns.links() == set()


@in_namespace
def test_an_ipv6_address() -> None:
    address = net.parse_address("fd00::1", "ffff:ffff:ffff:ffff::", "net[0]")
    tap = Tap.open(None, 1, Settings(address=address), "net[0]")
    try:
        found = netns.link("vmtap0")
        assert found is not None
        assert found["addresses"] == {"fd00::1/64"}
    finally:
        tap.close()


@in_namespace
@pytest.mark.parametrize("pairs", [1, 3])
def test_frames_pass_with_a_header_of_twelve_bytes(pairs: int) -> None:
    tap = Tap.open(None, pairs, Settings(), "net[0]")
    try:
        with packet_socket(tap.name) as wire:
            os.write(tap.fds[0], HEADER + FRAME)
            assert receive(wire) == FRAME
            wire.send(FRAME)
            data = read_frame(tap.fds[0])
            assert data[12:] == FRAME
            assert data[:10] == bytes(10)
    finally:
        tap.close()


@in_namespace
def test_a_tap_of_several_pairs_starts_with_one() -> None:
    tap = Tap.open(None, 3, Settings(), "net[0]")
    try:
        assert len(tap.fds) == 3
        for count in (3, 1, 2):
            assert tap.set_pairs(count)
            info = net._link_info(tap.name, "f")[1]
            assert info["IFLA_TUN_NUM_QUEUES"] == count
            assert info["IFLA_TUN_NUM_DISABLED_QUEUES"] == 3 - count
        tap.reset()
        assert net._link_info(tap.name, "f")[1]["IFLA_TUN_NUM_QUEUES"] == 1
    finally:
        tap.close()


@in_namespace
def test_reset_drops_what_waits() -> None:
    tap = Tap.open(None, 1, Settings(), "net[0]")
    try:
        with packet_socket(tap.name) as wire:
            for _ in range(20):
                wire.send(FRAME)
        tap.reset()
        with pytest.raises(BlockingIOError):
            read_frame(tap.fds[0])
    finally:
        tap.close()


@in_namespace
def test_offloads_of_a_tap() -> None:
    tap = Tap.open(None, 1, Settings(), "net[0]")
    try:
        assert tap.offloads & net.TUN_F_CSUM
        assert tap.offloads & net.TUN_F_TSO4
        assert tap.set_offloads(tap.offloads)
        assert tap.set_offloads(0)
        assert not tap.set_offloads(1 << 30)
    finally:
        tap.close()


@in_namespace
def test_an_interface_that_is_deleted_under_a_tap() -> None:
    """Nothing raises, and closing gives everything back."""
    before = descriptors()
    netns.make_persistent_tap("old0")
    tap = Tap.open("old0", 1, Settings(mtu=2000), "net[0]")
    with IPRoute() as ip:
        ip.link("del", index=ip.link_lookup(ifname="old0")[0])
    assert not tap.set_offloads(0)
    tap.reset()
    tap.close()
    assert descriptors() == before


# -- taps that were there before --------------------------------------------------------------


@in_namespace
def test_an_existing_tap_is_put_back_as_it_was() -> None:
    netns.make_persistent_tap("old0")
    netns.set_link("old0", address="02:00:00:00:00:aa", mtu=1400)
    before = netns.link("old0")
    settings = Settings(
        address=net.parse_address("10.9.8.7", "255.255.0.0", "f"), mac=bytes.fromhex("0200000000bb"), mtu=2500
    )
    tap = Tap.open("old0", 1, settings, "net[0]")
    during = netns.link("old0")
    tap.close()
    assert during == {"mac": "02:00:00:00:00:bb", "mtu": 2500, "up": True, "addresses": {"10.9.8.7/16"}}
    assert before == {"mac": "02:00:00:00:00:aa", "mtu": 1400, "up": False, "addresses": set()}
    assert netns.link("old0") == before


@in_namespace
def test_what_an_existing_tap_has_already_stays() -> None:
    netns.make_persistent_tap("old0")
    with IPRoute() as ip:
        index = ip.link_lookup(ifname="old0")[0]
        ip.addr("add", index=index, address="10.9.8.7", prefixlen=16)
        ip.addr("add", index=index, address="10.9.8.8", prefixlen=16)
        ip.link("set", index=index, state="up")
    before = netns.link("old0")
    Tap.open("old0", 1, Settings(net.parse_address("10.9.8.7", "255.255.0.0", "f")), "net[0]").close()
    assert netns.link("old0") == before


@in_namespace
@pytest.mark.parametrize("pairs", [1, 2])
def test_an_existing_multi_queue_tap(pairs: int) -> None:
    netns.make_persistent_tap("many0", flags=MULTI)
    tap = Tap.open("many0", pairs, Settings(), "net[0]")
    try:
        assert len(tap.fds) == pairs
        with pytest.raises(ConfigError, match=r"net\[1\]\.tap: 'many0' is in use by another VM or program"):
            Tap.open("many0", 1, Settings(), "net[1]")
    finally:
        tap.close()
    assert netns.links() == {"many0"}


@in_namespace
def test_bad_taps() -> None:
    before = descriptors()
    netns.make_persistent_tap("one0")
    netns.make_persistent_tap("tun0", flags=0x1001)  # IFF_TUN
    busy = netns.make_tap("busy0", persist=False)
    rows: list[tuple[str, int, str]] = [
        ("busy0", 1, "'busy0' is in use by another VM or program; give each VM a tap of its own"),
        (
            "one0",
            2,
            r"'one0' has one queue, but net\[0\]\.num_queues asks for 2 pairs; .*mode tap multi_queue",
        ),
        ("tun0", 1, r"'tun0' is an interface of another kind \(tun\), not a tap"),
        ("lo", 1, r"'lo' is an interface of another kind \(no virtual one\), not a tap"),
        ("a/b", 1, "is no name of an interface"),
        ("new0", 300, "cannot open the tap 'new0': a tap cannot have so many queues"),
    ]
    for name, pairs, words in rows:
        with pytest.raises(ConfigError, match=rf"^net\[0\]\.tap: .*{words}"):
            Tap.open(name, pairs, Settings(), "net[0]")
    os.close(busy)
    assert netns.links() == {"one0", "tun0"}
    assert descriptors() == before


@in_namespace
def test_what_the_kernel_refuses_is_named_and_the_tap_removed() -> None:
    before = descriptors()
    with pytest.raises(ConfigError, match=r"^net\[0\]\.mtu: cannot give 'vmtap0' an MTU of 65530: Invalid"):
        Tap.open(None, 1, Settings(mtu=65530), "net[0]")
    with pytest.raises(ConfigError, match=r"^net\[0\]\.host_mac: cannot give 'vmtap0' the MAC address 01:"):
        Tap.open(None, 1, Settings(mac=bytes.fromhex("010000000000")), "net[0]")
    assert netns.links() == set()
    assert descriptors() == before


def fail_open(number: int) -> Callable[..., int]:
    def refuse(path: str, flags: int, *args: Any, **kwargs: Any) -> int:
        assert path == "/dev/net/tun"
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.ENOENT, "load the module with `modprobe tun`"), (errno.EACCES, "may it be read and written")],
)
def test_no_tun_device(monkeypatch: pytest.MonkeyPatch, number: int, hint: str) -> None:
    monkeypatch.setattr(os, "open", fail_open(number))
    with pytest.raises(ConfigError, match=rf"^net\[0\]\.tap: cannot open /dev/net/tun: .*; {hint}"):
        Tap.open(None, 1, Settings(), "net[0]")


# -- without CAP_NET_ADMIN --------------------------------------------------------------------


@in_namespace
def test_without_the_capability_the_error_says_what_to_give_it_to() -> None:
    netns.drop_net_admin()
    with pytest.raises(
        ConfigError, match=r"^net\[0\]\.tap: cannot open the tap 'vmtap%d': CAP_NET_ADMIN"
    ) as caught:
        Tap.open(None, 1, Settings(), "net[0]")
    assert f"`setcap cap_net_admin+ep {os.path.realpath(sys.executable)}`" in str(caught.value)


@in_namespace
def test_a_prepared_tap_needs_no_capability() -> None:
    netns.make_persistent_tap("old0")
    netns.set_link("old0", state="up")
    netns.drop_net_admin()
    tap = Tap.open("old0", 1, Settings(), "net[0]")
    try:
        with packet_socket("old0") as wire:
            os.write(tap.fds[0], HEADER + FRAME)
            assert receive(wire) == FRAME
    finally:
        tap.close()


@in_namespace
@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (Settings(), "tap"),
        (Settings(mtu=2000), "mtu"),
        (Settings(mac=bytes.fromhex("020000000001")), "host_mac"),
        (Settings(address=Address(ipaddress.ip_address("10.0.0.1"), 24)), "ip"),
    ],
    ids=["up", "mtu", "host_mac", "ip"],
)
def test_what_needs_the_capability_on_an_existing_tap(settings: Settings, field: str) -> None:
    netns.make_persistent_tap("old0")
    netns.drop_net_admin()
    with pytest.raises(ConfigError, match=rf"^net\[0\]\.{field}: .*setcap cap_net_admin\+ep"):
        Tap.open("old0", 1, settings, "net[0]")


# -- open descriptors -------------------------------------------------------------------------


@in_namespace
def test_an_open_descriptor_is_duplicated_and_left_as_it_was() -> None:
    theirs = netns.make_tap("fd0", flags=WITH_HEADER, persist=False)
    size = fcntl.ioctl(theirs, net._TUNGETVNETHDRSZ, bytes(4))
    netns.set_link("fd0", state="up")
    tap = Tap.from_fds([theirs], Settings(up=False), "net[0]")
    try:
        assert tap.name == "fd0"
        assert tap.fds != [theirs]
        assert not os.get_blocking(tap.fds[0])
        with packet_socket("fd0") as wire:
            os.write(tap.fds[0], HEADER + FRAME)
            assert receive(wire) == FRAME
    finally:
        tap.close()
    assert netns.links() == {"fd0"}
    assert os.get_blocking(theirs)
    assert fcntl.ioctl(theirs, net._TUNGETVNETHDRSZ, bytes(4)) == size == (10).to_bytes(4, "little")
    os.close(theirs)
    assert netns.links() == set()


@in_namespace
def test_an_open_descriptor_needs_no_capability() -> None:
    theirs = netns.make_tap("fd0", flags=WITH_HEADER, persist=False)
    netns.drop_net_admin()
    Tap.from_fds([theirs], Settings(up=False), "net[0]").close()
    os.close(theirs)


@in_namespace
def test_an_address_for_an_open_descriptors_tap() -> None:
    theirs = netns.make_tap("fd0", flags=WITH_HEADER, persist=False)
    settings = Settings(address=net.parse_address("10.0.0.1", "255.0.0.0", "f"), up=False)
    tap = Tap.from_fds([theirs], settings, "net[0]")
    during = netns.link("fd0")
    tap.close()
    after = netns.link("fd0")
    assert during is not None
    assert after is not None
    assert during["addresses"] == {"10.0.0.1/8"}
    assert after["addresses"] == set()
    os.close(theirs)


@in_namespace
def test_an_address_for_a_tap_in_another_namespace_is_refused() -> None:
    """An interface of the same name here is another one."""
    theirs = netns.make_tap("fd0", flags=WITH_HEADER, persist=False)
    netns.enter_new()
    netns.make_persistent_tap("fd0")
    settings = Settings(address=net.parse_address("10.0.0.1", "255.0.0.0", "f"), up=False)
    with pytest.raises(ConfigError, match=r"^net\[0\]\.fds: 'fd0' is in another network namespace: set ip"):
        Tap.from_fds([theirs], settings, "net[0]")
    Tap.from_fds([theirs], Settings(up=False), "net[0]").close()
    os.close(theirs)


@in_namespace
def test_bad_descriptors(tmp_path: Path) -> None:
    plain = netns.make_tap("plain0", persist=False)
    unattached = os.open("/dev/net/tun", os.O_RDWR)
    regular = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    one = netns.make_tap("one0", flags=WITH_HEADER, persist=False)
    two = netns.make_tap("two0", flags=WITH_HEADER, persist=False)
    before = descriptors()
    rows: list[tuple[list[int], str]] = [
        ([plain], r"fds\[0\]: 'plain0' was not opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"),
        ([unattached], rf"fds\[0\]: descriptor {unattached} is an open /dev/net/tun without an interface"),
        ([regular], rf"fds\[0\]: descriptor {regular} is not a tap"),
        ([987654], r"fds\[0\]: 987654 is no open file descriptor"),
        ([1 << 40], r"fds\[0\]: \d+ is no open file descriptor"),
        ([one, two], r"fds\[1\]: it belongs to 'two0', the ones before it to 'one0'"),
    ]
    for fds, words in rows:
        with pytest.raises(ConfigError, match=rf"^net\[0\]\.{words}"):
            Tap.from_fds(fds, Settings(up=False), "net[0]")
    assert descriptors() == before
    for fd in (plain, unattached, regular, one, two):
        os.close(fd)
