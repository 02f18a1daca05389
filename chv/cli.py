"""``chv``: Cloud Hypervisor's command line, and ``chv remote``: its ch-remote.

A VM given by options is created and booted at once; with only ``--api-socket`` the VMM waits to be
told over REST. The exit status is 0 when the guest powers off, when ``vmm.shutdown`` asks for it and
on SIGTERM, SIGINT or SIGHUP; 1 with the reasons on stderr when something failed; 2 for options that
argparse refuses.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, Error, NotSupportedYet
from .version import __version__

if TYPE_CHECKING:
    from .config import VmConfig

PAYLOAD = {
    "kernel": "kernel to boot: a vmlinux or firmware with a PVH entry (ELF), or a bzImage",
    "initramfs": "initial RAM file system",
    "cmdline": "the kernel's command line",
    "firmware": "firmware to boot",
    "boot-entry": "which boot entry of the first disk, when there is neither kernel nor firmware; "
    '"chv image entries FILE" lists them',
}
HELP = {
    "cpus": "vCPUs: boot=<number>[,max=<number>,topology=<threads>:<cores>:<dies>:<packages>] or a number "
    "[default: boot=1]",
    "memory": "RAM: size=<bytes, or with K, M, G> [default: size=512M]",
    "disk": "disks: path=<image or block device>[,readonly=on,direct=on,num_queues=<n>,queue_size=<n>,"
    "serial=<text>]",
    "net": "networks: tap=<name>,ip=<address>,mask=<mask>,mac=<address>,mtu=<n>,num_queues=<n>,fd=[<n>]; "
    "each may be left out",
    "rng": "entropy source [default: src=/dev/urandom]",
    "serial": "the serial port: off, null, pty, tty, file=<path> or socket=<path> [default: null]",
    "console": "the virtio console, hvc0: off, null, pty, tty, file=<path> or socket=<path> [default: tty]",
}
_PAYLOAD_VALUES = {"cmdline": "TEXT", "boot-entry": "ID"}
UNBUILT = {  # options of Cloud Hypervisor that are not fields of a VM -> what they ask for
    "event-monitor": "the event monitor",
    "gdb": "debugging with GDB",
    "igvm": "booting an IGVM file",
    "host-data": "host data for confidential VMs",
    "fw-cfg-config": "fw_cfg",
    "restore": "restoring a snapshot",
    "dbus-service-name": "the D-Bus API",
    "dbus-object-path": "the D-Bus API",
    "net-backend": "running as a vhost-user backend",
    "block-backend": "running as a vhost-user backend",
    "vhost-user-net": "vhost-user network devices",
    "vhost-user-blk": "vhost-user disks",
    "log-format": "choosing the format of the log",
}
UNBUILT_FLAGS = {"dbus-system-bus": "the D-Bus API", "pvmemcontrol": "pvmemcontrol"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``chv`` with ``argv`` (the process's arguments if None); the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["remote"]:
            from .remote import main as remote_main

            return remote_main(arguments[1:])
        if arguments[:1] == ["image"]:
            from .image_cli import main as image_main

            return image_main(arguments[1:])
        return _main(arguments)
    except KeyboardInterrupt:
        return 130
    except (Error, OSError) as error:
        report(error)
        return 1


def report(error: BaseException) -> None:
    """Print why it failed: the action, then each cause on a line of its own."""
    from .vmm import error_chain

    first, *causes = error_chain(error)
    print(f"chv: {as_option(first)}", file=sys.stderr)
    for cause in causes:
        print(f"  because: {as_option(cause)}", file=sys.stderr)


def _main(arguments: list[str]) -> int:
    if arguments in (["-V"], ["--version"]):
        print(f"chv v{__version__}")
        return 0
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 0
    options = parser.parse_args(arguments)
    if options.version:
        print(f"chv v{__version__}")
        return 0
    _refuse_unbuilt(options)
    config = read_config(options)
    if config is None and options.api_socket is None:
        raise ConfigError("nothing to do: give a VM (--kernel PATH ...), an --api-socket, or both")

    from .run import run
    from .threads import take_turns_quickly

    take_turns_quickly()
    return run(
        config,
        api_socket=options.api_socket,
        no_shutdown=options.no_shutdown,
        verbosity=options.v,
        log_file=options.log_file,
    )


# -- options to configuration --------------------------------------------------------


def read_config(options: argparse.Namespace) -> VmConfig | None:
    """The checked configuration that the options describe; None if they describe none."""
    from .config import decode, validate
    from .config.parts import FLAGS, PARTS, from_text

    body: dict[str, Any] = {}
    for part in PARTS:
        value = getattr(options, _attribute(part.option))
        if value is None:
            continue
        texts = value if part.many else [value]
        parsed = [
            from_text(part, text, f"{part.field}[{index}]" if part.many else "")
            for index, text in enumerate(texts)
        ]
        _put(body, part.field, parsed if part.many else parsed[0])
    for flag, field in FLAGS.items():
        if getattr(options, flag):
            body[field] = True
    payload = {
        _attribute(name): value
        for name in PAYLOAD
        if (value := getattr(options, _attribute(name))) is not None
    }
    if not payload and not body:
        return None
    if not (payload.get("kernel") or payload.get("firmware") or body.get("disks")):
        given = [*(_option_of(f"payload.{name}") for name in payload), *(_option_of(field) for field in body)]
        raise ConfigError(f"{', '.join(given)}: needs something to boot: --kernel PATH or --disk path=IMAGE")
    config = decode({**body, "payload": payload})
    validate(config)
    return config


def _put(body: dict[str, Any], path: str, value: Any) -> None:
    *outer, last = path.split(".")
    for step in outer:
        body = body.setdefault(step, {})
    body[last] = value


def _refuse_unbuilt(options: argparse.Namespace) -> None:
    for option, what in {**UNBUILT, **UNBUILT_FLAGS}.items():
        if getattr(options, _attribute(option)):
            raise NotSupportedYet(f"--{option}: {what}: chv does not support this yet")
    if options.seccomp not in (None, "false"):
        raise NotSupportedYet(
            f"--seccomp: {options.seccomp}: chv has no seccomp filter yet; allowed is false"
        )


def as_option(message: str) -> str:
    """``message`` with the option to change in front: ``net[0].mtu: ...`` belongs to ``--net``."""
    field = message.partition(":")[0]
    option = _option_of(field)
    if not option:
        return message
    return f"{option}{message[len(field) :]}" if _plain_name(field, option) else f"{option}: {message}"


def _plain_name(field: str, option: str) -> bool:
    """Whether naming ``field`` beside ``option`` would only repeat it."""
    name = re.sub(r"\[[0-9]+\]$", "", field)
    return name.replace("_", "-").rstrip("s") == option.removeprefix("--").rstrip("s")


def _option_of(field: str) -> str:
    """The option that sets ``field``; empty if there is none."""
    from .config.parts import FLAGS, PARTS

    path = field.replace("[", ".")
    known = {part.field: part.option for part in PARTS if part.field != "memory"}
    known |= {field: flag for flag, field in FLAGS.items()}
    known |= {f"payload.{_attribute(name)}": name for name in PAYLOAD}
    known |= {"memory": "memory", "api-socket": "api-socket"}
    for prefix, option in known.items():
        if path == prefix or path.startswith(f"{prefix}."):
            return f"--{option}"
    return ""


def _attribute(option: str) -> str:
    return option.replace("-", "_")


# -- the parser ------------------------------------------------------------------------


class _Once(argparse.Action):
    """An option that must not be given twice: one of the two values would be ignored silently."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice")
        setattr(namespace, self.dest, values)


