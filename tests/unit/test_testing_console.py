"""chv.testing.Console against real shells on a pty, with a noisy kernel on the same line."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chv.testing import CommandFailed, Console, ConsoleClosed, ConsoleTimeout, LoginFailed
from tests.support import require

SHELLS = {
    "busybox": ["busybox", "sh", "-i"],
    "dash": ["dash", "-i"],
    "bash": ["bash", "--norc", "--noprofile", "-i"],
}

Start = Callable[..., Console]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a program on a pty of its own; a console for it."""
    cleanup: list[Callable[[], object]] = []

    def start(command: list[str], **env: str) -> Console:
        require(shutil.which(command[0]), f"{command[0]} is not installed")
        pid, terminal = pty.fork()
        if pid == 0:
            os.execvpe(
                command[0],
                command,
                {"PATH": os.environ["PATH"], "PS1": "guest:\\w# ", "TERM": "vt100", **env},
            )
        console = Console(terminal)
        cleanup.extend(
            (
                lambda: os.close(terminal),
                console.close,
                lambda: os.waitpid(pid, 0),
                lambda: os.kill(pid, signal.SIGKILL),
            )
        )
        return console

    yield start
    for step in reversed(cleanup):
        step()


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, start: Start) -> Console:
    """A console with a shell at its prompt."""
    console = start(SHELLS[request.param])
    console.wait_for_prompt(10)
    return console


def test_output_and_status(shell: Console) -> None:
    result = shell.run("echo hello; echo to stderr >&2; (exit 7)", 10)
    assert (result.output, result.status) == ("hello\nto stderr\n", 7)
    with pytest.raises(CommandFailed, match=r"'the command' ended with status 7\nhello"):
        result.check()


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("true", ""),
        ("printf abc", "abc"),
        (r"printf '\n\n x \n'", "\n\n x \n"),
        (r"printf 'a\r\nb\r'", "a\r\nb\r"),
        (r"printf '\033[1mbold\033[0m'", "\x1b[1mbold\x1b[0m"),
        ("echo 'single' \"double\" $((6*7)) `echo tick` \\\\ ! # comment", "single double 42 tick \\ !\n"),
        ("echo one\necho two\n", "one\ntwo\n"),
        ("echo '\t<tab>'", "\t<tab>\n"),
        ("echo 'größer 漢字'", "größer 漢字\n"),
        ("cat", ""),
        ("printf 'root@guest:~# '", "root@guest:~# "),
        ("echo '[    1.234567] like a kernel message'", "[    1.234567] like a kernel message\n"),
        ("echo _chv_run: not found", "_chv_run: not found\n"),
    ],
)
def test_exact_output(shell: Console, command: str, output: str) -> None:
    result = shell.run(command, 10)
    assert (result.output, result.status) == (output, 0)


def test_many_commands_in_the_same_shell(shell: Console) -> None:
    shell.run("cd /; name=value; f() { echo f:$1; }", 10)
    for number in range(20):
        assert shell.run(f"pwd; echo $name; f {number}", 10).output == f"/\nvalue\nf:{number}\n"


def test_long_command(shell: Console) -> None:
    text = "".join(f"{number}," for number in range(1000))
    assert shell.run(f"printf %s '{text}'", 20).output == text


def test_long_output(shell: Console) -> None:
    result = shell.run("seq 100000", 60)
    assert result.output == "".join(f"{number}\n" for number in range(1, 100001))


def test_syntax_error_leaves_the_shell_usable(shell: Console) -> None:
    result = shell.run("echo 'unterminated", 10)
    assert result.status != 0
    assert shell.run("echo fine", 10).output == "fine\n"


def test_timeout_interrupts_the_command(shell: Console) -> None:
    with pytest.raises(ConsoleTimeout, match=r"waited 0\.5 s for the end of 'sleep 1000'"):
        shell.run("sleep 1000", 0.5)
    shell.wait_for_prompt(10)
    assert shell.run("echo fine", 10).output == "fine\n"


def test_background_command_does_not_hold_the_console(shell: Console) -> None:
    started = time.monotonic()
    shell.run("sleep 30 &", 10)
    assert shell.run("kill -0 $!", 10).status == 0
    assert time.monotonic() - started < 20
    shell.run("kill $!", 10)


def test_new_shell_on_the_same_line(start: Start) -> None:
    """After a reboot the shell does not know the helper functions: they are defined again."""
    console = start(["dash", "-c", "while true; do busybox sh -i; done"])
    for _ in range(3):
        console.wait_for_prompt(10)
        assert console.run("echo fine", 10).output == "fine\n"
        console.send("exit\n")


def test_wait_for_prompt_types_nothing_into_a_busy_terminal(start: Start) -> None:
    console = start(["sh", "-c", "for i in 1 2 3 4 5; do echo working; sleep 0.5; done; exec dash -i"])
    console.wait_for_prompt(20)
    console.run("true", 10)
    assert console.log.startswith("working\n" * 5 + "guest:\\w# _chv_run")


class Noise:
    """What a kernel does to the line: writes messages at any moment, in the middle of other output too.

    Sits between the console and a shell, on a socket pair, and cuts a message in after every so many bytes.
    """

    def __init__(self, terminal: int, every: Iterator[int]) -> None:
        self._terminal = terminal
        self._every = every
        self.read_end, self._write_end = os.pipe()
        self.messages = 0
        self.newline = b"\n"
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        left = next(self._every, 1 << 60)
        while True:
            try:
                data = os.read(self._terminal, 4096)
            except OSError:
                break
            while len(data) >= left:
                os.write(self._write_end, data[:left])
                data = data[left:]
                self.messages += 1
                time.sleep(0.001)
                os.write(
                    self._write_end,
                    b"[%5d.%06d] smpboot: Booting Node 0\r\n" % (self.messages, self.messages),
                )
                left = next(self._every, 1 << 60)
            left -= len(data)
            os.write(self._write_end, data.replace(b"\n", self.newline))
        os.close(self._write_end)


