"""The host's side of a network device: tap interfaces, their addresses, and MAC addresses.

A tap is opened by ioctls (linux/if_tun.h; the kernel's Documentation/networking/tuntap.rst); its link and
addresses are set by netlink, through pyroute2, which is imported when the first one is opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any, Final

from .errors import ConfigError

if TYPE_CHECKING:
    from pyroute2 import IPRoute

NEW_TAP: Final = "vmtap%d"  # the kernel puts the first free number; Cloud Hypervisor's name
NAME_MAX: Final = 15  # bytes: IFNAMSIZ without its NUL
MTU_MIN: Final = 1280  # what IPv6 needs (RFC 8200, 5) and Cloud Hypervisor asks for
MTU_MAX: Final = 65521  # a tap's: 65535 without the Ethernet header
HEADER_SIZE: Final = 12  # of virtio_net_hdr with num_buffers (virtio 1.2, 5.1.6)

# linux/if_tun.h
IFF_TAP: Final = 0x0002
IFF_MULTI_QUEUE: Final = 0x0100
IFF_ATTACH_QUEUE: Final = 0x0200
IFF_DETACH_QUEUE: Final = 0x0400
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
TUN_F_CSUM: Final = 0x01
TUN_F_TSO4: Final = 0x02
TUN_F_TSO6: Final = 0x04
TUN_F_TSO_ECN: Final = 0x08
TUN_F_UFO: Final = 0x10
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNGETIFF: Final = 0x800454D2
_TUNGETVNETHDRSZ: Final = 0x800454D7
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUNSETQUEUE: Final = 0x400454D9
_TUNGETDEVNETNS: Final = 0x54E3

_IFREQ: Final = struct.Struct("16sH22x")  # struct ifreq (netdevice(7)): a name, and here flags
_DRAIN_MAX: Final = 10_000  # frames: more than a tap's queue holds
_MISSING: Final = (errno.ENOENT, errno.ENXIO, errno.ENODEV)


# -- addresses ------------------------------------------------------------------------------


def parse_mac(text: str, field: str) -> bytes:
    """The six bytes of ``12:34:56:78:9a:bc``, which must be the address of one station."""
    pieces = text.split(":")
    digits = set("0123456789abcdefABCDEF")
    if len(pieces) != 6 or not all(len(piece) == 2 and set(piece) <= digits for piece in pieces):
        raise ConfigError(f"{field}: {text!r} is not a MAC address like 12:34:56:78:9a:bc")
    mac = bytes.fromhex("".join(pieces))
    if mac[0] & 1:
        raise ConfigError(f"{field}: {text} is a multicast address: the first byte must be even")
    if not any(mac):
        raise ConfigError(f"{field}: {text} is the address of nobody")
    return mac


def format_mac(mac: bytes) -> str:
    return mac.hex(":")


def random_mac() -> bytes:
    """A new unicast address, locally administered (IEEE 802, 8.4)."""
    mac = bytearray(secrets.token_bytes(6))
    mac[0] = mac[0] & 0xFC | 2
    return bytes(mac)


@dataclass(frozen=True, slots=True)
class Address:
    """An IP address and how many of its bits are the network's."""

    ip: IPv4Address | IPv6Address
    prefix: int

    def __str__(self) -> str:
        return f"{self.ip}/{self.prefix}"


def parse_address(ip: str | None, mask: str | None, field: str) -> Address | None:
    """What ``ip`` and ``mask`` of the network device ``field`` say; both or none must be there."""
    if not ip and not mask:
        return None
    if not mask:
        raise ConfigError(f"{field}.mask: required with {field}.ip, for example 255.255.255.0")
    if not ip:
        raise ConfigError(f"{field}.ip: required with {field}.mask, for example 192.168.249.1")
    address = _parse_ip(ip, f"{field}.ip")
    if address.is_multicast or address.is_unspecified or ip == "255.255.255.255":
        raise ConfigError(f"{field}.ip: {ip} is not the address of one host")
    netmask = _parse_ip(mask, f"{field}.mask")
    if netmask.version != address.version:
        raise ConfigError(
            f"{field}.mask: {mask} is of IPv{netmask.version}, {field}.ip of IPv{address.version}"
        )
    width = netmask.max_prefixlen
    hosts = int(netmask) ^ ((1 << width) - 1)
    if hosts & (hosts + 1):
        raise ConfigError(f"{field}.mask: {mask} is not a netmask: its ones must come first")
    return Address(address, width - hosts.bit_length())


def _parse_ip(text: str, field: str) -> IPv4Address | IPv6Address:
    example = "255.255.255.0 or ffff:ffff:ffff:ffff::" if field.endswith("mask") else "192.168.249.1"
    try:
        if "%" in text:
            raise ValueError
        return ip_address(text)
    except ValueError:
        raise ConfigError(f"{field}: {text!r} is not an IP address like {example}") from None


