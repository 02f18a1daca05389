"""The texts of boot entries, their order, and versions: no disk is needed for these."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chv.boot.loader_entries import (
    BootEntry,
    default_entry,
    default_pattern,
    in_order,
    matching,
    parse_snippet,
    split_name,
)
from chv.boot.uki import parse_os_release
from chv.boot.version_order import compare

BLANK = BootEntry("", "", "", "/k", (), "", "")


def entry(ident: str, **fields: Any) -> BootEntry:
    return replace(BLANK, id=ident, **fields)


# -- texts -------------------------------------------------------------------------------


def test_a_snippet() -> None:
    """The example of the specification's shape, with tabs, comments, CR LF and lines that say nothing."""
    snippet = parse_snippet(
        b"\xef\xbb\xbf# title not this\r\n  title\tDebian  12 \r\nlinux /a b\nlinux /last\ninitrd /1\n"
        b"initrd\t /2\n"
        b"options a=1  b\noptions c\nnonsense\n\n#options d\ntitle\n"
    )
    assert snippet.values == {"title": "Debian  12", "linux": "/last"}
    assert snippet.initrds == ("/1", "/2")
    assert snippet.options == "a=1  b c"


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (b"", None),
        (b"timeout 1\n", None),
        (b"default a-*.conf\n", "a-*.conf"),
        (b"default a\ndefault b\n", "b"),
    ],
)
def test_the_default_of_loader_conf(text: bytes, pattern: str | None) -> None:
    assert default_pattern(text) == pattern


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.conf", ("a.conf", None, 0)),
        ("a+3.conf", ("a.conf", 3, 0)),
        ("a+3-1.efi", ("a.efi", 3, 1)),
        ("a+0-3.CONF", ("a.CONF", 0, 3)),
        ("a+b+12-34.conf", ("a+b.conf", 12, 34)),
        ("6.12+deb12-amd64.conf", ("6.12+deb12-amd64.conf", None, 0)),
        ("a+3-.conf", ("a+3-.conf", None, 0)),
        ("a+.conf", ("a+.conf", None, 0)),
        ("a+3", ("a", 3, 0)),
        ("a+" + "9" * 5000 + ".conf", ("a+" + "9" * 5000 + ".conf", None, 0)),
    ],
)
def test_boot_counters(name: str, parts: tuple[str, int | None, int]) -> None:
    assert split_name(name) == parts


def test_os_release() -> None:
    text = '# comment\nID=debian\nNAME="Debian GNU/Linux"\n PRETTY_NAME=\'Debian 12\'\nODD="\nnonsense\n=x\n'
    assert parse_os_release(text) == {
        "ID": "debian",
        "NAME": "Debian GNU/Linux",
        "PRETTY_NAME": "Debian 12",
        "ODD": '"',
        "": "x",
    }


# -- versions ----------------------------------------------------------------------------

# The examples of the Version Format Specification, without the two that contradict its words on "~".
LOWER = [
    ("bar-123", "foo-123"),
    ("123", "123a"),
    ("123", "123.a"),
    ("123.a", "123.b"),
    ("123.a", "123a"),
    ("A", "a"),
    ("", "0"),
    ("0", "0."),
    ("0", "0.0"),
    ("1_", "1.2"),
    ("1.3.3", "1_2_3"),
    ("1+", "1.2"),
    ("1.3.3", "1+2+3"),
    # and what they are for
    ("6.9", "6.12"),
    ("6.12~rc1", "6.12"),
    ("6.12~rc1", "6.12~rc2"),
    ("6.12", "6.12^post"),
    ("6.12-1", "6.12.1"),
    ("122.1", "123~rc1-1"),
    ("123~rc1-1", "123"),
    ("123", "123-a"),
    ("123-a", "123-a.1"),
    ("123-a.1", "123-a1"),
    ("123-a1", "123.a"),
    ("123.1", "123^patch1"),
    ("9" * 4999, "1" + "0" * 4999),
]
EQUAL = [
    ("11", "11"),
    ("11α", "11β"),
    ("1_", "1"),
    ("_1", "1"),
    ("1+", "1"),
    ("007", "7"),
    ("", "+"),
    ("a0", "a0"),
]


