"""A network card that looks at each packet in Python: what the guest may say to whom.

    python -m examples.packet_filter --kernel vmlinuz --initramfs initrd --allow 22 --allow 53

The initramfs must give a root shell on ttyS0 and load virtio_net; the card is eth0 there. Without a tap that
was made before (--tap), this needs CAP_NET_ADMIN.
"""

from __future__ import annotations

import argparse
import os

from chv._virtqueue import Queue
from chv.config import NetConfig
from chv.net import HEADER_SIZE
from chv.testing import Guest
from chv.virtio.net import Net

TRANSMIT = 1  # queue number (virtio 1.2, 5.1.2)
LARGEST = HEADER_SIZE + 65550  # a frame with its virtio_net_hdr; with offloads it is not cut into packets yet
ARP, IPV4 = b"\x08\x06", b"\x08\x00"
ICMP, TCP, UDP = 1, 6, 17


class PacketFilter(Net):
    """Lets the guest ask for addresses, ping, and talk to the TCP and UDP ports in ``ports``."""

    ports: frozenset[int] = frozenset()
    refused = 0

    def work(self, queue: Queue) -> None:
        if queue.index != TRANSMIT:
            super().work(queue)  # what comes in goes the fast way
            return
        while not queue.stopping:
            for chain in queue:
                frame = chain.read(LARGEST)  # a copy: the guest cannot change what has been looked at
                if chain.readable_bytes <= LARGEST and self.allows(frame[HEADER_SIZE:]):
                    self.send(frame)
                else:
                    self.refused += 1
                chain.done()
            queue.wait()

    def send(self, frame: bytes) -> None:
        try:
            os.write(self.wire.fds[0], frame)
        except OSError:  # the tap is full or gone, or a header does not fit its frame: then it is lost
            self.refused += 1

    def allows(self, packet: bytes) -> bool:
        """Whether an Ethernet frame may leave."""
        if packet[12:14] == ARP:
            return True
        if packet[12:14] != IPV4 or len(packet) < 34:
            return False
        length, protocol = 4 * (packet[14] & 15), packet[23]
        if length < 20 or packet[20] & 0x3F or packet[21]:
            return False  # a fragment hides its ports
        ports = packet[14 + length : 18 + length]
        if protocol in (TCP, UDP):
            return len(ports) == 4 and int.from_bytes(ports[2:], "big") in self.ports
        return protocol == ICMP

    def counters(self) -> dict[str, int]:
        return {**super().counters(), "tx_refused": self.refused}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--initramfs", required=True)
    parser.add_argument("--cmdline", default="quiet")
    parser.add_argument("--tap", help="the name of a tap; without it one is made")
    parser.add_argument("--allow", type=int, action="append", default=[], metavar="PORT")
    parser.add_argument("--boot-timeout", type=float, default=120.0, metavar="SECONDS")
    options = parser.parse_args()

    wire = NetConfig(tap=options.tap, ip="192.168.249.1", mask="255.255.255.0")
    card = PacketFilter.open(wire, "net[0]", "packet-filter")
    assert isinstance(card, PacketFilter)
    card.ports = frozenset(options.allow)
    try:
        with Guest(kernel=options.kernel, initramfs=options.initramfs, cmdline=options.cmdline) as vm:
            vm.add_device(card)
            vm.boot()
            vm.wait_for_prompt(options.boot_timeout)
            vm.run("ip address add 192.168.249.2/24 dev eth0; ip link set eth0 up")
            print(vm.run("ping -c 3 192.168.249.1"))
            for port in (*options.allow, 9):
                vm.run(f"timeout 2 nc 192.168.249.1 {port} </dev/null", timeout=30, check=False)
            print(vm.counters()["packet-filter"])
    finally:
        card.close()


if __name__ == "__main__":
    main()
