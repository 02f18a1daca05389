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
STRICT = ("-std=gnu11", "-Wall", "-Wextra", "-Werror")


class BuildError(RuntimeError):
    """A compiler failed; the message has what it said."""


def floor() -> Path:
    """The C program, compiled with the system's ``cc``. Raises :class:`BuildError`."""
    source = SOURCES / "floor" / "floor.c"
    return built(
        BUILT / "floor", [source], lambda target: compiled(target, "-O2", "-pthread", *STRICT, str(source))
    )


def device() -> ModuleType:
    """The devices of device.pyx. Raises :class:`BuildError`."""
    return extension("device")


def extension(name: str) -> ModuleType:
    """A module compiled from NAME.pyx, by Cython and the system's ``cc``. Raises :class:`BuildError`."""
    import chv

    source = SOURCES / f"{name}.pyx"
    package = Path(chv.__file__).parent
    path = built(
        BUILT / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}",
        [source, package / "_bus.pxd"],
        lambda target: _translated(source, package.parent, target),
    )
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _translated(source: Path, include: Path, target: Path) -> None:
    translated = BUILT / f"{source.stem}.c"
    _run([sys.executable, "-m", "cython", "-I", str(include), "-o", str(translated), str(source)])
    headers = f"-I{sysconfig.get_paths()['include']}"
    compiled(target, "-shared", "-fPIC", "-O2", "-Wall", "-pthread", headers, str(translated))


def compiled(target: Path, *arguments: str) -> None:
    """Have the system's ``cc`` make ``target``. Raises :class:`BuildError`."""
    _run(["cc", *arguments, "-o", str(target)])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        raise BuildError(f"{command[0]} is not installed; the benchmarks need a C compiler") from None
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}".rstrip())


def built(target: Path, sources: list[Path], build: Callable[[Path], None]) -> Path:
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
