"""These tests need /dev/kvm: without it they are skipped, in CI they fail."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest

from tests.support import require_kvm


@pytest.fixture(autouse=True, scope="session")
def kvm_is_there() -> None:
    require_kvm()


def open_descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the listing's own
    return found


@pytest.fixture(autouse=True)
def nothing_is_left_behind(kvm_is_there: None) -> Iterator[None]:
    """Each test gives back the threads and the KVM descriptors that it made."""
    gc.collect()
    threads = set(threading.enumerate())
    before = len(open_descriptors())
    yield
    left = [t.name for t in threading.enumerate() if t not in threads]
    assert not left, f"threads left behind: {left}"
    gc.collect()
    after = open_descriptors()
    assert len(after) <= before, f"descriptors left behind: {after}"
