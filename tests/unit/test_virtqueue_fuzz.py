"""Short runs of tests/fuzz_virtqueue.py: they reach each kind of broken ring, and find mistakes made here."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import fuzz_virtqueue, virtqueue_model
from tests.fuzz_virtqueue import Corpus, Mismatch, Run, hammer
from tests.virtqueue_model import Model

BROKEN = [
    "the available index is further ahead than the queue is long",
    "a descriptor's index is beyond its table",
    "a descriptor chain is longer than the queue",
    "a buffer or a table of descriptors is not in RAM",
    "an indirect descriptor is nested, of a bad length, chained on, or was not negotiated",
    "a readable buffer follows a writable one",
]


@given(st.binary(max_size=600))
def test_any_program_of_driver_and_device_does_what_the_model_says(data: bytes) -> None:
    Run(data).go()


def test_asking_for_kicks_that_moves_the_index_breaks_both() -> None:
    program = Run(b"\x63")  # iterate for up to 100 chains
    with contextlib.closing(program.memory), contextlib.closing(program.queue):
        for ring in (program.queue, program.model):
            ring.enable(16, 0x1000, 0x1802, 0x1804, event_idx=False, indirect=False)
        program.put(0x1000, bytes(16))
        program.serve()
        program.compare()
        assert program.model.error == virtqueue_model.BAD_INDEX


def test_mutated_programs_reach_each_kind_of_broken_ring() -> None:
    corpus = Corpus(seed=3)
    for _ in range(600):
        corpus.step()
    branches = {branch for pair in corpus.seen for branch in pair}
    assert branches >= {f"error {n}" for n in range(1, 8)}
    assert branches >= {
        "enabled",
        "given back",
        "done and void",
        "signal True",
        "signal False",
        "kicks on True",
    }
    assert branches >= {"table after 0", "table after 1"}


@pytest.mark.parametrize(
    "rule", ["BAD_INDEX", "BAD_HEAD", "LOOP", "BAD_ADDRESS", "BAD_INDIRECT", "BAD_ORDER"]
)
def test_a_rule_that_differs_is_found(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtqueue_model, rule, virtqueue_model.BAD_RING)
    corpus = Corpus(seed=3)
    with pytest.raises(Mismatch, match=r"^error: "):
        run(corpus, 600)


def test_a_lost_interrupt_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: Model) -> None:
        """As signal(), but the event of the first chain since the last signal is overlooked."""
        if self.working and self.pushed != self.signalled and self.event_idx:
            self.signalled += 1
        original(self)

    original = Model.signal
    monkeypatch.setattr(Model, "signal", forgetful)
    with pytest.raises(Mismatch, match=r"^interrupts: ") as caught:
        run(Corpus(seed=3), 600)
    # The failure names its input, which fails again by itself.
    (note,) = caught.value.__notes__
    data = bytes.fromhex(note.removeprefix("input: "))
    with pytest.raises(Mismatch, match=r"^interrupts: "):
        fuzz_virtqueue.main(["--input", data.hex()])


def run(corpus: Corpus, count: int) -> None:
    for _ in range(count):
        corpus.step()


def test_a_guest_that_writes_at_the_same_time_stays_in_its_memory() -> None:
    def enough(outcomes: dict[str, int]) -> bool:
        return outcomes.get("chains", 0) > 1000 and len(outcomes) > 4

    outcomes = hammer(enough, seed=3)
    assert set(outcomes) - {"chains", "no error"} <= {f"queue 0: {words}" for words in BROKEN}


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_virtqueue.main(["--input", "00" * 20]) == 0
    assert capsys.readouterr().out == "the queue and the model agree\n"
