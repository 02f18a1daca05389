"""A Linux guest under the chv command, driven over REST: by the client, by chv remote and by curl."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chv.api.client import ApiError, Client
from chv.testing import Console
from tests.guests import SERIES
from tests.linux.guests import BOOT_TIMEOUT, guest_files


@pytest.fixture
def api_socket(tmp_path: Path) -> Iterator[Path]:
    """chv with nothing but its API; it must have ended cleanly after the test."""
    path = tmp_path / "ch-socket"
    process = subprocess.Popen([sys.executable, "-m", "chv", "--api-socket", str(path)])
    try:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield path
        assert process.wait(60) == 0
        assert not path.exists()
    finally:
        process.kill()
        process.wait()


def chv_remote(path: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "chv", "remote", "--api-socket", str(path), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def curl(path: Path, endpoint: str, body: str) -> int:
    """PUT as the document has it; the HTTP status."""
    command = ["curl", "-s", "-H", "Accept: application/json", "-H", "Content-Type: application/json"]
    command += ["-i", "-XPUT", "--unix-socket", str(path), "-d", body, f"http://localhost/api/v1/{endpoint}"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return int(answer.split()[1])


def online_total(console: Console, total: int) -> None:
    """Wait for the guest to have that many CPUs, and bring them all online."""
    console.run("cd /sys/devices/system/cpu").check()
    console.run(
        f"i=0; while [ $(ls -d cpu[0-9]* | wc -l) != {total} ] && [ $i -lt 100 ]; do "
        "sleep 0.2; i=$((i+1)); done; "
        "for c in cpu[1-9]*; do [ $(cat $c/online) = 1 ] || echo 1 > $c/online; done",
        120,
    ).check()
    assert console.run("nproc").output == f"{total}\n"


def test_the_whole_life_over_rest(api_socket: Path, tmp_path: Path) -> None:
    files = guest_files(SERIES[0])
    line = tmp_path / "serial"
    config = {
        "cpus": {"boot_vcpus": 4, "max_vcpus": 8},
        "memory": {"size": 1 << 30},
        "payload": {**files, "cmdline": "console=ttyS0 quiet"},
        "serial": {"mode": "Socket", "socket": str(line)},
        "console": {"mode": "Off"},
    }
    with Client(api_socket) as client, socket.socket(socket.AF_UNIX) as serial:
        with pytest.raises(ApiError) as not_created:
            client.boot()
        assert not_created.value.status == 404
        client.create(config)
        client.boot()
        serial.connect(str(line))
        with Console(serial) as console:
            console.wait_for_prompt(BOOT_TIMEOUT)
            client.resize(desired_vcpus=8)
            online_total(console, 8)
            info = client.info()
            assert info["state"] == "Running"
            assert [cpu["online"] for cpu in info["vcpus"]] == [True] * 8
            assert client.counters()["__serial"]["writes"] > 100

            chv_remote(api_socket, "resize", "--cpus", "2")
            online_total(console, 2)
            assert curl(api_socket, "vm.resize", '{"desired_vcpus":8}') == 204
            online_total(console, 8)
            assert curl(api_socket, "vm.resize", '{"desired_vcpus":9}') == 500
            assert curl(api_socket, "vm.resize", '{"desired_vcpus":"many"}') == 400

            client.reboot()
            console.wait_for("guest: ready", BOOT_TIMEOUT)
            console.wait_for_prompt()
            assert console.run("nproc").output == "8\n"

            client.pause()
            with pytest.raises(ApiError):
                client.pause()
            client.resume()
            assert console.run("nproc").output == "8\n"

            client.power_button()  # the guest powers off, and with it chv ends


def test_the_documents_command_line() -> None:
    """``chv`` with a terminal, curl, lscpu, reboot: the example that make demo runs."""
    files = guest_files(SERIES[0])
    demo = subprocess.run(
        [sys.executable, "-m", "examples.hotplug_demo", "--kernel", files["kernel"], "--initramfs",
         files["initramfs"], "--boot-timeout", str(BOOT_TIMEOUT)],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert demo.returncode == 0, demo.stdout + demo.stderr
