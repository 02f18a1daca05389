"""Disks, network devices, the entropy device and the console: what is wrong with them is said in these words."""  # noqa: E501

from __future__ import annotations

from typing import Any

import pytest

from chv import ConfigError
from chv.config import make_config

# make_config's keywords beside a kernel -> the whole message
ROWS: list[tuple[dict[str, Any], str]] = [
    ({"disks": [{"path": None}]}, "disks[0].path: required, but missing"),
    ({"disks": "readonly=on"}, "disks[0].path: required, but missing"),
    ({"disks": "path=/a,queue_size=100"}, "disks[0].queue_size: 100 is not a power of two from 4 to 32768"),
    (
        {"disks": "path=/a,queue_size=65536"},
        "disks[0].queue_size: 65536 is more than the most allowed, 65535",
    ),
    ({"disks": "path=/a,queue_size=2"}, "disks[0].queue_size: 2 is not a power of two from 4 to 32768"),
    (
        {"disks": "path=/a,num_queues=0"},
        "disks[0].num_queues: 0 is not in 1..1: there are at most as many queues as cpus.boot_vcpus",
    ),
    (
        {"disks": "path=/a,num_queues=2"},
        "disks[0].num_queues: 2 is not in 1..1: there are at most as many queues as cpus.boot_vcpus",
    ),
    (
        {"disks": "path=/a,serial=012345678901234567890"},
        "disks[0].serial: 21 bytes long, at most 20 are possible",
    ),
    (
        {"disks": "path=/a,image_type=qcow2"},
        "disks[0].image_type: chv reads raw images, not Qcow2: convert it with `qemu-img convert -f qcow2 -O raw`",  # noqa: E501
    ),
    (
        {"disks": "path=/a,image_type=vhdx"},
        "disks[0].image_type: chv reads raw images, not Vhdx: convert it with `qemu-img convert -f vhdx -O raw`",  # noqa: E501
    ),
    (
        {"disks": "path=/a,vhost_user=on"},
        "disks[0].vhost_user: disks in another process (vhost-user): chv does not support this yet",
    ),
    (
        {"disks": "path=/a,bw_size=1M,bw_refill_time=100"},
        "disks[0].rate_limiter_config: rate limits: chv does not support this yet",
    ),
    (
        {"disks": "path=/a,backing_files=on"},
        "disks[0].backing_files: images that lie on others: chv does not support this yet",
    ),
    ({"disks": "path=/a,iommu=on"}, "disks[0].iommu: the virtual IOMMU: chv does not support this yet"),
    (
        {"disks": "path=/a,pci_segment=1"},
        "disks[0].pci_segment: 1: chv does not support further segments yet",
    ),
    ({"disks": "path=/a,pci_device_id=0"}, "disks[0].pci_device_id: 0 is not in 1..31"),
    ({"disks": "path=/a,pci_device_id=32"}, "disks[0].pci_device_id: 32 is not in 1..31"),
    (
        {"disks": ["path=/a,pci_device_id=3", "path=/b,pci_device_id=3"]},
        "disks[1].pci_device_id: slot 3 is that of disks[0] already",
    ),
    ({"disks": ["path=/a,id=x", "path=/b,id=x"]}, "disks[1].id: 'x' is the id of disks[0] already"),
    ({"disks": "path=/a,id=_x"}, "disks[0].id: '_x' is empty or starts with _, as generated ids do"),
    ({"disks": "path=/a,readonly=maybe"}, "disks[0].readonly: 'maybe' is neither on nor off"),
    (
        {"disks": "path=/a,lock_granularity=half"},
        "disks[0].lock_granularity: 'half' is not one of byte-range, full",
    ),
    (
        {"disks": "path=/a,rate_limit_group=g"},
        "disks[0].rate_limit_group: rate limits: chv does not support this yet",
    ),
    ({"net": "mac=xx"}, "net[0].mac: 'xx' is not a MAC address like 12:34:56:78:9a:bc"),
    (
        {"net": "mac=01:00:5e:00:00:01"},
        "net[0].mac: 01:00:5e:00:00:01 is a multicast address: the first byte must be even",
    ),
    ({"net": "mac=00:00:00:00:00:00"}, "net[0].mac: 00:00:00:00:00:00 is the address of nobody"),
    ({"net": "ip=1.2.3"}, "net[0].mask: required with net[0].ip, for example 255.255.255.0"),
    ({"net": "ip=192.168.0.1"}, "net[0].mask: required with net[0].ip, for example 255.255.255.0"),
    ({"net": "mask=255.255.255.0"}, "net[0].ip: required with net[0].mask, for example 192.168.249.1"),
    (
        {"net": "ip=192.168.0.1,mask=255.0.255.0"},
        "net[0].mask: 255.0.255.0 is not a netmask: its ones must come first",
    ),
    ({"net": "mtu=100"}, "net[0].mtu: 100 is not in 1280..65521"),
    ({"net": "num_queues=1"}, "net[0].num_queues: 1 is not an even number from 2 up"),
    ({"net": "num_queues=3"}, "net[0].num_queues: 3 is not an even number from 2 up"),
    ({"net": "num_queues=4"}, "net[0].num_queues: 2 pairs of queues are more than cpus.boot_vcpus (1)"),
    ({"net": "queue_size=100"}, "net[0].queue_size: 100 is not a power of two up to 32768"),
    (
        {"net": "tap=a_very_long_name_of_a_tap"},
        "net[0].tap: 'a_very_long_name_of_a_tap' is too long: an interface's name has at most 15 bytes",
    ),
    (
        {"net": "tap=a/b"},
        "net[0].tap: 'a/b' is no name of an interface: not empty, '.' or '..', and no '/', ':' or spaces",
    ),
    ({"net": "fd=[1],tap=x"}, "net[0].fds: give either tap or fds, not both"),
    ({"net": "fd=[1]"}, "net[0].fds[0]: 1 is standard input, output or error, not a tap"),
    ({"net": "vhost_user=on"}, "net[0].vhost_user: chv cannot do vhost-user devices yet; use tap or fd"),
    ({"net": "host_mac=zz"}, "net[0].host_mac: 'zz' is not a MAC address like 12:34:56:78:9a:bc"),
    ({"net": "iommu=on"}, "net[0].iommu: the virtual IOMMU: chv does not support this yet"),
    ({"net": "bw_size=1M,bw_refill_time=100"}, "net[0].rate_limiter_config: chv cannot do rate limits yet"),
    (
        {"net": "fd=[2000,2001]"},
        "net[0].fds: 2 descriptors for 1 pairs of queues (net[0].num_queues is 2); it must be one for each pair",  # noqa: E501
    ),
    ({"rng": {"src": ""}}, "rng.src: empty; it is the path of a source of random numbers: /dev/urandom"),
    ({"rng": "src=/dev/urandom,iommu=on"}, "rng.iommu: the virtual IOMMU: chv does not support this yet"),
    ({"console": {"mode": "Socket"}}, "console.socket: required with mode Socket, but missing"),
    ({"console": {"mode": "Null", "file": "/a"}}, "console.file: goes with mode File, not with mode Null"),
]