def check_name(name: str, field: str) -> None:
    """Refuse what the kernel takes for no interface's name (dev_valid_name, net/core/dev.c)."""
    if len(os.fsencode(name)) > NAME_MAX:
        raise ConfigError(f"{field}: {name!r} is too long: an interface's name has at most {NAME_MAX} bytes")
    bad = {char for char in name if char in "/:\0" or char.isspace()}
    if bad or name in ("", ".", ".."):
        raise ConfigError(
            f"{field}: {name!r} is no name of an interface: not empty, '.' or '..', and no '/', ':' or spaces"
        )
    if "%" in name.replace("%d", "", 1):
        raise ConfigError(f"{field}: {name!r} has a '%' that is not one '%d', which becomes a free number")


def capability_hint() -> str:
    """What to do where CAP_NET_ADMIN is missing, with the program that must get it."""
    program = os.path.realpath(sys.executable or "/proc/self/exe")
    return (
        "CAP_NET_ADMIN is missing: run as root, or give it to the Python that runs this with "
        f"`setcap cap_net_admin+ep {program}`, or use a tap that root made for you with "
        "`ip tuntap add NAME mode tap user USER`"
    )


# -- taps -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settings:
    """What the host's side of a tap is to be; None: as it is."""

    address: Address | None = None
    mac: bytes | None = None
    mtu: int | None = None
    up: bool = True


