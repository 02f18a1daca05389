"""virtio-net: features, configuration and the control queue."""

from __future__ import annotations

import os
import struct
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chv.config import NetConfig
from chv.config.schema import RateLimiterConfig
from chv.errors import ConfigError, NotSupportedYet
from chv.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from chv.virtio.net import (
    F_CSUM,
    F_CTRL_GUEST_OFFLOADS,
    F_CTRL_VQ,
    F_GUEST_CSUM,
    F_GUEST_ECN,
    F_GUEST_TSO4,
    F_GUEST_TSO6,
    F_GUEST_UFO,
    F_HOST_ECN,
    F_HOST_TSO4,
    F_HOST_TSO6,
    F_HOST_UFO,
    F_MAC,
    F_MQ,
    F_MRG_RXBUF,
    F_MTU,
    F_STATUS,
    Net,
    check,
)

from .virtio_net_bench import ALL_OFFLOADS, HEADER, MAC, Bench, SocketWire, eventually, frame

BASE = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | F_MAC | F_STATUS | F_CTRL_VQ | F_MRG_RXBUF
CSUM = F_CSUM | F_GUEST_CSUM | F_CTRL_GUEST_OFFLOADS
TSO = F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN
UFO = F_GUEST_UFO | F_HOST_UFO
CONTROL = F_CTRL_VQ | F_CTRL_GUEST_OFFLOADS


def make(pairs: int = 1, offloads: int = ALL_OFFLOADS, **options: Any) -> Net:
    return Net("_net0", SocketWire(pairs, offloads), mac=MAC, **options)


# -- what is offered --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offloads", "options", "features"),
    [
        (0x1F, {}, BASE | CSUM | TSO | UFO),
        (0x1F, {"tso": False}, BASE | CSUM | UFO),
        (0x1F, {"ufo": False}, BASE | CSUM | TSO),
        (0x1F, {"csum": False}, BASE),
        (0x1F, {"mtu": 1500}, BASE | CSUM | TSO | UFO | F_MTU),
        (0x1F, {"pairs": 2}, BASE | CSUM | TSO | UFO | F_MQ),
        (0x0F, {}, BASE | CSUM | TSO),
        (0x01, {}, BASE | CSUM),
        (0x00, {}, BASE),
    ],
)
def test_features(offloads: int, options: dict[str, Any], features: int) -> None:
    device = make(offloads=offloads, **options)
    assert device.features == features
    device.close()


def test_configuration() -> None:
    device = make(3, mtu=9000)
    assert device.config() == MAC + struct.pack("<HHH", 1, 3, 9000)
    assert device.queue_sizes == (256,) * 6 + (64,)
    assert (device.ID, device.PCI_CLASS) == (1, 0x020000)
    device.write_config(0, bytes(6))
    assert device.config()[:6] == MAC
    device.close()


