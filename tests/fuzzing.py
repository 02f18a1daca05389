"""What the fuzzers share: their options, a corpus that grows by what is new, how its inputs are changed."""

from __future__ import annotations

import argparse
import faulthandler
import random
import time
from abc import ABC, abstractmethod
from pathlib import Path

from tests.sanitized.edges import Edges

SHOWN_EVERY = 10.0  # seconds


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """How long, from which random numbers, which input alone, and where the last one is kept."""
    made = argparse.ArgumentParser(
        prog=f"python -m tests.{module}", description=(doc or "").partition("\n")[0]
    )
    made.add_argument("--seconds", type=float, default=60, help="how long (default: 60)")
    made.add_argument(
        "--seed", type=int, default=None, help="of the random numbers (default: another each time)"
    )
    made.add_argument("--input", type=bytes.fromhex, default=None, metavar="HEX", help="run only this one")
    made.add_argument(
        "--record", type=Path, default=None, metavar="FILE", help="has the last input if it crashes"
    )
    return made


def seed_of(chosen: argparse.Namespace) -> int:
    """The seed that was asked for, or another each time."""
    return random.SystemRandom().randrange(1 << 32) if chosen.seed is None else int(chosen.seed)


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

    def keep_on(self, seconds: float, hang: float | None = None) -> None:
        """Run inputs for so long; one that takes more than ``hang`` seconds ends the process."""
        end = time.monotonic() + seconds
        shown = time.monotonic()
        while time.monotonic() < end:
            if hang is not None:
                faulthandler.dump_traceback_later(hang, exit=True)
            self.step()
            if time.monotonic() - shown > SHOWN_EVERY:
                shown = time.monotonic()
                print(self.progress(), flush=True)
        if hang is not None:
            faulthandler.cancel_dump_traceback_later()

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
