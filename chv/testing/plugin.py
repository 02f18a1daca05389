"""The pytest plugin: guests as fixtures, their console in the report of a test that fails.

Installed with chv, it costs a test run that does not use it nothing but this file's import.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .guest import Guest

_OPTIONS = {
    "kernel": "kernel for the vm fixture: a bzImage or an ELF vmlinux",
    "initramfs": "initramfs for the vm fixture",
    "cmdline": "kernel command line for the vm fixture (console=ttyS0 is added)",
    "timeout": "seconds that a guest may take to its prompt, or for a command (default 60)",
    "logs": "folder where each guest's whole console log is kept (default: a temporary folder)",
}
_CONSOLE_LINES = 60
_guests: pytest.StashKey[list[Guest]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Command-line options ``--chv-...``, each also an ini option ``chv_...``."""
    group = parser.getgroup("chv", "guests under chv")
    for name, text in _OPTIONS.items():
        group.addoption(f"--chv-{name}", metavar=name.upper(), help=text)
        parser.addini(f"chv_{name}", text)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        "chv(**parts): how the vm fixture's VM differs from the default, in chv.VM's keywords "
        "(cpus='boot=4,max=8', memory='1G', kernel=..., initramfs=..., cmdline=...)",
    )


@pytest.fixture
def vm_factory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    """Make guests that are not booted yet: ``vm_factory(cpus="boot=1,max=4")``.

    Keywords are those of chv.VM; they come before those of the chv marker, and these before the
    options of the test run. All guests are deleted after the test and their console logs kept.
    """
    from .guest import Guest

    guests: list[Guest] = []
    request.node.stash[_guests] = guests

    with contextlib.ExitStack() as closing:

        def make(**parts: Any) -> Guest:
            file = log_file(
                Path(option(request.config, "logs") or tmp_path), request.node.nodeid, len(guests)
            )
            guest = closing.enter_context(Guest(console_file=file, **vm_parts(request.node, parts)))
            guest.timeout = float(option(request.config, "timeout") or 60)
            guests.append(guest)
            return guest

        yield make


@pytest.fixture
def vm(vm_factory: Callable[..., Guest]) -> Guest:
    """A guest that has booted to its shell's prompt; see the chv marker."""
    guest = vm_factory()
    guest.boot()
    guest.wait_for_prompt()
    return guest


def vm_parts(item: pytest.Item, own: dict[str, Any]) -> dict[str, Any]:
    """The keywords for chv.VM: the test's own, then the marker's, then the run's options."""
    parts: dict[str, Any] = {}
    for name in ("kernel", "initramfs", "cmdline"):
        if value := option(item.config, name):
            parts[name] = value
    for marker in reversed(list(item.iter_markers("chv"))):
        parts.update(marker.kwargs)
    parts.update(own)
    if not (parts.get("kernel") or parts.get("firmware") or parts.get("disks")):
        raise pytest.UsageError(
            "the vm fixture needs a kernel: give pytest --chv-kernel=FILE (and --chv-initramfs=FILE), "
            "set chv_kernel in the ini file, or mark the test with @pytest.mark.chv(kernel=...)"
        )
    return parts


def option(config: pytest.Config, name: str) -> str:
    """An option from the command line, else from the ini file, else empty."""
    return str(config.getoption(f"--chv-{name}") or config.getini(f"chv_{name}") or "")


def log_file(folder: Path, nodeid: str, number: int) -> Path:
    """Where the log of a test's guest goes: a file named after the test."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.\[\]-]+", "-", nodeid)[-150:]
    return folder / f"{name}{f'-{number}' if number else ''}.console"


def guests_of(item: pytest.Item) -> list[Guest]:
    """The guests that a test has made."""
    none: list[Guest] = []
    return item.stash.get(_guests, none)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the last lines of each guest's console to the report of a test that failed."""
    report = yield
    if report.failed:
        for number, guest in enumerate(guests_of(item)):
            lines = guest.console_log.splitlines()[-_CONSOLE_LINES:]
            report.sections.append((f"console of guest {number}, last lines", "\n".join(lines)))
    return report
