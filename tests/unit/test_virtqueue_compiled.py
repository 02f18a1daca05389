"""The ring's functions are all there and stay in C: no line of them uses Python."""

from __future__ import annotations

import re
from pathlib import Path

from .test_compiled import ROOT, line_scores, nogil_functions

SOURCE = Path("chv/_virtqueue.pyx")


def test_what_the_header_promises_without_the_gil_touches_no_python() -> None:
    header = (ROOT / SOURCE).with_suffix(".pxd").read_text(encoding="utf-8")
    promised = set(re.findall(r"(\w+)\([^()]*\) noexcept nogil", header))
    assert promised >= {"ram_find", "vq_pop", "vq_push", "vq_signal", "vq_wait", "iov_copy_in", "io_record"}
    functions = dict(nogil_functions(SOURCE))
    assert promised | {"walk", "broken", "copy"} <= set(functions)
    scores = line_scores(SOURCE)
    assert [line for lines in functions.values() for line in lines if scores.get(line, 0)] == []
