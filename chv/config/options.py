"""The option grammar of the command line: ``key=value,key=value`` and what values look like.

    options := option (',' option)*        option := key ['=' value]

Commas inside double quotes or square brackets do not separate. The first ``=`` of an option ends
its key. ``key=`` leaves the key unset. A later key replaces an earlier one. (Cloud Hypervisor,
option_parser.) Every function raises :class:`chv.errors.ConfigError`; ``name`` is what the message
starts with, for example ``cpus`` or ``cpus.max``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ..errors import ConfigError

INTEGER_LIST_MAX = 65536  # members of one list: a typing error must not fill the memory
U64_MAX = (1 << 64) - 1

_SIZE = re.compile(r"([0-9]+)([KMG]?)")
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30}
_ADDRESS = re.compile(r"0[xX][0-9a-fA-F]+|[0-9]+")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean "boot"?``, or nothing where no known word is like ``word``."""
    from difflib import get_close_matches

    words = list(known)
    matches = get_close_matches(word, words, n=1)
    if not matches:  # "vcpus" is near a part of "desired_vcpus"
        matches = [one for one in words if get_close_matches(word, one.split("_"), n=1, cutoff=0.75)]
    return f'; did you mean "{matches[0]}"?' if matches else ""


def split(text: str, name: str, separator: str = ",") -> list[str]:
    """``text`` cut at each separator that is not inside quotes or brackets."""
    pieces: list[str] = []
    start = depth = 0
    quoted = False
    for index, char in enumerate(text):
        if char == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif char == "[":
            depth += 1
        elif char == "]":
            depth -= 1
            if depth < 0:
                raise ConfigError(f'{name}: "]" without "[" in {text!r}')
        elif char == separator and depth == 0:
            pieces.append(text[start:index])
            start = index + 1
    if quoted:
        raise ConfigError(f"{name}: a quote is not closed in {text!r}")
    if depth:
        raise ConfigError(f'{name}: "[" without "]" in {text!r}')
    pieces.append(text[start:])
    return pieces


def dequote(text: str) -> str:
    """``text`` without its quotes: ``"a,b"`` is ``a,b``."""
    return text.replace('"', "")


def parse(text: str, name: str, keys: Sequence[str], words: Sequence[str] = ()) -> dict[str, str | None]:
    """The keys of ``text`` with their raw values, ``None`` where unset.

    ``keys`` need a value; ``words`` stand alone. Any other key is refused.
    """
    found: dict[str, str | None] = {}
    if not text.strip():
        return found
    for piece in split(text, name):
        key, equals, value = piece.partition("=")
        key, value = key.strip(), value.strip()
        if key in words:
            if equals:
                raise ConfigError(f'{name}: "{key}" takes no value, not {value!r}')
            found[key] = None
        elif key not in keys:
            known = [*words, *keys]
            raise ConfigError(f'{name}: unknown key "{key}"{nearest(key, known)} (known: {", ".join(known)})')
        elif not equals:
            raise ConfigError(f'{name}: "{key}" needs a value: {key}=...')
        else:
            found[key] = value or None
    return found


# -- values ----------------------------------------------------------------------


def text_value(text: str, name: str) -> str:
    return dequote(text)


def integer(text: str, name: str) -> int:
    """A decimal number."""
    text = dequote(text)
    if not (text.isascii() and text.isdigit()) or len(text) > 20 or int(text) > U64_MAX:
        raise ConfigError(f"{name}: {text!r} is not a whole number")
    return int(text)


def address(text: str, name: str) -> int:
    """A number, decimal or with 0x."""
    if not _ADDRESS.fullmatch(text) or len(text) > 20:
        raise ConfigError(f"{name}: {text!r} is not an address, such as 0xe9 or 233")
    return int(text, 16) if text[:2].lower() == "0x" else int(text)


def size(text: str, name: str) -> int:
    """Bytes: a whole number with K (2**10), M (2**20), G (2**30) or no suffix."""
    match = _SIZE.fullmatch(dequote(text))
    value = int(match[1]) << _SHIFT[match[2]] if match and len(match[1]) <= 20 else U64_MAX + 1
    if value > U64_MAX:
        raise ConfigError(f"{name}: {text!r} is not a size, such as 512M, 2G or 1048576 (suffixes K, M, G)")
    return value


def toggle(text: str, name: str) -> bool:
    """on, true, off or false, in any case; nothing means off."""
    word = dequote(text).lower()
    if word in ("on", "true"):
        return True
    if word in ("off", "false", ""):
        return False
    raise ConfigError(f"{name}: {text!r} is neither on nor off")


def _inside(text: str) -> str:
    """What is between the outer brackets, or ``text`` where there are none."""
    text = text.strip()
    return text[1:-1].strip() if text.startswith("[") and text.endswith("]") else text


def integer_list(text: str, name: str) -> list[int]:
    """``[0,2-4,6]``: numbers and ascending ranges; the brackets may be left out."""
    numbers: list[int] = []
    inside = _inside(dequote(text))
    for piece in inside.split(",") if inside else ():
        match = _RANGE.fullmatch(piece.strip())
        if not match or len(piece) > 30:
            raise ConfigError(f"{name}: {piece.strip()!r} is neither a number nor a range, such as 2-4")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if match[2] is not None and first >= last:
            raise ConfigError(f"{name}: the range {piece.strip()!r} does not ascend")
        if max(last - first, len(numbers) + last - first) >= INTEGER_LIST_MAX:
            raise ConfigError(f"{name}: {piece.strip()!r} makes more than {INTEGER_LIST_MAX} numbers")
        numbers.extend(range(first, last + 1))
    return numbers


def string_list(text: str, name: str) -> list[str]:
    """``[a,b]``; the brackets may be left out."""
    inside = _inside(text)
    return [dequote(piece.strip()) for piece in split(inside, name)] if inside else []


def tuple_list(text: str, name: str) -> list[tuple[str, str]]:
    """``[key@value,key@value]`` as pairs of texts; the outer brackets are required."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        raise ConfigError(f"{name}: {text!r} is not a list in brackets, such as [0@1,1@2]")
    pairs: list[tuple[str, str]] = []
    inside = text[1:-1].strip()
    for piece in split(inside, name) if inside else ():
        key, at, value = piece.partition("@")
        if not at or not key.strip() or not value.strip():
            raise ConfigError(f"{name}: {piece.strip()!r} is not of the form key@value")
        pairs.append((key.strip(), value.strip()))
    return pairs


def choice(text: str, name: str, values: Mapping[str, str]) -> str:
    """One of the words in ``values``, in any case, turned into what it stands for."""
    word = dequote(text)
    if word.lower() not in values:
        raise ConfigError(f"{name}: {word!r} is not one of {', '.join(values)}")
    return values[word.lower()]
