"""The REST API on a real Unix socket, in front of a VM that is not one."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chv.api.app import BODY_LIMIT, NOT_BUILT
from chv.api.client import ApiError, Client, ConnectionFailed
from chv.api.server import ApiServer
from chv.config import VmConfig, VmState, make_config
from chv.errors import GuestCrash
from chv.version import __version__
from chv.vmm import Vmm

from .fake_vm import FakeVm

CONFIG = {"cpus": {"boot_vcpus": 4, "max_vcpus": 8}, "payload": {"kernel": "/k"}}
WITHOUT_BODY = ["vmm.shutdown"] + [
    f"vm.{name}" for name in ("delete", "boot", "pause", "resume", "shutdown", "reboot", "power-button")
]
WITH_BODY = ["vm.create", "vm.resize"]
READ = ["vmm.ping", "vm.info", "vm.counters"]


class Running:
    """A server, its VMM, and the fake VMs that it made."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = str(path)
        self.vms: list[FakeVm] = []
        self.vmm = Vmm(new_vm=self._new, **options)
        self.server = ApiServer(self.vmm, self.path).start()
        self.client = Client(self.path, timeout=20)

    def _new(self, config: VmConfig) -> FakeVm:
        self.vms.append(FakeVm(config))
        return self.vms[-1]

    def http(self, verb: str, path: str, body: bytes = b"") -> tuple[int, dict[str, str], Any]:
        """One request over a plain socket: status, headers, decoded body."""
        head = f"{verb} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return self.raw(head.encode() + b"\r\n" + body, verb)

    def raw(self, request: bytes, verb: str = "PUT") -> tuple[int, dict[str, str], Any]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(self.path)
            sock.sendall(request)
            answer = http.client.HTTPResponse(sock, method=verb)
            answer.begin()
            text = answer.read()
            return answer.status, dict(answer.getheaders()), json.loads(text) if text else None

    def put(self, endpoint: str, body: Any = None) -> tuple[int, Any]:
        data = b"" if body is None else json.dumps(body).encode()
        status, _, answer = self.http("PUT", f"/api/v1/{endpoint}", data)
        return status, answer

    def close(self) -> None:
        self.client.close()
        self.server.stop()
        self.vmm.delete()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Running]:
    running = Running(tmp_path / "api.sock")
    yield running
    running.close()


@pytest.fixture
def booted(api: Running) -> Running:
    api.client.create(CONFIG)
    api.client.boot()
    return api


# -- the protocol ----------------------------------------------------------------------


def test_ping(api: Running) -> None:
    status, headers, body = api.http("GET", "/api/v1/vmm.ping")
    assert status == 200
    assert headers["Server"] == "Cloud Hypervisor API"
    assert headers["Content-Type"] == "application/json"
    assert body["version"] == __version__
    assert body["build_version"] == f"v{__version__}"
    assert body["features"] == []


@pytest.mark.parametrize(
    "path", ["/", "/api/v1", "/api/v1/", "/api/v2/vmm.ping", "/api/v1/vm.nonsense", "/vmm.ping"]
)
def test_unknown_paths(api: Running, path: str) -> None:
    for verb in ("GET", "PUT", "POST"):
        status, headers, body = api.http(verb, path)
        assert (status, body) == (404, ["Not Found"])
        assert headers["Server"] == "Cloud Hypervisor API"


@pytest.mark.parametrize("verb", ["GET", "PUT", "POST", "DELETE", "PATCH", "HEAD", "OPTIONS"])
def test_wrong_verbs(api: Running, verb: str) -> None:
    for endpoint in [*WITHOUT_BODY, *WITH_BODY, *READ, *NOT_BUILT]:
        needed = "GET" if endpoint in READ else "PUT"
        if verb == needed:
            continue
        status, _, body = api.http(verb, f"/api/v1/{endpoint}")
        assert status == 400
        if verb != "HEAD":
            assert body == ["Error from API", f"{endpoint}: {verb} is not possible here, use {needed}"]


@pytest.mark.parametrize("endpoint", WITHOUT_BODY)
def test_a_body_where_none_belongs(api: Running, endpoint: str) -> None:
    assert api.put(endpoint, {}) == (400, ["Error from API", f"{endpoint}: it takes no request body"])


