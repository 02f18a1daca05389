"""What the fuzzers share: a corpus that grows by what leads somewhere new, and how its inputs are changed."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from pathlib import Path

from tests.sanitized.edges import Edges


class Inputs(ABC):
    """Inputs that showed something new, and what they showed: in the model, or in the compiled code's edges.

    ``record`` is a file that has the input of each run before the run, for what ends the process.
    """

    def __init__(self, seed: int, record: Path | None = None) -> None:
        self.random = random.Random(seed)
        self.inputs: list[bytes] = []
        self.seen: set[tuple[str, str]] = set()
        self.edges = Edges()
        self.runs = 0
        self._record = record

    @abstractmethod
    def run(self, data: bytes) -> set[tuple[str, str]]:
        """Run one input; what it showed. Raises what was found wrong."""

    def step(self) -> bytes:
        """Run one more input; raises what it raised, with the input as a note."""
        data = self.make()
        self.runs += 1
        if self._record is not None:
            self._record.write_text(data.hex())
        try:
            seen = self.run(data)
        except BaseException as error:
            error.add_note(f"input: {data.hex()}")
            raise
        new = self.edges.new()
        if new or not seen <= self.seen:
            self.seen |= seen
            self.inputs.append(data)
        return data

    def progress(self) -> str:
        """How far it has come."""
        found = f"{len(self.inputs)} inputs kept, {len(self.seen)} pairs of branches"
        return f"{self.runs} runs, {found}, {self.edges}"

    def make(self) -> bytes:
        rng = self.random
        if not self.inputs or rng.random() < 0.1:
            return rng.randbytes(rng.randrange(1, 300))
        data = bytearray(rng.choice(self.inputs[-200:] if rng.random() < 0.5 else self.inputs))
        for _ in range(1 << rng.randrange(5)):
            at = rng.randrange(len(data) + 1)
            match rng.randrange(6):
                case 0 if data:
                    data[at % len(data)] = rng.randrange(256)
                case 1 if data:
                    data[at % len(data)] ^= 1 << rng.randrange(8)
                case 2:
                    data[at:at] = rng.randbytes(rng.randrange(1, 12))
                case 3:
                    del data[at : at + rng.randrange(1, 12)]
                case 4:
                    other = rng.choice(self.inputs)
                    start = rng.randrange(len(other) + 1)
                    data[at:at] = other[start : start + rng.randrange(1, 60)]
                case _:
                    data[at:at] = data[at : at + rng.randrange(1, 40)]
        return bytes(data[:1200])
