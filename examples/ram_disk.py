"""A disk of your own, written in Python: a virtio block device whose content is a bytearray.

    python -m examples.ram_disk --kernel vmlinuz --initramfs initrd

The initramfs must give a root shell on ttyS0 and load virtio_blk; the disk is /dev/vda there.
"""

from __future__ import annotations

import argparse
import struct

from chv._virtqueue import Chain, Queue
from chv.testing import Guest
from chv.virtio.device import F_VERSION_1, VirtioDevice

SECTOR = 512
READ, WRITE = 0, 1  # request types (virtio 1.2, 5.2.6)
OK, IO_ERROR, UNSUPPORTED = b"\0", 1, 2


class RamDisk(VirtioDevice):
    """One queue; each chain is a header of 16 bytes, data, and a byte for the status."""

    ID = 2
    PCI_CLASS = 0x018000

    def __init__(self, size: int) -> None:
        super().__init__("ram-disk", F_VERSION_1, (128,))
        self.data = bytearray(size)

    def config(self) -> bytes:
        return struct.pack("<Q", len(self.data) // SECTOR)

    def work(self, queue: Queue) -> None:
        while not queue.stopping:
            for chain in queue:
                if chain.readable_bytes >= 16 and chain.writable:
                    self.answer(chain)
                chain.done()
            queue.wait()

    def answer(self, chain: Chain) -> None:
        request = chain.read(16 + len(self.data))  # a copy, and no more than there can be use for
        kind, sector = struct.unpack_from("<I4xQ", request)
        start, room = SECTOR * sector, chain.writable_bytes - 1
        inside = start + max(room, chain.readable_bytes - 16) <= len(self.data)
        if kind == READ and inside:
            chain.write(self.data[start : start + room] + OK)
        elif kind == WRITE and inside and not room:
            self.data[start : start + len(request) - 16] = request[16:]
            chain.write(OK)
        else:  # the status is the last byte, whatever else there is
            chain.writable[-1][-1] = IO_ERROR if kind in (READ, WRITE) else UNSUPPORTED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--initramfs", required=True)
    parser.add_argument("--cmdline", default="quiet")
    parser.add_argument("--boot-timeout", type=float, default=120.0, metavar="SECONDS")
    options = parser.parse_args()

    disk = RamDisk(16 << 20)
    with Guest(kernel=options.kernel, initramfs=options.initramfs, cmdline=options.cmdline) as vm:
        vm.add_device(disk)
        vm.boot()
        vm.wait_for_prompt(options.boot_timeout)
        vm.run("echo written by the guest > /dev/vda; sync")
        print(vm.run("head -n 1 /dev/vda; cat /sys/block/vda/size"))
    print(disk.data[:21].decode())


if __name__ == "__main__":
    main()
