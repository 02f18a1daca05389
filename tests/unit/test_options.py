"""The option grammar, by examples and by properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chv.config import options
from chv.errors import ConfigError

WORDS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8)
# anything that can stand in a value: what would separate is protected by quotes
VALUES = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters='"'), min_size=1, max_size=20
)


@given(st.dictionaries(WORDS, VALUES, max_size=6))
def test_quoted_values_come_back(pairs: dict[str, str]) -> None:
    text = ",".join(f'{key}="{value}"' for key, value in pairs.items())
    raw = options.parse(text, "x", list(pairs))
    assert {key: options.dequote(value or "") for key, value in raw.items()} == pairs


@given(st.lists(st.text("ab=@[],:"), min_size=1, max_size=5))
def test_split_never_loses_a_character(pieces: list[str]) -> None:
    text = ",".join(pieces)
    try:
        parts = options.split(text, "x")
    except ConfigError:
        assert text.count("[") or text.count("]")
        return
    assert ",".join(parts) == text


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for read in (
        options.integer,
        options.address,
        options.size,
        options.toggle,
        options.integer_list,
        options.string_list,
        options.tuple_list,
        lambda value, name: options.parse(value, name, ["a", "b"], ["off"]),
    ):
        message = "x"
        try:
            read(text, "x")
        except ConfigError as error:
            message = str(error)
        assert message.startswith("x")


@given(st.integers(0, (1 << 30) - 1), st.sampled_from(["", "K", "M", "G"]))
def test_sizes(number: int, suffix: str) -> None:
    assert options.size(f"{number}{suffix}", "x") == number * 1024 ** " KMG".index(suffix or " ")


@given(st.lists(st.integers(0, 5000), max_size=20), st.booleans())
def test_integer_lists(numbers: list[int], brackets: bool) -> None:
    text = ",".join(map(str, numbers))
    assert options.integer_list(f"[{text}]" if brackets else text, "x") == numbers


@given(st.integers(0, 1000), st.integers(1, 500))
def test_integer_ranges(first: int, more: int) -> None:
    assert options.integer_list(f"[{first}-{first + more}]", "x") == list(range(first, first + more + 1))


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=6))
def test_tuple_lists(pairs: list[tuple[int, int]]) -> None:
    text = "[" + ",".join(f"{a}@{b}" for a, b in pairs) + "]"
    assert options.tuple_list(text, "x") == [(str(a), str(b)) for a, b in pairs]


@pytest.mark.parametrize("text", ["on", "true", "ON", "True"])
def test_toggle_on(text: str) -> None:
    assert options.toggle(text, "x") is True


@pytest.mark.parametrize("text", ["off", "false", "OFF", ""])
def test_toggle_off(text: str) -> None:
    assert options.toggle(text, "x") is False


def test_separators_are_protected_by_brackets_and_quotes() -> None:
    text = 'a=[0@[1,2],1@[3]],b="x,y=z",c=1=2'
    assert options.split(text, "x") == ["a=[0@[1,2],1@[3]]", 'b="x,y=z"', "c=1=2"]
    assert options.parse(text, "x", ["a", "b", "c"])["c"] == "1=2"


def test_a_later_key_replaces_an_earlier_and_an_empty_value_unsets() -> None:
    assert options.parse("a=1,a=2", "x", ["a"]) == {"a": "2"}
    assert options.parse("a=1,a=", "x", ["a"]) == {"a": None}


def test_values_are_trimmed() -> None:
    assert options.parse(" a = 1 ,b= 2", "x", ["a", "b"]) == {"a": "1", "b": "2"}


def test_string_lists() -> None:
    assert options.string_list('[a,"b,c", d]', "x") == ["a", "b,c", "d"]
    assert options.string_list("[]", "x") == []


def test_a_range_cannot_fill_the_memory() -> None:
    with pytest.raises(ConfigError, match="more than 65536 numbers"):
        options.integer_list("0-4294967295", "x")
