"""What can go wrong while a guest is driven over its console."""

from __future__ import annotations

from ..errors import Error


class ConsoleTimeout(Error, TimeoutError):
    """What was waited for did not appear; the message ends with the last lines of the console."""


class ConsoleClosed(Error, EOFError):
    """The other end of the console is gone; the message ends with its last lines."""


class LoginFailed(Error):
    """The guest refused the user or password."""


class CommandFailed(Error):
    """A command ended with a status other than 0.

    ``command``, ``status`` and ``output`` say which and how.
    """

    def __init__(self, command: str, status: int, output: str) -> None:
        super().__init__(f"{command!r} ended with status {status}\n{output}")
        self.command = command
        self.status = status
        self.output = output
