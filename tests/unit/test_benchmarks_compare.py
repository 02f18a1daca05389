"""What the comparison of two results says, and which pictures a result gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as everything
from benchmarks import compare, plots
from benchmarks.results import Report


def result(folder: Path, name: str, *, chv: float = 1.0, floor: float = 10_000, rss: int = 1000) -> Path:
    report = Report("exits")
    case = report.case("outl")
    for wobble in (0.99, 1, 1.01):
        case.add("floor", [floor, floor, floor * 2])
        case.add("chv", [floor * chv * wobble] * 3)
    case.value("chv", "rss", rss, "bytes")
    case.value("chv", "bandwidth", 5e6 / chv, "bytes/s")
    report.save(folder / name)
    return folder / name


def test_a_slower_machine_is_no_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = result(tmp_path, "old"), result(tmp_path, "new", floor=10_100)
    assert compare.main([str(old), str(new)]) == 0
    assert (
        capsys.readouterr().out == "4 figures compared, 0 changed beyond the noise, 0 of them for the worse\n"
    )


def test_worse_and_better_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = result(tmp_path, "old", chv=1.0), result(tmp_path, "new", chv=1.5, rss=900)
    assert compare.main([str(old), str(new)]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "worse  outl: chv / floor: 1 -> 1.5 (+50.0%)",
        "better outl: chv rss, bytes: 1000 -> 900 (-10.0%)",
        "worse  outl: chv bandwidth, bytes/s: 5e+06 -> 3.333e+06 (-33.3%)",
        "4 figures compared, 3 changed beyond the noise, 2 of them for the worse",
    ]
    assert compare.main([str(new), str(new)]) == 0


def test_what_lies_within_the_rounds_spread_is_noise(tmp_path: Path) -> None:
    figures: dict[str, Any] = {"n": 1, "ratio_to_floor": 1.0, "ratio_spread": 0.2}
    report = {
        "benchmark": "exits",
        "reference": "floor",
        "cases": [{"name": "outl", "contestants": {"chv": figures}}],
    }
    later = json.loads(json.dumps(report))
    later["cases"][0]["contestants"]["chv"]["ratio_to_floor"] = 1.15
    [change] = compare.changes(report, later)
    assert not change.beyond_noise
    later["cases"][0]["contestants"]["chv"]["ratio_to_floor"] = 1.25
    [change] = compare.changes(report, later)
    assert change.beyond_noise


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"benchmark": "exits"}', "7"])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad").write_text(text)
    with pytest.raises(SystemExit, match="bad: "):
        compare.read(tmp_path / "bad")
    with pytest.raises(SystemExit, match="No such file"):
        compare.read(tmp_path / "missing")


def test_results_of_different_benchmarks_are_not_compared(tmp_path: Path) -> None:
    old = result(tmp_path, "old")
    other = Report("boot")
    other.save(tmp_path / "other")
    with pytest.raises(SystemExit):
        compare.main([str(old), str(tmp_path / "other")])


def test_pictures_of_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("boot")
    case = report.case("6.12, 4 vCPUs")
    case.add("floor", [1e9, 2e9], parts_ms={"host": 100.0, "guest": 900.0})
    case.add("chv", [3e9, 4e9])
    report.save(tmp_path / "boot.json")
    assert plots.main([str(tmp_path / "boot.json"), "--output", str(tmp_path / "out")]) == 0
    kinds = ("distributions", "ratios", "parts")
    names = [f"boot-{kind}.{suffix}" for kind in kinds for suffix in ("svg", "png")]
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == names
    assert "6.12, 4 vCPUs" in (tmp_path / "out" / "boot-distributions.svg").read_text()
    before = (tmp_path / "out" / "boot-parts.svg").read_bytes()
    plots.main([str(tmp_path / "boot.json"), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "boot-parts.svg").read_bytes() == before, "the same each time"


def test_nothing_has_no_picture(tmp_path: Path) -> None:
    assert plots.plot(Report("empty").as_json(), tmp_path) == []


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        everything.main(["speed"])
    assert "no benchmark 'speed', only exits, dispatch" in capsys.readouterr().err
