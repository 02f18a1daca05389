"""The configuration: three spellings of one thing, defaults, rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chv import cli
from chv.config import (
    MAX_VCPUS,
    ConsoleMode,
    CpusConfig,
    MemoryConfig,
    PayloadConfig,
    VmConfig,
    decode,
    decode_json,
    make_config,
    validate,
)
from chv.config.decode import type_at
from chv.config.make import to_json_shape
from chv.config.parts import BY_OPTION, FLAGS, PARTS, from_text
from chv.config.validate import NOT_BUILT
from chv.errors import ConfigError, NotSupportedYet

KERNEL = {"payload": {"kernel": "/k"}}

# option, its text, the JSON it means, and the same as a Python argument
SPELLINGS: list[tuple[str, str, Any, Any]] = [
    ("cpus", "boot=1", {"boot_vcpus": 1, "max_vcpus": 1}, 1),
    ("cpus", "4", {"boot_vcpus": 4}, {"boot": 4}),
    ("cpus", "boot=4,max=8", {"boot_vcpus": 4, "max_vcpus": 8}, {"boot": 4, "max": 8}),
    ("cpus", "boot=4,max=8", {"boot_vcpus": 4, "max_vcpus": 8}, CpusConfig(boot_vcpus=4, max_vcpus=8)),
    ("cpus", "max=8", {"max_vcpus": 8}, "max=8"),
    (
        "cpus",
        "boot=4,topology=2:2:1:1",
        {
            "boot_vcpus": 4,
            "topology": {"threads_per_core": 2, "cores_per_die": 2, "dies_per_package": 1, "packages": 1},
        },
        {"boot": 4, "topology": "2:2:1:1"},
    ),
    (
        "cpus",
        "boot=2,affinity=[0@[0,2-3],1@[1]],features=[amx],nested=off,kvm_hyperv=on,core_scheduling=vcpu",
        {
            "boot_vcpus": 2,
            "affinity": [{"vcpu": 0, "host_cpus": [0, 2, 3]}, {"vcpu": 1, "host_cpus": [1]}],
            "features": {"amx": True},
            "nested": False,
            "kvm_hyperv": True,
            "core_scheduling": "Vcpu",
        },
        {
            "boot": 2,
            "affinity": "[0@[0,2-3],1@[1]]",
            "features": "[amx]",
            "nested": False,
            "kvm_hyperv": True,
            "core_scheduling": "vcpu",
        },
    ),
    ("memory", "size=1024M", {"size": 1 << 30}, "1G"),
    ("memory", "1G", {"size": 1 << 30}, 1 << 30),
    (
        "memory",
        "size=1G,mergeable=on",
        {"size": 1 << 30, "mergeable": True},
        {"size": "1G", "mergeable": True},
    ),
    (
        "memory",
        "size=1G,hotplug_method=virtio-mem,hotplug_size=8G,thp=off,hugepages=on,hugepage_size=2M,shared=on",
        {
            "size": 1 << 30,
            "hotplug_method": "VirtioMem",
            "hotplug_size": 8 << 30,
            "thp": False,
            "hugepages": True,
            "hugepage_size": 2 << 20,
            "shared": True,
        },
        "size=1G,hotplug_method=virtio-mem,hotplug_size=8G,thp=false,hugepages=true,hugepage_size=2048K,shared=on",
    ),
    ("rng", "src=/dev/hwrng", {"src": "/dev/hwrng"}, {"src": Path("/dev/hwrng")}),
    ("rng", "", {}, {}),
    ("serial", "tty", {"mode": "Tty"}, {"mode": "Tty"}),
    ("serial", "file=/tmp/log", {"mode": "File", "file": "/tmp/log"}, {"file": "/tmp/log"}),
    ("serial", "socket=/tmp/s", {"mode": "Socket", "socket": "/tmp/s"}, "socket=/tmp/s"),
    ("console", "pty,iommu=on", {"mode": "Pty", "iommu": True}, {"mode": "Pty", "iommu": True}),
    ("debug-console", "file=/tmp/d,iobase=0x402", {"mode": "File", "file": "/tmp/d", "iobase": 0x402}, None),
    (
        "balloon",
        "size=1G,deflate_on_oom=on",
        {"size": 1 << 30, "deflate_on_oom": True},
        {"size": "1G", "deflate_on_oom": True},
    ),
    ("vsock", "cid=3,socket=/tmp/v", {"cid": 3, "socket": "/tmp/v"}, {"cid": 3, "socket": "/tmp/v"}),
    ("tpm", "socket=/tmp/t", {"socket": "/tmp/t"}, {"socket": "/tmp/t"}),
    (
        "platform",
        "num_pci_segments=2,iommu_segments=[1],oem_strings=[a,b],system_uuid=u",
        {"num_pci_segments": 2, "iommu_segments": [1], "oem_strings": ["a", "b"], "system_uuid": "u"},
        {"num_pci_segments": 2, "iommu_segments": [1], "oem_strings": ["a", "b"], "system_uuid": "u"},
    ),
]
LISTS: list[tuple[str, list[str], list[Any], Any]] = [
    ("disk", ["path=/a", "path=/b,readonly=on"], [{"path": "/a"}, {"path": "/b", "readonly": True}], None),
    (
        "disk",
        ["path=/a,bw_size=1M,bw_refill_time=100,queue_affinity=[0@[1-2]],image_type=qcow2,socket=/s"],
        [
            {
                "path": "/a",
                "rate_limiter_config": {"bandwidth": {"size": 1 << 20, "refill_time": 100}},
                "queue_affinity": [{"queue_index": 0, "host_cpus": [1, 2]}],
                "image_type": "Qcow2",
                "vhost_socket": "/s",
            }
        ],
        "path=/a,bw_size=1M,bw_refill_time=100,queue_affinity=[0@[1-2]],image_type=qcow2,socket=/s",
    ),
    ("net", ["tap=,mac=,ip=,mask="], [{}], {}),
    (
        "net",
        ["tap=t0,fd=[3,4],num_queues=4,vhost_mode=server,offload_tso=off"],
        [{"tap": "t0", "fds": [3, 4], "num_queues": 4, "vhost_mode": "Server", "offload_tso": False}],
        {"tap": "t0", "fd": [3, 4], "num_queues": 4, "vhost_mode": "server", "offload_tso": False},
    ),
    ("fs", ["tag=t,socket=/s"], [{"tag": "t", "socket": "/s"}], [{"tag": "t", "socket": "/s"}]),
    ("pmem", ["file=/p,size=1G"], [{"file": "/p", "size": 1 << 30}], {"file": "/p", "size": "1G"}),
    ("device", ["path=/d,iommu=on"], [{"path": "/d", "iommu": True}], {"path": "/d", "iommu": True}),
    ("vdpa", ["path=/d"], [{"path": "/d"}], {"path": "/d"}),
    (
        "numa",
        ["guest_numa_id=0,cpus=[0-1,4],distances=[1@20],memory_zones=[m0]"],
        [
            {
                "guest_numa_id": 0,
                "cpus": [0, 1, 4],
                "distances": [{"destination": 1, "distance": 20}],
                "memory_zones": ["m0"],
            }
        ],
        "guest_numa_id=0,cpus=[0-1,4],distances=[1@20],memory_zones=[m0]",
    ),
    (
        "generic-vhost-user",
        ["device_type=26,socket=/s,queue_sizes=[64,64]"],
        [{"device_type": 26, "socket": "/s", "queue_sizes": [64, 64]}],
        {"device_type": 26, "socket": "/s", "queue_sizes": [64, 64]},
    ),
    (
        "landlock-rules",
        ["path=/a,access=rw"],
        [{"path": "/a", "access": "rw"}],
        {"path": "/a", "access": "rw"},
    ),
    ("pci-segment", ["pci_segment=1"], [{"pci_segment": 1}], {"pci_segment": 1}),
]


@pytest.mark.parametrize(("option", "text", "plain", "argument"), SPELLINGS)
def test_option_json_and_python_mean_the_same(option: str, text: str, plain: Any, argument: Any) -> None:
    field = BY_OPTION[option].field
    from_json = decode_json(json.dumps({**KERNEL, field: plain}))
    assert decode({**KERNEL, field: from_text(BY_OPTION[option], text)}) == from_json
    assert decode(to_json_shape({"kernel": "/k", field: text})) == from_json
    if argument is not None:
        assert decode(to_json_shape({"kernel": "/k", field: argument})) == from_json


@pytest.mark.parametrize(("option", "texts", "plain", "argument"), LISTS)
def test_list_options_json_and_python_mean_the_same(
    option: str, texts: list[str], plain: list[Any], argument: Any
) -> None:
    part = BY_OPTION[option]
    from_json = decode_json(json.dumps({**KERNEL, part.field: plain}))
    assert decode({**KERNEL, part.field: [from_text(part, text) for text in texts]}) == from_json
    assert decode(to_json_shape({"kernel": "/k", part.field: texts})) == from_json
    if argument is not None:
        assert decode(to_json_shape({"kernel": "/k", part.field: argument})) == from_json


def test_the_whole_command_line_is_the_whole_body_is_the_whole_call() -> None:
    words = ["--kernel", "vmlinuz", "--initramfs", "initrd", "--cmdline", "console=ttyS0"]
    words += ["--cpus", "boot=4,max=8", "--memory", "size=1024M"]
    words += ["--serial", "tty", "--console", "off", "--rng"]
    from_options = cli.read_config(cli.build_parser().parse_args(words))
    body = {
        "cpus": {"boot_vcpus": 4, "max_vcpus": 8},
        "memory": {"size": 1073741824},
        "payload": {"kernel": "vmlinuz", "initramfs": "initrd", "cmdline": "console=ttyS0"},
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
        "rng": {"src": "/dev/urandom"},
    }
    assert from_options == decode_json(json.dumps(body))
    assert from_options == make_config(
        kernel=Path("vmlinuz"),
        initramfs="initrd",
        cmdline="console=ttyS0",
        cpus={"boot": 4, "max": 8},
        memory="1G",
        serial="tty",
        console="off",
    )


@given(st.integers(1, MAX_VCPUS), st.integers(0, MAX_VCPUS), st.integers(1, 1 << 20))
def test_numbers_mean_the_same_in_all_spellings(boot: int, more: int, pages: int) -> None:
    top = min(boot + more, MAX_VCPUS)
    texts = ["--kernel", "/k", "--cpus", f"boot={boot},max={top}", "--memory", f"size={pages * 4}K"]
    body = {**KERNEL, "cpus": {"boot_vcpus": boot, "max_vcpus": top}, "memory": {"size": pages * 4096}}
    config = decode_json(json.dumps(body))
    assert cli.read_config(cli.build_parser().parse_args(texts)) == config
    assert make_config(kernel="/k", cpus={"boot": boot, "max": top}, memory=pages * 4096) == config


def test_an_empty_body_is_all_defaults() -> None:
    config = decode_json("{}")
    assert config == VmConfig()
    assert (config.cpus.boot_vcpus, config.cpus.max_vcpus, config.memory.size) == (1, 1, 512 << 20)
    assert config.serial.mode is ConsoleMode.NULL
    assert config.console.mode is ConsoleMode.TTY
    assert config.rng.src == "/dev/urandom"


def test_a_config_survives_json() -> None:
    config = make_config(kernel="/k", cpus="boot=2,max=4", memory="1G", serial="file=/tmp/x")
    assert decode_json(msgspec.json.encode(config)) == config
    assert decode(config.to_dict()) == config


def test_every_option_key_sets_a_field_that_exists() -> None:
    for part in PARTS:
        for key in part.keys.values():
            path = f"{part.field}[0].{key.field}" if part.many else f"{part.field}.{key.field}"
            assert type_at(VmConfig, path) is not None, path


def test_every_field_is_an_option_or_known_not_to_be() -> None:
    reachable = {part.field.partition(".")[0] for part in PARTS} | set(cli.PAYLOAD) | {"payload"}
    reachable |= set(FLAGS.values())
    # the virtual IOMMU is switched on by a device's iommu=on
    assert set(VmConfig.__struct_fields__) - reachable == {"iommu"}


# -- the old spelling -----------------------------------------------------------------


def test_the_spelling_of_v0_5_0() -> None:
    old = {
        "cpus": {"boot_vcpus": 4, "max_vcpus": 8},
        "memory": {"size": 1 << 30, "file": None, "mergeable": False, "hotplug_size": None},
        "kernel": {"path": "/k"},
        "cmdline": {"args": "console=ttyS0"},
        "disks": None,
        "serial": {"file": None, "mode": "Null", "iommu": False},
        "vhost_user_net": None,
    }
    assert decode(old) == make_config(kernel="/k", cmdline="console=ttyS0", cpus="boot=4,max=8", memory="1G")
    assert decode({**old, **KERNEL}).payload == PayloadConfig(kernel="/k", cmdline="console=ttyS0")
    assert old["kernel"] == {"path": "/k"}, "the caller's body is left alone"


def test_python_takes_a_payload_and_keywords_that_agree() -> None:
    assert make_config(payload=PayloadConfig(kernel="/k"), kernel="/k", cmdline="a").payload == PayloadConfig(
        kernel="/k", cmdline="a"
    )


# -- rules ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 254, 255, 256, MAX_VCPUS])
def test_any_count_up_to_the_maximum(count: int) -> None:
    assert make_config(kernel="/k", cpus=count).cpus.max_vcpus == count


@given(st.integers(0, 3), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3), st.integers(1, 64))
def test_topology_is_accepted_exactly_if_it_makes_the_maximum(
    threads: int, cores: int, dies: int, packages: int, most: int
) -> None:
    fine = threads in (1, 2) and threads * cores * dies * packages == most
    arguments = {"kernel": "/k", "cpus": f"max={most},topology={threads}:{cores}:{dies}:{packages}"}
    if fine:
        assert make_config(**arguments).cpus.max_vcpus == most
    else:
        with pytest.raises(ConfigError, match=r"^cpus\.topology"):
            make_config(**arguments)


@pytest.mark.parametrize("path", [path for path in NOT_BUILT if "." not in path])
def test_what_is_not_built_is_named(path: str) -> None:
    minimal: dict[str, Any] = {
        "rate_limit_groups": [{"id": "a", "rate_limiter_config": {}}],
        "disks": [{}],
        "net": [{}],
        "rng": {"src": "/dev/hwrng"},
        "balloon": {"size": 4096},
        "fs": [{"tag": "t", "socket": "s"}],
        "generic_vhost_user": [{"socket": "s", "queue_sizes": [1], "device_type": 1}],
        "pmem": [{"file": "f"}],
        "debug_console": {"mode": "Null"},
        "devices": [{"path": "p"}],
        "user_devices": [{"socket": "s"}],
        "vdpa": [{"path": "p"}],
        "vsock": {"cid": 3, "socket": "s"},
        "numa": [{"guest_numa_id": 0}],
        "rtc": {},
        "pci_segments": [{"pci_segment": 0}],
        "platform": {"num_pci_segments": 2},
        "tpm": {"socket": "s"},
        "landlock_rules": [{"path": "p", "access": "r"}],
    }
    config = decode({**KERNEL, path: minimal.get(path, True)})
    with pytest.raises(NotSupportedYet, match=rf"^{path}: .* chv does not support this yet$"):
        validate(config)


def test_defaults_and_empty_lists_of_what_is_not_built_are_fine() -> None:
    body = {
        **KERNEL,
        "disks": [],
        "net": [],
        "numa": [],
        "platform": {"num_pci_segments": 1, "vfio_p2p_dma": True},
        "memory": {"size": 4096, "hotplug_size": 0, "hotplug_method": "Acpi", "thp": True},
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "nested": True, "features": {"amx": False}, "affinity": []},
        "rng": {"src": "/dev/urandom"},
        "console": {"mode": "Null"},
        "debug_console": {"mode": "Off", "iobase": 233},
        "landlock_enable": False,
    }
    validate(decode(body))


def test_a_pty_may_carry_the_path_that_info_showed() -> None:
    validate(decode({**KERNEL, "serial": {"mode": "Pty", "file": "/dev/pts/3"}}))


def test_parts_can_be_built_directly() -> None:
    config = VmConfig(
        payload=PayloadConfig(kernel="/k"), cpus=CpusConfig(boot_vcpus=4), memory=MemoryConfig(size=1 << 21)
    )
    validate(config)
    assert config.cpus.max_vcpus == 4
