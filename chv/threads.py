"""What every thread of ours does first."""

from __future__ import annotations

import signal
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
