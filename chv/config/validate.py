"""Rules between fields, and what chv has not built yet.

Run when a VM is built: for a REST client at ``vm.boot``, on the command line and in Python at once.
The rules are Cloud Hypervisor's (``VmConfig::validate``); the words are ours.
"""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError, NotSupportedYet
from ..layout import CMDLINE_MAX, PAGE_SIZE, RAM_32BIT_END, RAM_64BIT
from .devices import check_devices
from .schema import ConsoleMode, CpusConfig, MemoryConfig, PayloadConfig, PlatformConfig, VmConfig

MAX_VCPUS = 1024  # what KVM offers at most on x86-64 by default
MIN_PHYS_BITS = 36  # an x86-64 processor has at least 36 physical address bits
MAX_PHYS_BITS = 52  # and at most 52 (Intel SDM volume 3, section 4.1.4)

# Fields that chv knows and has not built: refused unless they have their default (or are empty).
NOT_BUILT: dict[str, str] = {
    "payload.igvm": "booting an IGVM file",
    "payload.host_data": "host data for confidential VMs",
    "payload.fw_cfg_config": "fw_cfg",
    "cpus.kvm_hyperv": "Hyper-V emulation",
    "cpus.affinity": "pinning vCPUs",
    "cpus.features": "AMX",
    "cpus.nested": "hiding nested virtualization",
    "cpus.core_scheduling": "core scheduling other than Vm",
    "cpus.profile": "CPU profiles other than Host",
    "memory.mergeable": "merging equal pages",
    "memory.hotplug_method": "virtio-mem",
    "memory.hotplug_size": "memory hotplug",
    "memory.hotplugged_size": "memory hotplug",
    "memory.shared": "shared guest memory",
    "memory.hugepages": "huge pages",
    "memory.hugepage_size": "huge pages",
    "memory.prefault": "prefaulting guest memory",
    "memory.reserve": "reserving guest memory",
    "memory.zones": "memory zones",
    "rate_limit_groups": "rate limits",
    "balloon": "the balloon",
    "fs": "virtio-fs",
    "generic_vhost_user": "vhost-user devices",
    "pmem": "persistent memory",
    "debug_console": "the debug console",
    "devices": "VFIO devices",
    "user_devices": "vfio-user devices",
    "vdpa": "vDPA devices",
    "vsock": "vsock",
    "pvpanic": "pvpanic",
    "iommu": "the virtual IOMMU",
    "numa": "NUMA nodes",
    "watchdog": "the watchdog",
    "rtc": "the virtio RTC",
    "pci_segments": "PCI segments",
    "platform": "platform settings",
    "tpm": "the TPM",
    "landlock_enable": "Landlock",
    "landlock_rules": "Landlock",
}


def validate(config: VmConfig) -> None:
    """Raise :class:`ConfigError` (:class:`NotSupportedYet` for what is not built) or return."""
    _check_cpus(config.cpus)
    _check_memory(config.memory, config.cpus.max_phys_bits)
    _check_payload(config)
    _check_outputs(config)
    _check_built(config)
    check_devices(config)


def _check_cpus(cpus: CpusConfig) -> None:
    boot, most = cpus.boot_vcpus, cpus.max_vcpus
    if boot < 1:
        raise ConfigError(f"cpus.boot_vcpus: {boot} is not in 1..{MAX_VCPUS}")
    if not 1 <= most <= MAX_VCPUS:
        raise ConfigError(f"cpus.max_vcpus: {most} is not in 1..{MAX_VCPUS}")
    if most < boot:
        raise ConfigError(f"cpus.max_vcpus: {most} is less than cpus.boot_vcpus ({boot})")
    if not MIN_PHYS_BITS <= cpus.max_phys_bits <= MAX_PHYS_BITS:
        raise ConfigError(
            f"cpus.max_phys_bits: {cpus.max_phys_bits} is not in {MIN_PHYS_BITS}..{MAX_PHYS_BITS}"
        )
    _check_topology(cpus)


