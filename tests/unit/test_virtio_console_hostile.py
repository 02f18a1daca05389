"""Drivers that lie to the console and the entropy device: both can be stopped, and work after a reset."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chv.devices.backend import Fds
from chv.virtio.console import RECEIVE, TRANSMIT, Console
from chv.virtio.rng import Rng
from tests.virtio_driver import INDIRECT, NEXT, WRITE

from .test_virtio_console import Guest, receive
from .virtio_machine import MB, Machine, machine

SIZE = 8

addresses = st.one_of(
    st.integers(0, 8 * MB + 4096), st.integers(0, 2**64 - 1), st.sampled_from([0, MB, 3 * MB, 8 * MB - 1])
)
lengths = st.one_of(st.integers(0, 64), st.integers(0, 2**32 - 1), st.sampled_from([0, 16, 4096, 8 * MB]))
flags = st.one_of(st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, INDIRECT]), st.integers(0, 0xFFFF))
descriptors = st.tuples(addresses, lengths, flags, st.integers(0, SIZE))
rings = st.tuples(
    st.lists(descriptors, min_size=SIZE, max_size=SIZE),
    st.lists(st.integers(0, SIZE), max_size=2 * SIZE),
    st.booleans(),
)


def lie(m: Machine, number: int, ring: tuple[list[tuple[int, int, int, int]], list[int], bool]) -> None:
    table, heads, kick = ring
    for index, entry in enumerate(table):
        m.rings[number].describe(index, *entry)
    for head in heads:
        m.rings[number].publish(head)
    if kick:
        m.queues[number].kick()


@pytest.fixture(scope="module")
def console() -> Iterator[tuple[Console, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        device = Console("__console", Fds(near, near))
        yield device, far
        device.close()


@given(receive_ring=rings, transmit_ring=rings, typed=st.binary(max_size=100))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_console(
    console: tuple[Console, socket.socket],
    receive_ring: tuple[list[tuple[int, int, int, int]], list[int], bool],
    transmit_ring: tuple[list[tuple[int, int, int, int]], list[int], bool],
    typed: bytes,
) -> None:
    device, far = console
    far.sendall(typed)
    with machine(device, ring_size=SIZE) as m:
        lie(m, RECEIVE, receive_ring)
        lie(m, TRANSMIT, transmit_ring)
        drain(far)
    drain(far)
    with machine(device, ring_size=SIZE) as m:
        while device.line.pending_output:
            drain(far)
        drain(far)
        Guest(m).say(b"well")
        assert receive(far.fileno(), 4) == b"well"


def drain(far: socket.socket) -> None:
    far.settimeout(0.01)
    try:
        while far.recv(1 << 20):
            pass
    except TimeoutError:
        pass
    far.settimeout(10)


@pytest.fixture(scope="module")
def rng() -> Iterator[Rng]:
    with open("/dev/zero", "rb") as zero:
        device = Rng("__rng", os.dup(zero.fileno()))
        yield device
        device.close()


@given(ring=rings)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_entropy_device(rng: Rng, ring: tuple[list[tuple[int, int, int, int]], list[int], bool]) -> None:
    with machine(rng, ring_size=SIZE) as m:
        lie(m, 0, ring)
    with machine(rng, ring_size=SIZE) as m:
        head = m.rings[0].add(writable=[100])
        m.queues[0].kick()
        assert m.rings[0].wait() == [(head, 100)]
