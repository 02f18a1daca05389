"""How often a VM left the guest, as KVM itself counts: the same for every VMM (debugfs, for root only)."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

DEBUGFS = Path("/sys/kernel/debug")
COUNTERS = (
    "exits", "io_exits", "mmio_exits", "halt_exits", "irq_exits", "signal_exits", "irq_injections",
    "irq_window_exits", "request_irq_exits", "insn_emulation", "host_state_reload", "hypercalls", "pf_taken",
)  # fmt: skip


def available() -> bool:
    """Whether KVM's counters can be read; the testbed's debugfs is mounted if need be."""
    if (DEBUGFS / "kvm").is_dir():
        return True
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            subprocess.run(["mount", "-t", "debugfs", "debugfs", DEBUGFS], capture_output=True, check=False)
    return (DEBUGFS / "kvm").is_dir()


def of(pid: int) -> dict[str, int]:
    """The counters of a process's VM so far; empty if they cannot be read."""
    found: dict[str, int] = {}
    for folder in (DEBUGFS / "kvm").glob(f"{pid}-*"):
        for name in COUNTERS:
            with contextlib.suppress(OSError, ValueError):
                found[name] = found.get(name, 0) + int((folder / name).read_text())
    return found
