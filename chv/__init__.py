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

from .version import __version__

TYPE_CHECKING = False  # as typing has it; importing that takes longer than all of this package's front
if TYPE_CHECKING:
    from typing import Any

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

_IN_CONFIG = {"VmConfig", "VmState", "make_config"}
_IN_VM = {"VM", "VcpuState"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `chv --help` needs no machine."""
    if name not in __all__:
        raise AttributeError(f"module 'chv' has no attribute {name!r}")
    from importlib import import_module

    part = "config" if name in _IN_CONFIG else "vm" if name in _IN_VM else "errors"
    value = getattr(import_module(f".{part}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
