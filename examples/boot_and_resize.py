"""Boot Linux with two of four possible vCPUs, add two while it runs, take them back.

    python -m examples.boot_and_resize --kernel vmlinuz --initramfs initrd

The initramfs must give a root shell on ttyS0.
"""

from __future__ import annotations

import argparse

from chv.testing import Guest

CPU = "/sys/devices/system/cpu"


def show(vm: Guest, when: str) -> None:
    """What the guest and what chv say about the vCPUs."""
    online, present = vm.run(f"cat {CPU}/online"), vm.run(f"cat {CPU}/present")
    print(f"{when}: the guest has {present} present and {online} online", flush=True)
    for cpu in vm.cpus:
        print(f"    {cpu}", flush=True)


def bring_online(vm: Guest, number: int) -> None:
    """Wait until the guest's kernel knows the CPU, then start it, as its user would."""
    path = f"{CPU}/cpu{number}/online"
    vm.run(f"until [ -e {path} ]; do sleep 0.1; done; echo 1 > {path}", timeout=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--initramfs", required=True)
    parser.add_argument("--boot-timeout", type=float, default=120.0, metavar="SECONDS")
    options = parser.parse_args()

    files = {"kernel": options.kernel, "initramfs": options.initramfs}
    with Guest(**files, cmdline="quiet", cpus="boot=2,max=4", memory="512M") as vm:
        vm.boot()
        vm.wait_for_prompt(options.boot_timeout)
        show(vm, "after the boot")

        vm.resize(desired_vcpus=4)
        for number in (2, 3):
            bring_online(vm, number)
        show(vm, "after adding two")

        vm.resize(desired_vcpus=2)
        if not vm.wait_for(lambda vm: not vm.info["hotplug"]["removal_pending"], timeout=30):
            raise SystemExit(f"the guest keeps its vCPUs: {vm.info['hotplug']}")
        show(vm, "after taking them back")


if __name__ == "__main__":
    main()
