"""The REST API as a WSGI application: requests in, calls of :class:`chv.vmm.Vmm`, answers out.

Paths, verbs, bodies and statuses are Cloud Hypervisor's (vmm/src/api/http and its OpenAPI file).
An error's body is a JSON list of strings, outermost first. It knows nothing of sockets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from ..config import decode_json
from ..config.decode import convert, parse_json
from ..errors import ConfigError, Error
from ..vmm import Vmm, error_chain

log = logging.getLogger(__name__)

ROOT = "/api/v1/"
SERVER_NAME = "Cloud Hypervisor API"  # what its clients expect in the Server header
BODY_LIMIT = 4 << 20  # bytes (HTTP_PAYLOAD_MAX_SIZE)

Environ = dict[str, Any]
StartResponse = Callable[[str, list[tuple[str, str]]], Any]
Answer = tuple[int, bytes]


class VmResize(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``vm.resize``; sizes are bytes."""

    desired_vcpus: Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)] | None = None
    desired_ram: Annotated[int, Meta(ge=0)] | None = None
    desired_balloon: Annotated[int, Meta(ge=0)] | None = None


class Route(NamedTuple):
    verb: str
    call: Callable[..., Any]  # with the decoded body where there is one
    body: Callable[[bytes], Any] | None = None  # reads the body; None: there must not be one


NOT_BUILT = {  # endpoints that chv knows and has not built -> what they would do
    "vm.nmi": "sending an NMI",
    "vm.resize-disk": "resizing a disk",
    "vm.resize-zone": "resizing a memory zone",
    "vm.add-device": "adding a VFIO device",
    "vm.add-disk": "adding a disk",
    "vm.add-fs": "adding a virtio-fs device",
    "vm.add-generic-vhost-user": "adding a vhost-user device",
    "vm.add-net": "adding a network device",
    "vm.add-pmem": "adding persistent memory",
    "vm.add-vdpa": "adding a vDPA device",
    "vm.add-vsock": "adding a vsock device",
    "vm.add-user-device": "adding a vfio-user device",
    "vm.remove-device": "removing a device",
    "vm.snapshot": "taking a snapshot",
    "vm.restore": "restoring a snapshot",
    "vm.coredump": "dumping the guest's memory",
    "vm.send-migration": "migrating to another host",
    "vm.receive-migration": "migrating from another host",
}


def routes(vmm: Vmm) -> dict[str, Route]:
    return {
        "vmm.ping": Route("GET", vmm.ping),
        "vmm.shutdown": Route("PUT", vmm.shutdown_vmm),
        "vm.create": Route("PUT", vmm.create, decode_json),
        "vm.delete": Route("PUT", vmm.delete),
        "vm.boot": Route("PUT", vmm.boot),
        "vm.pause": Route("PUT", vmm.pause),
        "vm.resume": Route("PUT", vmm.resume),
        "vm.shutdown": Route("PUT", vmm.shutdown),
        "vm.reboot": Route("PUT", vmm.reboot),
        "vm.power-button": Route("PUT", vmm.power_button),
        "vm.resize": Route("PUT", lambda body: vmm.resize(**msgspec.structs.asdict(body)), _resize_body),
        "vm.info": Route("GET", vmm.info),
        "vm.counters": Route("GET", vmm.counters),
    }


def _resize_body(body: bytes) -> VmResize:
    return convert(parse_json(body), VmResize, "the request body")


class Application:
    """WSGI: ``Application(vmm)(environ, start_response)``."""

    def __init__(self, vmm: Vmm) -> None:
        self._routes = routes(vmm)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        status, body = self._answer(environ)
        log.debug("%s %s: %d", environ["REQUEST_METHOD"], environ["PATH_INFO"], status)
        headers = [("Content-Type", "application/json")]
        if status != HTTPStatus.NO_CONTENT:
            headers.append(("Content-Length", str(len(body))))
        start_response(f"{status} {HTTPStatus(status).phrase}", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" or not body else [body]

    def _answer(self, environ: Environ) -> Answer:
        path, verb = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        endpoint = path.removeprefix(ROOT) if path.startswith(ROOT) else ""
        route = self._routes.get(endpoint)
        if route is None and endpoint not in NOT_BUILT:
            return failure(404, ["Not Found"])
        needed = route.verb if route is not None else "PUT"
        if verb != needed:
            return failure(400, ["Error from API", f"{endpoint}: {verb} is not possible here, use {needed}"])
        if route is None:
            what = f"{NOT_BUILT[endpoint]}: chv does not support this yet"
            return failure(400, ["Error from API", f"{endpoint}: {what}"])
        return _perform(endpoint, route, _read_body(environ) if verb == "PUT" else b"")


def _perform(endpoint: str, route: Route, body: bytes) -> Answer:
    try:
        arguments = _arguments(endpoint, route, body)
        result = route.call(*arguments)
    except (Error, OSError) as error:
        return failure(getattr(error, "status", 500), ["Error from API", *error_chain(error)])
    except Exception as error:
        log.exception("%s failed unexpectedly", endpoint)
        return failure(500, ["Error from API", f"{endpoint}: unexpected error", *error_chain(error)])
    if result is None:
        return 204, b""
    return 200, msgspec.json.encode(result)


def _arguments(endpoint: str, route: Route, body: bytes) -> list[Any]:
    if route.body is None:
        if body:
            raise ConfigError(f"{endpoint}: it takes no request body")
        return []
    if not body:
        raise ConfigError(f"{endpoint}: the request body is missing")
    return [route.body(body)]


def _read_body(environ: Environ) -> bytes:
    length = environ.get("CONTENT_LENGTH") or "0"
    body: bytes = environ["wsgi.input"].read(int(length))
    return body


def failure(status: int, messages: list[str]) -> Answer:
    return status, msgspec.json.encode(messages)
