"""chv's version, which ``chv -V`` and ``vmm.ping`` show; pyproject.toml has the same (tested)."""

from __future__ import annotations

__version__ = "0.1.0"
