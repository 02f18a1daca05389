"""``python -m tests.testbed -- COMMAND...``: run a command where /dev/kvm runs Linux.

It runs in the same folder, with this Python's programs first in PATH. Its output comes
out here while it runs, and its exit status is this program's: 124 when --timeout is over,
125 when the machine cannot start or dies.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.guests.cache import CHECKOUT
from tests.testbed import INSIDE, kvm_opens, needed
from tests.testbed.machine import CommandTimeout, Machine, TestbedError

TIMED_OUT = 124
DIED = 125

KEPT = ("CI", "HOME", "LANG", "LC_ALL", "PATH", "TERM", "USER", "VIRTUAL_ENV")
KEPT_PREFIXES = ("CHV_", "PYTHON", "PYTEST_", "HYPOTHESIS_")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run the command in a machine of its own."""
    options = parse(arguments)
    if options.if_needed and not wanted_for(options.if_needed):
        os.execvpe(options.command[0], options.command, environment(inside=False))
    for attempt in range(1, options.tries + 1):
        status = run(options)
        if status != DIED or attempt == options.tries:
            break
        print(f"testbed: attempt {attempt} of {options.tries}; again", file=sys.stderr, flush=True)
    return status


def run(options: argparse.Namespace) -> int:
    """Start a machine and run the command in it; the exit status."""
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    machine = Machine(
        memory=options.memory,
        cpus=options.cpus,
        results=results,
        modules=[name for name in options.modules.split(",") if name],
    )
    try:
        with machine:
            if options.verbose:
                print(f"testbed: up after {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
            pass_signals(machine)
            return machine.run(options.command, env=environment(), cwd=Path.cwd(), timeout=options.timeout)
    except CommandTimeout:
        print(f"testbed: not done after {options.timeout} s, ended", file=sys.stderr)
        return TIMED_OUT
    except TestbedError as error:
        print(f"testbed: {error}", file=sys.stderr)
        return DIED
    except KeyboardInterrupt:
        print("testbed: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.testbed", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--memory", type=int, default=3072, metavar="MIB", help="default %(default)s")
    parser.add_argument("--cpus", type=int, default=1, help="default %(default)s; see docs/testing.md")
    parser.add_argument(
        "--modules", default="", metavar="NAME,...", help="more kernel modules, e.g. tun,vhost_net"
    )
    parser.add_argument(
        "--tries",
        type=int,
        default=1,
        metavar="N",
        help="start again, so often at most, if the machine itself dies",
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="end the command after that time")
    parser.add_argument(
        "--results",
        type=Path,
        default=CHECKOUT / ".work/results",
        metavar="FOLDER",
        help="the one folder where files written inside stay (default %(default)s)",
    )
    parser.add_argument(
        "--if-needed",
        choices=("linux", "kvm"),
        help="run the command here instead if /dev/kvm can run Linux, or can be opened at all",
    )
    parser.add_argument("--verbose", action="store_true", help="say when the machine is up")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    return parser.parse_args(arguments)


def wanted_for(purpose: str) -> bool:
    """Whether the testbed is needed for Linux guests, or for any use of KVM."""
    return needed() if purpose == "linux" else not kvm_opens()


def environment(*, inside: bool = True) -> dict[str, str]:
    """The variables that a command gets: inside the machine those that matter, else all."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not inside or name in KEPT or name.startswith(KEPT_PREFIXES)
    }
    env["PATH"] = f"{Path(sys.executable).parent}:{env.get('PATH', os.defpath)}"
    if inside:
        env[INSIDE] = "1"
    return env


def pass_signals(machine: Machine) -> None:
    """Give the command inside a chance to end by itself at ^C or SIGTERM; the second one ends the machine."""

    def handler(number: int, _frame: object) -> None:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.default_int_handler)
        machine.signal(signal.Signals(number).name.removeprefix("SIG"))

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