# -- the configuration's errors ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_queues": 0}, "num_queues: 0 is not an even number from 2 up"),
        ({"num_queues": 1}, "num_queues: 1 is not an even number"),
        ({"num_queues": 3}, "num_queues: 3 is not an even number"),
        ({"num_queues": 6}, r"num_queues: 3 pairs of queues are more than cpus\.boot_vcpus \(2\)"),
        ({"queue_size": 0}, "queue_size: 0 is not a power of two up to 32768"),
        ({"queue_size": 100}, "queue_size: 100 is not a power of two"),
        ({"queue_size": 65535}, "queue_size: 65535 is not a power of two"),
        ({"mtu": 1279}, r"mtu: 1279 is not in 1280\.\.65521"),
        ({"mtu": 65522}, r"mtu: 65522 is not in 1280\.\.65521"),
        ({"mac": "01:00:00:00:00:00"}, "mac: .* multicast"),
        ({"mac": "nonsense"}, "mac: 'nonsense' is not a MAC address"),
        ({"host_mac": "1:2:3:4:5:6"}, "host_mac: .* is not a MAC address"),
        ({"ip": "10.0.0.1"}, r"mask: required with net\[2\]\.ip"),
        ({"mask": "255.0.0.0"}, r"ip: required with net\[2\]\.mask"),
        ({"ip": "10.0.0.1", "mask": "255.0.1.0"}, "mask: 255.0.1.0 is not a netmask"),
        ({"tap": "a/b"}, "tap: 'a/b' is no name of an interface"),
        ({"tap": "x" * 16}, "tap: .* is too long"),
        ({"tap": "x", "fds": [5]}, "fds: give either tap or fds, not both"),
        ({"fds": []}, "fds: 0 descriptors for 1 pairs"),
        ({"fds": [5, 6]}, r"fds: 2 descriptors for 1 pairs of queues \(net\[2\]\.num_queues is 2\)"),
        ({"fds": [2]}, r"fds\[0\]: 2 is standard input, output or error"),
        ({"fds": [-1]}, r"fds\[0\]: -1 is no descriptor"),
        ({"fds": [5, 5], "num_queues": 4}, r"fds\[1\]: 5 is there twice"),
    ],
)
def test_bad_configurations(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^net\[2\]\.{words}"):
        check(NetConfig(**values), "net[2]", 2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"vhost_user": True}, "vhost_user: chv cannot do vhost-user devices yet"),
        ({"vhost_socket": "/s"}, "vhost_user: chv cannot do vhost-user devices yet"),
        ({"rate_limiter_config": RateLimiterConfig()}, "rate_limiter_config: chv cannot do rate limits yet"),
    ],
)
def test_what_is_not_built(values: dict[str, Any], words: str) -> None:
    with pytest.raises(NotSupportedYet, match=rf"^net\[0\]\.{words}"):
        check(NetConfig(**values), "net[0]", 1)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tap": "", "mac": "", "ip": "", "mask": ""},
        {"tap": "tap0", "mac": "12:34:56:78:9a:bc", "ip": "192.168.249.1", "mask": "255.255.255.0"},
        {"fds": [3, 4], "num_queues": 4, "mtu": 1280},
        {"queue_size": 32768, "mtu": 65521},
    ],
)
def test_good_configurations(values: dict[str, Any]) -> None:
    check(NetConfig(**values), "net[0]", 2)


# -- offloads follow the driver ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "offloads"),
    [
        (0, 0),
        (F_CSUM | F_HOST_TSO4, 0),
        (F_GUEST_CSUM, 0x01),
        (F_GUEST_CSUM | F_GUEST_TSO4, 0x03),
        (F_GUEST_CSUM | F_GUEST_TSO6 | F_GUEST_ECN, 0x0D),
        (F_GUEST_CSUM | F_GUEST_UFO, 0x11),
        (F_GUEST_TSO4 | F_GUEST_TSO6, 0),  # segments without checksums: 5.1.3.1
        (F_GUEST_CSUM | F_GUEST_ECN, 0x01),  # ECN without segments
        (BASE | CSUM | TSO | UFO, 0x1F),
    ],
)
def test_the_tap_gets_the_offloads_that_the_driver_takes(features: int, offloads: int) -> None:
    with Bench() as bench:
        bench.start(features)
        assert bench.wire.calls == [("offloads", offloads), ("pairs", 1)]


def test_a_reset_takes_offloads_and_pairs_back() -> None:
    with Bench(pairs=2) as bench:
        bench.start(CONTROL | F_GUEST_CSUM | F_MQ)
        assert bench.command(struct.pack("<BBH", 4, 0, 2)) == b"\0"
        bench.device.stop()
        bench.wire.calls.clear()
        bench.device.reset()
        assert bench.device.accepted == 0
        for ring in bench.rings:
            ring.clear()
        bench.start(0)
        assert bench.wire.calls == [("reset", 0), ("offloads", 0), ("pairs", 1)]


