"""What is measured in an I/O guest: fio's answers, streams of bytes over TCP, dd from /dev/hwrng."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from dataclasses import dataclass

from .io_guest import CommandFailed, IoGuest

PIECE = 1 << 20


@dataclass(frozen=True)
class FioResult:
    """One job of fio's."""

    iops: float
    bytes_per_second: float
    p50_ns: float


def fio_command(pattern: str, block: str, depth: int, seconds: int) -> str:
    """fio on the second disk, past the guest's own cache."""
    return (
        f"fio --name=bench --filename=/dev/vdb --direct=1 --ioengine=libaio --rw={pattern} --bs={block} "
        f"--iodepth={depth} --runtime={seconds} --time_based --randrepeat=1 --output-format=json"
    )


def fio_result(output: str) -> FioResult:
    """The figures of the direction that was used; CommandFailed for an output that has none."""
    try:
        job = json.loads(output[output.index("{") :])["jobs"][0]
        used = max((job["read"], job["write"]), key=lambda side: side["iops"])
        return FioResult(used["iops"], used["bw_bytes"], used["clat_ns"]["percentile"]["50.000000"])
    except (ValueError, KeyError, IndexError) as error:
        raise CommandFailed(f"fio's output has no figures ({error!r}): {output[-300:]}") from error


def dd_rate(output: str) -> float:
    """Bytes a second, from what dd says on standard error."""
    match = re.search(r"(\d+) bytes.* copied, ([0-9.e+-]+) s", output)
    if match is None or not float(match[2]):
        raise CommandFailed(f"dd's output has no figures: {output[-300:]}")
    return int(match[1]) / float(match[2])


class Stream:
    """The host's end of one TCP connection: counts what passes in the middle of it."""

    def __init__(self, address: str, sending: bool) -> None:
        self._listener = socket.create_server((address, 0))
        self.port: int = self._listener.getsockname()[1]
        self._sending = sending
        self.counted = 0
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        self._listener.settimeout(60)
        buffer = bytearray(PIECE)
        try:
            with self._listener, self._listener.accept()[0] as line:
                start = time.monotonic()
                while count := line.send(buffer) if self._sending else line.recv_into(buffer):
                    self.counted += count
                    self.seconds = time.monotonic() - start
        except OSError:
            return  # the guest's end was closed, or never came: what was counted says which

    def rate(self) -> float:
        """Bytes a second, once the guest has ended the connection."""
        self._thread.join()
        if not self.counted:
            raise CommandFailed("nothing came over the network")
        return self.counted / self.seconds


def stream(guest: IoGuest, to_guest: bool, seconds: int) -> float:
    """Bytes a second between the guest's cat and the host."""
    line = Stream(guest.image.gateway, sending=to_guest)
    peer = f"/dev/tcp/{guest.image.gateway}/{line.port}"
    copy = f"cat < {peer} > /dev/null" if to_guest else f"cat /dev/zero > {peer}"
    guest.run(f"timeout {seconds} bash -c '{copy}'; true")
    return line.rate()


def entropy(guest: IoGuest, kib: int) -> float:
    """Bytes a second out of /dev/hwrng."""
    return dd_rate(guest.run(f"dd if=/dev/hwrng of=/dev/null bs=4k count={kib // 4} iflag=fullblock 2>&1"))