@pytest.fixture
def noisy_shell(request: pytest.FixtureRequest) -> Iterator[tuple[Console, Noise]]:
    require(shutil.which("busybox"), "busybox is not installed")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(
            "busybox", SHELLS["busybox"], {"PATH": os.environ["PATH"], "PS1": "guest# ", "TERM": "vt100"}
        )
    noise = Noise(terminal, iter(request.param))
    console = Console(noise.read_end, terminal)
    yield console, noise
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    console.close()
    os.close(noise.read_end)
    os.close(terminal)


@pytest.mark.parametrize(
    "noisy_shell",
    [[97] * 20000, [701] * 20000, [*range(1, 400)], [13] * 400],
    indirect=True,
    ids=["often", "sometimes", "everywhere", "storm at first"],
)
def test_kernel_messages_in_the_middle(noisy_shell: tuple[Console, Noise]) -> None:
    console, noise = noisy_shell
    console.wait_for_prompt(20)
    for number in range(5):
        result = console.run(f"seq {200 * number} {200 * number + 300}; (exit {number})", 60)
        assert result.output == "".join(f"{n}\n" for n in range(200 * number, 200 * number + 301))
        assert result.status == number
    assert noise.messages > 10


@pytest.mark.parametrize("noisy_shell", [[]], indirect=True)
def test_two_terminals_on_the_way(noisy_shell: tuple[Console, Noise]) -> None:
    """The second one makes a carriage return and newline of each newline once more."""
    console, noise = noisy_shell
    noise.newline = b"\r\n"
    console.wait_for_prompt(10)
    assert console.run("seq 3", 10).output == "1\n2\n3\n"
    assert b"1\r\r\n2" in console.raw_log


def test_waiting_goes_forward(start: Start) -> None:
    console = start(["sh", "-c", "echo ready; echo ready; echo the last line; sleep 100"])
    assert console.wait_for("rea(dy)", 10)[1] == "dy"
    assert console.wait_for_line("^ready$", 10) == "ready"
    assert console.wait_for_line("last", 10) == "the last line"
    with pytest.raises(ConsoleTimeout, match=r"(?s)waited 0\.2 s for 'ready'.*the last line"):
        console.wait_for("ready", 0.2)
    assert console.log == "ready\nready\nthe last line\n"
    assert console.raw_log == b"ready\r\nready\r\nthe last line\r\n"


def test_bytes_that_are_no_text_do_not_shift_what_is_found(start: Start) -> None:
    console = start(["sh", "-c", r"printf '\377\376\303 one two'; sleep 100"])
    console.wait_for("one", 10)
    assert console.wait_for(".*two", 10)[0] == " two"


def test_escape_sequences_are_not_in_the_log(start: Start) -> None:
    pieces = [
        r"\033[1;31mred\033[0m \033]0;title\007",
        r"\0337plain\033",
        r"[Kend",
        r"\r\n\ragain 1%%\ragain 2%%\r",
        r"\n",
    ]
    script = "; sleep 0.1; ".join(f"printf '{piece}'" for piece in pieces)
    console = start(["sh", "-c", f"stty -onlcr; {script}; sleep 100"])
    console.wait_for(r"2%\n\Z", 10)
    time.sleep(0.2)
    assert console.log == "red plainend\nagain 1%\nagain 2%\n"


def test_end_of_the_other_side(start: Start) -> None:
    console = start(["sh", "-c", "echo goodbye"])
    with pytest.raises(ConsoleClosed, match=r"(?s)closed while waiting for 'hello'.*goodbye"):
        console.wait_for("hello", 10)


LOGIN = r"""
printf 'debian login: '; read -r user
stty -echo; printf 'Password: '; read -r password; stty echo; echo
if [ "$user:$password" = root:secret ]; then exec dash -i; fi
echo; echo 'Login incorrect'; printf 'debian login: '; sleep 100
"""


def test_login(start: Start) -> None:
    console = start(["sh", "-c", LOGIN])
    console.login("root", "secret", 10)
    assert console.run("echo in", 10).output == "in\n"
    assert "secret" not in console.log


def test_login_refused(start: Start) -> None:
    console = start(["sh", "-c", LOGIN])
    with pytest.raises(LoginFailed, match="refuses user 'root': Login incorrect"):
        console.login("root", "wrong", 10)


def test_login_and_password_of_a_real_getty(start: Start) -> None:
    """The whole of it, with nobody at the other end: the timeout names what was waited for."""
    console = start(["sh", "-c", "sleep 100"])
    with pytest.raises(ConsoleTimeout, match="login:"):
        console.login("root", "secret", 0.2)


def test_no_thread_or_descriptor_is_left(tmp_path: Path) -> None:
    before = (threading.active_count(), sorted(os.listdir("/proc/self/fd")))
    for _ in range(5):
        read, write = os.pipe()
        console = Console(read, write)
        os.write(write, b"text")
        console.wait_for("text", 5)
        console.close()
        console.close()
        os.close(read)
        os.close(write)
    assert (threading.active_count(), sorted(os.listdir("/proc/self/fd"))) == before
