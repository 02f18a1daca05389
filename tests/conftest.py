"""pytest's set-up for the project's own tests."""

from __future__ import annotations

from importlib.metadata import entry_points

# Where chv is installed pytest finds its plugin by itself; a checkout that was only built has it here.
pytest_plugins = [] if entry_points(group="pytest11", name="chv") else ["chv.testing.plugin"]
