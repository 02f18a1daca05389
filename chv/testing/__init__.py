"""Drive a guest from tests: its console, commands in it, and a pytest plugin.

In a test, with ``--chv-kernel`` and ``--chv-initramfs`` given to pytest (or as ini options)::

    @pytest.mark.chv(cpus="boot=4,max=8")
    def test_hotplug(vm):
        vm.resize(desired_vcpus=8)
        vm.wait_for(lambda vm: vm.run("nproc --all") == "8", timeout=10)

Without pytest::

    with chv.testing.Guest(kernel="vmlinuz", initramfs="initrd", cpus="boot=4,max=8") as vm:
        vm.boot()
        vm.wait_for_prompt()
        print(vm.run("uname -r"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .console import CommandResult, Console
    from .errors import CommandFailed, ConsoleClosed, ConsoleTimeout, LoginFailed
    from .guest import Guest

__all__ = [
    "CommandFailed",
    "CommandResult",
    "Console",
    "ConsoleClosed",
    "ConsoleTimeout",
    "Guest",
    "LoginFailed",
]

_HOMES = {"CommandResult": ".console", "Console": ".console", "Guest": ".guest"}


def __getattr__(name: str) -> object:
    # Late, because every pytest run where chv is installed imports this package for its plugin.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, ".errors"), __name__), name)
