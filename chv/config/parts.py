"""How each part of a VM's configuration is spelled as an option: one table.

The command line and the Python keyword arguments both read it. An option string becomes a plain
dict in the shape of the JSON body (:func:`from_text`), so that all three spellings meet in
:func:`chv.config.decode.decode`. Keys and values are Cloud Hypervisor's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from ..errors import ConfigError
from . import options

Convert = Callable[[str, str], Any]


class Key(NamedTuple):
    """One key of an option: the field it sets (dots go into a nested object) and how to read it."""

    field: str
    convert: Convert
    also: tuple[tuple[str, str], ...] = ()  # fields that using the key sets as well


class Part(NamedTuple):
    """One option: its field in VmConfig, its keys, the words that stand alone."""

    option: str
    field: str
    keys: Mapping[str, Key]
    many: bool = False  # the field is a list, the option may be repeated
    bare: str = ""  # the key that a text without any "=" sets
    words: Mapping[str, tuple[str, str]] = {}  # word -> (field, value); at most one of these is given


# -- values that only one option has -----------------------------------------------


def _topology(text: str, name: str) -> dict[str, int]:
    numbers = options.dequote(text).split(":")
    fields = ("threads_per_core", "cores_per_die", "dies_per_package", "packages")
    if len(numbers) != len(fields):
        raise ConfigError(f"{name}: {text!r} is not of the form {':'.join(fields)}")
    return {field: options.integer(number, name) for field, number in zip(fields, numbers, strict=True)}


def _features(text: str, name: str) -> dict[str, bool]:
    known = {"amx": "amx"}
    return {options.choice(word, name, known): True for word in options.string_list(text, name)}


def _pairs(key_field: str, value_field: str, value: Convert) -> Convert:
    def convert(text: str, name: str) -> list[dict[str, Any]]:
        return [
            {key_field: options.integer(first, name), value_field: value(second, name)}
            for first, second in options.tuple_list(text, name)
        ]

    return convert


def _one_of(**values: str) -> Convert:
    words = {word.replace("_", "-"): value for word, value in values.items()}

    def convert(text: str, name: str) -> str:
        return options.choice(text, name, words)

    return convert


# -- the table ---------------------------------------------------------------------


def _plain(convert: Convert, *fields: str) -> dict[str, Key]:
    return {field: Key(field, convert) for field in fields}


_TEXT, _INT, _SIZE, _TOGGLE = options.text_value, options.integer, options.size, options.toggle
_INTS, _TEXTS = options.integer_list, options.string_list
_PCI = {**_plain(_TEXT, "id"), **_plain(_TOGGLE, "iommu"), **_plain(_INT, "pci_segment", "pci_device_id")}
_RATE = {
    f"{prefix}_{key}": Key(f"rate_limiter_config.{bucket}.{key}", convert)
    for prefix, bucket, convert in (("bw", "bandwidth", _SIZE), ("ops", "ops", _INT))
    for key in ("size", "one_time_burst", "refill_time")
}
_VHOST_SOCKET = {"socket": Key("vhost_socket", _TEXT)}
_OUTPUT_WORDS = {word: ("mode", word.capitalize()) for word in ("off", "null", "pty", "tty")}
_OUTPUT_KEYS = {
    "file": Key("file", _TEXT, also=(("mode", "File"),)),
    "socket": Key("socket", _TEXT, also=(("mode", "Socket"),)),
}
_ZONE = {
    **_plain(_SIZE, "size", "hotplug_size", "hotplugged_size", "hugepage_size"),
    **_plain(_TOGGLE, "mergeable", "shared", "hugepages", "prefault", "reserve"),
}

PARTS: tuple[Part, ...] = (
    Part(
        "cpus",
        "cpus",
        {
            "boot": Key("boot_vcpus", _INT),
            "max": Key("max_vcpus", _INT),
            "topology": Key("topology", _topology),
            **_plain(_TOGGLE, "kvm_hyperv", "nested"),
            **_plain(_INT, "max_phys_bits"),
            "affinity": Key("affinity", _pairs("vcpu", "host_cpus", _INTS)),
            "features": Key("features", _features),
            "core_scheduling": Key("core_scheduling", _one_of(vm="Vm", vcpu="Vcpu", off="Off")),
            **_plain(_TEXT, "profile"),
        },
        bare="boot",
    ),
    Part(
        "memory",
        "memory",
        {
            **_ZONE,
            "hotplug_method": Key("hotplug_method", _one_of(acpi="Acpi", virtio_mem="VirtioMem")),
            **_plain(_TOGGLE, "thp"),
        },
        bare="size",
    ),
    Part(
        "memory-zone",
        "memory.zones",
        {**_plain(_TEXT, "id", "file"), **_ZONE, **_plain(_INT, "host_numa_node")},
        many=True,
    ),
    Part("rate-limit-group", "rate_limit_groups", {**_plain(_TEXT, "id"), **_RATE}, many=True),
    Part(
        "disk",
        "disks",
        {
            **_plain(_TEXT, "path"),
            **_plain(_TOGGLE, "readonly", "direct", "vhost_user", "backing_files", "sparse"),
            **_plain(_INT, "num_queues", "queue_size"),
            **_VHOST_SOCKET,
            **_RATE,
            **_PCI,
            **_plain(_TEXT, "rate_limit_group", "serial"),
            "queue_affinity": Key("queue_affinity", _pairs("queue_index", "host_cpus", _INTS)),
            "image_type": Key(
                "image_type", _one_of(raw="Raw", qcow2="Qcow2", vhd="FixedVhd", vhdx="Vhdx", vmdk="FlatVmdk")
            ),
            "lock_granularity": Key("lock_granularity", _one_of(byte_range="ByteRange", full="Full")),
            "_disable_io_uring": Key("disable_io_uring", _TOGGLE),
            "_disable_aio": Key("disable_aio", _TOGGLE),
        },
        many=True,
    ),
    Part(
        "net",
        "net",
        {
            **_plain(_TEXT, "tap", "ip", "mask", "mac", "host_mac"),
            **_plain(_INT, "mtu", "num_queues", "queue_size"),
            "fd": Key("fds", _INTS),
            **_plain(_TOGGLE, "vhost_user", "offload_tso", "offload_ufo", "offload_csum"),
            **_VHOST_SOCKET,
            "vhost_mode": Key("vhost_mode", _one_of(client="Client", server="Server")),
            **_RATE,
            **_PCI,
        },
        many=True,
    ),
    Part("rng", "rng", {**_plain(_TEXT, "src"), **_PCI}),
    Part(
        "balloon",
        "balloon",
        {**_plain(_SIZE, "size"), **_plain(_TOGGLE, "deflate_on_oom", "free_page_reporting"), **_PCI},
    ),
    Part(
        "fs",
        "fs",
        {**_plain(_TEXT, "tag", "socket"), **_plain(_INT, "num_queues", "queue_size"), **_PCI},
        many=True,
    ),
    Part(
        "generic-vhost-user",
        "generic_vhost_user",
        {**_plain(_INT, "device_type"), **_plain(_TEXT, "socket"), **_plain(_INTS, "queue_sizes"), **_PCI},
        many=True,
    ),
    Part(
        "pmem",
        "pmem",
        {**_plain(_TEXT, "file"), **_plain(_SIZE, "size"), **_plain(_TOGGLE, "discard_writes"), **_PCI},
        many=True,
    ),
    Part("serial", "serial", _OUTPUT_KEYS, words=_OUTPUT_WORDS),
    Part("console", "console", {**_OUTPUT_KEYS, **_PCI}, words=_OUTPUT_WORDS),
    Part(
        "debug-console",
        "debug_console",
        {"file": _OUTPUT_KEYS["file"], "iobase": Key("iobase", options.address)},
        words=_OUTPUT_WORDS,
    ),
    Part(
        "device",
        "devices",
        {
            **_plain(_TEXT, "path"),
            **_plain(_INT, "x_nv_gpudirect_clique"),
            **_plain(_INTS, "x_exclude_mmap_bars"),
            **_PCI,
        },
        many=True,
    ),
    Part("user-device", "user_devices", {**_plain(_TEXT, "socket"), **_PCI}, many=True),
    Part("vdpa", "vdpa", {**_plain(_TEXT, "path"), **_plain(_INT, "num_queues"), **_PCI}, many=True),
    Part("vsock", "vsock", {**_plain(_INT, "cid"), **_plain(_TEXT, "socket"), **_PCI}),
    Part(
        "numa",
        "numa",
        {
            **_plain(_INT, "guest_numa_id"),
            **_plain(_INTS, "cpus", "pci_segments"),
            "distances": Key("distances", _pairs("destination", "distance", _INT)),
            **_plain(_TEXTS, "memory_zones"),
            **_plain(_TEXT, "device_id"),
        },
        many=True,
    ),
    Part("rtc", "rtc", _PCI),
    Part(
        "pci-segment",
        "pci_segments",
        _plain(_INT, "pci_segment", "mmio32_aperture_weight", "mmio64_aperture_weight"),
        many=True,
    ),
    Part(
        "platform",
        "platform",
        {
            **_plain(_INT, "num_pci_segments", "iommu_address_width_bits"),
            "iommu_address_width": Key("iommu_address_width_bits", _INT),
            **_plain(_INTS, "iommu_segments"),
            **_plain(_TEXT, "serial_number", "system_serial_number", "uuid", "system_uuid"),
            **_plain(_TEXTS, "oem_strings"),
            **_plain(_TEXT, "system_manufacturer", "system_product_name", "system_version"),
            **_plain(_TEXT, "system_family", "system_sku_number", "chassis_asset_tag"),
            **_plain(_TOGGLE, "tdx", "sev_snp", "iommufd", "vfio_p2p_dma"),
        },
    ),
    Part("tpm", "tpm", _plain(_TEXT, "socket")),
    Part("landlock-rules", "landlock_rules", _plain(_TEXT, "path", "access"), many=True),
)

BY_OPTION: dict[str, Part] = {part.option: part for part in PARTS}
BY_FIELD: dict[str, Part] = {part.field: part for part in PARTS}
FLAGS: dict[str, str] = {  # options without a value -> the field that they set to true
    "pvpanic": "pvpanic",
    "watchdog": "watchdog",
    "landlock": "landlock_enable",
}


def from_text(part: Part, text: str, name: str = "") -> dict[str, Any]:
    """The JSON object that the option string ``text`` means; messages start with ``name``."""
    name = name or part.field
    if part.bare and text.strip() and not set(text) & {"=", ","}:
        text = f"{part.bare}={text}"
    raw = options.parse(text, name, list(part.keys), list(part.words))
    result: dict[str, Any] = {}
    ways = [key for key in raw if key in part.words or (part.keys[key].also and raw[key] is not None)]
    if len(ways) > 1:
        raise ConfigError(f"{name}: {' and '.join(ways)} exclude each other: give one of them")
    for key, value in raw.items():
        if key in part.words:
            field, word = part.words[key]
            result[field] = word
        elif value is not None:
            _put(result, part.keys[key], part.keys[key].convert(value, f"{name}.{key}"))
    return result


def from_mapping(part: Part, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with the option's short keys (``boot``) replaced by the JSON names (``boot_vcpus``)."""
    result: dict[str, Any] = {}
    for key, value in given.items():
        if not isinstance(key, str):
            raise ConfigError(f"{part.field}: the key {key!r} is not a string")
        known = part.keys.get(key)
        if known is None or (known.field == key and not isinstance(value, str)):
            _set(result, key, plain(value), part.field)
            continue
        if isinstance(value, str) and known.convert is not options.text_value:
            value = known.convert(value, f"{part.field}.{key}")
        _put(result, known, plain(value), part.field)
    return result


