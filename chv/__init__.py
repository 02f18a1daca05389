"""Run virtual machines on KVM from Python.

``chv`` is Cloud Hypervisor's machine as a library::

    import chv

    with chv.VM(kernel="vmlinuz", initramfs="initrd", cmdline="console=ttyS0",
                cpus=dict(boot=4, max=8), memory="1G", serial="tty") as vm:
        vm.boot()
        vm.resize(desired_vcpus=8)
        vm.wait()
"""

from __future__ import annotations

from .config import VmConfig, VmState, make_config
from .errors import (
    BusError,
    ConfigError,
    DeviceError,
    Error,
    GuestCrash,
    GuestMemoryError,
    ImageError,
    KvmError,
    NotCreated,
    NotSupportedYet,
    ResizeError,
    ResizePending,
    StateError,
)
from .vm import VM, VcpuState

__version__ = "0.1.0"

__all__ = [
    "VM",
    "BusError",
    "ConfigError",
    "DeviceError",
    "Error",
    "GuestCrash",
    "GuestMemoryError",
    "ImageError",
    "KvmError",
    "NotCreated",
    "NotSupportedYet",
    "ResizeError",
    "ResizePending",
    "StateError",
    "VcpuState",
    "VmConfig",
    "VmState",
    "__version__",
    "make_config",
]
