"""A disk image in Clear Linux's shape, booted with firmware and without, reached over the network."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chv.testing import Guest
from tests.images import ClearImage, cloudhv, find
from tests.support import require

BOOT_TIMEOUT = 300.0


@pytest.fixture
def image(tmp_path: Path) -> Iterator[ClearImage]:
    try:
        copy = find().copy(tmp_path)
    except FileNotFoundError as error:
        require(False, str(error))
        raise
    yield copy
    copy.path.unlink()


def firmware() -> str:
    try:
        return str(cloudhv())
    except FileNotFoundError as error:
        require(False, str(error))
        raise


def inside(image: ClearImage, command: str, timeout: float = 120) -> str:
    """What a command prints that ssh runs in the guest."""
    done = subprocess.run(image.ssh(command), capture_output=True, text=True, timeout=timeout, check=True)
    return done.stdout.strip()


def wait_for_ssh(image: ClearImage, timeout: float = BOOT_TIMEOUT) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            inside(image, "true", timeout=60)
            return
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "with_firmware",
    [pytest.param(False, id="without firmware"), pytest.param(True, id="EDK2", marks=pytest.mark.firmware)],
)
def test_the_documents_story(image: ClearImage, with_firmware: bool) -> None:
    """``chv`` with the document's options; ssh; 4 vCPUs more over curl, brought online, kept over a reboot.

    So are the PCI addresses and a file. The example checks each step and ends with 0 only if all was right.
    """
    command = [sys.executable, "-u", "-m", "examples.image_demo", "--disk", str(image.path)]
    command += ["--key", str(image.key), "--address", image.address, "--gateway", image.gateway]
    command += ["--firmware", firmware()] if with_firmware else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as story:
        try:
            print(story.communicate(timeout=850)[0])
        except subprocess.TimeoutExpired:
            story.send_signal(signal.SIGINT)  # it takes its chv with it
            raise
    assert story.returncode == 0


def test_the_other_kernel_of_the_image(vm_factory: Callable[..., Guest], image: ClearImage) -> None:
    vm = vm_factory(
        disks=f"path={image.path}",
        boot_entry=image.entries["6.1"],
        net=f"tap=,mac=,ip={image.gateway},mask={image.mask}",
        memory="1G",
    )
    vm.boot()
    wait_for_ssh(image)
    assert inside(image, "uname -r").startswith("6.1.")
