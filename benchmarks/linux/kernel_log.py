"""Where a kernel spent its boot, from its own log.

The timestamps are the guest's clock, which starts with KVM's clock early in the kernel; what goes by before
(firmware, unpacking, the first steps) has no line. ``initcall_debug`` adds the time of each initcall.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LINE = re.compile(r"^(?:<\d+>)?\[ *(\d+)\.(\d{6})\] (.*)$")
INITCALL = re.compile(r"^initcall (\S+?)\+\S+ (?:\[\S+\] )?returned -?\d+ after (\d+) usecs")
INIT = "Run /init as init process"

GROUPS = {
    "acpi": r"acpi|pnp|ged_",
    "devices": r"pci|serial|8250|tty|rtc|cmos|i8042|virtio|input|hpet|timer|clocks|tsc|console|blk|scsi|drm",
}
"""Initcalls by what they are for: the first pattern found in the name decides, the rest are "other"."""


def lines(text: str) -> list[tuple[int, str]]:
    """Each line of a log as (microseconds of the guest's clock, text)."""
    found = []
    for line in text.splitlines():
        if match := LINE.match(line.strip()):
            found.append((int(match[1]) * 10**6 + int(match[2]), match[3]))
    return found


def moment(log: Iterable[tuple[int, str]], *patterns: str) -> int | None:
    """When the first line that has one of the patterns was printed, in us; None if there is none."""
    return next((us for us, text in log if any(re.search(pattern, text) for pattern in patterns)), None)


def init_us(log: Iterable[tuple[int, str]]) -> int | None:
    """The guest's clock when /init began; None if the log was cut off."""
    return moment(log, INIT)


def initcalls(log: Iterable[tuple[int, str]]) -> dict[str, int]:
    """Microseconds of each initcall that took long enough to be in the log."""
    found: dict[str, int] = {}
    for _, text in log:
        if match := INITCALL.match(text):
            found[match[1]] = found.get(match[1], 0) + int(match[2])
    return found


def group(initcall: str) -> str:
    """Which part of the breakdown an initcall belongs to."""
    return next((name for name, pattern in GROUPS.items() if re.search(pattern, initcall)), "other")


def breakdown(text: str) -> dict[str, int]:
    """Microseconds by part.

    ``early`` (to the second vCPU's start), ``vcpus``, initcalls by :data:`GROUPS` (``acpi``, ``devices``,
    ``other``), and ``rest`` to /init. Empty if the log lacks its milestones.
    """
    log = lines(text)
    end = init_us(log)
    # A kernel with one vCPU has nothing to bring up, and says how many it has all the same.
    up = moment(log, r"smp: Brought up", r"smpboot: Total of")
    if end is None or up is None:
        return {}
    bringing = moment(log, r"smp: Bringing up secondary CPUs")
    start = up if bringing is None else bringing
    parts = {"early": start, "vcpus": up - start, "acpi": 0, "devices": 0, "other": 0}
    for name, us in initcalls(log).items():
        parts[group(name)] += us
    parts["rest"] = max(0, end - up - parts["acpi"] - parts["devices"] - parts["other"])
    return parts
