"""What the ``chv`` process does between its options and its exit status."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import termios
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from .config import VmConfig
from .errors import ConfigError
from .logs import Logger, set_up_later
from .vmm import Vmm

if TYPE_CHECKING:
    from logging import LogRecord

log = Logger(__name__)

STARTED = time.time()
ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
LEVELS = ("WARNING", "INFO", "DEBUG")


def run(
    config: VmConfig | None,
    *,
    api_socket: str | None = None,
    no_shutdown: bool = False,
    verbosity: int = 0,
    log_file: str | None = None,
) -> int:
    """Boot ``config`` if there is one, serve the API if asked, until it is time to end; the exit status.

    Whatever ends it, the VM is deleted, the socket removed and the terminal as it was.
    Raises what went wrong, the guest's failure among it.
    """
    os.umask(0o077)
    raise_descriptor_limit()
    if verbosity or log_file is not None or api_socket is not None:
        start_logging(verbosity, log_file)
    else:  # most VMs have nothing to say, and importing logging takes 10 ms
        set_up_later(partial(start_logging, 0, None))
    vmm = Vmm(no_shutdown=no_shutdown)
    with contextlib.ExitStack() as ending:
        ending.enter_context(terminal_restored())
        ending.enter_context(signals_end(vmm))
        ending.callback(vmm.delete)
        if api_socket is not None:
            from .api.server import ApiServer

            ending.enter_context(ApiServer(vmm, api_socket))
        if config is not None:
            vmm.create(config)
            vmm.boot()
        vmm.wait()
    return 0


def raise_descriptor_limit() -> None:
    """Each vCPU is a descriptor, and the usual limit of 1024 is only a default."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def start_logging(verbosity: int, log_file: str | None) -> None:
    """Log from warnings (0) to debugging (2 and more), to stderr or a file."""
    import logging

    try:
        handler = logging.StreamHandler(sys.stderr) if log_file is None else logging.FileHandler(log_file)
    except OSError as error:
        raise ConfigError(f"--log-file: {log_file}: {error.strerror}") from None
    handler.addFilter(_stamp)
    logging.basicConfig(
        level=LEVELS[min(verbosity, len(LEVELS) - 1)],
        format="chv: %(uptime)d ms: <%(threadName)s> %(levelname)s: %(name)s: %(message)s",
        handlers=[handler],
    )


def _stamp(record: LogRecord) -> bool:
    record.uptime = (record.created - STARTED) * 1000
    return True


@contextlib.contextmanager
def signals_end(vmm: Vmm) -> Iterator[None]:
    """Let SIGTERM, SIGINT and SIGHUP end ``vmm.wait()``.

    A thread takes them, so that none interrupts the main thread in the middle of a boot or of
    giving things back. A signal that the parent made us ignore (nohup) stays ignored.
    """
    wanted = {number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    done = threading.Event()

    def take() -> None:
        while not done.is_set():
            taken = signal.sigtimedwait(wanted, 0.2) if wanted else None
            if taken is not None and not done.is_set():
                log.info("%s: ending", signal.Signals(taken.si_signo).name)
                vmm.request_exit()

    thread = threading.Thread(target=take, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def terminal_restored() -> Iterator[None]:
    """Leave the terminal on stdin with the settings that it has now."""
    try:
        settings = termios.tcgetattr(0)
    except termios.error:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal may be gone
            if termios.tcgetattr(0) != settings:
                termios.tcsetattr(0, termios.TCSANOW, settings)
