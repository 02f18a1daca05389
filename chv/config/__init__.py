"""A VM's configuration: the schema, its three spellings, its rules."""

from __future__ import annotations

from .decode import decode, decode_json
from .make import make_config
from .schema import (
    BalloonConfig,
    ConsoleConfig,
    ConsoleMode,
    CpusConfig,
    CpuTopology,
    DiskConfig,
    FsConfig,
    MemoryConfig,
    NetConfig,
    PayloadConfig,
    RngConfig,
    SerialConfig,
    VmConfig,
    VmState,
    VsockConfig,
)
from .validate import MAX_VCPUS, check_memory_size, validate

__all__ = [
    "MAX_VCPUS",
    "BalloonConfig",
    "ConsoleConfig",
    "ConsoleMode",
    "CpuTopology",
    "CpusConfig",
    "DiskConfig",
    "FsConfig",
    "MemoryConfig",
    "NetConfig",
    "PayloadConfig",
    "RngConfig",
    "SerialConfig",
    "VmConfig",
    "VmState",
    "VsockConfig",
    "check_memory_size",
    "decode",
    "decode_json",
    "make_config",
    "validate",
]
