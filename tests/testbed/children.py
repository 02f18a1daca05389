"""Child processes that never outlive the one that started them."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)


def start(command: Sequence[str | Path], log: Path, pass_fds: Iterable[int] = ()) -> subprocess.Popen[bytes]:
    """Start a program with its output in ``log``; the kernel kills it when this process ends.

    The kernel watches the thread that started it, so call this from the main thread.
    A ^C at the terminal does not reach the program: it is for this process to end it.
    """
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=tuple(pass_fds),
            preexec_fn=_die_with_parent,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a program and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.wait()


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
