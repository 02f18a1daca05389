"""Short runs of tests/fuzz_block.py: they reach each kind of request, and find mistakes made here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import block_model
from tests.fuzz_block import Corpus, Mismatch, Run, hammer


@pytest.fixture
def corpus() -> Iterator[Corpus]:
    with Corpus(seed=11) as made:
        yield made


@given(data=st.binary(max_size=400))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_request_is_answered_as_the_model_says(data: bytes, tmp_path: Path) -> None:
    Run(data, tmp_path).go()


def test_mutated_programs_reach_each_kind_of_request(corpus: Corpus) -> None:
    for _ in range(150):
        corpus.step()
    branches = {branch for pair in corpus.seen for branch in pair}
    assert branches >= {"no status", "short header", "flush", "id", "unknown", "flags", "cut 3"}
    assert branches >= {f"{what} {n}" for what in ("read", "write") for n in range(10)}
    assert branches >= {f"{what} behind the end" for what in ("read", "write", "range")}
    assert branches >= {f"{what} of odd length" for what in ("read", "write", "ranges")}
    assert branches >= {"write to a readonly disk", "ranges of a readonly disk"}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("IOERR", 2, "status"),
        ("UNSUPP", 1, "status"),
        ("SECTOR", 256, "used length|status|what was read|content"),
        ("GET_ID", 9, "used length|status"),
    ],
)
def test_a_rule_that_differs_is_found(
    corpus: Corpus, name: str, value: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_model, name, value)
    with pytest.raises(Mismatch, match=words):
        run(corpus, 100)


def run(corpus: Corpus, steps: int) -> None:
    for _ in range(steps):
        corpus.step()


def test_a_guest_that_scribbles_over_its_requests_harms_nobody_else(tmp_path: Path) -> None:
    def enough(outcomes: dict[str, int]) -> bool:
        return outcomes.get("chains", 0) > 500 and sum(outcomes.values()) > 500

    outcomes = hammer(enough, 5, tmp_path)
    assert outcomes["failed"] > 0
