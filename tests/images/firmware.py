"""The firmware that tests boot images with."""

from __future__ import annotations

from pathlib import Path

from tests.guests.cache import cache


def cloudhv() -> Path:
    """EDK2's build for Cloud Hypervisor, as tools/cloudhv.sh makes it; FileNotFoundError if it did not."""
    path = cache() / "firmware" / "CLOUDHV.fd"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: run tools/cloudhv.sh")
    return path
