"""What tests share."""

from __future__ import annotations

import os

import pytest


def in_ci() -> bool:
    """Whether this is a CI run, where nothing may be missing."""
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


def require(condition: object, reason: str) -> None:
    """Skip the test when something that it needs is missing; in CI that is a failure."""
    if condition:
        return
    if in_ci():
        pytest.fail(f"CI must have this: {reason}", pytrace=False)
    pytest.skip(reason)


def require_kvm() -> None:
    """Skip (in CI: fail) unless /dev/kvm can be opened."""
    require(os.access("/dev/kvm", os.R_OK | os.W_OK), "/dev/kvm is missing or may not be opened")
