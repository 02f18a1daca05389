"""The image that was built: where it is, how to get in, and copies of it that a test may write to."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.guests.cache import cache
from tests.guests.initramfs import PASSWORD
from tests.images import layout

STABLE_NAME = "clear.img"
"""The symbolic link to the newest image, in the folder of the images."""

KEY_NAME = "id_ed25519"
"""The ssh key that opens every image of the folder, made with the first one."""


@dataclasses.dataclass(frozen=True)
class ClearImage:
    """An image in the shape of Clear Linux's KVM image.

    A guest with a virtio-net device has ``address`` on it and routes by ``gateway``: give that address to the
    host's tap. That is eth0; a second interface, eth1, has 192.168.250.2, and so on up to eth3.
    """

    path: Path
    key: Path
    """Private ssh key of ``user``."""
    entries: Mapping[str, str]
    """Kernel series to the file name of its boot entry: ``{"6.12": "Clear-linux-kvm-6.12.117.conf", ...}``.
    The first one is the default."""
    user: str = "root"
    password: str = PASSWORD
    address: str = layout.address(0)
    gateway: str = layout.gateway(0)
    mask: str = "255.255.255.0"

    def copy(self, folder: Path, *, default: str | None = None, name: str = STABLE_NAME) -> ClearImage:
        """The same image in another folder, to be written to; holes stay holes.

        ``default``: the kernel series that boots when nobody chooses, in place of the first of ``entries``.
        """
        path = folder / name
        subprocess.run(["cp", "--sparse=always", "--reflink=auto", self.path.resolve(), path], check=True)
        path.chmod(0o644)
        copied = dataclasses.replace(self, path=path)
        if default is not None:
            if default not in self.entries:
                raise LookupError(f"{self.path} has no kernel {default}: {', '.join(self.entries)}")
            copied.write("loader/loader.conf", layout.loader_conf(layout.pattern(default)).encode())
        return copied

    def read(self, name: str) -> bytes:
        """A file of the EFI system partition: ``read("loader/loader.conf")``."""
        command = ["mtype", "-i", layout.esp_in(self.path), f"::{name}"]
        return subprocess.run(command, check=True, capture_output=True).stdout

    def write(self, name: str, data: bytes) -> None:
        """Put a file into the EFI system partition, in place of one of that name. Only in a copy."""
        command = ["mcopy", "-o", "-i", layout.esp_in(self.path), "-", f"::{name}"]
        subprocess.run(command, input=data, check=True, capture_output=True)

    def ssh(self, *command: str, connect_timeout: int = 60) -> list[str]:
        """The arguments of an ssh that runs a command in the guest, for subprocess.

        The guest is known by its address alone: nothing is read from or written to the user's ssh files.
        """
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": str(connect_timeout),
            "IdentitiesOnly": "yes",
            "LogLevel": "ERROR",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return ["ssh", "-F", "none", *words, "-i", str(self.key), f"{self.user}@{self.address}", *command]


def find(folder: Path | None = None) -> ClearImage:
    """The image in ``.cache/images`` or another folder; FileNotFoundError if none was built.

    It is shared by all tests: none writes to it, each takes a ``copy()``.
    """
    folder = folder or cache() / "images"
    path = folder / STABLE_NAME
    if not path.exists():
        raise FileNotFoundError(f"no {path}: run `python -m tests.images`")
    entries = json.loads(path.resolve().with_suffix(".json").read_text())["entries"]
    return ClearImage(path, folder / KEY_NAME, entries)
