"""Loggers that import :mod:`logging` when there is something to say.

It takes as long to import as a small VM takes to boot, and most programs never hear from chv.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

_pending: list[Callable[[], object]] = []


def set_up_later(setup: Callable[[], object]) -> None:
    """Have ``setup`` called before the first record."""
    _pending.append(setup)


class Logger:
    """The methods of :class:`logging.Logger` that chv uses, for the logger called ``name``."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def debug(self, message: str, *arguments: object, exc_info: BaseException | None = None) -> None:
        if _configured():
            self._say("debug", message, arguments, exc_info)

    def info(self, message: str, *arguments: object) -> None:
        if _configured():
            self._say("info", message, arguments, None)

    def warning(self, message: str, *arguments: object) -> None:
        self._say("warning", message, arguments, None)

    def error(self, message: str, *arguments: object) -> None:
        self._say("error", message, arguments, None)

    def exception(self, message: str, *arguments: object) -> None:
        """An error, with the exception that is being handled."""
        self._say("error", message, arguments, sys.exc_info()[1])

    def _say(
        self, level: str, message: str, arguments: tuple[object, ...], error: BaseException | None
    ) -> None:
        import logging

        while _pending:
            _pending.pop()()
        logging.getLogger(self.name).log(
            getattr(logging, level.upper()), message, *arguments, exc_info=error, stacklevel=3
        )


def _configured() -> bool:
    """Whether the program may have asked for more than warnings, which takes an import of logging."""
    return "logging" in sys.modules
