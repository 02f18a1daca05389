"""A VM with its console in hand."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .console import PROMPT, CommandResult, Console

if TYPE_CHECKING:
    from ..vm import VM


class Guest:
    """A :class:`chv.VM` whose serial line is connected to a :class:`Console`.

    Takes what VM takes, apart from ``serial``, and passes on everything that VM has
    (``boot``, ``resize``, ``info``, ...). The command line gets ``console=ttyS0`` unless it
    names a console. ``console_file`` gets what the guest prints while it runs. Leaving the
    ``with`` block deletes the VM; the console's log stays.
    """

    def __init__(self, *, console_file: Path | None = None, **parts: Any) -> None:
        from ..vm import VM

        if "console=" not in (parts.get("cmdline") or ""):
            parts["cmdline"] = f"console=ttyS0 {parts.get('cmdline') or ''}".strip()
        self._ours, self._theirs = socket.socketpair()
        try:
            self.vm: VM = VM(serial=self._theirs, **parts)
        except BaseException:
            self._ours.close()
            self._theirs.close()
            raise
        self.console = Console(self._ours, log_file=console_file)
        self.timeout = 60.0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "vm":
            raise AttributeError(name)
        return getattr(self.vm, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete the VM and let go of its console. May be called twice."""
        try:
            self.vm.delete()
        finally:
            self._theirs.close()
            self.console.close()
            self._ours.close()

    @property
    def console_log(self) -> str:
        """All that the guest printed so far."""
        return self.console.log

    def run(self, command: str, *, timeout: float | None = None, check: bool = True) -> str:
        """What a command prints in the guest's shell, without white space around it.

        Raises :class:`CommandFailed`, which has the output, for a status other than 0 unless
        ``check`` is False. Takes ``timeout`` seconds at most, by default :attr:`timeout`.
        """
        result = self.run_result(command, timeout=timeout)
        if check:
            result.check(command)
        return result.output.strip()

    def run_result(self, command: str, *, timeout: float | None = None) -> CommandResult:
        """Run a command in the guest's shell: its exact output and its status."""
        return self.console.run(command, self._seconds(timeout))

    def send(self, text: str | bytes) -> None:
        """Type text on the guest's serial line."""
        self.console.send(text)

    def wait_for_text(self, pattern: str | re.Pattern[str], timeout: float | None = None) -> re.Match[str]:
        """The next match of a regular expression on the console."""
        return self.console.wait_for(pattern, self._seconds(timeout))

    def wait_for_line(self, pattern: str, timeout: float | None = None) -> str:
        """The next complete line on the console in which a regular expression matches."""
        return self.console.wait_for_line(pattern, self._seconds(timeout))

    def wait_for_prompt(self, timeout: float | None = None, prompt: str = PROMPT) -> None:
        """Until the guest's shell waits for a command."""
        self.console.wait_for_prompt(self._seconds(timeout), prompt)

    def login(self, user: str = "root", password: str | None = None, timeout: float | None = None) -> None:
        """Log in at the guest's ``login:`` prompt."""
        self.console.login(user, password, self._seconds(timeout))

    def _seconds(self, timeout: float | None) -> float:
        return self.timeout if timeout is None else timeout
