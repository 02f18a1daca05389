"""The dispatch benchmark: its traces, and that C and the buses find the same devices in them."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import dispatch, trace
from benchmarks.results import Report
from benchmarks.trace import Access, Layout

ACCESSES = st.builds(
    Access,
    st.sampled_from(trace.SPACES),
    st.integers(0, 0xFFFF),
    st.sampled_from(trace.SIZES),
    st.booleans(),
)


class Steps:
    def advance(self, text: str | None = None) -> None:
        pass


@given(st.lists(ACCESSES))
def test_a_trace_is_read_as_it_was_written(accesses: list[Access]) -> None:
    layout = Layout([(0x60, 4)], [(0xD000_0000, 4096)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace")
        path.write_bytes(gzip.compress(trace.write(accesses, layout)))
        assert trace.read(path) == (accesses, layout)


def test_the_recorded_boot_is_a_boot() -> None:
    accesses, layout = trace.read()
    assert 2_000 < len(accesses) < 200_000
    assert trace.RECORDED.stat().st_size < 200_000
    assert (0x3F8, 8) in layout.pio
    touched = {access.address for access in accesses if access.space == "pio"}
    assert touched & set(range(0x3F8, 0x400))
    assert touched & set(range(0x70, 0x72))


@pytest.mark.parametrize("ranges", dispatch.SYNTHETIC)
def test_a_synthetic_trace_touches_every_range(ranges: int) -> None:
    accesses, layout = trace.uniform(ranges, dispatch.COUNT)
    assert len(layout.mmio) == ranges
    assert {access.address & ~0xFFF for access in accesses} == {base for base, _ in layout.mmio}
    assert (accesses, layout) == trace.uniform(ranges, dispatch.COUNT)


@pytest.mark.parametrize("name", dispatch.names())
def test_c_and_the_buses_agree(name: str) -> None:
    accesses, layout = dispatch.load(name)
    claimed = {who: dispatch.contestant(who, name)() for who in dispatch.CONTESTANTS}
    expected = 0
    for access in accesses:
        ranges = layout.pio if access.space == "pio" else layout.mmio
        expected += any(
            base <= access.address and access.address + access.size <= base + size for base, size in ranges
        )
    assert claimed == dict.fromkeys(dispatch.CONTESTANTS, expected)


def test_a_round_has_samples_of_all(tmp_path: Path) -> None:
    accesses, layout = dispatch.load("uniform_8")
    report = Report("dispatch", reference=dispatch.REFERENCE)
    case = report.case("uniform_8", ranges=len(layout.mmio), exits=len(accesses))
    dispatch.measure(case, 1, 2, Steps())
    report.save(tmp_path / "dispatch.json")
    contestants = json.loads((tmp_path / "dispatch.json").read_text())["cases"][0]["contestants"]
    assert set(contestants) == set(dispatch.CONTESTANTS)
    assert {name: who["n"] for name, who in contestants.items()} == {
        "switch": 2,
        "search": 2,
        "chv_c": 2,
        "chv_py": 1,
    }
    assert "ratio_to_switch" in contestants["chv_c"]


def test_without_valgrind_the_case_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    report = Report("dispatch", reference=dispatch.REFERENCE)
    dispatch.count_instructions(report.case("uniform_8", exits=1), "chv_c")
    found = report.cases[0].as_json("switch")["contestants"]
    assert found == {"chv_c_instructions": {"absent": "valgrind is not installed"}}
