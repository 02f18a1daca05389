"""docs/virtqueues.md: its devices work."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.virtio_driver import QueueBench

from .test_compiled import ROOT


def page() -> str:
    return Path(ROOT, "docs/virtqueues.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """The names that the page's Python blocks define."""
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page(), re.MULTILINE | re.DOTALL):
        exec(block, names)
    return names


def test_the_device_answers_its_driver(shown: dict[str, Any]) -> None:
    device = shown["Entropy"]()
    assert len(shown["answer"](device, 100)) == 100
    assert len(shown["answer"](device, 5000)) == 4096
    assert device.counters() == {"delivered": 4196}


def test_a_device_that_waits_for_data_and_for_buffers(shown: dict[str, Any]) -> None:
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    with QueueBench(8) as bench:
        bench.queue.prepare()
        worker = threading.Thread(target=shown["deliver"], args=(bench.queue, read_end), daemon=True)
        worker.start()
        try:
            os.write(write_end, b"first, no buffer is there")
            head = bench.ring.add(writable=[10, 100])
            bench.queue.kick()
            assert bench.ring.wait(1) == [(head, 25)]
            heads = [bench.ring.add(writable=[3]) for _ in range(2)]
            bench.queue.kick()
            os.write(write_end, b"twothr")
            assert bench.ring.wait(2) == [(head, 3) for head in heads]
            assert bench.queue.error is None
        finally:
            bench.queue.stop()
            worker.join(30)
            os.close(read_end)
            os.close(write_end)
        assert not worker.is_alive()


def test_each_reason_is_in_the_table() -> None:
    rows = re.findall(r"^\| (an? .*|parts .*) \| [\d.]+ \|$", page(), re.MULTILINE)
    assert len(rows) == 8
