"""Stock Debian kernels as guests. Where /dev/kvm cannot run Linux, run these in the testbed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from chv.testing import Guest
from tests.guests import SERIES
from tests.linux.guests import BOOT_TIMEOUT, guest_files
from tests.support import require, require_kvm
from tests.testbed import needed


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--chv-timeout"):
        config.option.chv_timeout = str(BOOT_TIMEOUT)


@pytest.fixture(autouse=True, scope="session")
def _can_run_linux() -> None:
    require_kvm()
    require(not needed(), "/dev/kvm cannot run Linux here: use python -m tests.testbed")


@pytest.fixture(params=SERIES)
def series(request: pytest.FixtureRequest) -> str:
    """Each series of Debian's kernels."""
    return str(request.param)


@pytest.fixture
def guest(vm_factory: Callable[..., Guest]) -> Callable[..., Guest]:
    """Boot a guest of the newest series to its prompt: ``guest(cpus="boot=1,max=2")``."""

    def boot(series: str = SERIES[0], kind: str = "bzImage", prompt: bool = True, **parts: object) -> Guest:
        vm = vm_factory(**{**guest_files(series, kind), "cmdline": "quiet", **parts})
        vm.boot()
        if prompt:
            vm.wait_for_prompt()
        return vm

    return boot
