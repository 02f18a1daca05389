"""A machine in which /dev/kvm runs Linux guests, for hosts where it does not.

``python -m tests.testbed -- COMMAND...`` runs a command in it: QEMU without KVM
emulates a CPU with AMD's SVM, Debian's kernel inside loads its kvm-amd, and the root
is this machine's own file system, so the same Python, virtual environment and checkout
are there. What is written inside stays in the machine's memory, except in one folder
for results.
"""

from __future__ import annotations

import os
from pathlib import Path

INSIDE = "CHV_INSIDE_TESTBED"
"""Environment variable that is set for what runs in the machine."""


def needed() -> bool:
    """Whether stock Linux guests need the testbed here.

    They do where /dev/kvm cannot be opened, and where it works without svm or vmx
    underneath (such a KVM interprets guest kernels and lacks instructions they use).
    ``CHV_TESTBED=always`` and ``CHV_TESTBED=never`` decide otherwise.
    """
    choice = os.environ.get("CHV_TESTBED", "auto")
    if choice in ("always", "never"):
        return choice == "always" and INSIDE not in os.environ
    if choice != "auto":
        raise ValueError(f"CHV_TESTBED={choice}: must be auto, always or never")
    if INSIDE in os.environ:
        return False
    return not (kvm_opens() and has_virtualization())


def kvm_opens() -> bool:
    """Whether /dev/kvm is there for this user."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def has_virtualization() -> bool:
    """Whether the CPU says that it has Intel's VMX or AMD's SVM."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return bool({"svm", "vmx"} & set(line.split()))
    return False
