"""The API's socket: who may open it, and whose place it takes."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from chv.api.client import Client
from chv.api.listener import open_listener
from chv.api.server import ApiServer
from chv.errors import ConfigError
from chv.vmm import Vmm


def test_only_its_user_can_open_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    before = os.umask(0)
    try:
        listener = open_listener(str(path))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(f"{path}.lock").stat().st_mode) == 0o600
    listener.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spec", ["{}", "path={}"])
def test_both_spellings_of_a_path(tmp_path: Path, spec: str) -> None:
    listener = open_listener(spec.format(tmp_path / "s"))
    assert listener.path == str(tmp_path / "s")
    listener.close()


def test_a_stale_socket_and_a_stale_lock_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    Path(f"{path}.lock").touch()
    with ApiServer(Vmm(), str(path)), Client(path) as client:
        client.ping()
    assert list(tmp_path.iterdir()) == []


def test_the_socket_of_a_killed_vmm_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    code = (
        "import os, signal, sys; from chv.api.listener import open_listener; "
        "listener = open_listener(sys.argv[1]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60)
    assert path.is_socket()
    open_listener(str(path)).close()
    assert list(tmp_path.iterdir()) == []


def test_another_vmm_is_refused_and_unharmed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with ApiServer(Vmm(), str(path)), Client(path) as client:
        with pytest.raises(ConfigError, match=rf"^api-socket: {path} is in use by another VMM$"):
            open_listener(str(path))
        client.ping()
        assert Path(f"{path}.lock").exists()


def test_a_live_socket_without_a_lock_is_refused_and_unharmed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        with pytest.raises(ConfigError, match=rf"^api-socket: {path} is in use by another process$"):
            open_listener(str(path))
        assert path.is_socket()
    assert not Path(f"{path}.lock").exists()


def test_a_file_is_never_deleted(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(ConfigError, match=rf"^api-socket: {path} exists and is not a socket$"):
        open_listener(str(path))
    assert path.read_text() == "precious"
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(ConfigError, match="exists and is not a socket"):
        open_listener(str(link))
    assert link.is_symlink()


def test_a_successor_at_the_path_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = open_listener(str(path))
    path.unlink()
    path.write_text("somebody else's")
    listener.close()
    assert path.read_text() == "somebody else's"


def test_a_listening_socket_that_was_passed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    with ApiServer(Vmm(), f"fd={sock.detach()}"), Client(path) as client:
        client.ping()
    assert path.is_socket(), "it was made by somebody else"


def test_stopping_twice_and_without_starting(tmp_path: Path) -> None:
    server = ApiServer(Vmm(), str(tmp_path / "s"))
    server.stop()
    server.stop()
    assert list(tmp_path.iterdir()) == []


def test_serving_many_times_leaks_no_descriptors(tmp_path: Path) -> None:
    def rounds(count: int) -> int:
        for _ in range(count):
            with ApiServer(Vmm(), str(tmp_path / "s")), Client(tmp_path / "s") as client:
                client.ping()
        return len(os.listdir("/proc/self/fd"))

    assert rounds(3) == rounds(10)


def test_descriptors_above_the_limit_of_select(tmp_path: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] != resource.RLIM_INFINITY and limits[1] < 2000:
        pytest.skip("this user may not open 2000 files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, limits[1]))
    held: list[int] = []
    try:
        held = [os.dup(0) for _ in range(1100)]
        with ApiServer(Vmm(), str(tmp_path / "s")), Client(tmp_path / "s", timeout=20) as client:
            client.ping()
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
