"""Bad input: what is given, and exactly what the person who gave it reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chv import cli, remote
from chv.api.listener import open_listener
from chv.api.server import ApiServer
from chv.config import make_config
from chv.config.make import to_json_shape
from chv.errors import ConfigError, Error, NotSupportedYet
from chv.vmm import Vmm

from .fake_vm import FakeVm
from .test_api import Running

NOTHING_TO_BOOT = (
    "payload.kernel: required, but missing: a VM needs something to boot, a kernel, a firmware or a disk"
)
TERMINAL_TAKEN = (
    "console.mode: Tty (its default) is taken by serial.mode: only one of them can have the terminal; "
    "allowed beside it are Off, Null, Pty, File and Socket"
)
CPU_KEYS = (
    "boot, max, topology, kvm_hyperv, nested, max_phys_bits, affinity, features, core_scheduling, profile"
)

# Python arguments (with kernel="/k") -> message
ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"kernal": "/k"}, 'kernal: unknown argument; did you mean "kernel"?'),
    ({"disk": "path=/a"}, 'disk: unknown argument; did you mean "disks"?'),
    ({"kernel": 4}, "payload.kernel: expected a string or null, got a whole number (4)"),
    ({"kernel": None}, NOTHING_TO_BOOT),
    ({"kernel": ""}, NOTHING_TO_BOOT),
    ({"firmware": "/f"}, "payload.firmware: give either a kernel or a firmware, not both"),
    ({"kernel": "a\0b"}, "payload.kernel: it contains a NUL character"),
    (
        {"payload": {"kernel": "/other"}},
        "kernel: '/k' differs from payload.kernel ('/other'): give one of them",
    ),
    ({"cmdline": "x" * 65536}, "payload.cmdline: 65536 bytes long, at most 65535 are possible"),
    ({"cpus": 0}, "cpus.boot_vcpus: 0 is not in 1..1024"),
    ({"cpus": -1}, "cpus.boot_vcpus: -1 is less than the least allowed, 0"),
    ({"cpus": 1025}, "cpus.max_vcpus: 1025 is not in 1..1024"),
    ({"cpus": True}, "cpus: expected an object, got true or false (true)"),
    ({"cpus": 1.5}, "cpus: expected an object, got a number (1.5)"),
    ({"cpus": [4]}, "cpus: expected an object, got a list"),
    ({"cpus": {"boot": 4, "max": 2}}, "cpus.max_vcpus: 2 is less than cpus.boot_vcpus (4)"),
    ({"cpus": {"boot": 4, "boot_vcpus": 3}}, "cpus.boot_vcpus: given twice, as 4 and 3"),
    ({"cpus": {"bot": 4}}, 'cpus.bot: unknown field; did you mean "boot_vcpus"?'),
    ({"cpus": {"boot": "four"}}, "cpus.boot: 'four' is not a whole number"),
    ({"cpus": {1: 2}}, "cpus: the key 1 is not a string"),
    ({"cpus": {"max_phys_bits": 64}}, "cpus.max_phys_bits: 64 is not in 36..52"),
    (
        {"cpus": {"max": 4, "topology": "2:2:1:2"}},
        "cpus.topology: it makes 8 vCPUs, not 4 as cpus.max_vcpus says",
    ),
    ({"cpus": {"max": 4, "topology": "4:1:1:1"}}, "cpus.topology.threads_per_core: 4 is not 1 or 2"),
    ({"cpus": {"max": 4, "topology": "1:4:0:1"}}, "cpus.topology.dies_per_package: 0 is not at least 1"),
    ({"memory": 0}, "memory.size: 0 is not a positive multiple of 4096 bytes"),
    ({"memory": 4097}, "memory.size: 4097 is not a positive multiple of 4096 bytes"),
    (
        {"memory": 1 << 46},
        "memory.size: 70368744177664 is more than 70367670435840, what fits in 46 address bits "
        "(cpus.max_phys_bits)",
    ),
    ({"memory": "1T"}, "memory.size: '1T' is not a size, such as 512M, 2G or 1048576 (suffixes K, M, G)"),
    ({"memory": {"sze": 1}}, 'memory.sze: unknown field; did you mean "size"?'),
    (
        {"serial": "ttyS0"},
        'serial: unknown key "ttyS0"; did you mean "tty"? (known: off, null, pty, tty, file, socket)',
    ),
    ({"serial": "tty,off"}, "serial: tty and off exclude each other: give one of them"),
    ({"serial": "tty,file=/a"}, "serial: tty and file exclude each other: give one of them"),
    ({"serial": {"mode": "File"}}, "serial.file: required with mode File, but missing"),
    ({"serial": {"mode": "Tty", "file": "/a"}}, "serial.file: goes with mode File, not with mode Tty"),
    ({"serial": {"mode": "tty"}}, 'serial.mode: "tty" is not one of Off, Pty, Tty, File, Socket, Null'),
    (
        {"serial": "tty", "console": "tty"},
        TERMINAL_TAKEN,
    ),
    ({"disks": [{"path": 3}]}, "disks[0].path: expected a string or null, got a whole number (3)"),
    (
        {"memory": "size=1G,hotplug_size=8G"},
        "memory.hotplug_size: memory hotplug: chv does not support this yet",
    ),
    ({"watchdog": True}, "watchdog: the watchdog: chv does not support this yet"),
    ({"watchdog": 1}, "watchdog: expected true or false, got a whole number (1)"),
]

# chv's options -> the first line on stderr, without "chv: "
OPTIONS: list[tuple[list[str], str]] = [
    (["--cpus", "4"], "--cpus: needs something to boot: --kernel PATH or --disk path=IMAGE"),
    (
        ["--cmdline", "x", "--memory", "1G"],
        "--cmdline, --memory: needs something to boot: --kernel PATH or --disk path=IMAGE",
    ),
    (["-v"], "nothing to do: give a VM (--kernel PATH ...), an --api-socket, or both"),
    (
        ["--kernel", "k", "--cpus", "bot=4"],
        f'--cpus: unknown key "bot"; did you mean "boot"? (known: {CPU_KEYS})',
    ),
    (["--kernel", "k", "--cpus", "boot"], "--cpus: cpus.boot: 'boot' is not a whole number"),
    (["--kernel", "k", "--cpus", "max=8,boot"], '--cpus: "boot" needs a value: boot=...'),
    (
        ["--kernel", "k", "--cpus", "boot=4,max=2"],
        "--cpus: cpus.max_vcpus: 2 is less than cpus.boot_vcpus (4)",
    ),
    (
        ["--kernel", "k", "--cpus", "topology=1:2"],
        "--cpus: cpus.topology: '1:2' is not of the form "
        "threads_per_core:cores_per_die:dies_per_package:packages",
    ),
    (["--kernel", "k", "--cpus", "affinity=[0@[1]"], '--cpus: "[" without "]" in \'affinity=[0@[1]\''),
    (["--kernel", "k", "--cpus", "affinity=0]"], '--cpus: "]" without "[" in \'affinity=0]\''),
    (["--kernel", "k", "--cpus", 'profile="Host'], "--cpus: a quote is not closed in 'profile=\"Host'"),
    (
        ["--kernel", "k", "--cpus", "affinity=0@1"],
        "--cpus: cpus.affinity: '0@1' is not a list in brackets, such as [0@1,1@2]",
    ),
    (
        ["--kernel", "k", "--cpus", "affinity=[0@[3-2]]"],
        "--cpus: cpus.affinity: the range '3-2' does not ascend",
    ),
    (["--kernel", "k", "--cpus", "features=[avx]"], "--cpus: cpus.features: 'avx' is not one of amx"),
    (
        ["--kernel", "k", "--memory", "size=1.5G"],
        "--memory: memory.size: '1.5G' is not a size, such as 512M, 2G or 1048576 (suffixes K, M, G)",
    ),
    (
        ["--kernel", "k", "--memory", "mergeable=yes"],
        "--memory: memory.mergeable: 'yes' is neither on nor off",
    ),
    (["--kernel", "k", "--serial", "off=1"], "--serial: \"off\" takes no value, not '1'"),
    (
        ["--kernel", "k", "--serial", "tty", "--console", "tty"],
        f"--console: {TERMINAL_TAKEN}",
    ),
    (
        ["--kernel", "k", "--net", "mtu=70000"],
        "--net: net[0].mtu: 70000 is more than the most allowed, 65535",
    ),
    (["--kernel", "k", "--fs", "tag=a"], "--fs: fs[0].socket: required, but missing"),
    (["--kernel", "k", "--landlock"], "--landlock: landlock_enable: Landlock: chv does not support this yet"),
    (["--event-monitor", "path=x"], "--event-monitor: the event monitor: chv does not support this yet"),
    (
        ["--kernel", "k", "--seccomp", "true"],
        "--seccomp: true: chv has no seccomp filter yet; allowed is false",
    ),
    (["--api-socket", ""], "--api-socket: the path is empty"),
    (["--api-socket", "fd=x"], "--api-socket: fd=x is not a file descriptor"),
    (["--api-socket", "fd=999"], "--api-socket: fd=999 is not a socket (Bad file descriptor)"),
    (
        ["--api-socket", "/no/such/folder/s"],
        "--api-socket: /no/such/folder/s.lock: No such file or directory",
    ),
    (
        ["--api-socket", "/" + "x" * 200],
        f"--api-socket: /{'x' * 200}: longer than 107 bytes, what a Unix socket can have",
    ),
    (
        ["--kernel", "k", "--log-file", "/no/such/folder/log"],
        "--log-file: /no/such/folder/log: No such file or directory",
    ),
]

# bodies of vm.create -> status and message
BODIES: list[tuple[str, str]] = [
    ("{", "this is not JSON: Input data was truncated"),
    ("nonsense", "this is not JSON: JSON is malformed: invalid character (byte 4)"),
    ('{"a": 1} x', "this is not JSON: JSON is malformed: trailing characters (byte 10)"),
    ("[" * 100000, "this JSON is nested too deeply"),
    ("[]", "the configuration: expected an object, got a list"),
    ("null", "the configuration: expected an object, got null"),
    ('{"cpu": {}}', 'cpu: unknown field; did you mean "cpus"?'),
    ('{"cpus": null}', "cpus: expected an object, got null"),
    ('{"cpus": {"boot_vcpus": "4"}}', 'cpus.boot_vcpus: expected a whole number, got a string ("4")'),
    (
        '{"cpus": {"boot_vcpus": 4294967296}}',
        "cpus.boot_vcpus: 4294967296 is more than the most allowed, 4294967295",
    ),
    ('{"cpus": {"boot_vcpus": 1.5}}', "cpus.boot_vcpus: expected a whole number, got a number (1.5)"),
    ('{"memory": {"size": -4096}}', "memory.size: -4096 is less than the least allowed, 0"),
    (
        '{"memory": {"size": 18446744073709551616}}',
        "memory.size: 18446744073709551616 is more than the most allowed, 9223372036854775807",
    ),
    ('{"memory": {"file": "/x"}}', "memory.file: no longer a field: use memory.zones"),
    ('{"memory": {"hotplug_method": "acpi"}}', 'memory.hotplug_method: "acpi" is not one of Acpi, VirtioMem'),
    ('{"kernel": "/k"}', 'kernel: expected {"path": "..."}, or payload.kernel in the current spelling'),
    (
        '{"kernel": {"path": "/a"}, "payload": {"kernel": "/b"}}',
        "kernel.path: '/a' differs from payload.kernel ('/b'): give one of them",
    ),
    ('{"payload": 3}', "payload: expected an object or null, got a whole number (3)"),
    ('{"disks": {"path": "/a"}}', "disks: expected a list or null, got an object"),
    ('{"vsock": {"cid": 3}}', "vsock.socket: required, but missing"),
    (
        '{"disks": [{}, {"image_type": "iso"}]}',
        'disks[1].image_type: "iso" is not one of Unknown, Raw, Qcow2, FixedVhd, Vhdx, FlatVmdk',
    ),
    ('{"numa": [{"guest_numa_id": 0, "cpu": [1]}]}', 'numa[0].cpu: unknown field; did you mean "cpus"?'),
]

# bodies of vm.resize, of a VM with at most 8 vCPUs that has not booted -> status and message
RESIZES: list[tuple[str, int, str]] = [
    ("{", 400, "this is not JSON: Input data was truncated"),
    ("8", 400, "the request body: expected an object, got a whole number (8)"),
    ('{"vcpus": 8}', 400, 'vcpus: unknown field; did you mean "desired_vcpus"?'),
    ('{"desired_vcpus": "8"}', 400, 'desired_vcpus: expected a whole number or null, got a string ("8")'),
    ('{"desired_vcpus": -1}', 400, "desired_vcpus: -1 is less than the least allowed, 0"),
    ('{"desired_vcpus": 0}', 500, "desired_vcpus: 0 is not possible; allowed are 1 to 8 (cpus.max_vcpus)"),
    ('{"desired_vcpus": 9}', 500, "desired_vcpus: 9 is not possible; allowed are 1 to 8 (cpus.max_vcpus)"),
    ('{"desired_ram": 5000}', 500, "desired_ram: 5000 is not a positive multiple of 4096 bytes"),
    ('{"desired_balloon": 4096}', 400, "desired_balloon: the balloon: chv does not support this yet"),
]

# chv remote's arguments -> the first line on stderr, without "chv: "
REMOTE: list[tuple[list[str], str]] = [
    (["resize"], "resize: nothing to change: give --cpus, --memory or --balloon"),
    (["resize", "--cpus", "many"], "--cpus: 'many' is not a whole number"),
    (
        ["resize", "--memory", "lots"],
        "--memory: 'lots' is not a size, such as 512M, 2G or 1048576 (suffixes K, M, G)",
    ),
    (["create", "/no/such/file"], "/no/such/file: No such file or directory"),
    (["create", "/dev/null"], "/dev/null: this is not JSON: Input data was truncated"),
    (["nmi"], "nmi: chv does not support this yet"),
    (["add-disk", "path=/a"], "add-disk: chv does not support this yet"),
    (["ping"], "/no/such/socket: No such file or directory: is a VMM listening there?"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS)
def test_python_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**{"kernel": "/k", **arguments})
    assert str(caught.value) == message
    assert isinstance(caught.value, NotSupportedYet) == ("support" in message)


@pytest.mark.parametrize(("arguments", "message"), OPTIONS)
def test_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"chv: {message}\n")


@pytest.mark.parametrize(("arguments", "message"), REMOTE)
def test_remote(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["remote", "--api-socket", "/no/such/socket", *arguments]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"chv: {message}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense"], "chv: error: unrecognized arguments: --nonsense"),
        (["--kernel"], "chv: error: argument --kernel: expected one argument"),
        (["--kernel", "a", "--kernel", "b"], "chv: error: --kernel is given twice"),
        (["--kern", "a"], "chv: error: unrecognized arguments: --kern a"),
        (["remote", "ping"], "chv remote: error: --api-socket PATH is needed"),
        (["remote", "--api-socket", "s", "ping", "x"], "chv remote: error: unknown arguments: x"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == message


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("api") / "s")
    yield running
    running.close()


@pytest.mark.parametrize(("body", "message"), BODIES)
def test_bodies_of_create(server: Running, body: str, message: str) -> None:
    status, _, answer = server.http("PUT", "/api/v1/vm.create", body.encode())
    assert (status, answer) == (400, ["Error from API", message])
    assert server.vmm.state is None


@pytest.mark.parametrize(("body", "status", "message"), RESIZES)
def test_bodies_of_resize(server: Running, body: str, status: int, message: str) -> None:
    server.client.create({"cpus": {"boot_vcpus": 4, "max_vcpus": 8}, "payload": {"kernel": "/k"}})
    try:
        got, _, answer = server.http("PUT", "/api/v1/vm.resize", body.encode())
        assert (got, answer[0], answer[-1]) == (status, "Error from API", message)
        config = server.client.info()["config"]
        assert (config["cpus"]["boot_vcpus"], config["memory"]["size"]) == (4, 512 << 20)
    finally:
        server.client.delete()


def over_rest() -> list[tuple[bytes, str]]:
    """The Python arguments that can be said in JSON as well, with their messages."""
    rows = []
    for arguments, message in ARGUMENTS:
        try:
            body = to_json_shape({"kernel": "/k", **arguments})
        except ConfigError:
            continue  # Python's own spelling is at fault
        rows.append((json.dumps(body).encode(), message))
    return rows


@pytest.mark.parametrize(("body", "message"), over_rest())
def test_rules_are_the_same_over_rest(server: Running, body: bytes, message: str) -> None:
    """Types are refused at create, rules at boot, in the words that Python has for it."""
    server.client.delete()
    status, _, answer = server.http("PUT", "/api/v1/vm.create", body)
    if status == 204:
        status, _, answer = server.http("PUT", "/api/v1/vm.boot")
    server.client.delete()
    assert (status, answer[-1]) == (400, message)


def test_a_socket_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.touch()
    with pytest.raises(Error) as caught:
        ApiServer(Vmm(new_vm=FakeVm), str(path))
    assert str(caught.value) == f"api-socket: {path} exists and is not a socket"


def test_descriptors_that_are_no_api_sockets(tmp_path: Path) -> None:
    with open(tmp_path / "f", "w") as file, pytest.raises(ConfigError) as caught:
        open_listener(f"fd={file.fileno()}")
    assert str(caught.value).startswith("api-socket: fd=")
    assert str(caught.value).endswith(" is not a socket (Socket operation on non-socket)")


def test_every_known_command_is_offered() -> None:
    offered = remote.build_parser().format_help()
    assert all(command in offered for command in remote.SIMPLE)
