"""Compiles the C floor and the C-level devices into .work/benchmarks/, when a source is newer."""

from __future__ import annotations

import fcntl
import importlib.machinery
import importlib.util
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from .environment import ROOT

SOURCES = Path(__file__).resolve().parent
BUILT = ROOT / ".work" / "benchmarks"


class BuildError(RuntimeError):
    """A compiler failed; the message has what it said."""


def floor() -> Path:
    """The C program, compiled with the system's ``cc``. Raises :class:`BuildError`."""
    source = SOURCES / "floor" / "floor.c"
    return _built(
        BUILT / "floor",
        [source],
        lambda target: _run(
            [
                "cc",
                "-std=gnu11",
                "-O2",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-pthread",
                "-o",
                str(target),
                str(source),
            ]
        ),
    )


def device() -> ModuleType:
    """The module compiled from device.pyx, by Cython and the system's ``cc``. Raises :class:`BuildError`."""
    import chv

    source = SOURCES / "device.pyx"
    package = Path(chv.__file__).parent
    interface = package / "_bus.pxd"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    path = _built(
        BUILT / f"device{suffix}",
        [source, interface],
        lambda target: _compile(source, package.parent, target),
    )
    loader = importlib.machinery.ExtensionFileLoader("device", str(path))
    spec = importlib.util.spec_from_file_location("device", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _compile(source: Path, include: Path, target: Path) -> None:
    translated = BUILT / "device.c"
    _run([sys.executable, "-m", "cython", "-I", str(include), "-o", str(translated), str(source)])
    shared = ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-pthread", f"-I{sysconfig.get_paths()['include']}"]
    _run([*shared, "-o", str(target), str(translated)])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        raise BuildError(f"{command[0]} is not installed; the benchmarks need a C compiler") from None
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}".rstrip())


def _built(target: Path, sources: list[Path], build: Callable[[Path], None]) -> Path:
    """``target``, built first if it is older than a source; one process at a time."""
    newest = max(source.stat().st_mtime for source in sources)
    if target.exists() and target.stat().st_mtime >= newest:
        return target
    BUILT.mkdir(parents=True, exist_ok=True)
    with _locked(BUILT / "lock"):
        if not target.exists() or target.stat().st_mtime < newest:
            half = target.with_name(f"half-{target.name}")
            build(half)
            half.replace(target)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    print(floor())
    print(device().__file__)
