"""Boot a disk image with no firmware, change its vCPUs, and stay until it powers off.

    python -m examples.clear_linux clear-31890-kvm.img

For Clear Linux's image for KVM, or any other with boot loader entries in its EFI system partition
(``chv image entries FILE`` lists them). The image is written to. With --firmware, that boots it instead;
with --tap, the guest gets a network device.
"""

from __future__ import annotations

import argparse

import chv


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image")
    parser.add_argument("--entry", help="a boot entry other than the image's default")
    parser.add_argument("--firmware", help="for example EDK2's CLOUDHV.fd")
    parser.add_argument("--tap", help="a tap's name; made if there is none (needs CAP_NET_ADMIN)")
    options = parser.parse_args()

    network = {} if options.tap is None else {"net": f"tap={options.tap}"}
    with chv.VM(
        disks=f"path={options.image}",
        boot_entry=options.entry,
        kernel=options.firmware,
        cpus="boot=4,max=8",
        memory="1G",
        serial="tty",
        **network,
    ) as vm:
        vm.boot()
        vm.resize(desired_vcpus=8)
        vm.wait_for(lambda vm: all(cpu.acknowledged for cpu in vm.cpus), timeout=60)
        vm.wait()


if __name__ == "__main__":
    main()
