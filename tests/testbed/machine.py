"""The testbed machine: QEMU, virtiofsd, and the conversation with the init inside."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import selectors
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.guests import Kernel, kernel
from tests.guests.cache import cache, digest
from tests.guests.cpio import Archive
from tests.guests.initramfs import add_busybox, add_modules
from tests.testbed import children
from tests.testbed.kvm_amd import with_cr8_exits
from tests.testbed.stream import MarkedStream

BASE_MODULES = ("overlay", "irqbypass", "kvm", "kvm_amd")
"""What every testbed loads."""

PORTS = ("control", "stdout", "stderr")
VIRTIOFSD = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")
START_TIMEOUT = 120.0
WAKE_SECONDS = 0.2
"""How often a silent machine is interrupted. QEMU's emulation loses a short timer now and then; a machine
that waits for nothing else would stand still for ever, and goes on at the next interrupt."""

KERNEL_OPTIONS = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on"


class TestbedError(Exception):
    """The machine cannot be started, or it ended by itself."""

    __test__ = False  # not a test class, whatever its name


class CommandTimeout(TestbedError):
    """The command took longer than it was given."""


class Machine:
    """One running testbed; a context manager that leaves no process and no file behind.

    ``memory`` (MiB) and ``cpus`` are its size; with more than one CPU QEMU's emulation sometimes
    goes on with stale code after the kernel has patched its own, and the machine dies.
    ``results`` is the one folder where what is written inside reaches the host. ``modules``
    are loaded besides KVM's. ``live`` lets the machine see what the host changes meanwhile,
    which makes it slower.
    """

    def __init__(
        self,
        *,
        memory: int = 3072,
        cpus: int = 1,
        results: Path | None = None,
        modules: Sequence[str] = (),
        live: bool = False,
    ) -> None:
        self._memory = memory
        self._cpus = cpus
        self._results = results
        self._modules = (*BASE_MODULES, *modules)
        self._cache = "auto" if live else "always"
        self._cleanup = contextlib.ExitStack()
        self._selector = selectors.DefaultSelector()
        self._lines = b""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._selector)
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chv-testbed-")))
            self._start(stack)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def run(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        stdout: int = 1,
        stderr: int = 2,
        timeout: float | None = None,
    ) -> int:
        """Run a command, pass its output on while it runs, and return its exit status.

        ``timeout`` is in seconds. CommandTimeout when that is over, TestbedError when the
        machine ends first; after either the machine is of no use any more.
        """
        mark = f"#chv-testbed-end-{secrets.token_hex(16)}#"
        streams = {
            port: MarkedStream(fd, mark.encode()) for port, fd in (("stdout", stdout), ("stderr", stderr))
        }
        variables = (f"{name}={value}" for name, value in env.items())
        # The init's background commands start with SIGINT ignored; ^C should reach them.
        clean = ["env", "-i", "--default-signal=INT,QUIT", *variables, *command]
        script = f"cd {shlex.quote(str(cwd))} || exit 126\nexec {shlex.join(clean)}\n"
        streaming = "merged" if os.path.sameopenfile(stdout, stderr) else "split"
        self._say(f"run {mark} {streaming} {base64.b64encode(script.encode()).decode()}")
        deadline = None if timeout is None else time.monotonic() + timeout
        status = None
        while status is None or not all(stream.ended for stream in streams.values()):
            port, data = self._next(deadline)
            if port == "control":
                status = int(data.split()[1])
            else:
                streams[port].pass_on(data)
        return status

    def signal(self, name: str) -> None:
        """Send a signal, such as ``"INT"``, to the process group of the running command."""
        self._say(f"signal {name}")

    def _start(self, stack: contextlib.ExitStack) -> None:
        guest = kernel()
        share = self._folder / "host.sock"
        virtiofsd = self._spawn(stack, "virtiofsd", virtiofsd_command(share, self._cache))
        self._wait_for(share, virtiofsd)
        theirs = {}
        for name in PORTS:
            mine, theirs[name] = (stack.enter_context(end) for end in socket.socketpair())
            self._selector.register(mine, selectors.EVENT_READ, name)
            if name == "control":
                self._control = mine
        fds = {name: end.fileno() for name, end in theirs.items()}
        self._qemu = self._spawn(stack, "qemu", self._qemu_command(guest, share, fds), fds.values())
        for end in theirs.values():
            end.close()
        try:
            self._next(time.monotonic() + START_TIMEOUT)
        except CommandTimeout:
            raise TestbedError(
                f"the testbed was not up after {START_TIMEOUT:.0f} s\n{self._last_words()}"
            ) from None

    def _spawn(
        self,
        stack: contextlib.ExitStack,
        name: str,
        command: Sequence[str | Path],
        fds: Sequence[int] | object = (),
    ) -> subprocess.Popen[bytes]:
        process = children.start(command, self._folder / f"{name}.log", fds)  # type: ignore[arg-type]
        stack.callback(children.stop, process)
        return process

    def _wait_for(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 10
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise TestbedError(f"virtiofsd does not start\n{self._last_words()}")
            time.sleep(0.01)

    def _qemu_command(self, guest: Kernel, share: Path, fds: Mapping[str, int]) -> list[str]:
        initramfs = self._folder / "initramfs"
        initramfs.write_bytes(init_archive(guest, self._modules, self._results))
        options = {
            "accel": "tcg,thread=multi",
            "machine": "q35,memory-backend=memory",
            "cpu": "EPYC,+svm,+npt",
            "smp": str(self._cpus),
            "m": f"{self._memory}M",
            "kernel": str(guest.bzimage),
            "initrd": str(initramfs),
            "append": KERNEL_OPTIONS,
            "display": "none",
            "serial": f"file:{self._folder / 'console.log'}",
        }
        command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"]
        for name, value in options.items():
            command += [f"-{name}", value]
        # The memory is shared with virtiofsd, so it must be a file.
        command += ["-object", f"memory-backend-memfd,id=memory,size={self._memory}M,share=on"]
        command += ["-chardev", f"socket,id=host,path={share}"]
        command += ["-device", "vhost-user-fs-pci,chardev=host,tag=host"]
        command += ["-device", "virtio-serial-pci"]
        for name, fd in fds.items():
            command += ["-chardev", f"socket,id={name},fd={fd}"]
            command += ["-device", f"virtserialport,chardev={name},name={name}"]
        return command

    def _say(self, line: str) -> None:
        self._control.sendall(f"{line}\n".encode())

    def _next(self, deadline: float | None) -> tuple[str, bytes]:
        """The next line of the control port, or piece of output; raises as ``run`` says."""
        while True:
            line, newline, rest = self._lines.partition(b"\n")
            if newline:
                self._lines = rest
                return "control", line
            left = WAKE_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
            ready = self._selector.select(min(left, WAKE_SECONDS))
            if not ready:
                if left <= WAKE_SECONDS and deadline is not None:
                    raise CommandTimeout("the command took too long")
                self._say("wake")
                continue
            # Output before control lines: what a command printed comes before its exit status.
            key = max((key for key, _ in ready), key=lambda key: key.data != "control")
            data = os.read(key.fd, 65536)
            if not data:
                raise TestbedError(f"the testbed died\n{self._last_words()}")
            if key.data != "control":
                return key.data, data
            self._lines += data

    def _last_words(self) -> str:
        """The ends of the logs, to say why the machine is gone; the results folder gets them whole."""
        words = []
        for name in ("virtiofsd", "qemu", "console"):
            log = self._folder / f"{name}.log"
            if log.exists() and (text := log.read_text(errors="replace").strip()):
                lines = [line for line in text.splitlines() if "TCG doesn't support" not in line]
                words += [f"--- {name} ---", *lines[-30:]]
                if self._results is not None:
                    shutil.copy(log, self._results / f"testbed-{name}.log")
        return "\n".join(words)


def virtiofsd_command(share: Path, cache: str) -> list[str]:
    """The command that serves this machine's root on a socket: QEMU's own virtiofsd or the newer one."""
    program = next((path for path in VIRTIOFSD if os.access(path, os.X_OK)), None) or shutil.which(
        "virtiofsd"
    )
    if program is None:
        raise TestbedError(f"virtiofsd is not installed (looked for {', '.join(VIRTIOFSD)})")
    command = [program, f"--socket-path={share}"]
    if "/lib/qemu/" in program:
        return [*command, "-o", f"source=/,sandbox=chroot,cache={cache},log_level=warn"]
    return [*command, "--shared-dir=/", "--sandbox=chroot", f"--cache={cache}", "--log-level=warn"]


def init_archive(guest: Kernel, modules: Sequence[str], results: Path | None) -> bytes:
    """The testbed's own initramfs: busybox, modules, the init beside this file, its config."""
    archive = Archive()
    archive.device("dev/console", 5, 1)
    for folder in ("proc", "sys", "run", "etc"):
        archive.folder(folder)
    archive.file("init", Path(__file__).with_name("init").read_bytes(), 0o755)
    archive.file("bin/keeper", keeper().read_bytes(), 0o755)
    archive.file("etc/testbed", f"results={shlex.quote(str(results or ''))}\n".encode())
    add_busybox(archive)
    add_modules(archive, guest, modules, {"kvm-amd.ko": kvm_amd})
    return archive.data()


def kvm_amd(module: bytes) -> bytes:
    """The module that intercepts CR8 writes; if it is not as known, the module as it is, and that is said."""
    try:
        return with_cr8_exits(module)
    except ValueError as error:
        print(f"testbed: {error}: firmware may make QEMU fail", file=sys.stderr)
        return module


def keeper() -> Path:
    """The program that keeper.c is, compiled once."""
    source = Path(__file__).with_name("keeper.c")
    program = cache() / "testbed" / f"keeper-{digest([source.read_bytes()])}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        draft = program.with_name(f"{program.name}.{os.getpid()}")
        compiler = ["gcc", "-O2", "-Wall", "-static", "-o", str(draft), str(source)]
        result = subprocess.run(compiler, capture_output=True, text=True, check=False)
        if result.returncode:
            raise TestbedError(f"cannot compile {source}\n{result.stderr}")
        draft.rename(program)
    return program
