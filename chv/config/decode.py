"""JSON to :class:`VmConfig`: the one door that every spelling goes through.

It checks what a field's type can say (names, kinds, ranges of the integer types). Rules between
fields are :func:`chv.config.validate.validate`'s.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from ..errors import ConfigError
from .options import nearest
from .schema import VmConfig

T = TypeVar("T")

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "object": "an object",
    "array": "a list",
    "null": "null",
    "bytes": "bytes",
}
_LOCATION = re.compile(r"(.*?)(?: - at `\$(.*)`)?", re.DOTALL)
_EXPECTED = re.compile(r"Expected `([^`]*)`, got `([^`]*)`")
_BOUND = re.compile(r"Expected `[^`]*` (>=|<=) (-?\d+)")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `([^`]*)`")
_ENUM = re.compile(r"Invalid enum value .*", re.DOTALL)

# Fields of old versions that said nothing new when empty: dropped then, refused otherwise.
_RETIRED = {
    ("vhost_user_net",): "use net with vhost_user",
    ("vhost_user_blk",): "use disks with vhost_user",
    ("sgx_epc",): "removed from Cloud Hypervisor",
    ("memory", "file"): "use memory.zones",
    ("serial", "iommu"): "the serial port has no IOMMU",
}


def decode_json(body: bytes | str) -> VmConfig:
    """The configuration in a request body or a file; :class:`ConfigError` says what is wrong where."""
    return decode(parse_json(body))


def parse_json(body: bytes | str) -> Any:
    """``body`` as plain values; :class:`ConfigError` if it is not JSON."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"this is not JSON: {error}") from None
    except RecursionError:
        raise ConfigError("this JSON is nested too deeply") from None


def decode(plain: Any) -> VmConfig:
    """Plain values in the shape of the JSON body, as a :class:`VmConfig`.

    Also takes the spelling of v0.5.0: ``kernel.path`` and ``cmdline.args`` instead of ``payload``.
    """
    return convert(_modern(plain), VmConfig, "the configuration")


def convert(plain: Any, kind: type[T], whole: str) -> T:
    """``plain`` as a ``kind``; messages call the value itself ``whole``."""
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), plain, kind, whole)) from None


# -- the spelling of v0.5.0 ----------------------------------------------------------


def _modern(plain: Any) -> Any:
    """A copy of ``plain`` without the old spellings."""
    if not isinstance(plain, dict):
        return plain
    plain = dict(plain)
    _drop_retired(plain)
    for old, inner, new in (("kernel", "path", "kernel"), ("cmdline", "args", "cmdline")):
        if old in plain:
            _move_to_payload(plain, old, inner, new)
    return plain


def _drop_retired(plain: dict[str, Any]) -> None:
    for (*outer, last), instead in _RETIRED.items():
        holder: Any = plain
        for step in outer:
            holder = holder.get(step) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or last not in holder:
            continue
        if holder[last]:
            raise ConfigError(f"{'.'.join((*outer, last))}: no longer a field: {instead}")
        rest = {key: value for key, value in holder.items() if key != last}
        if outer:
            plain[outer[0]] = rest
        else:
            del plain[last]


def _move_to_payload(plain: dict[str, Any], old: str, inner: str, new: str) -> None:
    given = plain.pop(old)
    if given is None:
        return
    if not isinstance(given, dict) or set(given) != {inner} or not isinstance(given[inner], str):
        raise ConfigError(f'{old}: expected {{"{inner}": "..."}}, or payload.{new} in the current spelling')
    value = given[inner]
    payload = plain.get("payload")
    if payload is not None and not isinstance(payload, dict):
        return  # decoding says what is wrong with it
    payload = dict(payload or {})
    present = payload.get(new)
    if present is not None and present != value:
        raise ConfigError(
            f"{old}.{inner}: {value!r} differs from payload.{new} ({present!r}): give one of them"
        )
    payload[new] = value
    plain["payload"] = payload


# -- messages ------------------------------------------------------------------------


def _explain(message: str, plain: Any, kind: Any, whole: str) -> str:
    """msgspec's message in words, starting with the path of the field."""
    location = _LOCATION.fullmatch(message)
    assert location is not None  # the pattern matches every text
    what, path = location[1], (location[2] or "").removeprefix(".")
    value = _value_at(plain, path)
    if match := _UNKNOWN.fullmatch(what):
        return _explain_unknown(match[1], path, kind)
    if match := _MISSING.fullmatch(what):
        return f"{_join(path, match[1])}: required, but missing"
    where = path or whole
    if match := _EXPECTED.fullmatch(what):
        expected = " or ".join(_KINDS.get(name, name) for name in match[1].split(" | "))
        got = _KINDS.get(match[2], match[2])
        shown = "" if isinstance(value, (dict, list, type(None))) else f" ({_show(value)})"
        return f"{where}: expected {expected}, got {got}{shown}"
    if match := _BOUND.fullmatch(what):
        limit = "less than the least" if match[1] == ">=" else "more than the most"
        return f"{where}: {_show(value)} is {limit} allowed, {match[2]}"
    if _ENUM.fullmatch(what):
        return f"{where}: {_show(value)} is not one of {', '.join(_choices(kind, path))}"
    return f"{where}: {what}"


def _explain_unknown(field: str, path: str, kind: Any) -> str:
    known = _fields(type_at(kind, path))
    listed = nearest(field, known) or (f" (known: {', '.join(known)})" if known else "")
    return f"{_join(path, field)}: unknown field{listed}"


def _join(path: str, field: str) -> str:
    return f"{path}.{field}" if path else field


def _show(value: Any) -> str:
    import json

    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _steps(path: str) -> list[str]:
    """``disks[0].path`` as its steps: ``disks``, ``0``, ``path``."""
    return re.findall(r"[^.\[\]]+", path)


def _value_at(plain: Any, path: str) -> Any:
    for step in _steps(path):
        if isinstance(plain, dict):
            plain = plain.get(step)
        elif isinstance(plain, list) and step.isdigit() and int(step) < len(plain):
            plain = plain[int(step)]
        else:
            return None
    return plain


def type_at(kind: Any, path: str) -> Any:
    """msgspec's description of the type at ``path``."""
    found = _not_null(msgspec.inspect.type_info(kind))
    for step in _steps(path):
        if isinstance(found, msgspec.inspect.StructType):
            inner = [field.type for field in found.fields if field.encode_name == step]
            if not inner:
                return None
            found = _not_null(inner[0])
        elif isinstance(found, msgspec.inspect.ListType):
            found = _not_null(found.item_type)
        else:
            return None
    return found


def _not_null(found: Any) -> Any:
    """The one alternative of ``X | None`` that is not None."""
    if isinstance(found, msgspec.inspect.UnionType):
        return next((one for one in found.types if not isinstance(one, msgspec.inspect.NoneType)), found)
    return found


def _fields(found: Any) -> list[str]:
    return (
        [field.encode_name for field in found.fields] if isinstance(found, msgspec.inspect.StructType) else []
    )


def _choices(kind: Any, path: str) -> list[str]:
    found = type_at(kind, path)
    return [str(one.value) for one in found.cls] if isinstance(found, msgspec.inspect.EnumType) else []
