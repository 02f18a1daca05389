"""What every thread of ours does first, and how Python's threads take turns."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Collection
from typing import Final

# A thread must not keep those signals from itself that report its own faults.
_FAULTS: Final = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGABRT,
    signal.SIGTRAP,
}


def leave_signals_to_main(keep: Collection[int] = ()) -> None:
    """Let signals interrupt the main thread, where Python handles them, and not the calling one.

    ``keep`` are signals that the calling thread still takes.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS - set(keep))


SWITCH_SECONDS = 0.00002
SLACK_NS = 1000


def take_turns_quickly() -> None:
    """Let a Python thread compute for only 20 us while another waits to, in this whole process.

    A vCPU whose exit goes to Python waits that long for a thread that computes. Python's own 5 ms are
    made for less haste, and the kernel's timer slack of 50 us (proc(5), /proc/pid/timerslack_ns; threads
    inherit it) comes on top of each wait. For the threads that are started from here on.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    # Without /proc it works, too.
    with contextlib.suppress(OSError), open("/proc/self/timerslack_ns", "w") as slack:
        slack.write(str(SLACK_NS))
