"""virtio-net and a hostile driver: a few inputs of the fuzzer's kind each time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz_net import Target, fuzz


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    made = Target()
    yield made
    made.close()


@given(st.binary(max_size=400))
def test_a_hostile_driver(target: Target, data: bytes) -> None:
    target.run(data)


def test_the_fuzzer_finds_different_behaviour(target: Target, tmp_path: Path) -> None:
    runs, kinds = 0, 0
    while runs < 20 or kinds < 5:
        more, found = fuzz(target, 0.5, runs, tmp_path / "input")
        runs, kinds = runs + more, max(kinds, found)


def test_the_fuzzer_would_notice_a_frame_that_may_not_leave(target: Target) -> None:
    target.bench.wire.near[0].send(bytes(60))
    with pytest.raises(AssertionError, match="a frame from 00:00:00:00:00:00 left"):
        target.run(b"")
    target.bench.device.stop()
