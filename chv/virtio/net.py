"""virtio-net (virtio 1.2, 5.1): an Ethernet card whose wire is a tap of the host.

Pairs of queues, receive then transmit, and behind them a control queue. The frames move in
:mod:`chv.virtio._net`; here are the features, the configuration and the control queue's commands.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from .. import net
from ..errors import ConfigError, NotSupportedYet
from ._net import Receiver, Sender
from .device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice

if TYPE_CHECKING:
    from .._virtqueue import Queue
    from ..config import NetConfig

# Feature bits (virtio 1.2, 5.1.3).
F_CSUM: Final = 1 << 0
F_GUEST_CSUM: Final = 1 << 1
F_CTRL_GUEST_OFFLOADS: Final = 1 << 2
F_MTU: Final = 1 << 3
F_MAC: Final = 1 << 5
F_GUEST_TSO4: Final = 1 << 7
F_GUEST_TSO6: Final = 1 << 8
F_GUEST_ECN: Final = 1 << 9
F_GUEST_UFO: Final = 1 << 10
F_HOST_TSO4: Final = 1 << 11
F_HOST_TSO6: Final = 1 << 12
F_HOST_ECN: Final = 1 << 13
F_HOST_UFO: Final = 1 << 14
F_MRG_RXBUF: Final = 1 << 15
F_STATUS: Final = 1 << 16
F_CTRL_VQ: Final = 1 << 17
F_MQ: Final = 1 << 22

S_LINK_UP: Final = 1  # bit of the configuration's status (5.1.4)

# Commands of the control queue: class, command (5.1.6.5).
MQ_VQ_PAIRS_SET: Final = (4, 0)
GUEST_OFFLOADS_SET: Final = (5, 0)
ACK_OK: Final = b"\0"
ACK_ERROR: Final = b"\1"

CONTROL_QUEUE_SIZE: Final = 64
QUEUE_SIZE_MAX: Final = 32768  # virtio 1.2, 2.7
_COMMAND_MAX: Final = 10  # bytes of the longest command that is known

# What the guest takes half done -> what the tap is told.
_TO_TAP: Final = {
    F_GUEST_CSUM: net.TUN_F_CSUM,
    F_GUEST_TSO4: net.TUN_F_TSO4,
    F_GUEST_TSO6: net.TUN_F_TSO6,
    F_GUEST_ECN: net.TUN_F_TSO_ECN,
    F_GUEST_UFO: net.TUN_F_UFO,
}
_GUEST_OFFLOADS: Final = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_GUEST_UFO
_CONFIG: Final = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu (5.1.4)


class Wire(Protocol):
    """What a network device is connected to: a :class:`chv.net.Tap`, or something like it in a test."""

    @property
    def fds(self) -> Sequence[int]: ...
    @property
    def offloads(self) -> int: ...
    def set_offloads(self, offloads: int) -> bool: ...
    def set_pairs(self, count: int) -> bool: ...
    def reset(self) -> None: ...
    def close(self) -> None: ...


def check(config: NetConfig, field: str, boot_vcpus: int) -> None:
    """Raise :class:`ConfigError` for what is wrong with ``config``, as far as the host need not be asked.

    ``field`` is where it is in the VM's configuration, such as ``net[0]``.
    """
    _check_built(config, field)
    if config.num_queues < 2 or config.num_queues % 2:
        raise ConfigError(f"{field}.num_queues: {config.num_queues} is not an even number from 2 up")
    if config.num_queues // 2 > boot_vcpus:
        raise ConfigError(
            f"{field}.num_queues: {config.num_queues // 2} pairs of queues are more than cpus.boot_vcpus "
            f"({boot_vcpus})"
        )
    size = config.queue_size
    if not 0 < size <= QUEUE_SIZE_MAX or size & (size - 1):
        raise ConfigError(f"{field}.queue_size: {size} is not a power of two up to {QUEUE_SIZE_MAX}")
    if config.mtu is not None and not net.MTU_MIN <= config.mtu <= net.MTU_MAX:
        raise ConfigError(f"{field}.mtu: {config.mtu} is not in {net.MTU_MIN}..{net.MTU_MAX}")
    if config.mac:
        net.parse_mac(config.mac, f"{field}.mac")
    if config.host_mac:
        net.parse_mac(config.host_mac, f"{field}.host_mac")
    net.parse_address(config.ip, config.mask, field)
    if config.tap:
        net.check_name(config.tap, f"{field}.tap")
    if config.fds is not None:
        _check_fds(config, config.fds, field)


def _check_built(config: NetConfig, field: str) -> None:
    if config.vhost_user or config.vhost_socket:
        raise NotSupportedYet(f"{field}.vhost_user: chv cannot do vhost-user devices yet; use tap or fd")
    if config.rate_limiter_config is not None:
        raise NotSupportedYet(f"{field}.rate_limiter_config: chv cannot do rate limits yet")


def _check_fds(config: NetConfig, fds: list[int], field: str) -> None:
    if config.tap:
        raise ConfigError(f"{field}.fds: give either tap or fds, not both")
    if len(fds) != config.num_queues // 2:
        raise ConfigError(
            f"{field}.fds: {len(fds)} descriptors for {config.num_queues // 2} pairs of queues "
            f"({field}.num_queues is {config.num_queues}); it must be one for each pair"
        )
    for position, fd in enumerate(fds):
        if fd < 0:
            raise ConfigError(f"{field}.fds[{position}]: {fd} is no descriptor")
        if fd <= 2:
            raise ConfigError(f"{field}.fds[{position}]: {fd} is standard input, output or error, not a tap")
        if fd in fds[:position]:
            raise ConfigError(f"{field}.fds[{position}]: {fd} is there twice")


class Net(VirtioDevice):
    """A network card on ``wire``, with a pair of queues for each of its descriptors.

    ``mac`` is the guest's; with ``filtered`` no frame leaves that claims to come from another.
    ``mtu`` is what the guest is told (None: nothing). The wire is closed with the device.
    """

    ID = 1
    PCI_CLASS = 0x020000

    def __init__(
        self,
        name: str,
        wire: Wire,
        *,
        mac: bytes,
        filtered: bool = False,
        mtu: int | None = None,
        queue_size: int = 256,
        tso: bool = True,
        ufo: bool = True,
        csum: bool = True,
    ) -> None:
        self.pairs = len(wire.fds)
        self.mac = mac
        self.mtu = mtu
        self.wire = wire
        features = _offered(wire.offloads, tso=tso, ufo=ufo, csum=csum)
        if self.pairs > 1:
            features |= F_MQ
        if mtu is not None:
            features |= F_MTU
        super().__init__(name, features, [queue_size] * (2 * self.pairs) + [CONTROL_QUEUE_SIZE])
        self._receivers = [Receiver(fd) for fd in wire.fds]
        self._senders = [Sender(fd, mac if filtered else None) for fd in wire.fds]
        self._used_pairs = 1
        self._offloads: int | None = None  # feature bits; None: the driver has just come

    @classmethod
    def open(cls, config: NetConfig, field: str, name: str) -> Net:
        """Open or make the tap that ``config`` asks for. Raises :class:`ConfigError`.

        ``field`` is where ``config`` is in the VM's configuration, ``name`` what the device is called.
        """
        mac = net.parse_mac(config.mac, f"{field}.mac") if config.mac else net.random_mac()
        host_mac = net.parse_mac(config.host_mac, f"{field}.host_mac") if config.host_mac else None
        address = net.parse_address(config.ip, config.mask, field)
        if config.fds:
            settings = net.Settings(address=address, mac=host_mac, up=False)
            wire = net.Tap.from_fds(config.fds, settings, field)
        else:
            settings = net.Settings(address=address, mac=host_mac, mtu=config.mtu)
            wire = net.Tap.open(config.tap, config.num_queues // 2, settings, field)
        try:
            return cls(
                name,
                wire,
                mac=mac,
                filtered=bool(config.mac),
                mtu=config.mtu,
                queue_size=config.queue_size,
                tso=config.offload_tso,
                ufo=config.offload_ufo,
                csum=config.offload_csum,
            )
        except BaseException:
            wire.close()
            raise

    # -- the driver's side

    def config(self) -> bytes:
        return _CONFIG.pack(self.mac, S_LINK_UP, self.pairs, self.mtu or 0)

    def start(self, queues: Mapping[int, Queue], features: int) -> None:
        if self._offloads is None:
            self._offloads = features & _GUEST_OFFLOADS
        self.wire.set_offloads(_tap_offloads(self._offloads))
        self.wire.set_pairs(self._used_pairs)
        super().start(queues, features)

    def reset(self) -> None:
        super().reset()
        self._offloads = None
        self._used_pairs = 1
        self.wire.reset()

    def work(self, queue: Queue) -> None:
        # Without MQ there is one pair, and the control queue comes next (5.1.2).
        pairs = self.pairs if self.accepted & F_MQ else 1
        number, transmit = divmod(queue.index, 2)
        if number < pairs and transmit:
            self._senders[number].run(queue)
        elif number < pairs:
            self._receivers[number].run(queue, bool(self.accepted & F_MRG_RXBUF))
        elif queue.index == 2 * pairs and self.accepted & F_CTRL_VQ:
            self._control(queue)

    # -- the control queue

    def _control(self, queue: Queue) -> None:
        while not queue.stopping:
            for chain in queue:
                chain.write(self._command(chain.read(_COMMAND_MAX)))
                chain.done()
            queue.wait()

    def _command(self, command: bytes) -> bytes:
        """Carry out one command; the acknowledgement."""
        kind, data = tuple(command[:2]), command[2:]
        if kind == MQ_VQ_PAIRS_SET and len(data) >= 2 and self.accepted & F_MQ:
            done = self._set_pairs(int.from_bytes(data[:2], "little"))
        elif kind == GUEST_OFFLOADS_SET and len(data) >= 8 and self.accepted & F_CTRL_GUEST_OFFLOADS:
            done = self._set_offloads(int.from_bytes(data[:8], "little"))
        else:
            done = False
        return ACK_OK if done else ACK_ERROR

    def _set_pairs(self, count: int) -> bool:
        if not 1 <= count <= self.pairs or not self.wire.set_pairs(count):
            return False
        self._used_pairs = count
        return True

    def _set_offloads(self, offloads: int) -> bool:
        if offloads & ~(self.accepted & _GUEST_OFFLOADS) or not self.wire.set_offloads(
            _tap_offloads(offloads)
        ):
            return False
        self._offloads = offloads
        return True

    # -- the host's side

    def counters(self) -> dict[str, int]:
        """Frames and their bytes (without virtio_net_hdr) since the VM was made, and what was lost."""
        return {
            "rx_bytes": sum(one.total_bytes for one in self._receivers),
            "rx_frames": sum(one.frames for one in self._receivers),
            "rx_dropped": sum(one.dropped for one in self._receivers),
            "rx_errors": sum(one.errors for one in self._receivers),
            "tx_bytes": sum(one.total_bytes for one in self._senders),
            "tx_frames": sum(one.frames for one in self._senders),
            "tx_dropped": sum(one.dropped for one in self._senders),
            "tx_spoofed": sum(one.spoofed for one in self._senders),
            "tx_errors": sum(one.errors for one in self._senders),
        }

    def save(self) -> dict[str, Any]:
        return super().save() | {
            "mac": net.format_mac(self.mac),
            "pairs": self._used_pairs,
            "offloads": self._offloads,
        }

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.mac = bytes.fromhex(state["mac"].replace(":", ""))
        self._used_pairs = state["pairs"]
        self._offloads = state["offloads"]

    def close(self) -> None:
        self.wire.close()


def _offered(tap: int, *, tso: bool, ufo: bool, csum: bool) -> int:
    """The features of a device on a tap with these offloads (segments need checksums: 5.1.3.1)."""
    features = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
    features |= F_MAC | F_STATUS | F_CTRL_VQ | F_MRG_RXBUF
    if csum and tap & net.TUN_F_CSUM:
        features |= F_CSUM | F_GUEST_CSUM | F_CTRL_GUEST_OFFLOADS
        if tso and tap & net.TUN_F_TSO4:
            features |= F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN
            features |= F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN
        if ufo and tap & net.TUN_F_UFO:
            features |= F_GUEST_UFO | F_HOST_UFO
    return features


def _tap_offloads(features: int) -> int:
    """The tap's offloads for a guest that takes these features; none without their condition (5.1.3.1)."""
    offloads = sum(theirs for ours, theirs in _TO_TAP.items() if features & ours)
    if not offloads & net.TUN_F_CSUM:
        return 0
    if not offloads & (net.TUN_F_TSO4 | net.TUN_F_TSO6):
        offloads &= ~net.TUN_F_TSO_ECN
    return offloads