def from_python(part: Part, value: Any) -> Any:
    """What a keyword argument means in JSON: text, a mapping, a config object, or a list of these."""
    if part.many:
        if value is None:
            return None
        values = value if isinstance(value, (list, tuple)) else [value]
        return [_from_one(part, one, f"{part.field}[{index}]") for index, one in enumerate(values)]
    return _from_one(part, value, part.field)


def _from_one(part: Part, value: Any, name: str) -> Any:
    if isinstance(value, str):
        return from_text(part, value, name)
    if isinstance(value, Mapping):
        return from_mapping(part, value)
    if part.bare and isinstance(value, int) and not isinstance(value, bool):
        return {part.keys[part.bare].field: value}
    return plain(value)


def plain(value: Any) -> Any:
    """``value`` as plain dicts, lists, numbers and texts."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else value


def _put(target: dict[str, Any], key: Key, value: Any, name: str = "") -> None:
    """Set ``key``'s field in ``target``, making the objects around it."""
    *outer, last = key.field.split(".")
    for step in outer:
        target = target.setdefault(step, {})
    _set(target, last, value, name)
    for field, word in key.also:
        target.setdefault(field, word)


def _set(target: dict[str, Any], field: str, value: Any, name: str) -> None:
    if name and field in target and target[field] != value:
        raise ConfigError(f"{name}.{field}: given twice, as {target[field]!r} and {value!r}")
    target[field] = value
