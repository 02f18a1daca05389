"""Run ``chv`` as a process whose VM is a fake, and talk to it.

``python -m tests.unit.chv_process ARGUMENTS`` is ``chv ARGUMENTS``, except that no machine is made.
The kernel's path tells the fake guest what to do: ``poweroff``, ``crash``, ``missing``, or nothing.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

from chv import vmm
from chv.cli import main
from chv.config import VmConfig
from chv.errors import ImageError

from .fake_vm import FakeVm

ROOT = Path(__file__).parents[2]
FAKE = "tests.unit.chv_process"
PATIENCE = 60.0


class GuestOfThatName(FakeVm):
    def boot(self) -> None:
        kernel = (self.config.payload and self.config.payload.kernel) or ""
        if kernel == "missing":
            raise ImageError("missing: no such file")
        super().boot()
        if kernel == "poweroff":
            self.guest_ends()
        if kernel == "crash":
            self.guest_crashes("triple fault at RIP 0x1000")
        if kernel == "raw":
            settings = termios.tcgetattr(0)
            settings[3] &= ~termios.ECHO
            termios.tcsetattr(0, termios.TCSANOW, settings)

    def delete(self) -> None:
        if self.state == "Running":
            print("the VM was deleted", flush=True)
        super().delete()


def new_fake(config: VmConfig) -> vmm.Machine:
    return GuestOfThatName(config)


def chv(*arguments: str, fake: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    module = FAKE if fake else "chv"
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def start(*arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """Start it and go on."""
    return subprocess.Popen(
        [sys.executable, "-m", FAKE, *arguments],
        cwd=ROOT,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_socket(process: subprocess.Popen[str], path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.send_signal(signal.SIGKILL)
            raise AssertionError(f"no socket at {path}: {process.communicate()}")
        time.sleep(0.02)


if __name__ == "__main__":
    vmm._new_vm = new_fake
    sys.exit(main())
