"""Short runs of tests/fuzz_pci.py: they reach the states behind a good driver, and find mistakes."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chv.pci._config import ConfigSpace
from chv.virtio.transport import VirtioPci
from tests import fuzz, fuzz_pci
from tests.fuzz_pci import Corpus, Run
from tests.fuzz_virtqueue import Mismatch


@given(data=st.binary(max_size=200))
@settings(max_examples=30, deadline=None)
def test_after_any_program_each_device_works(data: bytes) -> None:
    Run(data).go()


def test_mutated_programs_reach_what_only_a_good_driver_reaches() -> None:
    corpus = Corpus(seed=5)
    for _ in range(60):
        corpus.step()
    branches = {branch for pair in corpus.seen for branch in pair}
    assert branches >= {"negotiated 11", "moved True", "moved False", "notified", "window", "msix", "host"}


def run(count: int) -> None:
    corpus = Corpus(seed=5)
    for _ in range(count):
        corpus.step()


def test_an_ioeventfd_that_stays_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VirtioPci, "_signal_at", lambda self, address: None)
    original = VirtioPci.__init__

    def leave_one(self: VirtioPci, *args: object, **options: object) -> None:
        original(self, *args, **options)  # type: ignore[arg-type]
        self._vm.ioeventfd(0, id(self), 0)

    monkeypatch.setattr(VirtioPci, "__init__", leave_one)
    with pytest.raises(Mismatch, match="ioeventfds after the end"):
        run(1)


def test_a_bar_that_does_not_come_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_pci, "RESET", 0.1)
    monkeypatch.setattr(VirtioPci, "bar_moved", lambda self, index, address: None)
    with pytest.raises(Mismatch) as caught:
        run(5)
    # The failure names its input, which fails again by itself.
    (note,) = caught.value.__notes__
    with pytest.raises(Mismatch):
        fuzz_pci.main(["--input", note.removeprefix("input: ")])


def test_an_identity_that_changes_is_found() -> None:
    found = Run(b"")
    space = found.machine.transports[0].config
    assert isinstance(space, ConfigSpace)
    space.set(0, 2, 0x1234)
    with pytest.raises(Mismatch, match="the identity of slot 1"):
        found.go()


def test_the_summary_of_all_fuzzers_says_what_failed_and_where() -> None:
    good = fuzz.Outcome("net", 60, 0, "7 inputs", Path("net.log"))
    bad = fuzz.Outcome("pci", 3, -11, "Segmentation <fault>", Path("pci.log"))
    assert good.told == "net        7 inputs"
    assert bad.told.splitlines()[0] == "pci        FAILED with status -11: Segmentation <fault>"
    assert bad.told.splitlines()[1].endswith("pci.log")
    suite = ElementTree.fromstring(fuzz.junit([good, bad]))
    assert [(case.get("name"), len(case)) for case in suite] == [("net", 0), ("pci", 1)]


def test_a_failure_says_what_it_was_and_how_to_meet_it_again() -> None:
    lines = ["seed 1", "9 runs, 3 inputs kept", "Timeout (0:01:00)!", "  File x, line 80 in work"]
    assert fuzz.told(lines, 1) == "Timeout (0:01:00)!"
    assert fuzz.told(lines, 0) == "9 runs, 3 inputs kept"
    assert fuzz.told(["Mismatch: a != b", "input: 00"], 1) == "Mismatch: a != b"
    assert fuzz.told([], 1) == "it said nothing"
    assert fuzz.replay("net", "none", Path("net.input")) == "python -m tests.fuzz_net --input net.input"
    again = 'python -m tests.sanitized address -- tests.fuzz_pci --input "$(cat pci.input)"'
    assert fuzz.replay("pci", "address", Path("pci.input")) == again


def test_an_unknown_target_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fuzz.main(["nothing"])
    assert "only image, virtqueue, block, net, pci" in capsys.readouterr().err