@pytest.mark.parametrize("endpoint", WITH_BODY)
def test_a_missing_body(api: Running, endpoint: str) -> None:
    assert api.put(endpoint) == (400, ["Error from API", f"{endpoint}: the request body is missing"])


@pytest.mark.parametrize("endpoint", NOT_BUILT)
def test_what_is_not_built_says_so(api: Running, endpoint: str) -> None:
    status, body = api.put(endpoint, {"id": "x"})
    assert (status, body[0]) == (400, "Error from API")
    assert body[1] == f"{endpoint}: {NOT_BUILT[endpoint]}: chv does not support this yet"


def test_a_body_of_4_mib_is_read_and_more_is_refused(api: Running) -> None:
    body = json.dumps(CONFIG).encode()
    assert api.http("PUT", "/api/v1/vm.create", body.ljust(BODY_LIMIT - 1))[0] == 204
    head = f"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: {BODY_LIMIT + 1}\r\n\r\n"
    status, headers, answer = api.raw(head.encode())
    assert status == 413
    assert headers["Server"] == "Cloud Hypervisor API"
    assert answer == ["Error from API", f"Request Entity Too Large: exceeds max_body of {BODY_LIMIT}"]


def test_chunked_bodies(api: Running) -> None:
    body = json.dumps(CONFIG).encode()
    chunks = (
        b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:10], body[10:])) + b"0\r\n\r\n"
    )
    head = b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert api.raw(head + chunks)[0] == 204
    assert api.client.info()["config"]["cpus"]["max_vcpus"] == 8


def test_malformed_http_is_answered_in_json(api: Running) -> None:
    status, _, body = api.raw(b"PUT /api/v1/vm.boot HTTP/1.1\r\nContent-Length: many\r\n\r\n")
    assert status == 400
    assert body[0] == "Error from API"
    assert api.client.ping()["version"] == __version__


