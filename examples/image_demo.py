"""A disk image with no firmware and no kernel given: booted, reached over the network, resized, rebooted.

    python -m examples.image_demo --disk clear.img --key id_ed25519 \\
        --address 192.168.249.2 --gateway 192.168.249.1

Needs the right to make a tap (root, or CAP_NET_ADMIN) and ssh. The image is written to; its guest must
have ``address`` on its first network device and let ``root`` in with that key. ``make demo-image`` builds
such a one. Ends with status 0 only if each of the guest's CPU lists was right.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

from examples.hotplug_demo import Demo, Failed, tell

# Slot, device id and the address of BAR 0 of each.
PCI_DEVICES = "cd /sys/bus/pci/devices; for d in *; do echo $d $(cat $d/device) $(head -1 $d/resource); done"


class ImageDemo(Demo):
    """The same as :class:`Demo`, with the guest's commands over ssh."""

    def __init__(self, options: argparse.Namespace) -> None:
        network = f"tap=,mac=,ip={options.gateway},mask=255.255.255.0"
        boot = ["--firmware", options.firmware] if options.firmware else []
        super().__init__(
            [*boot, "--disk", f"path={options.disk}", "--net", network, "--rng"], options.boot_timeout
        )
        self._ssh = [
            "ssh", "-F", "none", "-i", options.key, "-o", "BatchMode=yes", "-o", "ConnectTimeout=30",
            "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
            f"root@{options.address}",
        ]  # fmt: skip

    def run(self, command: str) -> tuple[int, str]:
        done = subprocess.run([*self._ssh, command], capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stdout

    def boot(self) -> None:
        self._until(lambda identity: bool(identity))
        self.say("the guest answers over the network")

    def reboot(self) -> None:
        before = self._identity()
        self.say("guest# reboot")
        self.run("reboot")
        self._until(lambda identity: identity not in ("", before))
        self.say("the guest answers again")

    def _identity(self) -> str:
        """Different after each boot; empty while nobody answers."""
        try:
            return self.run("cat /proc/sys/kernel/random/boot_id")[1].strip()
        except subprocess.TimeoutExpired:
            return ""

    def _until(self, satisfied: Callable[[str], bool]) -> None:
        deadline = time.monotonic() + self._timeout
        while not satisfied(self._identity()):
            if time.monotonic() > deadline:
                raise Failed(f"no answer over the network after {self._timeout:.0f} s")
            time.sleep(1)


def story(demo: ImageDemo) -> None:
    demo.boot()
    demo.guest("uname -r; ip -brief address show dev eth0")
    demo.say("-- four vCPUs at boot")
    demo.cpu_lists("0-3", "")
    demo.resize()
    demo.wait_for_cpu(7)
    demo.cpu_lists("0-3", "4-7")
    demo.guest("echo 1 | tee /sys/devices/system/cpu/cpu[4,5,6,7]/online")
    demo.cpu_lists("0-7", "")
    devices = demo.guest(PCI_DEVICES)
    demo.guest("date > /root/before-the-reboot; sync")
    demo.say("-- after a reboot they remain")
    demo.reboot()
    demo.cpu_lists("0-7", "")
    if demo.guest(PCI_DEVICES) != devices:
        raise Failed("the PCI devices are elsewhere after the reboot")
    demo.guest("cat /root/before-the-reboot")
    demo.run("poweroff")
    demo.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--disk", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--gateway", required=True)
    parser.add_argument("--firmware", help="boot with this, for example EDK2's CLOUDHV.fd")
    parser.add_argument("--boot-timeout", type=float, default=600.0, help="seconds that a boot may take")
    return tell(story, ImageDemo(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
