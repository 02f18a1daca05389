"""A copy of the checkout whose compiled modules have instruments in them."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
SHARED = ("tests", "examples", "benchmarks", "docs", "pyproject.toml", "README.md", "Makefile", "tools")

FLAGS = {
    "address": "-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "coverage": "-g -O2 -fsanitize-coverage=trace-pc",
}


def build(kind: str) -> Path:
    """The folder with the build, made or brought up to date; ``kind`` is one of :data:`FLAGS`.

    Raises ``subprocess.CalledProcessError`` with the compiler's output if it fails.
    """
    folder = ROOT / ".work" / f"build-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        copy_sources(folder)
        if kind == "coverage":
            compile_counters(folder)
        flags = FLAGS[kind]
        # The counters are in a library that is loaded before everything else.
        link = flags if kind == "address" else ""
        env = {**os.environ, "CFLAGS": flags, "LDFLAGS": link}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", f"-j{os.cpu_count() or 1}"]
        subprocess.run(
            command, cwd=folder, env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    return folder


def copy_sources(folder: Path) -> None:
    """Only what changed, so that only that is compiled again; Cython's C last, so that it counts as new."""
    wanted = {ROOT / "setup.py", *(path for path in (ROOT / "chv").rglob("*") if path.is_file())}
    for path in sorted(wanted, key=lambda path: (path.suffix == ".c", path)):
        target = folder / path.relative_to(ROOT)
        if path.suffix in (".so", ".pyc", ".html") or (path.suffix == ".c" and out_of_date(path)):
            continue
        if not target.exists() or target.read_bytes() != path.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for path in (folder / "chv").rglob("*"):
        if path.suffix in (".py", ".pyx", ".pxd") and ROOT / path.relative_to(folder) not in wanted:
            path.unlink()
    for name in (*SHARED, ".cache"):
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(ROOT / name)


def out_of_date(generated: Path) -> bool:
    """Whether a C file is older than something that it may have been made of."""
    made = generated.stat().st_mtime
    return any(path.stat().st_mtime > made for path in (ROOT / "chv").rglob("*.p[yx][xd]"))


def compile_counters(folder: Path) -> None:
    """The library with the map of edges."""
    command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(folder / "edges.so"), str(HERE / "edges.c")]
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def environment(kind: str, folder: Path) -> Mapping[str, str]:
    """What a process that imports the build needs."""
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    if kind == "coverage":
        return {**env, "LD_PRELOAD": str(folder / "edges.so")}
    libraries = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        **env,
        "LD_PRELOAD": " ".join(libraries),
        # Python's own allocator would hide what is behind a block; it leaks by design at its end.
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
