"""The PCI devices of a configuration: names, slots, and what can be checked without opening anything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from msgspec import Struct

from ..errors import ConfigError, NotSupportedYet
from .schema import ConsoleMode, VmConfig

SLOTS: Final = range(1, 32)  # 0 is the host bridge


class Place(Struct, frozen=True):
    """A device of the configuration: where it is described, what it is called, which slot it has."""

    kind: str  # "console", "disk", "net" or "rng"
    field: str  # in the configuration, for example "disks[0]"
    name: str  # its id, or one made like Cloud Hypervisor's: "_disk0", "__rng"
    slot: int
    config: Any


def places(config: VmConfig) -> list[Place]:
    """Every virtio device of ``config`` with its name and slot; the order is Cloud Hypervisor's.

    Slots that were asked for (``pci_device_id``) are kept, the others get the lowest free ones. Names
    without an id are numbered through all devices that have numbers.
    """
    wanted = list(_wanted(config))
    asked = {part.pci_device_id for _, _, part in wanted if part.pci_device_id is not None}
    free = iter([slot for slot in SLOTS if slot not in asked])
    found, number = [], 0
    for kind, field, part in wanted:
        name = part.id
        if kind in ("disk", "net"):
            name, number = name or f"_{kind}{number}", number + 1
        slot = part.pci_device_id if part.pci_device_id is not None else next(free, 0)
        found.append(Place(kind, field, name or f"__{kind}", slot, part))
    return found


def _wanted(config: VmConfig) -> Iterator[tuple[str, str, Any]]:
    if config.console.mode is not ConsoleMode.OFF:
        yield "console", "console", config.console
    for index, disk in enumerate(config.disks or ()):
        yield "disk", f"disks[{index}]", disk
    for index, net in enumerate(config.net or ()):
        yield "net", f"net[{index}]", net
    yield "rng", "rng", config.rng


def check_devices(config: VmConfig) -> None:
    """Raise :class:`ConfigError` or return."""
    found = places(config)
    if len(found) > len(SLOTS):
        last = found[-1]
        raise ConfigError(f"{last.field}: the {len(found)}th device; there are slots for {len(SLOTS)} in all")
    for place in found:
        _check_pci(place)
    _check_unique(found)
    boot = config.cpus.boot_vcpus
    for place in found:
        _check_one(place, boot)


def _check_pci(place: Place) -> None:
    part, field = place.config, place.field
    if part.iommu:
        raise NotSupportedYet(f"{field}.iommu: the virtual IOMMU: chv does not support this yet")
    if part.pci_segment:
        raise NotSupportedYet(
            f"{field}.pci_segment: {part.pci_segment}: chv does not support further segments yet"
        )
    slot = part.pci_device_id
    if slot is not None and slot not in SLOTS:
        raise ConfigError(f"{field}.pci_device_id: {slot} is not in {SLOTS[0]}..{SLOTS[-1]}")
    if part.id is not None and (not part.id or part.id.startswith("_")):
        raise ConfigError(f"{field}.id: {part.id!r} is empty or starts with _, as generated ids do")


def _check_unique(found: list[Place]) -> None:
    names: dict[str, str] = {}
    slots: dict[int, str] = {}
    for place in found:
        other = names.setdefault(place.name, place.field)
        if other != place.field:
            raise ConfigError(f"{place.field}.id: {place.name!r} is the id of {other} already")
        other = slots.setdefault(place.slot, place.field)
        if other != place.field:
            raise ConfigError(f"{place.field}.pci_device_id: slot {place.slot} is that of {other} already")


def _check_one(place: Place, boot_vcpus: int) -> None:
    # Each is imported when there is one: a VM without a network needs no netlink.
    if place.kind == "disk":
        from ..virtio.block import check as check_disk

        check_disk(place.config, place.field, boot_vcpus)
    elif place.kind == "net":
        from ..virtio.net import check as check_net

        check_net(place.config, place.field, boot_vcpus)
    elif place.kind == "rng" and not place.config.src:
        raise ConfigError(
            f"{place.field}.src: empty; it is the path of a source of random numbers: /dev/urandom"
        )
