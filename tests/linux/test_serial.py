"""The serial line carries a login shell and whatever is pasted into it."""

from __future__ import annotations

import base64
import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path

from chv.testing import Console, Guest
from tests.guests import PASSWORD

PASTE = 100_000


def test_login_and_pasting_both_ways(guest: Callable[..., Guest]) -> None:
    vm = guest(cmdline="quiet guest.login", prompt=False)
    vm.login("root", PASSWORD)
    text = base64.encodebytes(random.Random(1).randbytes(PASTE * 3 // 4))
    assert len(text) > PASTE
    digest = hashlib.md5(text).hexdigest()
    # The terminal echoes all of it, so as many bytes come back at the same time.
    # The shell's line editor does not echo like the terminal does, so wait until it is out of the way.
    vm.send("echo go; cat > /dev/shm/paste\n")
    vm.wait_for_text("^go$")
    start = len(vm.console.raw_log)
    vm.send(text)
    vm.send(b"\x04")
    vm.wait_for_prompt(timeout=300)
    assert vm.run("md5sum < /dev/shm/paste").split()[0] == digest
    # Where the terminal has IXOFF set it also says when its buffer is nearly full, and when it is not.
    echoed = vm.console.raw_log[start:].translate(None, b"\x11\x13").replace(b"\r\n", b"\n")
    assert text in echoed
    start = len(vm.console.raw_log)
    vm.send("cat /dev/shm/paste; echo the-end\n")
    vm.wait_for_text("^the-end$", timeout=300)
    assert text in vm.console.raw_log[start:].replace(b"\r\n", b"\n")


def test_a_pty_keeps_what_nobody_reads_and_takes_a_late_reader(vm_factory: Callable[..., Guest]) -> None:
    from chv import VM
    from tests.linux.guests import BOOT_TIMEOUT, guest_files

    with VM(**guest_files("6.12"), cmdline="console=ttyS0 quiet", serial="pty") as vm:
        vm.boot()
        path = vm.info["config"]["serial"]["file"]
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        try:
            with Console(fd) as console:
                console.wait_for_prompt(BOOT_TIMEOUT)
                assert console.run("echo through a pty").output == "through a pty\n"
        finally:
            os.close(fd)


def test_a_file_has_the_whole_log(tmp_path: Path) -> None:
    from chv import VM
    from tests.linux.guests import BOOT_TIMEOUT, guest_files

    log = tmp_path / "serial.log"
    with VM(**guest_files("6.12"), cmdline="console=ttyS0 guest.then=poweroff", serial=f"file={log}") as vm:
        vm.boot()
        assert vm.wait(BOOT_TIMEOUT)
    text = log.read_text(errors="replace")
    assert "Linux version 6.12" in text
    assert "guest: ready" in text
    assert "Power down" in text
