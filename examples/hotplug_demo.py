"""CPU hotplug from the command line and over HTTP, as a user does it.

Starts ``chv`` with four of eight vCPUs on a terminal of its own, asks for eight with curl,
brings the new ones online in the guest, reboots it, and shows the guest's own CPU lists at each
step. Ends with status 0 only if each list was right.

    python -m examples.hotplug_demo --kernel vmlinuz --initramfs initrd

The initramfs must give a root shell on ttyS0 and have lscpu; ``make demo`` builds such a one.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
import tty
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import chv
from chv.testing import Console

RESIZE = '{"desired_vcpus":8}'
URL = "http://localhost/api/v1/vm.resize"


class Failed(Exception):
    """A step did not show what it should."""


class Demo:
    """One run of ``chv`` with four of eight vCPUs and ``options``, and the guest's console."""

    def __init__(self, options: list[str], boot_timeout: float) -> None:
        self._timeout = boot_timeout
        self._started = time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="chv-demo-")
        self.api_socket = str(Path(self._folder.name) / "ch-socket")
        arguments = [
            *options, "--cpus", "boot=4,max=8", "--memory", "size=1024M",
            "--serial", "tty", "--console", "off", "--api-socket", self.api_socket,
        ]  # fmt: skip
        self.say("$ chv " + " ".join(a if " " not in a else f'"{a}"' for a in arguments))
        master, slave = pty.openpty()
        tty.setraw(slave)  # else it would send a carriage return of its own before each newline
        self._process = subprocess.Popen(
            [sys.executable, "-m", "chv", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._master = master
        self.console = Console(master, master)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:6.1f} s] {text}", flush=True)

    def boot(self) -> None:
        self.console.wait_for("Run /init as init process", timeout=self._timeout)
        self.console.wait_for_prompt(timeout=self._timeout)
        self.say("the guest has booted")

    def guest(self, command: str) -> str:
        """Run a command in the guest, showing it and what it prints."""
        self.say(f"guest# {command}")
        status, output = self.run(command)
        for line in output.splitlines():
            self.say(f"       {line}")
        if status != 0:
            raise Failed(f"the guest's command ended with status {status}")
        return output

    def run(self, command: str) -> tuple[int, str]:
        """Run a command in the guest; its exit status and what it prints."""
        result = self.console.run(command, timeout=60)
        return result.status, result.output

    def cpu_lists(self, online: str, offline: str) -> None:
        """Show the guest's CPU lists and check them."""
        lists = dict(
            re.findall(r"^(On|Off)-line CPU\(s\) list:\s*(\S+)", self.guest("lscpu | grep list:"), re.M)
        )
        expected = {"On": online} | ({"Off": offline} if offline else {})
        if lists != expected:
            raise Failed(f"the guest shows {lists}, expected {expected}")

    def host(self, *command: str) -> str:
        """Run a command on the host, showing it and what it prints."""
        self.say("host$ " + " ".join(c if re.fullmatch(r"[\w./:=-]+", c) else f"'{c}'" for c in command))
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        for line in (done.stdout + done.stderr).splitlines():
            self.say(f"      {line}")
        if done.returncode != 0:
            raise Failed(f"{command[0]} ended with status {done.returncode}")
        return done.stdout

    def resize(self) -> None:
        answer = self.host(
            "curl", "-sS", "-H", "Accept: application/json", "-H", "Content-Type: application/json", "-i",
            "-XPUT", "--unix-socket", self.api_socket, "-d", RESIZE, URL,
        )  # fmt: skip
        if " 204 " not in answer.splitlines()[0]:
            raise Failed("the resize was not answered with 204")

    def wait_for_cpu(self, number: int) -> None:
        """The kernel adds the CPUs a moment after the request was answered."""
        path = f"/sys/devices/system/cpu/cpu{number}/online"
        loop = f"i=0; while [ ! -e {path} ] && [ $i -lt 100 ]; do sleep 0.2; i=$((i+1)); done; [ -e {path} ]"
        if self.run(loop)[0] != 0:
            raise Failed(f"cpu{number} did not appear in the guest")

    def poweroff(self) -> None:
        self.say("guest# poweroff -f")
        self.console.send("poweroff -f\n")
        self.wait()

    def wait(self) -> None:
        """Until chv has ended, which it must do with status 0."""
        status = self._process.wait(timeout=60)
        self.say(f"chv ended with status {status}")
        if status != 0:
            raise Failed("chv did not end with status 0")

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.console.close()
        os.close(self._master)
        self._folder.cleanup()


def story(demo: Demo) -> None:
    demo.boot()
    demo.say("-- four vCPUs at boot")
    demo.cpu_lists("0-3", "")
    demo.say("-- the request for eight")
    demo.resize()
    demo.wait_for_cpu(7)
    demo.cpu_lists("0-3", "4-7")
    demo.say("-- bringing them online")
    demo.guest("for i in 4 5 6 7; do echo 1 > /sys/devices/system/cpu/cpu$i/online; done")
    demo.cpu_lists("0-7", "")
    demo.host(sys.executable, "-m", "chv", "remote", "--api-socket", demo.api_socket, "ping")
    demo.say("-- after a reboot they remain")
    demo.console.send("reboot -f\n")
    demo.boot()
    demo.cpu_lists("0-7", "")
    demo.poweroff()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--initramfs", required=True)
    parser.add_argument("--boot-timeout", type=float, default=120.0, help="seconds that a boot may take")
    options = parser.parse_args()
    kernel = ["--kernel", options.kernel, "--initramfs", options.initramfs, "--cmdline", "console=ttyS0"]
    return tell(story, Demo(kernel, options.boot_timeout))


DemoType = TypeVar("DemoType", bound=Demo)


def tell(story: Callable[[DemoType], None], demo: DemoType) -> int:
    """Run a story to its end; the exit status."""
    try:
        story(demo)
    except (Failed, chv.Error, OSError, subprocess.TimeoutExpired) as error:
        print(f"FAILED: {error}", flush=True)
        print(demo.console.log[-4000:], flush=True)
        return 1
    finally:
        demo.close()
    print("The demo is complete: every CPU list was right.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
