"""All fuzzers, a while each: ``python -m tests.fuzz --seconds 60 [--build coverage] [--jobs 2] [TARGET...]``.

With ``--build coverage`` (the default) compiled code counts its edges, which guides them; ``address`` has
AddressSanitizer and UBSan look on; ``none`` takes the build that is here. What a fuzzer wrote is in its log,
and its last input in a file beside it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import quoteattr

from tests.sanitized.build import FLAGS, ROOT, build, environment

TARGETS = ("image", "virtqueue", "block", "net", "pci")
LOGS = ROOT / ".work" / "fuzz"


@dataclass(frozen=True)
class Outcome:
    """How one target went."""

    target: str
    seconds: float
    status: int
    last: str
    log: Path
    again: str = ""

    @property
    def told(self) -> str:
        """A line for people."""
        if self.status == 0:
            return f"{self.target:<10} {self.last}"
        failed = f"{self.target:<10} FAILED with status {self.status}: {self.last}"
        return f"{failed}\n{'':<10} all of it: {self.log}\n{'':<10} again: {self.again}"


# What a log has of a mistake, where its last line is only the end of a stack.
SIGNS = ("Timeout (", "ERROR: AddressSanitizer", "runtime error:", "Fatal Python error")


def told(lines: list[str], status: int) -> str:
    """The line of a log that says most: the last count of what was run, or what went wrong."""
    wanted = SIGNS if status else ("runs", "inputs", "images")
    plain = [line for line in lines if not line.startswith("input: ")]  # a note behind what was raised
    found = [line for line in lines if any(word in line for word in wanted)] or plain[-1:]
    return (found[0] if status else found[-1]) if found else "it said nothing"


def replay(target: str, build: str, record: Path) -> str:
    """The command that runs the last input of a target again."""
    module = f"tests.fuzz_{target}"
    start = f"python -m {module}" if build == "none" else f"python -m tests.sanitized {build} -- {module}"
    return f"{start} --input {record}" if target in ("image", "net") else f'{start} --input "$(cat {record})"'


def fuzz(target: str, seconds: float, build: str, folder: Path, env: Mapping[str, str]) -> Outcome:
    """Run one fuzzer until it ends; it has a minute more than its time, then it counts as hanging."""
    log, record = LOGS / f"{target}.log", LOGS / f"{target}.input"
    command = [sys.executable, "-X", "faulthandler", "-m", f"tests.fuzz_{target}", "--seconds", str(seconds)]
    command += ["--image" if target == "image" else "--record", str(record)]
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = process.wait(seconds + 60)
        except subprocess.TimeoutExpired:
            process.send_signal(6)  # its stacks go into the log
            status = process.wait(30)
    last = told(log.read_text(errors="replace").strip().splitlines(), status)
    return Outcome(target, time.monotonic() - started, status, last, log, replay(target, build, record))


def junit(outcomes: list[Outcome]) -> str:
    """The outcomes as the other stages of the tests give theirs."""
    cases = "".join(
        f'<testcase classname="tests.fuzz" name={quoteattr(found.target)} time="{found.seconds:.1f}">'
        + ("" if found.status == 0 else f"<failure message={quoteattr(found.told)}/>")
        + "</testcase>"
        for found in outcomes
    )
    return (
        f'<testsuite name="fuzz" time="{sum(found.seconds for found in outcomes):.1f}">{cases}</testsuite>\n'
    )


def main(arguments: list[str] | None = None) -> int:
    """1 if a fuzzer found something."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=60, help="how long each (default: 60)")
    parser.add_argument("--build", choices=[*FLAGS, "none"], default="coverage")
    parser.add_argument("--jobs", type=int, default=max(os.cpu_count() or 1, 1), help="how many at a time")
    parser.add_argument("--junitxml", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    for target in options.targets:
        if target not in TARGETS:
            parser.error(f"there is no target {target!r}, only {', '.join(TARGETS)}")
    folder, env = ROOT, dict(os.environ)
    if options.build != "none":
        try:
            folder = build(options.build)
        except subprocess.CalledProcessError as error:
            print(error.stdout.decode(errors="replace")[-5000:], file=sys.stderr)
            return 1
        env = dict(environment(options.build, folder))
    LOGS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        started = [
            pool.submit(fuzz, target, options.seconds, options.build, folder, env)
            for target in options.targets or TARGETS
        ]
        outcomes = [future.result() for future in started]
    for found in outcomes:
        print(found.told)
    if options.junitxml is not None:
        options.junitxml.parent.mkdir(parents=True, exist_ok=True)
        options.junitxml.write_text(junit(outcomes))
    return 1 if any(found.status for found in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