def test_half_a_request_keeps_nobody_waiting(api: Running) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(api.path)
        sock.sendall(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        assert api.client.ping()["version"] == __version__


# -- the life of a VM ----------------------------------------------------------------------


def test_a_whole_life_over_the_client(api: Running) -> None:
    client = api.client
    client.create(CONFIG)
    assert client.info()["state"] == "Created"
    client.boot()
    assert client.info()["state"] == "Running"
    client.pause()
    assert client.info()["state"] == "Paused"
    client.resume()
    client.resize(desired_vcpus=8)
    assert client.info()["config"]["cpus"]["boot_vcpus"] == 8
    client.reboot()
    assert client.counters() == {"__exits": {"io": 7}}
    client.shutdown()
    assert client.info()["state"] == "Shutdown"
    client.boot()
    client.delete()
    assert api.vms[0].calls == ["boot", "pause", "resume", "resize", "reboot", "shutdown", "boot", "delete"]
    assert api.vmm.state is None
    client.create(make_config(kernel="/other"))
    assert client.info()["config"]["payload"]["kernel"] == "/other"


@pytest.mark.parametrize("verb", ["boot", "pause", "resume", "shutdown", "reboot", "delete", "power-button"])
def test_what_succeeds_answers_204_with_no_body(booted: Running, verb: str) -> None:
    if verb == "boot":
        booted.client.shutdown()
    if verb == "resume":
        booted.client.pause()
    assert booted.put(f"vm.{verb}") == (204, None)


def refusals() -> list[tuple[str, str, Any, int, list[str]]]:
    """What is done first, the endpoint, its body, and the answer."""
    missing = "VM config is missing: create the VM first"
    rows: list[tuple[str, str, Any, int, list[str]]] = [
        ("nothing", "vm.boot", None, 404, ["The VM could not boot", missing]),
        ("nothing", "vm.info", None, 404, ["The VM's information is not available", "VM is not created"]),
        ("nothing", "vm.counters", None, 500, ["The VM's counters are not available", "VM is not running"]),
        ("nothing", "vm.pause", None, 500, ["The VM could not be paused", "VM is not running"]),
        ("nothing", "vm.resume", None, 500, ["The VM could not resume", "VM is not running"]),
        ("nothing", "vm.shutdown", None, 500, ["The VM could not shut down", "VM is not running"]),
        (
            "nothing",
            "vm.power-button",
            None,
            500,
            ["The power button could not be pressed", "VM is not running"],
        ),
        ("nothing", "vm.reboot", None, 404, ["The VM could not reboot", missing]),
        ("nothing", "vm.resize", {"desired_vcpus": 2}, 404, ["The VM could not be resized", missing]),
        ("create", "vm.create", CONFIG, 500, ["The VM could not be created", "VM is already created"]),
        ("create", "vm.pause", None, 500, ["The VM could not be paused", "VM is not running"]),
        ("create", "vm.reboot", None, 404, ["The VM could not reboot", "VM is not booted"]),
        ("boot", "vm.boot", None, 500, ["The VM could not boot", "VM is already booted: it is Running"]),
        ("boot", "vm.resume", None, 500, ["The VM could not resume", "resume: the VM is Running"]),
        ("pause", "vm.pause", None, 500, ["The VM could not be paused", "pause: the VM is Paused"]),
        ("pause", "vm.boot", None, 500, ["The VM could not boot", "VM is already booted: it is Paused"]),
    ]
    for when in ("create", "boot"):
        for count, words in ((0, "0 is not"), (9, "9 is not")):
            chain = ["The VM could not be resized", f"desired_vcpus: {words}"]
            rows.append((when, "vm.resize", {"desired_vcpus": count}, 500, chain))
    return rows


@pytest.mark.parametrize(("first", "endpoint", "body", "status", "chain"), refusals())
def test_refusals(api: Running, first: str, endpoint: str, body: Any, status: int, chain: list[str]) -> None:
    for step in {"nothing": [], "create": ["create"], "boot": ["create", "boot"]}.get(
        first, ["create", "boot", "pause"]
    ):
        assert api.put(f"vm.{step}", CONFIG if step == "create" else None)[0] == 204
    verb = "GET" if endpoint in READ else "PUT"
    got, _, answer = api.http(verb, f"/api/v1/{endpoint}", b"" if body is None else json.dumps(body).encode())
    assert got == status
    assert answer[:2] == ["Error from API", chain[0]]
    assert answer[2].startswith(chain[1])


def test_delete_needs_nothing(api: Running) -> None:
    assert api.put("vm.delete") == (204, None)
    api.client.create(CONFIG)
    assert api.put("vm.delete") == (204, None)
    assert api.put("vm.delete") == (204, None)


def test_a_pending_removal_is_429(booted: Running) -> None:
    booted.vms[0].pending = True
    status, body = booted.put("vm.resize", {"desired_vcpus": 2})
    assert status == 429
    assert body[1:] == ["The VM could not be resized", "desired_vcpus: vCPU 3 has not been given back yet"]


def test_rules_are_checked_at_boot_not_at_create(api: Running) -> None:
    api.client.create({"cpus": {"boot_vcpus": 4, "max_vcpus": 2}, "payload": {"kernel": "/k"}})
    status, body = api.put("vm.boot")
    assert status == 400
    assert body[1:] == ["The VM could not boot", "cpus.max_vcpus: 2 is less than cpus.boot_vcpus (4)"]
    assert api.client.info()["state"] == "Created"
    assert api.vms == []


def test_resize_before_boot_edits_the_config(api: Running) -> None:
    api.client.create(CONFIG)
    api.client.resize(desired_vcpus=6, desired_ram=1 << 30)
    info = api.client.info()
    assert (info["config"]["cpus"]["boot_vcpus"], info["memory_actual_size"]) == (6, 1 << 30)
    with pytest.raises(
        ApiError, match="desired_ram: 4097 is not a positive multiple of 4096 bytes"
    ) as caught:
        api.client.resize(desired_ram=4097)
    assert caught.value.status == 500
    api.client.boot()
    assert api.vms[0].config.cpus.boot_vcpus == 6


def test_a_boot_that_fails_can_be_tried_again(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeVm) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/k")

    api.client.create(CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(FakeVm, "boot", fail)
        status, body = api.put("vm.boot")
    assert status == 500
    assert body == ["Error from API", "The VM could not boot", "[Errno 2] No such file or directory: '/k'"]
    assert api.vms[0].calls == ["delete"]
    api.client.boot()
    assert api.client.info()["state"] == "Running"


def test_a_mistake_of_ours_is_an_answer_too(booted: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeVm) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(FakeVm, "pause", fail)
    status, body = booted.put("vm.pause")
    assert (status, body) == (500, ["Error from API", "vm.pause: unexpected error", "KeyError: 'oops'"])
    assert booted.client.info()["state"] == "Running"


def test_info_is_answered_while_many_resize(booted: Running) -> None:
    failures: list[BaseException] = []

    def hammer(index: int) -> None:
        try:
            with Client(booted.path, timeout=20) as client:
                for count in range(1, 9):
                    client.resize(desired_vcpus=count)
                    assert client.info()["state"] == "Running"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=hammer, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert booted.vms[0].calls.count("resize") == 48


# -- the end -------------------------------------------------------------------------------


def test_the_answer_to_shutdown_arrives_before_the_end(booted: Running) -> None:
    answers: list[tuple[int, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(booted.put("vmm.shutdown")))
    asking.start()
    assert booted.vmm.wait(20)
    booted.server.stop()
    asking.join(20)
    assert answers == [(204, None)]
    assert booted.vms[0].calls[-1] == "delete"
    assert not Path(booted.path).exists()


def test_an_answer_that_is_under_way_leaves_before_the_socket_closes(
    booted: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(self: FakeVm) -> None:
        entered.set()
        go_on.wait(20)

    monkeypatch.setattr(FakeVm, "pause", slow)
    answers: list[tuple[int, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(booted.put("vm.pause")))
    asking.start()
    assert entered.wait(20)
    stopping = threading.Thread(target=booted.server.stop)
    stopping.start()
    go_on.set()
    asking.join(20)
    stopping.join(20)
    assert answers == [(204, None)]


def test_the_vmm_ends_with_the_guest(booted: Running) -> None:
    assert not booted.vmm.wait(0.05)
    booted.vms[0].guest_ends()
    assert booted.vmm.wait(20)


def test_a_crash_of_the_guest_is_raised(booted: Running) -> None:
    booted.vms[0].guest_crashes("triple fault")
    with pytest.raises(GuestCrash, match=r"^triple fault$"):
        booted.vmm.wait(20)


def test_with_no_shutdown_the_vmm_outlives_the_guest(tmp_path: Path) -> None:
    running = Running(tmp_path / "s", no_shutdown=True)
    try:
        running.client.create(CONFIG)
        running.client.boot()
        running.vms[0].guest_ends()
        assert not running.vmm.wait(0.3)
        assert running.client.info()["state"] == "Shutdown"
        running.client.boot()
        running.vms[0].guest_crashes("triple fault")
        assert not running.vmm.wait(0.3)
    finally:
        running.close()


@pytest.mark.parametrize("end", ["shutdown", "delete"])
def test_ending_the_vm_over_rest_does_not_end_the_vmm(booted: Running, end: str) -> None:
    assert booted.put(f"vm.{end}")[0] == 204
    assert not booted.vmm.wait(0.3)
    if end == "delete":
        booted.client.create(CONFIG)
    booted.client.boot()
    assert booted.vmm.state is VmState.RUNNING
    booted.vms[-1].guest_ends()
    assert booted.vmm.wait(20)


# -- the client --------------------------------------------------------------------------------


def test_the_client_says_when_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "nobody"
    with Client(path) as client:
        with pytest.raises(
            ConnectionFailed, match=rf"^{path}: No such file or directory: is a VMM listening there\?$"
        ):
            client.ping()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
        with pytest.raises(
            ConnectionFailed, match=rf"^{path}: Connection refused: is a VMM listening there\?$"
        ):
            client.ping()


def test_the_client_has_a_timeout(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock, Client(tmp_path / "s", timeout=0.2) as client:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        with pytest.raises(ConnectionFailed, match=r"no answer to vmm\.ping in time"):
            client.ping()


def test_api_errors_have_the_status_and_the_chain(api: Running) -> None:
    with pytest.raises(ApiError) as caught:
        api.client.boot()
    assert caught.value.status == 404
    assert caught.value.messages[:2] == ["Error from API", "The VM could not boot"]
    assert str(caught.value).startswith("Error from API: The VM could not boot: VM config is missing")


def test_a_relative_path_with_odd_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    running = Running(Path("a b%2F#?é.sock"))
    try:
        assert running.client.ping()["version"] == __version__
    finally:
        running.close()
