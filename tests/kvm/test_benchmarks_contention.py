"""The contention benchmark, shortened, on /dev/kvm."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import build, contention
from tests.support import require_kvm


@pytest.mark.parametrize("name", contention.DISTURBANCES)
def test_the_guest_takes_its_samples_whatever_else_runs(name: str, tmp_path: Path) -> None:
    require_kvm()
    guest = contention.write_guest(tmp_path, 20)
    with contention.DISTURBANCES[name](tmp_path) as gauges:
        taken = contention.samples(guest, build.device(), python=True)
    assert len(taken) == 20
    assert all(sample > 0 for sample in taken)
    assert all(value > 0 for value, _ in gauges.values())