class Tap:
    """An open tap interface: ``fds``, one non-blocking descriptor for each pair of queues.

    Frames have a virtio_net_hdr of 12 bytes in front. ``offloads`` are the ``TUN_F_*`` bits that it can do.
    Whatever was made or changed on the host is undone by :meth:`close`.
    """

    def __init__(self, field: str) -> None:
        self.name = ""
        self.fds: list[int] = []
        self.offloads = 0
        self._field = field
        self._created = False
        self._index = 0  # of the interface; 0: unknown, it may be in another network namespace
        self._attached = 1  # pairs that the interface spreads frames over
        self._undo: list[Callable[[], object]] = []

    @classmethod
    def open(cls, name: str | None, pairs: int, settings: Settings, field: str) -> Tap:
        """The tap called ``name``, made if there is none; without a name a new one, ``vmtap0`` or higher.

        Raises :class:`ConfigError`; ``field`` is the device's in the configuration, such as ``net[0]``.
        """
        tap = cls(field)
        with tap._closed_on_error():
            tap._open_named(name or NEW_TAP, pairs)
            tap._prepare(settings)
        return tap

    @classmethod
    def from_fds(cls, fds: Sequence[int], settings: Settings, field: str) -> Tap:
        """The tap that the open descriptors ``fds`` belong to; they are duplicated, the caller keeps his own.

        Only what ``settings`` has is changed, and needs the tap to be in our network namespace.
        """
        tap = cls(field)
        with tap._closed_on_error():
            for position, fd in enumerate(fds):
                tap._take(fd, f"{field}.fds[{position}]")
            if settings.address or settings.mac or settings.mtu or settings.up:
                tap._index = _index_of_fd(tap.fds[0], tap.name, field)
            tap._prepare(settings)
        return tap

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    # -- opening

    def _open_named(self, name: str, pairs: int) -> None:
        field = f"{self._field}.tap"
        check_name(name, field)
        existing = _interface_index(name) is not None
        multi = pairs > 1
        if existing:
            multi = self._check_existing(name, pairs, field)
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if multi else 0)
        for _ in range(pairs):
            fd = _open_tun(field)
            self.fds.append(fd)
            name = _attach(fd, name, flags, field)
        self.name = name
        self._index = _interface_index(name) or 0
        if existing:
            if multi:
                self._check_ours_alone(pairs, field)
        else:
            self._created = True

    def _check_existing(self, name: str, pairs: int, field: str) -> bool:
        """Whether the tap called ``name`` must be opened as a multi-queue one."""
        kind, info = _link_info(name, field)
        if kind != "tun" or info.get("IFLA_TUN_TYPE", IFF_TAP) != IFF_TAP:
            raise ConfigError(f"{field}: {name!r} is an interface of another kind ({kind}), not a tap")
        multi = bool(info.get("IFLA_TUN_MULTI_QUEUE", pairs > 1))
        if pairs > 1 and not multi:
            raise ConfigError(
                f"{field}: {name!r} has one queue, but {self._field}.num_queues asks for {pairs} pairs; "
                f"make it with `ip tuntap add {name} mode tap multi_queue`"
            )
        return multi

    def _check_ours_alone(self, pairs: int, field: str) -> None:
        """The kernel lets several programs share a multi-queue tap, each getting some of the frames."""
        info = _link_info(self.name, field)[1]
        queues = info.get("IFLA_TUN_NUM_QUEUES", pairs) + info.get("IFLA_TUN_NUM_DISABLED_QUEUES", 0)
        if queues != pairs:
            raise ConfigError(_busy(self.name, field))

    def _take(self, fd: int, field: str) -> None:
        try:
            own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        except (OSError, OverflowError):
            raise ConfigError(f"{field}: {fd} is no open file descriptor") from None
        self.fds.append(own)
        try:
            raw = fcntl.ioctl(own, _TUNGETIFF, _IFREQ.pack(b"", 0))
        except OSError as error:
            reason = (
                "an open /dev/net/tun without an interface" if error.errno == errno.EBADFD else "not a tap"
            )
            raise ConfigError(f"{field}: descriptor {fd} is {reason}") from None
        name, flags = _decode(raw)
        if flags & IFF_TAP == 0 or flags & IFF_NO_PI == 0 or flags & IFF_VNET_HDR == 0:
            raise ConfigError(
                f"{field}: {name!r} was not opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR (its flags are "
                f"{flags:#x})"
            )
        if self.name and name != self.name:
            raise ConfigError(f"{field}: it belongs to {name!r}, the ones before it to {self.name!r}")
        self.name = name
        size = fcntl.ioctl(own, _TUNGETVNETHDRSZ, bytes(4))
        self._undo.append(lambda: fcntl.ioctl(own, _TUNSETVNETHDRSZ, size))
        status = fcntl.fcntl(own, fcntl.F_GETFL)
        if not status & os.O_NONBLOCK:
            fcntl.fcntl(own, fcntl.F_SETFL, status | os.O_NONBLOCK)
            self._undo.append(lambda: fcntl.fcntl(own, fcntl.F_SETFL, status))

    def _prepare(self, settings: Settings) -> None:
        try:
            for fd in self.fds:
                fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", HEADER_SIZE))
        except OSError as error:
            raise ConfigError(f"{self._field}.tap: {self.name!r}: {error.strerror}") from None
        self.offloads = self._find_offloads()
        self._attached = len(self.fds)
        if self._index:
            with _netlink() as ip:
                self._set_up(ip, settings)
        self.reset()

    def _find_offloads(self) -> int:
        best = 0
        tcp = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN
        for wanted in (TUN_F_CSUM, tcp, tcp | TUN_F_UFO):
            if not self.set_offloads(wanted):
                break
            best = wanted
        return best

    # -- the link

    def _set_up(self, ip: IPRoute, settings: Settings) -> None:
        """Make the interface what ``settings`` say; remember how it was, unless it goes away with us."""
        link = next(iter(ip.get_links(self._index)))
        mac, mtu = link.get_attr("IFLA_ADDRESS"), link.get_attr("IFLA_MTU")
        if settings.mac and format_mac(settings.mac) != mac:
            self._change(
                ip,
                "host_mac",
                f"the MAC address {format_mac(settings.mac)}",
                {"address": format_mac(settings.mac)},
                {"address": mac},
            )
        if settings.mtu and settings.mtu != mtu:
            self._change(ip, "mtu", f"an MTU of {settings.mtu}", {"mtu": settings.mtu}, {"mtu": mtu})
        if settings.address:
            self._add_address(ip, settings.address)
        if settings.up and not link["flags"] & 1:  # IFF_UP (netdevice(7))
            self._change(ip, "tap", "the link up", {"state": "up"}, {"state": "down"})

    def _change(
        self, ip: IPRoute, key: str, what: str, new: dict[str, object], old: dict[str, object]
    ) -> None:
        with self._explained(key, what):
            ip.link("set", index=self._index, **new)
        self._on_close(lambda back: back.link("set", index=self._index, **old))

    def _add_address(self, ip: IPRoute, address: Address) -> None:
        family = socket.AF_INET if address.ip.version == 4 else socket.AF_INET6
        there = ip.get_addr(index=self._index, family=family)
        if any(
            one.get_attr("IFA_ADDRESS") == str(address.ip) and one["prefixlen"] == address.prefix
            for one in there
        ):
            return
        values: dict[str, Any] = {
            "index": self._index,
            "address": str(address.ip),
            "prefixlen": address.prefix,
        }
        with self._explained("ip", f"the address {address}"):
            ip.addr("add", **values)
        self._on_close(lambda back: back.addr("del", **values))

    @contextlib.contextmanager
    def _explained(self, key: str, what: str) -> Iterator[None]:
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            yield
        except NetlinkError as error:
            reason = capability_hint() if error.code == errno.EPERM else os.strerror(error.code)
            raise ConfigError(f"{self._field}.{key}: cannot give {self.name!r} {what}: {reason}") from None

    def _on_close(self, action: Callable[[IPRoute], object]) -> None:
        if self._created:
            return

        def undo() -> None:
            with _netlink() as ip:
                action(ip)

        self._undo.append(undo)

    # -- while it is open

    def set_offloads(self, offloads: int) -> bool:
        """Let frames come with what ``TUN_F_*`` bits say left undone; False: the tap cannot."""
        try:
            fcntl.ioctl(self.fds[0], _TUNSETOFFLOAD, offloads)
        except OSError:
            return False
        return True

    def set_pairs(self, count: int) -> bool:
        """Spread frames for the guest over the first ``count`` descriptors; False: the tap cannot."""
        if len(self.fds) == 1:
            return count == 1
        while self._attached != count:
            grow = self._attached < count
            fd = self.fds[self._attached if grow else self._attached - 1]
            request = _IFREQ.pack(b"", IFF_ATTACH_QUEUE if grow else IFF_DETACH_QUEUE)
            try:
                fcntl.ioctl(fd, _TUNSETQUEUE, request)
            except OSError:
                return False
            self._attached += 1 if grow else -1
        return True

    def reset(self) -> None:
        """No offloads, one pair, and no frame left that came before."""
        self.set_offloads(0)
        self.set_pairs(1)
        for fd in self.fds:
            with contextlib.suppress(OSError):
                for _ in range(_DRAIN_MAX):
                    os.read(fd, 64)  # the rest of the frame is dropped

    def close(self) -> None:
        """Undo what was done to the host, and close the descriptors. May be called more than once."""
        if self.fds and self.name:
            self.set_offloads(0)
            self.set_pairs(len(self.fds))
        while self._undo:
            with contextlib.suppress(OSError, *_netlink_errors()):  # somebody else changed or removed it
                self._undo.pop()()
        while self.fds:
            os.close(self.fds.pop())


