"""Guests for the tests: Debian's cloud kernels and a small initramfs to run in them.

>>> guest = kernel("6.12")                                      # doctest: +SKIP
>>> guest.bzimage, guest.vmlinux, initramfs(guest)              # doctest: +SKIP

``python -m tests.guests`` fetches and builds all of it under ``.cache/guests/``.
"""

from __future__ import annotations

from tests.guests.initramfs import PASSWORD, READY, initramfs
from tests.guests.kernels import SERIES, Kernel, kernel, kernels

__all__ = ["PASSWORD", "READY", "SERIES", "Kernel", "initramfs", "kernel", "kernels"]
