"""How far an input went in the compiled code, where the build counts edges (``tests.sanitized coverage``)."""

from __future__ import annotations

import ctypes


class Edges:
    """The counters of this process; without them nothing is ever new."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self.counted = hasattr(library, "chv_edges_new")
        self._new = library.chv_edges_new if self.counted else int
        self._known = library.chv_edges_known if self.counted else int
        if self.counted:
            library.chv_edges_forget()  # what importing took

    def new(self) -> bool:
        """Whether an edge was taken, since the last call, that no earlier input took (or not as often)."""
        return bool(self._new())

    def __str__(self) -> str:
        return f"{self._known()} edges of compiled code" if self.counted else "compiled code not counted"
