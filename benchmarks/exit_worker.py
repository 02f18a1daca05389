"""A Python contestant of the exit benchmarks, in a process of its own.

``python -m benchmarks.exit_worker NAME`` takes one guest after another, as lines of JSON on standard input
(``{"guest": {...}, "cpus": [...]}``, the processors to run it on), and answers each with a line:
``{"output": hex, "exits": {...}}`` or ``{"error": text}``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

from . import build, exit_chv, exit_pure
from .guests import Guest

Run = Callable[[Guest], tuple[bytes, dict[str, int]]]


def contestants() -> dict[str, Run]:
    """The contestants by name."""
    device = build.device()
    return {
        "chv_c": lambda guest: exit_chv.run(guest, device, python=False),
        "chv_py": lambda guest: exit_chv.run(guest, device, python=True),
        "chv_py_spin": lambda guest: exit_chv.run(guest, device, python=True, spin=True),
        "pure_python": lambda guest: exit_pure.run(guest, device.ticks),
    }


def main() -> None:
    run = contestants()[sys.argv[1]]
    for line in sys.stdin:
        try:
            wanted = json.loads(line)
            os.sched_setaffinity(0, wanted["cpus"])  # its vCPUs' threads, too, which this one starts
            output, exits = run(Guest(**wanted["guest"]))
            answer: dict[str, object] = {"output": output.hex(), "exits": exits}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
