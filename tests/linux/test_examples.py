"""The examples that bring a device of their own, with the guest that they were written for."""

from __future__ import annotations

import sys

import pytest

from examples import acpi_device, ram_disk
from tests.linux.guests import BOOT_TIMEOUT, guest_files


def arguments(*more: str) -> list[str]:
    files = guest_files("6.12")
    return [
        "example", "--kernel", files["kernel"], "--initramfs", files["initramfs"],
        "--boot-timeout", str(BOOT_TIMEOUT), *more,
    ]  # fmt: skip


def test_a_disk_in_python(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", arguments("--cmdline", "quiet guest.devices"))
    ram_disk.main()
    assert capsys.readouterr().out == "written by the guest\n32768\nwritten by the guest\n\n"


def test_a_device_that_acpi_describes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", arguments())
    acpi_device.main()
    assert capsys.readouterr().out.endswith("hello from the guest\r\n\n")
