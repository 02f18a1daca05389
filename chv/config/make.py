"""Python's spelling of a VM: keyword arguments to :class:`VmConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .decode import decode
from .options import nearest
from .parts import BY_FIELD, from_python, plain
from .schema import VmConfig
from .validate import validate

PAYLOAD = ("kernel", "initramfs", "cmdline", "firmware", "boot_entry")


def make_config(**arguments: Any) -> VmConfig:
    """A checked configuration from keyword arguments.

    ``kernel``, ``initramfs``, ``cmdline``, ``firmware`` and ``boot_entry`` name the payload. Every field of
    :class:`VmConfig` is a keyword as well; its value is the option's text, a dict with the keys of
    the option or of the JSON, or a config object. ``cpus`` may be a number, ``memory`` a number of
    bytes, and a list field one value.

    >>> make_config(kernel="vmlinuz", cpus=dict(boot=4, max=8), memory="1G").cpus.max_vcpus
    8

    Raises :class:`chv.errors.ConfigError`.
    """
    config = decode(to_json_shape(arguments))
    validate(config)
    return config


def to_json_shape(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments in the shape of the JSON body."""
    known = [*PAYLOAD, *VmConfig.__struct_fields__]
    body: dict[str, Any] = {}
    for name, value in arguments.items():
        if name not in known:
            hint = nearest(name, known) or f" (known: {', '.join(known)})"
            raise ConfigError(f"{name}: unknown argument{hint}")
        if name in PAYLOAD:
            continue
        body[name] = from_python(BY_FIELD[name], value) if name in BY_FIELD else plain(value)
    _add_payload(body, {name: plain(arguments[name]) for name in PAYLOAD if arguments.get(name) is not None})
    return body


def _add_payload(body: dict[str, Any], given: Mapping[str, Any]) -> None:
    if not given:
        return
    payload = body.get("payload")
    if payload is not None and not isinstance(payload, dict):
        return  # decoding says what is wrong with it
    payload = dict(payload or {})
    for name, value in given.items():
        if payload.get(name) is not None and payload[name] != value:
            raise ConfigError(
                f"{name}: {value!r} differs from payload.{name} ({payload[name]!r}): give one of them"
            )
        payload[name] = value
    body["payload"] = payload
