"""Where the time of a virtio-blk worker goes: one second of random 4k reads, sampled by perf.

The driver's side is this process: chains that stay as they are, made available again each time they
come back. Only the worker's thread is sampled, at every 0.1 ms of its CPU time. No frame of
Python may be in it: what a request costs does not depend on the interpreter, nor on who has the GIL.

``python -m benchmarks.profile [--direct] [--depth N] [--seconds S]``; needs Debian's linux-perf.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from tests.block_bench import IN, SECTOR, Bench, header

SIZE = 256 << 20
BLOCK = 4096
INTERVAL_HZ = 10_000


def main(arguments: list[str] | None = None) -> int:
    """Print the profile; 1 if a Python frame is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--direct", action="store_true", help="past the page cache")
    parser.add_argument("--depth", type=int, default=32, help="requests at a time, 1 to 64 (default 32)")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long (default 1)")
    options = parser.parse_args(arguments)
    if not 1 <= options.depth <= 64:
        parser.error(f"--depth: {options.depth} is not 1 to 64")
    if shutil.which("perf") is None:
        parser.error("perf is not installed: apt-get install linux-perf")
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder, "disk")
        disk.write_bytes(random.Random(1).randbytes(1 << 20) * (SIZE >> 20))
        frames, reads, engine = profile(disk, Path(folder, "perf.data"), options)
    samples = sum(frames.values())
    print(
        f"{reads} reads in {options.seconds:g} s, {engine}, depth {options.depth}; "
        f"{samples} samples of the worker"
    )
    for (module, symbol), count in frames.most_common(15):
        print(f"{100 * count / samples:6.2f} %  {module:<28} {symbol}")
    python = sum(count for (module, symbol), count in frames.items() if is_python(module, symbol))
    print(f"in Python: {python} of {samples} samples")
    return 1 if python or not samples else 0


def profile(
    disk: Path, output: Path, options: argparse.Namespace
) -> tuple[Counter[tuple[str, str]], int, str]:
    """Samples by (module, symbol), how many reads there were, and by which engine."""
    chance = random.Random(2)
    others = {thread.native_id for thread in threading.enumerate()}
    with Bench(disk, ring_size=256, direct=options.direct) as bench:
        sectors = SIZE // SECTOR // 8
        for _ in range(options.depth):
            bench.add([header(IN, 8 * chance.randrange(sectors))], [BLOCK, 1])
        drive(bench, options.depth, 0.2)
        workers = {thread.native_id for thread in threading.enumerate()} - others
        tids = ",".join(str(tid) for tid in workers if tid is not None)
        command = [
            "perf",
            "record",
            "-q",
            "-e",
            "cpu-clock",
            "-F",
            str(INTERVAL_HZ),
            "-t",
            tids,
            "-o",
            str(output),
        ]
        recorder = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            time.sleep(0.5)  # until it samples
            reads = drive(bench, options.depth, options.seconds)
        finally:
            recorder.terminate()
            recorder.wait()
        return frames_of(output), reads, bench.engine


def drive(bench: Bench, depth: int, seconds: float) -> int:
    """Make all chains available whenever all have come back; how many there were."""
    ring, queue = bench.rings[0], bench.queues[0]
    heads = bench.memory.read(ring.avail + 4, 2 * depth)
    available = int.from_bytes(bench.memory.read(ring.avail + 2, 2), "little")
    done, end = 0, time.monotonic() + seconds
    while True:
        queue.kick()
        while int.from_bytes(bench.memory.read(ring.used_ring + 2, 2), "little") != available:
            if time.monotonic() > end + 10:
                sys.exit("the device does not answer")
        done += depth
        if time.monotonic() > end:
            return done
        for n in range(depth):
            slot = ring.avail + 4 + 2 * ((available + n) % ring.size)
            bench.memory.write(slot, heads[2 * n : 2 * n + 2])
        available = (available + depth) % 0x10000
        bench.memory.write(ring.avail + 2, available.to_bytes(2, "little"))


def frames_of(data: Path) -> Counter[tuple[str, str]]:
    """The recorded samples: how often each (module, symbol) was met."""
    command = ["perf", "script", "-i", str(data), "-F", "ip,sym,dso"]
    found: Counter[tuple[str, str]] = Counter()
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        words = line.split(None, 1)
        if len(words) == 2:
            symbol, _, module = words[1].rpartition(" (")
            found[Path(module.rstrip(")")).name, symbol] += 1
    return found


def is_python(module: str, symbol: str) -> bool:
    """Whether a sample is in the interpreter or its C interface."""
    return module.startswith(("python", "libpython")) or symbol.startswith(("Py", "_Py", "__Pyx"))


if __name__ == "__main__":
    sys.exit(main())
