"""Unpacked kernels kept on disk."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from chv import boot
from chv.boot import cache, decompress
from chv.errors import ConfigError
from chv.memory import GuestMemory

from .boot_images import MiB, bzimage, vmlinux


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage("zstd"))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kernels"


def no_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise AssertionError("unpacked again")

    monkeypatch.setattr(decompress, "unpack", refuse)


def placed(kernel: Path, folder: Path) -> bytes:
    memory = GuestMemory(32 * MiB)
    with boot.prepare(kernel, cache_dir=folder) as payload:
        assert payload.place(memory).protocol == "pvh"
    data = memory.read(0x100_0000, 2 * MiB)
    memory.close()
    return data


def test_a_kernel_is_unpacked_once(kernel: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = placed(kernel, folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (kept,) = folder.iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert kept.read_bytes() == vmlinux()
    no_unpacking(monkeypatch)
    assert placed(kernel, folder) == first


def test_another_kernel_is_another_file(kernel: Path, folder: Path) -> None:
    placed(kernel, folder)
    kernel.write_bytes(bzimage("zstd", vmlinux() + b"other"))
    placed(kernel, folder)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", vmlinux()[:-1], bytes(len(vmlinux()))])
def test_a_damaged_file_is_replaced(
    kernel: Path, folder: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    first = placed(kernel, folder)
    (kept,) = folder.iterdir()
    kept.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert placed(kernel, folder) == first
    assert f"{kept} is removed" in caplog.text
    assert kept.read_bytes() == vmlinux()


def test_without_a_pvh_entry_nothing_is_kept(kernel: Path, folder: Path) -> None:
    kernel.write_bytes(bzimage(data=vmlinux(notes=None)))
    boot.prepare(kernel, cache_dir=folder).close()
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_does_no_harm(
    kernel: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        placed(kernel, folder)
    assert "No space left on device" in caplog.text
    assert list(folder.iterdir()) == []  # nothing half-written stays


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_refused(kernel: Path, folder: Path, mode: int) -> None:
    folder.mkdir(parents=True)
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=rf"cache_dir: .* has mode {mode:o}; it must be yours"):
        placed(kernel, folder)


def test_a_folder_that_is_a_file(kernel: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache_dir: .* cannot be used \(File exists\)"):
        placed(kernel, kernel)
    with pytest.raises(ConfigError, match=r"cache_dir: .* cannot be used \((Not a directory|File exists)\)"):
        placed(kernel, kernel / "below")


def test_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.default_directory() == Path("/somewhere/chv/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    monkeypatch.setenv("HOME", "/home/me")
    assert cache.default_directory() == Path("/home/me/.cache/chv/kernels")
