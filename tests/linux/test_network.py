"""Network cards under stock Linux drivers: what passes between the guest and the host's taps."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from chv.testing import Guest
from tests.linux.guests import assert_healthy
from tests.linux.transfers import Sink, Source, serving
from tests.netns import in_namespace, links

KIB, MIB = 1 << 10, 1 << 20
LONGEST_PACKET = 1514  # Ethernet's header and 1500 bytes

# Feature bits (virtio 1.2, 5.1.3): CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4.
OFFLOADS = {0, 1, 7, 11}
MERGEABLE = 15


@dataclass(frozen=True)
class Card:
    """A card of the guest: its number there, and what it has beside names and addresses."""

    number: int
    name: str
    options: str = ""

    @property
    def host(self) -> str:
        return f"192.168.{249 + self.number}.1"

    @property
    def guest(self) -> str:
        return f"192.168.{249 + self.number}.2"

    @property
    def config(self) -> str:
        return f"tap=,ip={self.host},mask=255.255.255.0,id={self.name}{self.options}"


DEFAULT = Card(0, "default")
BARE = Card(1, "bare", ",offload_csum=off,offload_tso=off,offload_ufo=off,mac=02:00:5e:10:00:01")
PAIRS = Card(2, "pairs", ",num_queues=4")
CARDS = (DEFAULT, BARE, PAIRS)


@pytest.mark.timeout(600)  # a minute, and several on a busy machine in the testbed
@in_namespace
def test_pings_and_transfers_with_offloads_and_without_and_over_two_pairs(
    guest: Callable[..., Guest], series: str
) -> None:
    vm = guest(series, cmdline="quiet guest.devices", cpus=2, net=[card.config for card in CARDS])
    assert links() == {"vmtap0", "vmtap1", "vmtap2"}
    for card in CARDS:
        # Longer than a packet: in pieces, each way.
        ping = f"ping -c 3 -i 0.2 -W 10 -s 8000 {card.host}"
        assert "3 packets received" in vm.run(f"ifconfig eth{card.number} {card.guest} && {ping}")
    with_offloads(vm)
    without_offloads(vm)
    over_two_pairs(vm)
    from_another_address(vm)
    assert_healthy(vm)
    vm.close()
    assert links() == set()


def with_offloads(vm: Guest) -> None:
    """Segments of TCP pass in one piece, on the way to the guest over several of its buffers."""
    assert features(vm, DEFAULT) >= {*OFFLOADS, MERGEABLE}
    received, sent = there_and_back(vm, DEFAULT, 8 * MIB)
    assert received > LONGEST_PACKET
    assert sent > LONGEST_PACKET


def without_offloads(vm: Guest) -> None:
    assert not features(vm, BARE) & OFFLOADS
    received, sent = there_and_back(vm, BARE, 512 * KIB)
    assert received <= LONGEST_PACKET
    assert sent <= LONGEST_PACKET


def there_and_back(vm: Guest, card: Card, size: int) -> tuple[float, float]:
    """Send noise to the guest and have it sent back; how long a frame was each way, in the mean."""
    data = os.urandom(size)
    digest = hashlib.sha256(data).hexdigest()
    before = counters(vm, card)
    with serving(card.host, Source, data) as source, serving(card.host, Sink) as sink:
        found = vm.run(f"nc {card.host} {source.port} </dev/null >/tmp/noise; sha256sum </tmp/noise")
        assert found.split()[0] == digest
        between = counters(vm, card)
        vm.run(f"nc {card.host} {sink.port} </tmp/noise")
        assert sink.digests == [digest]
    after = counters(vm, card)
    assert after["rx_errors"] == after["tx_errors"] == after["tx_dropped"] == 0
    return mean(before, between, "rx"), mean(between, after, "tx")


def mean(before: dict[str, int], after: dict[str, int], way: str) -> float:
    frames, length = (after[f"{way}_{what}"] - before[f"{way}_{what}"] for what in ("frames", "bytes"))
    return length / frames


def over_two_pairs(vm: Guest) -> None:
    """Two connections at once, one on each vCPU: each has a pair of queues for itself, both ways."""
    assert vm.run(f"ls /sys/class/net/eth{PAIRS.number}/queues").split() == ["rx-0", "rx-1", "tx-0", "tx-1"]
    data = os.urandom(512 * KIB)
    digest = hashlib.sha256(data).hexdigest()
    before = interrupts(vm, PAIRS)
    with serving(PAIRS.host, Source, data) as source, serving(PAIRS.host, Sink) as sink:
        each = "for cpu in 0 1; do taskset $((1 << cpu))"
        vm.run(f"{each} nc {PAIRS.host} {source.port} </dev/null >/tmp/noise$cpu & done; wait")
        found = vm.run("sha256sum /tmp/noise?").splitlines()
        assert [line.split()[0] for line in found] == [digest, digest]
        vm.run(f"{each} nc {PAIRS.host} {sink.port} </tmp/noise$cpu & done; wait")
        assert sink.digests == [digest, digest]
    after = interrupts(vm, PAIRS)
    assert after.keys() == {"input.0", "output.0", "input.1", "output.1"}
    assert all(after[queue] > before[queue] for queue in ("input.0", "input.1")), (before, after)


def from_another_address(vm: Guest) -> None:
    """A card that was given an address sends from no other one."""
    before = counters(vm, BARE)["tx_spoofed"]
    vm.run(f"ifconfig eth{BARE.number} hw ether 02:00:5e:10:00:99")
    assert " 0 packets received" in vm.run(f"ping -c 1 -W 1 {BARE.host}", check=False)
    assert counters(vm, BARE)["tx_spoofed"] > before


def counters(vm: Guest, card: Card) -> dict[str, int]:
    found: dict[str, int] = vm.counters()[card.name]
    return found


def features(vm: Guest, card: Card) -> set[int]:
    """The feature bits that the driver accepted; /sys shows bit 0 first."""
    bits = vm.run(f"cat /sys/class/net/eth{card.number}/device/features")
    return {bit for bit, value in enumerate(bits) if value == "1"}


def interrupts(vm: Guest, card: Card) -> dict[str, int]:
    """How many interrupts each queue of a card gave, on all vCPUs."""
    device = vm.run(f"basename $(readlink /sys/class/net/eth{card.number}/device)")
    lines = vm.run(f"grep -E '{device}-(in|out)put' /proc/interrupts").splitlines()
    counts = {}
    for line in lines:
        numbers = re.match(r" *\d+:((?: +\d+)+) ", line)
        assert numbers, line
        counts[line.split("-")[-1]] = sum(map(int, numbers[1].split()))
    return counts
