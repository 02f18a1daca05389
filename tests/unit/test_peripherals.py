"""Which device has which name and slot, and devices of a program's own."""

from __future__ import annotations

from typing import Any

import pytest

from chv import VM, ConfigError
from chv.config import make_config
from chv.config.devices import places
from chv.peripherals import plug

from .pci_machine import Echo


def found(**parts: Any) -> list[tuple[str, int]]:
    return [(place.name, place.slot) for place in places(make_config(kernel="/k", **parts))]


def test_the_order_and_the_names_are_cloud_hypervisors() -> None:
    assert found(disks=["path=/a", "path=/b"], net="tap=") == [
        ("__console", 1),
        ("_disk0", 2),
        ("_disk1", 3),
        ("_net2", 4),
        ("__rng", 5),
    ]


def test_slots_that_are_asked_for_are_kept_and_others_go_around_them() -> None:
    assert found(
        console="off", disks=["path=/a", "path=/b,pci_device_id=1,id=boot"], rng="pci_device_id=31"
    ) == [
        ("_disk0", 2),
        ("boot", 1),
        ("__rng", 31),
    ]


def test_a_programs_own_devices_come_behind() -> None:
    taken = places(make_config(kernel="/k", console="off"))
    (peripheral,) = plug(taken, [Echo()])
    assert (peripheral.slot, peripheral.bdf) == (2, "0000:00:02.0")
    with pytest.raises(ConfigError, match="'echo' is the name of two devices"):
        plug(taken, [Echo(), Echo()])
    with pytest.raises(ConfigError, match="there are slots for 31"):
        plug(taken, [named(f"echo{number}") for number in range(31)])


def named(name: str) -> Echo:
    device = Echo()
    device.name = name
    return device


def test_a_vm_refuses_a_device_whose_name_is_taken() -> None:
    with VM(kernel="/k") as vm:
        vm.add_device(Echo())
        with pytest.raises(ConfigError, match="'echo' is the name of two devices"):
            vm.add_device(Echo())
        with pytest.raises(ConfigError, match="'__rng' is the name of two devices"):
            vm.add_device(named("__rng"))
