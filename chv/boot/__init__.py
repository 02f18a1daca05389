"""Loading what a VM boots: ELF kernels and firmware, bzImages, an initramfs, the command line."""

from __future__ import annotations

from .entry import EntryPoint
from .payload import Payload, load, prepare, prepare_image

__all__ = ["EntryPoint", "Payload", "load", "prepare", "prepare_image"]
