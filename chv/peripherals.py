"""The virtio devices of a VM, opened from its configuration.

They belong to the VM and live over reboots; each power-on puts transports in front of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from .config.devices import SLOTS, Place, places
from .errors import ConfigError

if TYPE_CHECKING:
    from .config import VmConfig
    from .virtio.device import VirtioDevice


class Peripheral(Struct, frozen=True):
    """A device that is open, and its slot."""

    device: VirtioDevice
    slot: int

    @property
    def bdf(self) -> str:
        """Segment, bus, device and function, as ``lspci -D`` has them."""
        return f"0000:00:{self.slot:02x}.0"


def open_all(config: VmConfig) -> list[Peripheral]:
    """Open every device; if one cannot be, those before it are closed again.

    Raises :class:`chv.errors.ConfigError` with the field that is at fault.
    """
    with contextlib.ExitStack() as opened:
        result = []
        for place in places(config):
            device = _open(place)
            opened.callback(device.close)
            result.append(Peripheral(device, place.slot))
        opened.pop_all()
    return result


def plug(taken: Sequence[Place], devices: Sequence[VirtioDevice]) -> list[Peripheral]:
    """Slots for a program's own devices, behind those that are taken.

    Raises :class:`chv.errors.ConfigError` for a name that is taken and when there are too many.
    """
    names = [place.name for place in taken] + [device.name for device in devices]
    for device in devices:
        if names.count(device.name) > 1:
            raise ConfigError(f"devices: {device.name!r} is the name of two devices")
    free = [slot for slot in SLOTS if slot not in {place.slot for place in taken}]
    if len(devices) > len(free):
        raise ConfigError(f"devices: {len(names)} are too many; there are slots for {len(SLOTS)} in all")
    return [Peripheral(device, slot) for device, slot in zip(devices, free, strict=False)]


def _open(place: Place) -> VirtioDevice:
    # Each is imported when there is one: a VM without a network needs no netlink.
    if place.kind == "disk":
        from .virtio.block import Block

        return Block.open(place.config, place.field, place.name)
    if place.kind == "net":
        from .virtio.net import Net

        return Net.open(place.config, place.field, place.name)
    if place.kind == "rng":
        from .virtio.rng import Rng

        return Rng.open(place.config, place.field, place.name)
    from .virtio.console import Console

    return Console.open(place.config, place.field, place.name)
