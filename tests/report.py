"""``python -m tests.report STAGE...``: run make targets one after the other, then one table of how they went.

All stages are run, whatever happens to earlier ones. The last line of the output is
``N passed, N failed, N skipped``, which counts every test and, for a stage without
tests, the stage itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

JUNIT = Path(".work/results/junit")

# No stage may take all the time that a CI run has: what hangs is to be named in the summary.
LIMIT_SECONDS = 40 * 60


@dataclass
class Stage:
    """How a stage, or one junit file of it, went."""

    name: str
    seconds: float
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    skips: Counter[str] = field(default_factory=Counter)


def main(targets: Sequence[str]) -> int:
    """Run the stages, print the summary, return the exit status."""
    JUNIT.mkdir(parents=True, exist_ok=True)
    for old in JUNIT.glob("*.xml"):
        old.unlink()
    stages = [stage for target in targets for stage in run(target)]
    print_summary(stages)
    return 1 if any(stage.counts["failed"] for stage in stages) else 0


def run(target: str) -> list[Stage]:
    """Run one make target; one result for each junit file that it wrote, or one for itself."""
    print(f"\n===== {target} =====", flush=True)
    before = set(JUNIT.glob("*.xml"))
    started = time.monotonic()
    # This make is not the one that started us: its jobserver is not for this one.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    status = make(target, env)
    seconds = time.monotonic() - started
    stages = [read_junit(path) for path in sorted(set(JUNIT.glob("*.xml")) - before)]
    if not stages:
        stages = [Stage(target, seconds, Counter({"failed" if status else "passed": 1}))]
    if status and not any(stage.counts["failed"] for stage in stages):
        stages.append(Stage(target, seconds, Counter(failed=1)))
    for stage in stages:
        if stage.counts["failed"] and not stage.failures:
            stage.failures.append(f"{stage.name}: make {target} ended with status {status}")
    return stages


def make(target: str, env: dict[str, str]) -> int:
    """Run one target in a process group of its own; what is left of it after LIMIT_SECONDS is killed."""
    command = ["make", "--no-print-directory", target]
    process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, process_group=0)
    try:
        return process.wait(LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"{target}: not over after {LIMIT_SECONDS} s, killed", flush=True)
        return 124
    finally:
        for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
                time.sleep(patience if process.poll() is None else 0)


def read_junit(path: Path) -> Stage:
    """The counts of a junit file, the names of what failed and the reasons of what was skipped."""
    try:
        suites = ElementTree.parse(path).getroot().iter("testsuite")
        cases = [case for suite in suites for case in suite.iter("testcase")]
    except ElementTree.ParseError as error:
        return Stage(path.stem, 0.0, Counter(failed=1), [f"{path}: {error}"])
    stage = Stage(path.stem, sum(float(case.get("time", 0)) for case in cases))
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            stage.counts["failed"] += 1
            stage.failures.append(f"{stage.name}: {name}")
        elif skipped is not None and skipped.get("type") != "pytest.xfail":
            stage.counts["skipped"] += 1
            stage.skips[skipped.get("message", "no reason given")] += 1
        else:
            stage.counts["passed"] += 1
    return stage


def print_summary(stages: Sequence[Stage]) -> None:
    """The table, the failures, the reasons of skips, and the closing line."""
    print("\n===== summary =====")
    print(f"{'stage':<24}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}")
    for stage in stages:
        numbers = "".join(f"{stage.counts[kind]:>8}" for kind in ("passed", "failed", "skipped"))
        print(f"{stage.name:<24}{numbers}{stage.seconds:>9.0f}")
    for stage in stages:
        for reason, count in stage.skips.items():
            print(f"skipped in {stage.name}: {count} x {reason}")
    for stage in stages:
        for failure in stage.failures:
            print(f"FAILED {failure}")
    total: Counter[str] = sum((stage.counts for stage in stages), Counter())
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