def test_a_pause_keeps_what_the_control_queue_set() -> None:
    with Bench(pairs=2) as bench:
        features = CONTROL | F_GUEST_CSUM | F_GUEST_TSO4 | F_MQ
        bench.start(features)
        assert bench.command(struct.pack("<BBH", 4, 0, 2)) == b"\0"
        assert bench.command(struct.pack("<BBQ", 5, 0, F_GUEST_CSUM)) == b"\0"
        bench.device.stop()
        state = bench.device.save()
        bench.wire.calls.clear()
        bench.device.start(bench.queues, features)
        assert bench.wire.calls == [("offloads", 1), ("pairs", 2)]
    assert state == {"accepted": features, "mac": "02:00:00:00:00:0a", "pairs": 2, "offloads": F_GUEST_CSUM}
    with Bench(pairs=2, mac=b"\2" * 6) as other:
        other.device.load(state)
        assert other.device.save() == state
        assert other.device.config()[:6] == MAC
        other.start(state["accepted"])
        assert other.wire.calls == [("offloads", 1), ("pairs", 2)]


# -- the control queue ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "calls"),
    [
        (struct.pack("<BBH", 4, 0, 1), [("pairs", 1)]),
        (struct.pack("<BBH", 4, 0, 3), [("pairs", 3)]),
        (struct.pack("<BBHQ", 4, 0, 2, 99), [("pairs", 2)]),
        (struct.pack("<BBH", 4, 0, 0), None),
        (struct.pack("<BBH", 4, 0, 4), None),
        (struct.pack("<BBH", 4, 0, 65535), None),
        (struct.pack("<BBH", 4, 1, 1), None),
        (b"\4\0\1", None),
        (b"\4\0", None),
        (b"\4", None),
        (struct.pack("<BBQ", 5, 0, 0), [("offloads", 0)]),
        (struct.pack("<BBQ", 5, 0, F_GUEST_CSUM), [("offloads", 1)]),
        (struct.pack("<BBQ", 5, 0, F_GUEST_CSUM | F_GUEST_TSO4), [("offloads", 3)]),
        (struct.pack("<BBQ", 5, 0, F_GUEST_TSO6), None),  # not negotiated
        (struct.pack("<BBQ", 5, 0, F_CSUM), None),
        (struct.pack("<BBQ", 5, 0, 1 << 63), None),
        (struct.pack("<BBQ", 5, 0, 0)[:9], None),
        (struct.pack("<BBQ", 5, 1, 0), None),
        (struct.pack("<BBB", 0, 0, 1), None),  # promiscuous mode: CTRL_RX is not offered
        (struct.pack("<BB", 1, 1) + MAC, None),  # a MAC address: CTRL_MAC_ADDR is not offered
        (struct.pack("<BBH", 2, 0, 5), None),  # a VLAN
        (struct.pack("<BB", 3, 0), None),
        (b"\xff" * 5000, None),
    ],
)
def test_commands(command: bytes, calls: list[tuple[str, int]] | None) -> None:
    with Bench(pairs=3) as bench:
        bench.start(CONTROL | F_GUEST_CSUM | F_GUEST_TSO4 | F_MQ)
        bench.wire.calls.clear()
        assert bench.command(command) == (b"\1" if calls is None else b"\0")
        assert bench.wire.calls == (calls or [])


@pytest.mark.parametrize("command", [struct.pack("<BBH", 4, 0, 1), struct.pack("<BBQ", 5, 0, F_GUEST_CSUM)])
def test_commands_of_features_that_were_not_taken(command: bytes) -> None:
    with Bench(pairs=2) as bench:
        bench.start(F_CTRL_VQ | F_GUEST_CSUM)
        bench.control, bench.rings = bench.rings[2], bench.rings[:3]  # the control queue's place without MQ
        bench.wire.calls.clear()
        assert bench.command(command) == b"\1"
        assert bench.wire.calls == []


@pytest.mark.parametrize("command", [struct.pack("<BBH", 4, 0, 1), struct.pack("<BBQ", 5, 0, F_GUEST_CSUM)])
def test_what_the_tap_refuses_is_an_error_for_the_driver(command: bytes) -> None:
    with Bench(pairs=2) as bench:
        bench.start(CONTROL | F_GUEST_CSUM | F_MQ)
        before = bench.device.save()
        bench.wire.works = False
        assert bench.command(command) == b"\1"
        assert bench.device.save() == before


def test_a_command_without_room_for_the_answer() -> None:
    with Bench(pairs=2) as bench:
        bench.start(CONTROL | F_MQ)
        assert bench.command(struct.pack("<BBH", 4, 0, 2), room=0) == b""
        assert bench.command(struct.pack("<BBH", 4, 0, 1)) == b"\0"


