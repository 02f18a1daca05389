"""Comparing version strings: Version Format Specification of the UAPI group, "Version Comparison".

Where its steps and its own words differ, a suffix that begins with "~" is lower than none, as systemd has it.
"""

from __future__ import annotations

import re

_SKIPPED = re.compile(r"[^a-zA-Z0-9\-.~^]*")
_DIGITS = re.compile(r"[0-9]*")
_LETTERS = re.compile(r"[a-zA-Z]*")
# Steps 5 to 7: a separator that only one of the two has, and how that one compares.
_SEPARATORS = (("-", -1), ("^", 1), (".", -1))


def compare(a: str, b: str) -> int:
    """-1, 0 or 1: whether version ``a`` is lower than, equal to or higher than ``b``."""
    at, bt = 0, 0
    while True:
        at, bt = _end(_SKIPPED, a, at), _end(_SKIPPED, b, bt)
        if a[at : at + 1] == "~" or b[bt : bt + 1] == "~":
            if a[at : at + 1] != b[bt : bt + 1]:
                return -1 if a[at : at + 1] == "~" else 1
            at, bt = at + 1, bt + 1
            continue
        if at == len(a) or bt == len(b):
            return (at < len(a)) - (bt < len(b))
        separator = next((pair for pair in _SEPARATORS if pair[0] in (a[at], b[bt])), None)
        if separator is not None:
            mark, sign = separator
            if a[at] != b[bt]:
                return sign if a[at] == mark else -sign
            at, bt = at + 1, bt + 1
            continue
        order, at, bt = _compare_part(a, at, b, bt)
        if order:
            return order


def _compare_part(a: str, at: int, b: str, bt: int) -> tuple[int, int, int]:
    """Compare the numbers at the front, or the letters if neither has a number; where each goes on."""
    numeric = a[at].isdigit() or b[bt].isdigit()
    pattern = _DIGITS if numeric else _LETTERS
    a_end, b_end = _end(pattern, a, at), _end(pattern, b, bt)
    first, second = a[at:a_end], b[bt:b_end]
    if not numeric:
        return (first > second) - (first < second), a_end, b_end
    # Not as int(): that refuses thousands of digits.
    first, second = first.lstrip("0"), second.lstrip("0")
    one, other = (len(first), first), (len(second), second)
    return (one > other) - (one < other), a_end, b_end


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    match = pattern.match(text, start)
    return match.end() if match is not None else start