@pytest.mark.parametrize(("low", "high"), LOWER)
def test_lower_versions(low: str, high: str) -> None:
    assert (compare(low, high), compare(high, low)) == (-1, 1)


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_versions(one: str, other: str) -> None:
    assert (compare(one, other), compare(other, one)) == (0, 0)


VERSION = st.text("0129abZ.-~^+_ é", max_size=8)


@given(a=VERSION, b=VERSION, c=VERSION)
def test_versions_have_an_order(a: str, b: str, c: str) -> None:
    assert compare(a, a) == 0
    assert compare(a, b) == -compare(b, a)
    if compare(a, b) <= 0 and compare(b, c) <= 0:
        assert compare(a, c) <= 0


# -- order -------------------------------------------------------------------------------

# As the specification's section "Sorting" has them, the first at the front.
ORDER = [
    entry("z.conf", sort_key="a", machine_id="1", version="6.12"),
    entry("y.conf", sort_key="a", machine_id="1", version="6.9"),
    entry("2.conf", sort_key="a", machine_id="2", version="9"),
    entry("x.conf", sort_key="b"),
    entry("w.efi", sort_key="b"),
    entry("debian-6.12.conf"),
    entry("debian-6.12~rc1.conf", tries_left=3),
    entry("debian-6.9.efi"),
    entry("a.conf", version="99"),
    entry("first.conf", sort_key="a", tries_left=0, tries_done=1),
    entry("z.conf", tries_left=0, tries_done=1),
    entry("z.conf", tries_left=0, tries_done=2),
]


@given(st.permutations(ORDER))
def test_the_order_of_entries(entries: list[BootEntry]) -> None:
    assert in_order(entries) == ORDER


def test_every_pair_is_in_order() -> None:
    for a, b in itertools.combinations(ORDER, 2):
        assert in_order([b, a]) == [a, b]


# -- choice ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("a", ["a.conf", "a.efi"]),
        ("A.conf", ["a.conf"]),
        ("a*", ["a.conf", "a.efi", "ab.conf"]),
        ("a+3-4.conf", ["a.conf"]),
        ("[ab]*.conf", ["a.conf", "ab.conf", "b.conf"]),
        ("?", ["a.conf", "a.efi", "b.conf"]),
        ("", []),
        ("[", []),
        ("[z-a]", []),
        ("c", []),
        ("[x].conf", ["[x].conf"]),
    ],
)
def test_names_and_globs(wanted: str, found: list[str]) -> None:
    entries = [entry(name) for name in ("a.conf", "a.efi", "ab.conf", "b.conf", "[x].conf")]
    assert [e.id for e in matching(entries, wanted)] == found


@given(wanted=st.text("a*?[]!-\\^.c", max_size=12))
def test_any_glob(wanted: str) -> None:
    entries = [entry("a.conf"), entry("aa.conf")]
    assert [e for e in entries if e in matching(entries, wanted)] == matching(entries, wanted)


def test_a_glob_that_is_made_to_take_long() -> None:
    """Its 128 stars would keep an expression that goes back over them busy for ages."""
    entries = [entry("a" * 250 + ".conf")]
    assert default_entry(entries, "*a" * 128 + "b") == entries[0]
    assert matching(entries, "*a" * 100) == entries


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(None, "b.conf"), ("c", "c.conf"), ("a*", "b.conf"), ("[ac]*", "c.conf"), ("none", "b.conf")],
)
def test_the_default(pattern: str | None, expected: str) -> None:
    entries = [entry("a.conf", problem="it is broken"), entry("b.conf"), entry("c.conf")]
    found = default_entry(entries, pattern)
    assert found is not None
    assert found.id == expected
    assert default_entry(entries[:1], pattern) is None