@pytest.mark.parametrize(("keywords", "message"), ROWS, ids=[str(keywords) for keywords, _ in ROWS])
def test_what_is_wrong_is_named(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(kernel="/k", **keywords)
    assert str(error.value) == message


# Without a kernel.
BOOT_ROWS: list[tuple[dict[str, Any], str]] = [
    (
        {"boot_entry": "x"},
        "payload.kernel: required, but missing: a VM needs something to boot, a kernel, a firmware or a disk",
    ),
    (
        {"disks": "path=/a", "initramfs": "/i"},
        "payload.initramfs: goes with a kernel; a disk that boots itself has its own",
    ),
    (
        {"disks": "path=/a", "kernel": "/k", "boot_entry": "x"},
        "payload.boot_entry: goes with a disk that boots itself, not with a kernel or firmware",
    ),
    ({"disks": "path=/a", "boot_entry": "a\0b"}, "payload.boot_entry: it contains a NUL character"),
]


@pytest.mark.parametrize(("keywords", "message"), BOOT_ROWS, ids=[str(keywords) for keywords, _ in BOOT_ROWS])
def test_what_is_wrong_with_what_boots_is_named(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(**keywords)
    assert str(error.value) == message


def test_more_devices_than_slots_are_refused() -> None:
    make_config(kernel="/k", console="off", disks=["path=/a"] * 30)
    with pytest.raises(ConfigError, match="there are slots for 31 in all"):
        make_config(kernel="/k", console="off", disks=["path=/a"] * 31)
