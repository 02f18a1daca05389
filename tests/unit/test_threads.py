"""How the threads of a chv process take turns."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, threading
from chv.threads import take_turns_quickly
take_turns_quickly()
def slack():
    with open(f"/proc/{threading.get_native_id()}/timerslack_ns") as file:
        print(round(sys.getswitchinterval() * 1e6), file.read().strip())
slack()
thread = threading.Thread(target=slack)
thread.start()
thread.join()
"""


def test_a_thread_that_waits_for_another_is_there_soon() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert ran.stdout == "20 1000\n" * 2