def _check_topology(cpus: CpusConfig) -> None:
    topology = cpus.topology
    if topology is None:
        return
    product = 1
    for field in topology.__struct_fields__:
        count = getattr(topology, field)
        if count < 1:
            raise ConfigError(f"cpus.topology.{field}: {count} is not at least 1")
        product *= count
    if topology.threads_per_core > 2:
        raise ConfigError(f"cpus.topology.threads_per_core: {topology.threads_per_core} is not 1 or 2")
    if product != cpus.max_vcpus:
        raise ConfigError(
            f"cpus.topology: it makes {product} vCPUs, not {cpus.max_vcpus} as cpus.max_vcpus says"
        )


def _check_memory(memory: MemoryConfig, phys_bits: int) -> None:
    check_memory_size(memory.size, "memory.size")
    hole = RAM_64BIT - RAM_32BIT_END
    limit = (1 << phys_bits) - hole
    if memory.size > limit:
        raise ConfigError(
            f"memory.size: {memory.size} is more than {limit}, what fits in {phys_bits} address bits "
            "(cpus.max_phys_bits)"
        )


def check_memory_size(size: int, name: str) -> None:
    """``size`` must be a positive multiple of 4096 bytes."""
    if size <= 0 or size % PAGE_SIZE:
        raise ConfigError(f"{name}: {size} is not a positive multiple of {PAGE_SIZE} bytes")


def _check_payload(config: VmConfig) -> None:
    payload = config.payload or PayloadConfig()
    if payload.kernel and payload.firmware:
        raise ConfigError("payload.firmware: give either a kernel or a firmware, not both")
    if not (payload.kernel or payload.firmware or payload.igvm):
        _check_image_boot(config, payload)
    elif payload.boot_entry is not None:
        raise ConfigError(
            "payload.boot_entry: goes with a disk that boots itself, not with a kernel or firmware"
        )
    for field in ("kernel", "initramfs", "firmware", "cmdline", "boot_entry"):
        if "\0" in (getattr(payload, field) or ""):
            raise ConfigError(f"payload.{field}: it contains a NUL character")
    length = len((payload.cmdline or "").encode(errors="surrogateescape"))
    if length >= CMDLINE_MAX:
        raise ConfigError(f"payload.cmdline: {length} bytes long, at most {CMDLINE_MAX - 1} are possible")


def _check_image_boot(config: VmConfig, payload: PayloadConfig) -> None:
    if not config.disks:
        raise ConfigError(
            "payload.kernel: required, but missing: a VM needs something to boot, "
            "a kernel, a firmware or a disk"
        )
    if payload.initramfs:
        raise ConfigError("payload.initramfs: goes with a kernel; a disk that boots itself has its own")


def _check_outputs(config: VmConfig) -> None:
    for name, output in (("serial", config.serial), ("console", config.console)):
        mode = output.mode
        for field, needs in (("file", ConsoleMode.FILE), ("socket", ConsoleMode.SOCKET)):
            value = getattr(output, field)
            if mode == needs and not value:
                raise ConfigError(f"{name}.{field}: required with mode {mode.value}, but missing")
            shows_its_path = field == "file" and mode == ConsoleMode.PTY  # a booted VM's info has it there
            if mode != needs and value and not shows_its_path:
                raise ConfigError(f"{name}.{field}: goes with mode {needs.value}, not with mode {mode.value}")
    if config.serial.mode == config.console.mode == ConsoleMode.TTY:
        raise ConfigError(
            "console.mode: Tty (its default) is taken by serial.mode: "
            "only one of them can have the terminal; allowed beside it are Off, Null, Pty, File and Socket"
        )


def _check_built(config: VmConfig) -> None:
    default = VmConfig(payload=PayloadConfig())
    for path, what in NOT_BUILT.items():
        value, usual = _at(config, path), _at(default, path)
        if value != usual and not _empty(value):
            raise NotSupportedYet(f"{path}: {what}: chv does not support this yet")


def _at(config: VmConfig, path: str) -> Any:
    value: Any = config
    for step in path.split("."):
        value = None if value is None else getattr(value, step)
    return value


def _empty(value: Any) -> bool:
    """Whether ``value`` asks for nothing: null, 0, an empty list; False counts only as a default."""
    return value is None or value in ([], "", PlatformConfig()) or (value == 0 and value is not False)
