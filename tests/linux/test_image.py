"""A disk image in Clear Linux's shape, booted with firmware and without, reached over the network."""

from __future__ import annotations

import hashlib
import os
import subprocess
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


def network(image: ClearImage) -> str:
    return f"tap=,mac=,ip={image.gateway},mask={image.mask}"


def inside(image: ClearImage, command: str, timeout: float = 120, **options: object) -> str:
    """What a command prints that ssh runs in the guest."""
    done = subprocess.run(
        image.ssh(command), capture_output=True, text=True, timeout=timeout, check=True, **options
    )  # type: ignore[call-overload]
    assert isinstance(done.stdout, str)
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


def boot_id(image: ClearImage) -> str:
    return inside(image, "cat /proc/sys/kernel/random/boot_id")


def reboot(image: ClearImage) -> None:
    before = boot_id(image)
    subprocess.run(image.ssh("reboot"), capture_output=True, timeout=60, check=False)
    deadline = time.monotonic() + BOOT_TIMEOUT
    while True:
        assert time.monotonic() < deadline
        time.sleep(2)
        wait_for_ssh(image)
        if boot_id(image) != before:
            return


def addresses(image: ClearImage) -> str:
    return inside(
        image, "cd /sys/bus/pci/devices; for d in *; do echo $d $(cat $d/device) $(head -1 $d/resource); done"
    )


def resize_and_reboot(vm: Guest, image: ClearImage) -> None:
    assert inside(image, "nproc") == "2"
    vm.resize(desired_vcpus=4)
    script = (
        "for i in 2 3; do while [ ! -e /sys/devices/system/cpu/cpu$i/online ]; do sleep 0.2; done; done; "
    )
    inside(image, script + "echo 1 | tee /sys/devices/system/cpu/cpu[23]/online")
    assert inside(image, "nproc") == "4"
    before = addresses(image)
    inside(image, "echo kept > /root/mark; sync")
    reboot(image)
    assert inside(image, "nproc") == "4"
    assert addresses(image) == before
    assert inside(image, "cat /root/mark") == "kept"


def transfer(image: ClearImage) -> None:
    """A megabyte each way, its checksum compared."""
    data = os.urandom(1 << 20)
    sent = subprocess.run(
        image.ssh("tee /root/data | md5sum"), input=data, capture_output=True, timeout=120, check=True
    )
    back = subprocess.run(image.ssh("cat /root/data"), capture_output=True, timeout=120, check=True)
    assert back.stdout == data
    assert sent.stdout.split()[0].decode() == hashlib.md5(data).hexdigest()


def test_an_image_boots_without_firmware(vm_factory: Callable[..., Guest], image: ClearImage) -> None:
    vm = vm_factory(disks=f"path={image.path}", net=network(image), cpus="boot=2,max=4", memory="1G")
    vm.boot()
    wait_for_ssh(image)
    inside(image, f"ping -c 3 -W 10 {image.gateway}")
    transfer(image)
    resize_and_reboot(vm, image)
    fio = "fio --name=v --filename=/root/fio --size=16m --bs=4k --rw=randwrite --verify=crc32c --direct=1"
    inside(image, f"{fio} --ioengine=libaio --iodepth=16 --minimal", timeout=300)


@pytest.mark.firmware
def test_an_image_boots_with_edk2(vm_factory: Callable[..., Guest], image: ClearImage) -> None:
    vm = vm_factory(
        kernel=firmware(), disks=f"path={image.path}", net=network(image), cpus="boot=2,max=4", memory="1G"
    )
    vm.boot()
    wait_for_ssh(image)
    transfer(image)
    resize_and_reboot(vm, image)


def test_the_other_kernel_of_the_image(vm_factory: Callable[..., Guest], image: ClearImage) -> None:
    vm = vm_factory(
        disks=f"path={image.path}", boot_entry=image.entries["6.1"], net=network(image), memory="1G"
    )
    vm.boot()
    wait_for_ssh(image)
    assert inside(image, "uname -r").startswith("6.1.")
