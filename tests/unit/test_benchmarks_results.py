"""What a reader of a benchmark's JSON relies on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.environment import kvm_kind, machine
from benchmarks.results import Report, parser
from benchmarks.statistics import median, quantile, spread, summary
from benchmarks.tables import duration


@given(st.lists(st.floats(0, 1e12), min_size=1), st.floats(0.001, 1))
def test_a_quantile_is_a_sample_that_enough_others_do_not_exceed(samples: list[float], part: float) -> None:
    found = quantile(sorted(samples), part)
    assert found in samples
    assert sum(sample <= found for sample in samples) >= part * len(samples) - 1e-9
    assert sum(sample < found for sample in samples) <= part * len(samples)


@given(st.lists(st.floats(0, 1e12), min_size=1))
def test_a_summary_rises(samples: list[float]) -> None:
    found = summary(samples)
    assert found["p50_ns"] <= found["p90_ns"] <= found["p99_ns"] <= found["p999_ns"] <= found["max_ns"]
    assert found["max_ns"] == max(samples)
    assert found["n"] == len(samples)


def test_nothing_has_no_quantile() -> None:
    with pytest.raises(ValueError, match="there is no"):
        quantile([], 0.5)
    with pytest.raises(ValueError, match="there is no"):
        median([])


def test_ratios_are_taken_within_a_round() -> None:
    """The machine got ten times slower between the rounds; both contestants did."""
    case = Report("x").case("outl", userspace_exit=True)
    for slow in (1, 10, 10):
        case.add("floor", [100 * slow, 100 * slow, 900])
        case.add("chv", [110 * slow, 110 * slow, 110 * slow])
    assert case.ratios("chv", "floor") == pytest.approx([1.1, 1.1 * 1000 / 900, 1.1 * 1000 / 900], rel=0.2)
    found = case.as_json("floor")
    assert found["userspace_exit"] is True
    assert found["contestants"]["chv"]["ratio_to_floor"] == pytest.approx(1.1)
    assert found["contestants"]["floor"]["ratio_to_floor"] == 1
    assert found["contestants"]["chv"]["n"] == 9
    assert spread([1, 2, 3, 4]) == 2


def test_the_json_names_the_machine_and_who_is_absent(tmp_path: Path) -> None:
    report = Report("exits", quick=True)
    case = report.case("outl")
    case.add("floor", [1.0, 2.0], handler="switch")
    case.absent("qemu", "not installed")
    case.value("floor", "rss", 4096, "bytes")
    report.save(tmp_path / "deep" / "result.json")
    found = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert (found["benchmark"], found["quick"], found["version"]) == ("exits", True, 1)
    assert set(found["machine"]) >= {"cpu", "cores", "kernel", "kvm", "testbed", "python", "chv", "qemu"}
    assert found["cases"][0]["contestants"]["qemu"] == {"absent": "not installed"}
    assert found["cases"][0]["contestants"]["floor"]["values"] == {"rss": {"value": 4096, "unit": "bytes"}}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["result.json"]


def test_the_table_shows_every_contestant(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("exits")
    case = report.case("outl")
    case.add("floor", [11_000.0])
    case.absent("qemu", "not installed")
    case.value("floor", "rss", 4096, "bytes")
    report.print()
    shown = capsys.readouterr().out
    for text in ("outl", "floor", "11 us", "qemu is absent: not installed", "4,096 bytes"):
        assert text in shown


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(3.14159, "3.14 ns"), (999, "999 ns"), (12_345, "12.3 us"), (123_456, "123 us"), (2e9, "2 s")],
)
def test_durations(nanoseconds: float, text: str) -> None:
    assert duration(nanoseconds) == text


def test_rounds_are_a_positive_number() -> None:
    options = parser("What it does.\n\nMore.").parse_args(["--quick", "--rounds", "3"])
    assert (options.quick, options.rounds, options.json) == (True, 3, None)
    with pytest.raises(SystemExit):
        parser("x").parse_args(["--rounds", "0"])
    assert isinstance(options, argparse.Namespace)


def test_the_kind_of_kvm_is_one_of_four() -> None:
    assert kvm_kind({"svm"}) in ("svm", "none")
    assert kvm_kind(set()) in ("emulated", "none")
    assert machine()["kvm"] in ("svm", "vmx", "emulated", "none")


def test_of_a_gauge_that_was_read_often_the_median_is_told() -> None:
    report = Report("example")
    case = report.case("disk")
    for rate in (10, 30, 11):
        case.value("chv", "bandwidth", rate, "MiB/s")
    found = report.as_json()["cases"][0]["contestants"]["chv"]["values"]
    assert found == {"bandwidth": {"value": 11, "unit": "MiB/s"}}
