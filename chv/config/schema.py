"""The one description of a VM: Cloud Hypervisor's ``VmConfig``, field for field.

Names, types and defaults are those of its REST API (OpenAPI file of August 2026), so a body
written for it decodes here. Sizes are bytes. Unknown fields are refused. ``payload.boot_entry`` is ours.

The annotations are objects, not text: msgspec would otherwise compile each of them again, which takes longer
than importing it.
"""

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta, field

from ..layout import MiB

U8 = Annotated[int, Meta(ge=0, le=0xFF)]
U16 = Annotated[int, Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
U64 = Annotated[int, Meta(ge=0, le=0x7FFF_FFFF_FFFF_FFFF)]  # msgspec bounds are signed; no size is larger

DEFAULT_MEMORY = 512 * MiB
DEFAULT_MAX_PHYS_BITS = 46
DEFAULT_RNG_SOURCE = "/dev/urandom"
SAME_AS_BOOT = -1  # stands for "not given": CpusConfig replaces it


class VmState(StrEnum):
    """Where a VM is in its life; the values are the REST API's."""

    CREATED = "Created"
    RUNNING = "Running"
    PAUSED = "Paused"
    SHUTDOWN = "Shutdown"


class ConsoleMode(StrEnum):
    OFF = "Off"
    PTY = "Pty"
    TTY = "Tty"
    FILE = "File"
    SOCKET = "Socket"
    NULL = "Null"


class HotplugMethod(StrEnum):
    ACPI = "Acpi"
    VIRTIO_MEM = "VirtioMem"


class CoreScheduling(StrEnum):
    VM = "Vm"
    VCPU = "Vcpu"
    OFF = "Off"


class VhostMode(StrEnum):
    CLIENT = "Client"
    SERVER = "Server"


class ImageType(StrEnum):
    UNKNOWN = "Unknown"
    RAW = "Raw"
    QCOW2 = "Qcow2"
    FIXED_VHD = "FixedVhd"
    VHDX = "Vhdx"
    FLAT_VMDK = "FlatVmdk"


class LockGranularity(StrEnum):
    BYTE_RANGE = "ByteRange"
    FULL = "Full"


class _Part(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of every part: unknown fields are refused (inherited; ``kw_only`` is not)."""


class CpuAffinity(_Part, kw_only=True):
    vcpu: U32
    host_cpus: list[U32]


class CpuFeatures(_Part, kw_only=True):
    amx: bool = False


class CpuTopology(_Part, kw_only=True):
    """The product of the four must be ``max_vcpus``; ``threads_per_core`` is 1 or 2."""

    threads_per_core: U16
    cores_per_die: U16
    dies_per_package: U16
    packages: U16


class CpusConfig(_Part, kw_only=True):
    """``boot_vcpus`` (1 or more) start with the guest; up to ``max_vcpus`` (1024 at most) can be added.

    Without ``max_vcpus`` it equals ``boot_vcpus``.
    """

    boot_vcpus: U32 = 1
    max_vcpus: U32 = SAME_AS_BOOT
    topology: CpuTopology | None = None
    kvm_hyperv: bool = False
    max_phys_bits: U8 = DEFAULT_MAX_PHYS_BITS
    affinity: list[CpuAffinity] | None = None
    features: CpuFeatures = field(default_factory=CpuFeatures)
    nested: bool = True
    core_scheduling: CoreScheduling = CoreScheduling.VM
    profile: str = "Host"

    def __post_init__(self) -> None:
        if self.max_vcpus == SAME_AS_BOOT:
            self.max_vcpus = self.boot_vcpus


class MemoryZoneConfig(_Part, kw_only=True):
    id: str
    size: U64
    file: str | None = None
    mergeable: bool = False
    shared: bool = False
    hugepages: bool = False
    hugepage_size: U64 | None = None
    host_numa_node: U32 | None = None
    hotplug_size: U64 | None = None
    hotplugged_size: U64 | None = None
    prefault: bool = False
    reserve: bool = False


class MemoryConfig(_Part, kw_only=True):
    """``size`` in bytes: a positive multiple of 4096."""

    size: U64 = DEFAULT_MEMORY
    mergeable: bool = False
    hotplug_method: HotplugMethod = HotplugMethod.ACPI
    hotplug_size: U64 | None = None
    hotplugged_size: U64 | None = None
    shared: bool = False
    hugepages: bool = False
    hugepage_size: U64 | None = None
    prefault: bool = False
    reserve: bool = False
    zones: list[MemoryZoneConfig] | None = None
    thp: bool = True


class PayloadConfig(_Part, kw_only=True):
    """What the guest starts with: ``kernel`` (with ``cmdline`` and ``initramfs``) or ``firmware``.

    With neither, the boot entry ``boot_entry`` of the first disk (its default one if that is None); then
    ``cmdline`` follows the entry's own options.
    """

    firmware: str | None = None
    kernel: str | None = None
    cmdline: str | None = None
    initramfs: str | None = None
    igvm: str | None = None
    host_data: str | None = None
    boot_entry: str | None = None
    fw_cfg_config: dict[str, object] | None = None


class TokenBucket(_Part, kw_only=True):
    size: U64
    refill_time: U64
    one_time_burst: U64 | None = None


class RateLimiterConfig(_Part, kw_only=True):
    bandwidth: TokenBucket | None = None
    ops: TokenBucket | None = None


class RateLimitGroupConfig(_Part, kw_only=True):
    id: str
    rate_limiter_config: RateLimiterConfig


class _PciPart(_Part, kw_only=True):
    """What every PCI device has."""

    id: str | None = None
    iommu: bool = False
    pci_segment: U16 = 0
    pci_device_id: U8 | None = None


class VirtQueueAffinity(_Part, kw_only=True):
    queue_index: U16
    host_cpus: list[U32]


class DiskConfig(_PciPart, kw_only=True):
    path: str | None = None
    readonly: bool = False
    direct: bool = False
    num_queues: U16 = 1
    queue_size: U16 = 128
    vhost_user: bool = False
    vhost_socket: str | None = None
    rate_limit_group: str | None = None
    rate_limiter_config: RateLimiterConfig | None = None
    disable_io_uring: bool = False
    disable_aio: bool = False
    serial: str | None = None
    queue_affinity: list[VirtQueueAffinity] | None = None
    backing_files: bool = False
    sparse: bool = True
    image_type: ImageType = ImageType.UNKNOWN
    lock_granularity: LockGranularity = LockGranularity.BYTE_RANGE


class NetConfig(_PciPart, kw_only=True):
    tap: str | None = None
    ip: str | None = None
    mask: str | None = None
    mac: str | None = None
    host_mac: str | None = None
    mtu: U16 | None = None
    num_queues: U16 = 2
    queue_size: U16 = 256
    vhost_user: bool = False
    vhost_socket: str | None = None
    vhost_mode: VhostMode = VhostMode.CLIENT
    fds: list[int] | None = None
    rate_limiter_config: RateLimiterConfig | None = None
    offload_tso: bool = True
    offload_ufo: bool = True
    offload_csum: bool = True


class RngConfig(_PciPart, kw_only=True):
    """The entropy source: a file or character device that virtio-rng reads."""

    src: str = DEFAULT_RNG_SOURCE


class RtcConfig(_PciPart, kw_only=True):
    pass


class BalloonConfig(_PciPart, kw_only=True):
    size: U64
    deflate_on_oom: bool = False
    free_page_reporting: bool = False


class FsConfig(_PciPart, kw_only=True):
    tag: str
    socket: str
    num_queues: U16 = 1
    queue_size: U16 = 1024


class GenericVhostUserConfig(_PciPart, kw_only=True):
    socket: str
    queue_sizes: list[U16]
    device_type: U32


class PmemConfig(_PciPart, kw_only=True):
    file: str
    size: U64 | None = None
    discard_writes: bool = False


class SerialConfig(_Part, kw_only=True):
    """The 16550 at 0x3f8. ``file`` goes with mode ``File``, ``socket`` with mode ``Socket``."""

    mode: ConsoleMode = ConsoleMode.NULL
    file: str | None = None
    socket: str | None = None


class ConsoleConfig(_PciPart, kw_only=True):
    """virtio-console, ``hvc0``. ``file`` goes with mode ``File``, ``socket`` with mode ``Socket``."""

    mode: ConsoleMode = ConsoleMode.TTY
    file: str | None = None
    socket: str | None = None


class DebugConsoleConfig(_Part, kw_only=True):
    mode: ConsoleMode = ConsoleMode.OFF
    file: str | None = None
    iobase: U16 | None = 0xE9


class DeviceConfig(_PciPart, kw_only=True):
    path: str | None = None
    x_nv_gpudirect_clique: U8 | None = None
    x_exclude_mmap_bars: list[U32] | None = None


class UserDeviceConfig(_PciPart, kw_only=True):
    socket: str


class VdpaConfig(_PciPart, kw_only=True):
    path: str
    num_queues: U16 = 1


class VsockConfig(_PciPart, kw_only=True):
    cid: U32
    socket: str


class NumaDistance(_Part, kw_only=True):
    destination: U32
    distance: U8


class NumaConfig(_Part, kw_only=True):
    guest_numa_id: U32
    cpus: list[U32] | None = None
    distances: list[NumaDistance] | None = None
    memory_zones: list[str] | None = None
    pci_segments: list[U16] | None = None
    device_id: str | None = None


class PciSegmentConfig(_Part, kw_only=True):
    pci_segment: U16
    mmio32_aperture_weight: U32 = 1
    mmio64_aperture_weight: U32 = 1


class PlatformConfig(_Part, kw_only=True):
    num_pci_segments: U16 = 1
    iommu_segments: list[U16] | None = None
    iommu_address_width_bits: U8 = 64
    serial_number: str | None = None  # the old name of system_serial_number
    system_serial_number: str | None = None
    uuid: str | None = None  # the old name of system_uuid
    system_uuid: str | None = None
    oem_strings: list[str] | None = None
    system_manufacturer: str | None = None
    system_product_name: str | None = None
    system_version: str | None = None
    system_family: str | None = None
    system_sku_number: str | None = None
    chassis_asset_tag: str | None = None
    tdx: bool = False
    sev_snp: bool = False
    iommufd: bool = False
    vfio_p2p_dma: bool = True


class TpmConfig(_Part, kw_only=True):
    socket: str


class LandlockConfig(_Part, kw_only=True):
    path: str
    access: str


class VmConfig(_Part, kw_only=True):
    """Everything about one VM. ``VmConfig()`` is what an empty request body means."""

    cpus: CpusConfig = field(default_factory=CpusConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    payload: PayloadConfig | None = None
    rate_limit_groups: list[RateLimitGroupConfig] | None = None
    disks: list[DiskConfig] | None = None
    net: list[NetConfig] | None = None
    rng: RngConfig = field(default_factory=RngConfig)
    balloon: BalloonConfig | None = None
    fs: list[FsConfig] | None = None
    generic_vhost_user: list[GenericVhostUserConfig] | None = None
    pmem: list[PmemConfig] | None = None
    serial: SerialConfig = field(default_factory=SerialConfig)
    console: ConsoleConfig = field(default_factory=ConsoleConfig)
    debug_console: DebugConsoleConfig = field(default_factory=DebugConsoleConfig)
    devices: list[DeviceConfig] | None = None
    user_devices: list[UserDeviceConfig] | None = None
    vdpa: list[VdpaConfig] | None = None
    vsock: VsockConfig | None = None
    pvpanic: bool = False
    iommu: bool = False
    numa: list[NumaConfig] | None = None
    watchdog: bool = False
    rtc: RtcConfig | None = None
    pci_segments: list[PciSegmentConfig] | None = None
    platform: PlatformConfig | None = None
    tpm: TpmConfig | None = None
    landlock_enable: bool = False
    landlock_rules: list[LandlockConfig] | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain values, as the REST API shows them (``vm.info``'s ``config``)."""
        plain: dict[str, object] = msgspec.to_builtins(self)
        return plain
