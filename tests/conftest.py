"""pytest's set-up for the project's own tests."""

from __future__ import annotations

import signal
from importlib.metadata import entry_points
from typing import Any

import pytest

# Where chv is installed pytest finds its plugin by itself; a checkout that was only built has it here.
pytest_plugins = [] if entry_points(group="pytest11", name="chv") else ["chv.testing.plugin"]


def pytest_configure(config: pytest.Config) -> None:
    """nohup and a shell's ``&`` leave signals ignored, and what tests start would inherit that."""
    actions: dict[signal.Signals, Any] = {
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGQUIT: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    for number, action in actions.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, action)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        default="1/1",
        metavar="N/M",
        help="run every Mth test, beginning with the Nth, counted from 1",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the other parts to others, which run at the same time."""
    number, count = (int(field) for field in config.getoption("--part").split("/"))
    if count > 1:
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != number - 1])
        items[:] = items[number - 1 :: count]
