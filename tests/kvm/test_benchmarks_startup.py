"""The startup benchmark, shortened, on /dev/kvm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import startup


def test_a_short_run_answers_every_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "API", {"chv": startup.chv_answers})
    monkeypatch.setattr(startup, "FIRST", dict.fromkeys(("chv", "chv_library"), startup.first_byte))
    monkeypatch.setenv("PATH", "")  # without QEMU, which takes long
    out = tmp_path / "startup.json"
    assert startup.main(["--quick", "--rounds", "1", "--lives", "3", "--json", str(out)]) == 0
    cases = {case["name"]: case for case in json.loads(out.read_text())["cases"]}
    assert set(cases) == {"import", "api_answering", "first_exit", "lifecycle", "memory"}
    assert cases["lifecycle"]["contestants"]["chv_library"]["n"] == 3
    assert cases["first_exit"]["contestants"]["chv"]["p50_ns"] > 0
    assert cases["memory"]["contestants"]["chv_api"]["values"]["vmm_memory"]["unit"] == "MiB"
    assert "not installed" in cases["memory"]["contestants"]["qemu_q35"]["absent"]
