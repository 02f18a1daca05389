"""Building the image, step by step, unless one of the same content is there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.guests.cache import digest, link, write_whole
from tests.guests.kernels import SERIES, Kernel, fetch
from tests.images import disk, layout, rootfs
from tests.images.image import KEY_NAME, STABLE_NAME, ClearImage, find
from tests.images.initrd import initrd

TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "mcopy": "mtools",
    "mkfs.vfat": "dosfstools",
    "sfdisk": "fdisk",
    "mke2fs": "e2fsprogs",
    "fallocate": "util-linux",
    "busybox": "busybox-static",
    "ssh-keygen": "openssh-client",
}
"""Programs that are called, with the Debian package that each is in."""


def build(folder: Path) -> ClearImage:
    """The image in a folder, built unless it is there.

    FileNotFoundError for missing tools, LookupError for packages that apt does not know,
    subprocess.CalledProcessError or RuntimeError for tools that fail.
    """
    check_tools()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kernels = get_kernels()
        public_key = make_key(folder / KEY_NAME)
        initrds = {kernel.release: initrd(kernel) for kernel in kernels}
        path = folder / f"clear-shaped-{recipe(initrds, public_key)}.img"
        if not path.exists():
            make(path, kernels, initrds, public_key)
            link(folder / STABLE_NAME, path)
            remove_others(path)
        link(folder / STABLE_NAME, path)
    return find(folder)


def check_tools() -> None:
    """FileNotFoundError if a program is missing, with the packages to install."""
    # mkfs.vfat, mke2fs and sfdisk are not in the PATH of a user who is not root.
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        raise FileNotFoundError(f"these Debian packages are missing: {' '.join(missing)}")


def get_kernels() -> list[Kernel]:
    """The kernels of the image: every series that apt has, the first one at least."""
    kernels = [fetch(SERIES[0])]
    for series in SERIES[1:]:
        try:
            kernels.append(fetch(series))
        except LookupError as error:
            print(f"image: without the {series} kernel: {error}", file=sys.stderr)
    return kernels


def make_key(key: Path) -> str:
    """The public half of the ssh key, which is made if it is not there."""
    public = key.with_suffix(".pub")
    if not (key.exists() and public.exists()):
        key.unlink(missing_ok=True)
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tests of chv", "-f", str(key)]
        subprocess.run(command, check=True)
    return public.read_text()


def recipe(initrds: dict[str, bytes], public_key: str) -> str:
    """A name for what goes into the image: the files that it is made by, kernels, initrds and the key.

    Debian's packages count by name only: an image is not built again because one of them was updated.
    """
    here = Path(__file__).parent
    modules = [here / f"{name}.py" for name in ("build", "disk", "initrd", "layout", "rootfs")]
    sources = [*modules, rootfs.FINISH, *sorted(path for path in rootfs.FILES.rglob("*") if path.is_file())]
    parts = [str(path.relative_to(here)).encode() + b"\0" + path.read_bytes() for path in sources]
    parts += [public_key.encode()]
    for release, data in initrds.items():
        parts += [release.encode(), data]
    return digest(parts)


def make(path: Path, kernels: Sequence[Kernel], initrds: dict[str, bytes], public_key: str) -> None:
    """Build the image in a temporary folder beside ``path`` and move it there."""
    log = path.with_name("build.log")
    log.write_bytes(b"")
    started = time.monotonic()
    with working_folder(path.parent) as work:
        root, draft = work / "root", work / "image"
        with step(f"Debian packages: {len(rootfs.PACKAGES)} and what they need"):
            rootfs.build(root, work, kernels, public_key, log)
        with step("partition table"):
            disk.make_table(draft)
        with step(f"EFI system partition with {' and '.join(kernel.release for kernel in kernels)}"):
            disk.make_esp(draft, esp_files(kernels, initrds, (root / rootfs.BOOT_LOADER).read_bytes()))
        with step("root file system"):
            disk.make_root(draft, root, rootfs.as_owner())
            disk.make_sparse(draft)
        entries = {kernel.series: layout.entry_name(kernel.release) for kernel in kernels}
        write_whole(path.with_suffix(".json"), json.dumps({"entries": entries}, indent=2).encode())
        draft.chmod(0o444)
        draft.rename(path)
    size, seconds = disk.allocated(path) // 1_000_000, time.monotonic() - started
    print(f"image: {path}, {size} MB on disk, {seconds:.0f} s", flush=True)


def esp_files(kernels: Sequence[Kernel], initrds: dict[str, bytes], boot_loader: bytes) -> dict[str, bytes]:
    """The files of the EFI system partition.

    The default's come first: rust-hypervisor-firmware falls back to the first entry of the folder.
    """
    # As in Clear Linux's images, the default is the entry's name without ".conf".
    default = layout.entry_name(kernels[0].release).removesuffix(".conf")
    files = {
        layout.BOOT_LOADER: boot_loader,
        "loader/loader.conf": layout.loader_conf(default).encode(),
    }
    for kernel in kernels:
        files[f"loader/entries/{layout.entry_name(kernel.release)}"] = layout.entry(kernel.release).encode()
        files[layout.kernel_path(kernel.release)] = kernel.bzimage.read_bytes()
        files[layout.initrd_path(kernel.release)] = initrds[kernel.release]
    return files


def remove_others(path: Path) -> None:
    """Remove the images that this one replaces."""
    for old in path.parent.glob("clear-shaped-*"):
        if old.stem != path.stem:
            old.unlink()


@contextlib.contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, whoever owns what is in it."""
    work = Path(tempfile.mkdtemp(dir=parent, prefix=".build-"))
    # mmdebstrap of a user who is not root works under another user's number.
    work.chmod(0o755 if os.geteuid() == 0 else 0o777)
    try:
        yield work
    finally:
        subprocess.run([*rootfs.as_owner(), "rm", "-rf", *work.iterdir()], check=False)
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Print a line when something begins, and how long it took when it is done."""
    print(f"image: {title} ...", end="", flush=True)
    started = time.monotonic()
    try:
        yield
    except BaseException:
        print(" failed", flush=True)
        raise
    print(f" {time.monotonic() - started:.1f} s", flush=True)
