"""What the figures were taken on: CPU, kernel, what kind of KVM, versions, commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import chv
from tests.testbed import INSIDE

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str:
    """The checkout's commit, with ``+`` if files differ from it; empty outside of git."""
    named = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if named and _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"):
        named += "+"
    return named


def machine() -> dict[str, Any]:
    """Everything about this machine that a reader of the figures needs."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    cpu = {name.strip(): value.strip() for name, value in fields.items()}
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "kvm": kvm_kind(set(cpu.get("flags", "").split())),
        "testbed": INSIDE in os.environ,
        "python": platform.python_version(),
        "chv": chv.__version__,
        "qemu": qemu_version(),
    }


def kvm_kind(flags: set[str]) -> str:
    """How /dev/kvm runs guests: ``vmx``, ``svm``, ``emulated`` (it opens without either) or ``none``."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "none"
    return next((kind for kind in ("vmx", "svm") if kind in flags), "emulated")


def qemu_version() -> str | None:
    """QEMU's version, or None where it is not installed."""
    binary = shutil.which("qemu-system-x86_64")
    if binary is None:
        return None
    first = _output(binary, "--version").partition("\n")[0]
    return first.removeprefix("QEMU emulator version ") or None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
