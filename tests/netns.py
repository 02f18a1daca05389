"""Network namespaces for tests, each with a thread of its own, and the interfaces in them."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import struct
import threading
from collections.abc import Callable
from typing import Any

from pyroute2 import IPRoute

from tests.support import require

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_CAP_NET_ADMIN = 12  # linux/capability.h
_CAPABILITY_VERSION_3 = 0x20080522
_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_TUNSETPERSIST = 0x400454CB
_IFREQ = struct.Struct("16sH22x")

_libc = ctypes.CDLL(None, use_errno=True)


def in_namespace(test: Callable[..., Any]) -> Callable[..., Any]:
    """Run the decorated test in a network namespace of its own. Needs root and /dev/net/tun."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        require(os.geteuid() == 0, "network namespaces need root")
        require(os.access("/dev/net/tun", os.R_OK | os.W_OK), "/dev/net/tun is missing or may not be opened")
        failures: list[BaseException] = []

        def body() -> None:
            try:
                enter_new()
                test(*args, **kwargs)
            except BaseException as error:  # goes on in the thread of the test
                failures.append(error)

        thread = threading.Thread(target=body, name=test.__name__)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]

    return run


def enter_new() -> None:
    """Put the calling thread into a new network namespace; its loopback interface is down."""
    if _libc.unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")


def drop_net_admin() -> None:
    """Take CAP_NET_ADMIN from the calling thread."""
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)  # twice effective, permitted, inheritable
    if _libc.capget(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    values = list(struct.unpack("6I", data.raw))
    for index in range(3):
        values[index] &= ~(1 << _CAP_NET_ADMIN)
    if _libc.capset(header, struct.pack("6I", *values)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def make_tap(name: str, *, flags: int = 0x1002, persist: bool = True) -> int:
    """An interface made from outside of chv (IFF_TAP | IFF_NO_PI); the descriptor that is its queue."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
        fcntl.ioctl(fd, _TUNSETPERSIST, int(persist))
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_persistent_tap(name: str, *, flags: int = 0x1002) -> None:
    """As ``ip tuntap add NAME mode tap`` does."""
    os.close(make_tap(name, flags=flags))


def link(name: str) -> dict[str, Any] | None:
    """``mac``, ``mtu``, ``up``, and ``addresses`` (IPv4 and global IPv6) of an interface, if it is there."""
    with IPRoute() as ip:
        found = ip.link_lookup(ifname=name)
        if not found:
            return None
        one = next(iter(ip.get_links(found[0])))
        addresses = {
            f"{address.get_attr('IFA_ADDRESS')}/{address['prefixlen']}"
            for address in ip.get_addr(index=found[0])
            if address["scope"] == 0
        }
        return {
            "mac": one.get_attr("IFLA_ADDRESS"),
            "mtu": one.get_attr("IFLA_MTU"),
            "up": bool(one["flags"] & 1),
            "addresses": addresses,
        }


def links() -> set[str]:
    """The names of all interfaces, without the loopback."""
    with IPRoute() as ip:
        return {one.get_attr("IFLA_IFNAME") for one in ip.get_links()} - {"lo"}


def set_link(name: str, **values: Any) -> None:
    with IPRoute() as ip:
        ip.link("set", index=ip.link_lookup(ifname=name)[0], **values)
