"""The parts of the testbed and of the guests' builder that need no machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tests.testbed as testbed
from tests.guests.cpio import Archive
from tests.report import Stage, print_summary, read_junit
from tests.support import require
from tests.testbed.stream import MarkedStream


@given(
    text=st.binary(max_size=60).map(lambda data: data.replace(b"#", b".") + b"#en#e#end"[: len(data) % 6]),
    cuts=st.lists(st.integers(1, 9), max_size=40),
)
def test_marked_stream_passes_on_all_before_the_mark(text: bytes, cuts: list[int]) -> None:
    read, write = os.pipe()
    stream = MarkedStream(write, b"#end#")
    data = text + b"#end#"
    for size in [*cuts, len(data)]:
        stream.pass_on(data[:size])
        data = data[size:]
    assert stream.ended
    stream.pass_on(b"more")
    os.close(write)
    with open(read, "rb") as file:
        assert file.read() == text


@pytest.mark.parametrize(
    ("choice", "opens", "has", "expected"),
    [
        ("auto", True, True, False),
        ("auto", True, False, True),
        ("auto", False, True, True),
        ("always", True, True, True),
        ("never", False, False, False),
    ],
)
def test_needed(monkeypatch: pytest.MonkeyPatch, choice: str, opens: bool, has: bool, expected: bool) -> None:
    monkeypatch.setenv("CHV_TESTBED", choice)
    monkeypatch.delenv(testbed.INSIDE, raising=False)
    monkeypatch.setattr(testbed, "kvm_opens", lambda: opens)
    monkeypatch.setattr(testbed, "has_virtualization", lambda: has)
    assert testbed.needed() is expected
    monkeypatch.setenv(testbed.INSIDE, "1")
    assert testbed.needed() is False


def test_needed_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHV_TESTBED", "perhaps")
    with pytest.raises(ValueError, match="CHV_TESTBED=perhaps: must be auto, always or never"):
        testbed.needed()


def test_archive_as_cpio_reads_it(tmp_path: Path) -> None:
    require(shutil.which("cpio"), "cpio is not installed")
    archive = Archive()
    archive.file("a/b/file", b"content", 0o640)
    archive.file("a/program", b"#!/bin/sh\n", 0o755)
    archive.symlink("a/link", "b/file")
    archive.file("odd length", b"12345")
    subprocess.run(["cpio", "-idm", "--quiet"], input=archive.data(), cwd=tmp_path, check=True)
    assert (tmp_path / "a/b/file").read_bytes() == b"content"
    assert (tmp_path / "a/b/file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "a/program").stat().st_mode & 0o777 == 0o755
    assert os.readlink(tmp_path / "a/link") == "b/file"
    assert (tmp_path / "odd length").read_bytes() == b"12345"


JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.a" name="good" time="1.5"/>
<testcase classname="tests.a" name="bad" time="1"><failure message="no"/></testcase>
<testcase classname="tests.a" name="broken" time="0"><error message="no"/></testcase>
<testcase classname="tests.a" name="known" time="0"><skipped type="pytest.xfail" message="known"/></testcase>
<testcase classname="tests.a" name="away" time="0"><skipped type="pytest.skip" message="no fwts"/></testcase>
</testsuite></testsuites>"""


def test_report_counts_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "unit.xml").write_text(JUNIT)
    stage = read_junit(tmp_path / "unit.xml")
    assert dict(stage.counts) == {"passed": 2, "failed": 2, "skipped": 1}
    lint = Stage("lint", 3.0)
    lint.counts["passed"] += 1
    print_summary([lint, stage])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "3 passed, 2 failed, 1 skipped"
    assert "skipped in unit: 1 x no fwts" in lines
    assert "FAILED unit: tests.a::bad" in lines


def test_report_of_a_file_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "unit.xml").write_text(JUNIT[:200])
    assert read_junit(tmp_path / "unit.xml").counts["failed"] == 1