@given(
    st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=5),
    st.lists(st.integers(1, 40), max_size=3),
    st.booleans(),
)
def test_any_command_is_answered(pieces: list[bytes], room: list[int], indirect: bool) -> None:
    with Bench(pairs=2) as bench:
        bench.start(CONTROL | F_GUEST_CSUM | F_MQ | F_INDIRECT_DESC)
        head = bench.control.add(pieces, room, indirect=indirect)
        bench.queues[4].kick()
        assert bench.control.wait(1) == [(head, min(1, len(room)))]
        if room:
            assert bench.control.written(head)[0] in (0, 1)
        assert bench.command(struct.pack("<BBH", 4, 0, 2)) == b"\0"


def test_a_gigantic_command_is_not_copied() -> None:
    """A table of descriptors that all name the same 16 MiB: 1 GiB in one chain."""
    with Bench() as bench:
        bench.start(CONTROL | F_INDIRECT_DESC)
        head = bench.control.add_buffers([(0, 16 << 20, 0)] * 63 + [(0x1000, 1, 2)], indirect=True)
        bench.queues[2].kick()
        assert bench.control.wait(1) == [(head, 1)]


# -- queues -----------------------------------------------------------------------------------


def test_a_queue_that_was_not_negotiated_is_not_served() -> None:
    """Without MQ and CTRL_VQ two queues are all there is; the driver of this one enables five."""
    with Bench(pairs=2) as bench:
        bench.start(0)
        for number in (2, 3, 4):
            bench.rings[number].add([HEADER + frame(60)], [2000])
            bench.queues[number].kick()
        bench.send([HEADER + frame(60)])
        assert bench.far.recv(100) == HEADER + frame(60)
        bench.tx.wait(1)
        assert [len(ring.used()) for ring in bench.rings] == [0] * 5


def test_both_pairs_carry_frames() -> None:
    with Bench(pairs=2) as bench:
        bench.start(F_MRG_RXBUF | F_MQ | F_CTRL_VQ)
        for pair in (0, 1):
            bench.offer(2000, queue=2 * pair)
            bench.wire.far[pair].send(HEADER + frame(100, seed=pair))
            assert bench.receive(2 * pair)[1] == frame(100, seed=pair)
            bench.send([HEADER + frame(200, seed=pair)], 2 * pair + 1)
            assert bench.wire.far[pair].recv(1000) == HEADER + frame(200, seed=pair)
        eventually(lambda: bench.device.counters()["tx_frames"] == 2)
        assert bench.counters() == {"rx_bytes": 200, "rx_frames": 2, "tx_bytes": 400, "tx_frames": 2}


def test_one_queue_stops_and_starts_alone() -> None:
    with Bench() as bench:
        bench.start()
        bench.device.stop_queue(1)
        bench.offer(2000)
        bench.far.send(HEADER + frame(100))
        assert bench.receive()[1] == frame(100)
        bench.send([HEADER + frame(60)])
        bench.device.start_queue(bench.queues[1])
        assert bench.far.recv(100) == HEADER + frame(60)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_broken_ring_ends_its_queue_alone(number: int) -> None:
    with Bench() as bench:
        bench.start(F_MRG_RXBUF | CONTROL)
        bench.rings[number].publish(9999)
        bench.queues[number].kick()
        eventually(lambda: bench.queues[number].error)
        assert bench.status.value & 2
        if number != 1:
            bench.send([HEADER + frame(60)])
            assert bench.far.recv(100) == HEADER + frame(60)
        if number != 0:
            bench.offer(2000)
            bench.far.send(HEADER + frame(60))
            assert bench.receive()[1] == frame(60)
        if number != 2:
            assert bench.command(b"\0\0\0") == b"\1"


def test_threads_and_descriptors_are_given_back() -> None:
    with Bench() as bench:
        bench.start()  # imports, and what is made once
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(10):
        with Bench(pairs=2) as bench:
            bench.start(F_MQ | F_CTRL_VQ)
            bench.offer(2000, 2000)
            bench.far.send(HEADER + frame(60))
            bench.receive()
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before
