"""Debian's cloud kernels, downloaded and unpacked beside the checkout, never installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.guests.cache import cache, link
from tests.guests.vmlinux import unpack

SERIES = ("6.12", "6.1")
"""The kernel series that the tests boot, the one that the testbed itself runs first."""


@dataclass(frozen=True)
class Kernel:
    """One unpacked kernel package."""

    series: str
    folder: Path

    @property
    def bzimage(self) -> Path:
        """The kernel as the package ships it."""
        return next((self.folder / "boot").glob("vmlinuz-*"))

    @property
    def release(self) -> str:
        """What ``uname -r`` prints."""
        return self.bzimage.name.removeprefix("vmlinuz-")

    @property
    def modules(self) -> Path:
        """The folder of its modules."""
        for lib in ("lib", "usr/lib"):
            folder = self.folder / lib / "modules" / self.release
            if folder.is_dir():
                return folder
        raise FileNotFoundError(f"{self.folder}: no modules of {self.release} in it")

    @property
    def vmlinux(self) -> Path:
        """The unpacked ELF file, made from the bzImage when first asked for."""
        return unpack(self.bzimage, self.folder / "boot" / f"vmlinux-{self.release}")


def kernel(series: str = SERIES[0]) -> Kernel:
    """The kernel of a series; FileNotFoundError if it was not fetched (``make setup`` does)."""
    folder = cache() / "kernels" / series
    if not folder.exists():
        raise FileNotFoundError(f"no {series} kernel in {folder}: run `make setup`")
    return Kernel(series, folder.resolve())


def kernels() -> list[Kernel]:
    """Every kernel that was fetched."""
    return [kernel(series) for series in SERIES if (cache() / "kernels" / series).exists()]


def fetch(series: str) -> Kernel:
    """The kernel of a series, downloaded with apt if it is not here yet.

    LookupError when apt offers none, subprocess.CalledProcessError when the download fails.
    """
    home = cache() / "kernels"
    if not (home / series).exists():
        package = newest_package(series)
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=".fetch-") as work:
            # As root apt would drop to the user _apt, which may not write here.
            download = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package]
            subprocess.run(download, cwd=work, check=True)
            deb = next(Path(work).glob("*.deb"))
            subprocess.run(["dpkg-deb", "-x", deb, Path(work) / "root"], check=True)
            release = next((Path(work) / "root/boot").glob("vmlinuz-*")).name.removeprefix("vmlinuz-")
            folder = home / release
            shutil.rmtree(folder, ignore_errors=True)
            (Path(work) / "root").rename(folder)
        link(home / f"vmlinuz-{release}", folder / "boot" / f"vmlinuz-{release}")
        link(home / series, folder)
    return kernel(series)


def newest_package(series: str) -> str:
    """The newest cloud kernel package of a series that apt can download."""
    pattern = rf"^linux-image-{re.escape(series)}\.[0-9.]+([-+][a-z0-9]+)?-cloud-amd64$"
    found = subprocess.run(
        ["apt-cache", "search", "--names-only", pattern], capture_output=True, text=True, check=True
    )
    names = [line.split()[0] for line in found.stdout.splitlines()]
    for name in sorted(names, key=lambda n: [int(d) for d in re.findall(r"\d+", n)], reverse=True):
        policy = subprocess.run(["apt-cache", "policy", name], capture_output=True, text=True, check=True)
        if "Candidate: (none)" not in policy.stdout:
            return name
    raise LookupError(f"apt offers no linux-image-{series}.*-cloud-amd64 (is `apt-get update` done?)")
