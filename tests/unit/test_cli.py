"""``chv`` and ``chv remote`` as processes."""

from __future__ import annotations

import json
import os
import pty
import signal
import stat
import subprocess
import sys
import termios
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chv.api.client import Client
from chv.cli import build_parser, option_table, read_config
from chv.version import __version__

from .chv_process import PATIENCE, ROOT, chv, start, wait_for_socket

Remote = Callable[..., "subprocess.CompletedProcess[str]"]

# every option of Cloud Hypervisor, and those of v0.5.0 (reference: get_cli_options_sorted)
THEIRS = """
    api-socket balloon block-backend cmdline console cpus dbus-object-path dbus-service-name dbus-system-bus
    debug-console device disk event-monitor firmware fs fw-cfg-config gdb generic-vhost-user host-data igvm
    initramfs kernel landlock landlock-rules log-file log-format memory memory-zone net net-backend
    no-shutdown numa pci-segment platform pmem pvmemcontrol pvpanic rate-limit-group restore rng rtc seccomp
    serial tpm user-device vdpa version vhost-user-blk vhost-user-net vsock watchdog
"""


def test_every_option_is_known() -> None:
    assert set(option_table()) >= {f"--{option}" for option in THEIRS.split()} | {"-v", "-V", "-h"}


def test_the_version_is_the_packages() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__
    for option in ("-V", "--version"):
        done = chv(option, fake=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"chv v{__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["remote"], ["remote", "--help"]])
def test_help(arguments: list[str]) -> None:
    done = chv(*arguments, fake=False)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: chv")
    assert done.stderr == ""


def test_lists_may_be_given_both_ways() -> None:
    parse = build_parser().parse_args
    once = parse(["--disk", "path=a", "path=b", "--kernel", "k"])
    twice = parse(["--disk", "path=a", "--kernel", "k", "--disk", "path=b"])
    assert once.disk == twice.disk == ["path=a", "path=b"]


def test_the_command_line_of_the_hotplug_document_reaches_what_is_missing() -> None:
    # Neither the firmware nor the image is there.
    done = chv(
        *("--kernel", "./hypervisor-fw", "--disk", "path=clear-31890-kvm.img", "--cpus", "boot=4,max=8"),
        *("--memory", "size=1024M", "--net", "tap=,mac=,ip=,mask=", "--rng", "--api-socket=/tmp/ch-socket"),
        fake=False,
    )
    assert done.returncode == 1
    assert "clear-31890-kvm.img" in done.stderr
    assert "disks[0].path" in done.stderr


def test_bare_numbers() -> None:
    config = read_config(build_parser().parse_args(["--kernel", "k", "--cpus", "4", "--memory", "1G"]))
    assert config is not None
    assert (config.cpus.boot_vcpus, config.cpus.max_vcpus, config.memory.size) == (4, 4, 1 << 30)


# -- how it ends -------------------------------------------------------------------------


def test_a_guest_that_powers_off() -> None:
    done = chv("--kernel", "poweroff")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_guest_that_crashes(tmp_path: Path) -> None:
    done = chv("--kernel", "crash", "--api-socket", str(tmp_path / "s"))
    assert (done.returncode, done.stderr) == (1, "chv: triple fault at RIP 0x1000\n")
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_that_cannot_be_loaded(tmp_path: Path) -> None:
    done = chv("--kernel", "missing", "--api-socket", str(tmp_path / "s"))
    assert done.returncode == 1
    assert done.stderr == "chv: The VM could not boot\n  because: missing: no such file\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "s"
    process = start("--kernel", "k", "--api-socket", str(path))
    wait_for_socket(process, path)
    with Client(path, timeout=PATIENCE) as client:
        while client.ping() and not _booted(client):
            pass
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (0, "the VM was deleted\n", "")
    assert list(tmp_path.iterdir()) == []


def _booted(client: Client) -> bool:
    from chv.api.client import ApiError

    try:
        return bool(client.info()["state"] == "Running")
    except ApiError:
        return False


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    path = tmp_path / "s"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does for what it starts
    try:
        process = start("--api-socket", str(path))
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_socket(process, path)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.terminate()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


def test_the_terminal_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "s"
    controller, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    process = start("--kernel", "raw", "--api-socket", str(path), stdin=terminal)
    wait_for_socket(process, path)
    with Client(path, timeout=PATIENCE) as client:
        while not _booted(client):
            pass
    assert termios.tcgetattr(terminal) != before
    process.terminate()
    process.communicate(timeout=PATIENCE)
    assert termios.tcgetattr(terminal) == before
    os.close(controller)
    os.close(terminal)


def test_no_shutdown_outlives_the_guest(tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = start("--kernel", "poweroff", "--no-shutdown", "--api-socket", str(path))
    wait_for_socket(process, path)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    with Client(path, timeout=PATIENCE) as client:
        assert client.info()["state"] == "Shutdown"
        client.shutdown_vmm()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


def test_files_that_it_makes_are_the_users_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = chv("--kernel", "poweroff", "-vv", "--log-file", str(log))
    assert (done.returncode, done.stderr) == (0, "")
    assert "INFO: chv.vmm: the guest has shut down" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


# -- chv remote ---------------------------------------------------------------------------------


@pytest.fixture
def vmm(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "s"
    process = start("--api-socket", str(path))
    wait_for_socket(process, path)
    yield path
    process.terminate()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


@pytest.fixture
def remote(vmm: Path) -> Remote:
    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return chv("remote", "--api-socket", str(vmm), *arguments, fake=False, stdin=stdin)

    return run


def test_a_whole_life_over_chv_remote(remote: Remote, tmp_path: Path) -> None:
    body = json.dumps({"cpus": {"boot_vcpus": 2, "max_vcpus": 4}, "payload": {"kernel": "k"}})
    assert json.loads(remote("ping").stdout)["version"] == __version__
    (tmp_path / "vm.json").write_text(body)
    done = remote("create", str(tmp_path / "vm.json"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for command in ("boot", "pause", "resume", "reboot"):
        assert remote(command).returncode == 0, command
    assert remote("resize", "--cpus", "4").returncode == 0
    info = json.loads(remote("info").stdout)
    assert (info["state"], info["config"]["cpus"]["boot_vcpus"]) == ("Running", 4)
    assert json.loads(remote("counters").stdout) == {"__exits": {"io": 7}}
    assert remote("shutdown").returncode == 0
    assert remote("delete").returncode == 0
    assert remote("create", stdin=body).returncode == 0
    assert remote("resize", "--memory", "1G").returncode == 0
    assert json.loads(remote("info").stdout)["memory_actual_size"] == 1 << 30


def test_power_button_and_shutdown_vmm(tmp_path: Path) -> None:
    for command in ("power-button", "shutdown-vmm"):
        path = tmp_path / command
        process = start("--kernel", "k", "--api-socket", str(path))
        wait_for_socket(process, path)
        with Client(path, timeout=PATIENCE) as client:
            while not _booted(client):
                pass
        assert chv("remote", "--api-socket", f"path={path}", command, fake=False).returncode == 0
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_is_told_with_its_reasons(remote: Remote) -> None:
    done = remote("boot")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "chv remote: Error from API\n"
        "  because: The VM could not boot\n"
        "  because: VM config is missing: create the VM first\n"
    )


def test_import_chv_loads_no_http() -> None:
    unwanted = ("waitress", "requests", "argparse", "http")
    code = f"import sys, chv; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout == "[]\n", done.stderr
