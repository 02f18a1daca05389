"""What kind of image a disk's file is: chv reads raw ones."""

from __future__ import annotations

import os
from typing import Final

from ..config.schema import ImageType
from ..errors import ConfigError

# At the start of the file; the formats' own specifications, as file(1) and qemu-img know them too.
_MAGIC: Final = {
    b"QFI\xfb": "qcow2",
    b"vhdxfile": "vhdx",
    b"KDMV": "vmdk",
    b"# Disk DescriptorFile": "vmdk",
    b"conectix": "vpc",
    b"<<< Oracle VM VirtualBox Disk Image >>>": "vdi",
    b"<<< Sun xVM VirtualBox Disk Image >>>": "vdi",
    b"QED\0": "qed",
}
_VHD_FOOTER: Final = 512  # a fixed VHD is a raw image with this many bytes behind it
_NAMES: Final = {
    ImageType.QCOW2: "qcow2",
    ImageType.FIXED_VHD: "vpc",
    ImageType.VHDX: "vhdx",
    ImageType.FLAT_VMDK: "vmdk",
}


def check_type(wanted: ImageType, field: str) -> None:
    """ConfigError if ``image_type`` asks for what chv cannot read."""
    if wanted in _NAMES:
        raise ConfigError(
            f"{field}.image_type: chv reads raw images, not {wanted.value}: convert it with "
            f"`qemu-img convert -f {_NAMES[wanted]} -O raw`"
        )


def check_content(fd: int, size: int, path: str, field: str) -> None:
    """ConfigError if the file looks like an image that is not raw."""
    name = recognize(fd, size)
    if name is not None:
        raise ConfigError(
            f"{field}.path: {path} is a {name} image and chv reads raw ones: convert it with "
            f"`qemu-img convert -f {name} -O raw`. If it is a raw disk all the same, say so: "
            "image_type=raw (Raw in Python and over REST)"
        )


def recognize(fd: int, size: int) -> str | None:
    """qemu-img's name of the format; None: raw, as far as one can tell."""
    start = os.pread(fd, 64, 0)
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            return name
    if os.pread(fd, 8, max(0, size - _VHD_FOOTER)) == b"conectix":
        return "vpc"
    return None