def build_parser() -> argparse.ArgumentParser:
    from .config.parts import FLAGS, PARTS
    from .config.validate import NOT_BUILT

    parser = argparse.ArgumentParser(
        prog="chv",
        usage="chv --kernel PATH [options] | chv --disk path=IMAGE [options] | chv --api-socket PATH | "
        "chv remote --api-socket PATH COMMAND | chv image entries IMAGE",
        description="Run a virtual machine on KVM.",
        epilog='"chv remote --help" shows how to control one that runs.',
        allow_abbrev=False,
    )
    machine = parser.add_argument_group("the VM")
    later = parser.add_argument_group("known, and refused with a message until chv has them")
    for name, text in PAYLOAD.items():
        group = later if f"payload.{name}" in NOT_BUILT else machine
        group.add_argument(f"--{name}", action=_Once, metavar=_PAYLOAD_VALUES.get(name, "PATH"), help=text)
    for part in PARTS:
        group = machine if part.option in HELP else later
        keys = ",".join([*part.words, *(f"{key}=" for key in part.keys)])
        text = HELP.get(part.option, keys).replace("%", "%%")
        metavar = part.option.upper().replace("-", "_")
        if part.many:
            group.add_argument(f"--{part.option}", action="extend", nargs="+", metavar=metavar, help=text)
        elif part.option == "rng":
            group.add_argument("--rng", action=_Once, nargs="?", const="", metavar=metavar, help=text)
        else:
            group.add_argument(f"--{part.option}", action=_Once, metavar=metavar, help=text)
    for flag in FLAGS:
        later.add_argument(f"--{flag}", action="store_true")
    for option in UNBUILT:
        later.add_argument(f"--{option}", action="append", metavar="VALUE", help=UNBUILT[option])
    for flag in UNBUILT_FLAGS:
        later.add_argument(f"--{flag}", action="store_true", help=UNBUILT_FLAGS[flag])
    _add_program_options(parser.add_argument_group("the program"))
    return parser


def _add_program_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--api-socket",
        action=_Once,
        metavar="PATH",
        help="serve the REST API on this Unix socket: PATH, path=PATH, or fd=NUMBER for one that is open",
    )
    group.add_argument("--no-shutdown", action="store_true", help="stay when the guest has shut down")
    group.add_argument("--seccomp", choices=("true", "false", "log", "errno"), help="only false for now")
    group.add_argument("--log-file", action=_Once, metavar="PATH", help="where to log [default: stderr]")
    group.add_argument("-v", action="count", default=0, help="log more: -v informs, -vv debugs")
    group.add_argument("-V", "--version", action="store_true", help="print the version")


def option_table() -> Mapping[str, str]:
    """Every option that the parser knows and its help, for documentation and tests."""
    return {
        option: action.help or "" for action in build_parser()._actions for option in action.option_strings
    }