def _open_tun(field: str) -> int:
    try:
        return os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        hint = (
            "load the module with `modprobe tun`"
            if error.errno in _MISSING
            else "may it be read and written?"
        )
        raise ConfigError(f"{field}: cannot open /dev/net/tun: {error.strerror}; {hint}") from None


def _attach(fd: int, name: str, flags: int, field: str) -> str:
    """Make ``fd`` a queue of the tap called ``name``; its name."""
    try:
        return _decode(fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(os.fsencode(name), flags)))[0]
    except OSError as error:
        number = error.errno
        reason = error.strerror
    if number == errno.EBUSY:
        raise ConfigError(_busy(name, field))
    if number == errno.EPERM:
        reason = capability_hint()
    if number == errno.E2BIG:
        reason = "a tap cannot have so many queues"
    raise ConfigError(f"{field}: cannot open the tap {name!r}: {reason}")


def _busy(name: str, field: str) -> str:
    return f"{field}: {name!r} is in use by another VM or program; give each VM a tap of its own"


def _decode(request: bytes) -> tuple[str, int]:
    name, flags = _IFREQ.unpack(request)
    return os.fsdecode(name.rstrip(b"\0")), flags


def _interface_index(name: str) -> int | None:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def _index_of_fd(fd: int, name: str, field: str) -> int:
    """The index of the tap of ``fd``, after looking that the one so called here is the same one."""
    place = "nobody knows where"
    with contextlib.suppress(OSError):
        namespace = fcntl.ioctl(fd, _TUNGETDEVNETNS)
        try:
            if os.path.samestat(os.fstat(namespace), os.stat("/proc/thread-self/ns/net")):
                return socket.if_nametoindex(name)
            place = "in another network namespace"
        finally:
            os.close(namespace)
    raise ConfigError(f"{field}.fds: {name!r} is {place}: set ip, mask and host_mac there, not here")


# -- netlink --------------------------------------------------------------------------------


@contextlib.contextmanager
def _netlink() -> Iterator[IPRoute]:
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        yield ip


def _netlink_errors() -> tuple[type[Exception], ...]:
    if "pyroute2" not in sys.modules:
        return ()
    from pyroute2.netlink.exceptions import NetlinkError

    return (NetlinkError,)


def _link_info(name: str, field: str) -> tuple[str, dict[str, int]]:
    """The kind of an interface ("tun" for taps) and what the kernel says of one of that kind."""
    with _netlink() as ip:
        index = _interface_index(name)
        link = next(iter(ip.get_links(index)), None) if index else None
    if link is None:
        raise ConfigError(f"{field}: {name!r} has just gone away")
    info = link.get_attr("IFLA_LINKINFO")
    if info is None:
        return "no virtual one", {}
    data = info.get_attr("IFLA_INFO_DATA")
    return info.get_attr("IFLA_INFO_KIND") or "unknown", dict(data["attrs"]) if data is not None else {}
