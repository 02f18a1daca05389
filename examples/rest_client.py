"""Talk to a running chv over its REST API: boot a VM with it, change its vCPUs, show them.

chv --api-socket /tmp/ch-socket &
python -m examples.rest_client --api-socket /tmp/ch-socket --kernel vmlinuz --initramfs initrd --vcpus 4
python -m examples.rest_client --api-socket /tmp/ch-socket --vcpus 2
"""

from __future__ import annotations

import argparse
import json

from chv.api.client import ApiError, Client


def boot(client: Client, options: argparse.Namespace) -> None:
    """Describe a VM and start it."""
    client.create(
        {
            "cpus": {"boot_vcpus": 2, "max_vcpus": 8},
            "memory": {"size": 512 << 20},
            "payload": {
                "kernel": options.kernel,
                "initramfs": options.initramfs,
                "cmdline": "console=ttyS0",
            },
            "serial": {"mode": "Pty"},
        }
    )
    client.boot()
    print("booted; the serial line is", client.info()["config"]["serial"]["file"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--api-socket", required=True, metavar="PATH")
    parser.add_argument("--kernel", help="create a VM with this kernel and boot it")
    parser.add_argument("--initramfs")
    parser.add_argument("--vcpus", type=int, help="how many vCPUs the VM shall have")
    options = parser.parse_args()

    with Client(options.api_socket) as client:
        print("chv", client.ping()["version"])
        try:
            if options.kernel:
                boot(client, options)
            if options.vcpus:
                client.resize(desired_vcpus=options.vcpus)
            info = client.info()
        except ApiError as error:
            raise SystemExit(f"refused with status {error.status}: {': '.join(error.messages)}") from None
    print(info["state"], json.dumps(info.get("hotplug"), indent=2))
    for vcpu in info.get("vcpus", []):
        print(vcpu)


if __name__ == "__main__":
    main()
