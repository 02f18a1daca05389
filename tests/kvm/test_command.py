"""``chv`` and ``chv remote`` with real machines, whose kernels are a few bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chv.api.client import ApiError, Client
from tests.unit.boot_images import ElfFile, Load
from tests.unit.chv_process import PATIENCE, ROOT, chv, wait_for_socket

# 32-bit code, entered by PVH; ports and values: chv.layout and the ACPI power registers
HALT = "f4 eb fd"  # hlt; jmp to it
POWER_OFF = "66 ba 00 06 b0 34 ee"  # mov dx, 0x600; mov al, 0x34; out dx, al
SAY_HI = "66 ba f8 03 b0 48 ee b0 69 ee b0 0a ee"  # "Hi\n" to COM1
INVALID = "0f 0b"  # ud2, with no interrupt table: a triple fault


@pytest.fixture
def kernel(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    path = tmp_path / "kernel"
    code = bytes.fromhex(request.param)
    path.write_bytes(ElfFile(loads=[Load(code.ljust(64, b"\xf4"))]).build())
    return str(path)


@pytest.mark.parametrize("kernel", [SAY_HI + POWER_OFF + HALT], indirect=True)
def test_a_guest_speaks_and_powers_off(kernel: str) -> None:
    done = chv("--kernel", kernel, "--serial", "tty", "--console", "off", fake=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hi\n", "")


@pytest.mark.parametrize("kernel", [INVALID], indirect=True)
def test_a_guest_that_crashes_is_described(kernel: str) -> None:
    done = chv("--kernel", kernel, fake=False)
    assert done.returncode == 1
    assert "triple fault" in done.stderr
    assert "rip=0000000001000000" in done.stderr
    assert "0f 0b" in done.stderr


@pytest.mark.parametrize("kernel", [HALT], indirect=True)
def test_resize_over_rest_and_the_command(kernel: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    command = [sys.executable, "-m", "chv", "--kernel", kernel, "--cpus", "boot=4,max=8"]
    process = subprocess.Popen([*command, "--api-socket", str(path)], cwd=ROOT, text=True)
    try:
        wait_for_socket(process, path)
        with Client(path, timeout=PATIENCE) as client:
            _until_running(client)
            assert (
                chv("remote", "--api-socket", str(path), "resize", "--cpus", "8", fake=False).returncode == 0
            )
            info = client.info()
            assert info["config"]["cpus"]["boot_vcpus"] == 8
            assert info["hotplug"]["present_vcpus"] == 8
            client.resize(desired_vcpus=4)
            with pytest.raises(ApiError) as caught:  # this guest never gives one back
                client.resize(desired_vcpus=5)
            assert caught.value.status == 429
            client.pause()
            with pytest.raises(ApiError) as caught:
                client.pause()
            assert caught.value.status == 500
            client.resume()
            client.reboot()
            assert client.info()["hotplug"]["present_vcpus"] == 4
            client.shutdown()
            client.boot()
            assert client.info()["state"] == "Running"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert not path.exists()
    finally:
        process.kill()
        process.wait()


def _until_running(client: Client) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if client.info()["state"] == "Running":
                return
        except ApiError:
            assert time.monotonic() < deadline
        time.sleep(0.02)
