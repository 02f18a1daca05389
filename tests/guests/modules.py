"""Kernel modules out of an unpacked package: decompressed, in the order in which they load."""

from __future__ import annotations

import lzma
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.guests.cache import write_whole
from tests.guests.kernels import Kernel

DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def load_order(kernel: Kernel, names: Iterable[str]) -> list[Path]:
    """The .ko files of the named modules and of what they need, each after what it needs.

    A name that the kernel has built in gives nothing; one that it does not have at all
    raises LookupError.
    """
    files = {path.name.split(".ko")[0].replace("-", "_"): path for path in kernel.modules.rglob("*.ko*")}
    builtin = (kernel.modules / "modules.builtin").read_text()
    order: dict[str, Path] = {}

    def add(name: str) -> None:
        name = name.replace("-", "_")
        if name in order or f"/{name}.ko" in builtin.replace("-", "_"):
            return
        if name not in files:
            raise LookupError(f"{kernel.release} has no module {name}")
        path = decompressed(kernel, files[name])
        for needed in depends(path):
            add(needed)
        order[name] = path

    for name in names:
        add(name)
    return list(order.values())


def depends(module: Path) -> list[str]:
    """The modules that a .ko file says it needs (its .modinfo section)."""
    match = DEPENDS.search(module.read_bytes())
    return [name for name in match[1].decode().split(",") if name] if match else []


def decompressed(kernel: Kernel, module: Path) -> Path:
    """The plain .ko of a module that may be compressed: busybox and insmod want it so."""
    if module.suffix == ".ko":
        return module
    plain = kernel.folder / "ko" / f"{module.name.split('.ko')[0]}.ko"
    if not plain.exists():
        if module.suffix == ".xz":
            data = lzma.decompress(module.read_bytes())
        elif module.suffix == ".zst":
            data = subprocess.run(["zstd", "-dcq", module], capture_output=True, check=True).stdout
        else:
            raise ValueError(f"{module}: unknown compression")
        write_whole(plain, data)
    return plain
