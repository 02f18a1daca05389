"""``chv remote``: control a running VMM from the shell, as ch-remote does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, Error, NotSupportedYet

if TYPE_CHECKING:
    from .api.client import Client

SIMPLE = {  # command -> what it does; the method has the same name
    "boot": "boot the VM",
    "counters": "show the VM's counters",
    "delete": "delete the VM",
    "info": "show the VM's configuration and state",
    "pause": "pause the VM",
    "ping": "show the VMM's version",
    "power-button": "press the VM's power button",
    "reboot": "reset the VM",
    "resume": "let a paused VM go on",
    "shutdown": "switch the VM off",
    "shutdown-vmm": "end the VMM",
}
UNBUILT = (
    "add-device",
    "add-disk",
    "add-fs",
    "add-generic-vhost-user",
    "add-net",
    "add-pmem",
    "add-user-device",
    "add-vdpa",
    "add-vsock",
    "coredump",
    "nmi",
    "receive-migration",
    "remove-device",
    "resize-disk",
    "resize-zone",
    "restore",
    "send-migration",
    "snapshot",
)


def main(arguments: Sequence[str]) -> int:
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command in UNBUILT:
        raise NotSupportedYet(f"{options.command}: chv does not support this yet")
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if options.command is None:
        parser.print_help()
        return 0
    if options.api_socket is None:
        parser.error("--api-socket PATH is needed")
    prepared = prepare(options)

    from .api.client import ApiError, Client

    with Client(options.api_socket.removeprefix("path=")) as client:
        try:
            answer = prepared(client)
        except ApiError as error:
            _report(error.messages)
            return 1
    if answer is not None:
        print(json.dumps(answer, indent=2))
    return 0


def prepare(options: argparse.Namespace) -> Callable[[Client], Any]:
    """What to do with the client; arguments are checked before anything is sent."""
    if options.command == "create":
        body = _read_json(options.config)
        return lambda client: client.create(body)
    if options.command == "resize":
        wanted = _resize_arguments(options)
        return lambda client: client.resize(**wanted)
    method = options.command.replace("-", "_")
    return lambda client: getattr(client, method)()


def _resize_arguments(options: argparse.Namespace) -> dict[str, int]:
    from .config.options import integer, size

    readers = {"vcpus": ("cpus", integer), "ram": ("memory", size), "balloon": ("balloon", size)}
    wanted = {
        f"desired_{field}": read(getattr(options, option), f"--{option}")
        for field, (option, read) in readers.items()
        if getattr(options, option) is not None
    }
    if not wanted:
        raise ConfigError("resize: nothing to change: give --cpus, --memory or --balloon")
    return wanted


def _read_json(path: str) -> dict[str, Any]:
    from .config.decode import parse_json

    name = "stdin" if path == "-" else path
    try:
        if path == "-":
            text = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                text = file.read()
        body = parse_json(text)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from None
    except Error as error:
        raise ConfigError(f"{name}: {error}") from None
    if not isinstance(body, dict):
        raise ConfigError(f"{name}: the configuration is not a JSON object")
    return body


def _report(messages: Sequence[str]) -> None:
    first, *causes = messages or ["the server gave no reason"]
    print(f"chv remote: {first}", file=sys.stderr)
    for cause in causes:
        print(f"  because: {cause}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chv remote", description="Control a running VMM over its REST API.", allow_abbrev=False
    )
    parser.add_argument("--api-socket", metavar="PATH", help="the Unix socket that the VMM serves")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    create = commands.add_parser("create", help="create a VM from a JSON configuration")
    create.add_argument("config", nargs="?", default="-", help='a file, or "-" for stdin [default: -]')
    resize = commands.add_parser("resize", help="change the number of vCPUs or the memory")
    resize.add_argument("--cpus", metavar="NUMBER", help="vCPUs")
    resize.add_argument("--memory", metavar="SIZE", help="RAM in bytes, or with K, M, G")
    resize.add_argument("--balloon", metavar="SIZE", help="balloon in bytes, or with K, M, G")
    for command, text in SIMPLE.items():
        commands.add_parser(command, help=text)
    for command in UNBUILT:
        commands.add_parser(command)
    return parser
