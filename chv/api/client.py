"""A client for the REST API on a Unix socket: chv's, or Cloud Hypervisor's own.

>>> client = Client("/tmp/ch-socket")  # doctest: +SKIP
>>> client.resize(desired_vcpus=8)  # doctest: +SKIP
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote

import requests
import requests_unixsocket

from ..config import VmConfig
from ..errors import Error


class ApiError(Error):
    """The server refused. ``messages`` is its error chain, outermost first."""

    def __init__(self, status: int, messages: list[str]) -> None:
        super().__init__(": ".join(messages) or f"HTTP status {status}")
        self.status = status
        self.messages = messages


class ConnectionFailed(Error, OSError):
    """Nobody answers on the socket."""


class Client:
    """One method per endpoint. Each raises :class:`ApiError` when the server refuses.

    ``timeout`` is in seconds, for each answer; None waits as long as it takes (a boot may).
    Close it, or use it in a ``with`` statement.
    """

    def __init__(self, socket_path: str | os.PathLike[str], timeout: float | None = None) -> None:
        self.socket_path = os.fspath(socket_path)
        self.timeout = timeout
        self._session = requests_unixsocket.Session()
        self._session.trust_env = False  # proxies have no place here
        self._root = f"http+unix://{quote(os.path.abspath(self.socket_path), safe='')}/api/v1/"

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- the VMM -------------------------------------------------------------------

    def ping(self) -> dict[str, Any]:
        """``version``, ``build_version``, ``pid`` and ``features`` of the VMM."""
        return self._get("vmm.ping")

    def shutdown_vmm(self) -> None:
        """End the VM and the VMM."""
        self._put("vmm.shutdown")

    # -- the VM --------------------------------------------------------------------

    def create(self, config: VmConfig | Mapping[str, Any]) -> None:
        """Describe the VM; :meth:`boot` makes it."""
        self._put("vm.create", config.to_dict() if isinstance(config, VmConfig) else dict(config))

    def boot(self) -> None:
        self._put("vm.boot")

    def delete(self) -> None:
        """Forget the VM, ending it first. No error without one."""
        self._put("vm.delete")

    def pause(self) -> None:
        self._put("vm.pause")

    def resume(self) -> None:
        self._put("vm.resume")

    def shutdown(self) -> None:
        """Switch the guest off without asking it."""
        self._put("vm.shutdown")

    def reboot(self) -> None:
        """Reset the guest without asking it."""
        self._put("vm.reboot")

    def power_button(self) -> None:
        """Ask the guest to shut down."""
        self._put("vm.power-button")

    def resize(
        self,
        desired_vcpus: int | None = None,
        desired_ram: int | None = None,
        desired_balloon: int | None = None,
    ) -> None:
        """Change the number of vCPUs, or bytes of RAM or balloon; None leaves one as it is."""
        wanted = {
            "desired_vcpus": desired_vcpus,
            "desired_ram": desired_ram,
            "desired_balloon": desired_balloon,
        }
        self._put("vm.resize", {key: value for key, value in wanted.items() if value is not None})

    def info(self) -> dict[str, Any]:
        """``config``, ``state``, ``memory_actual_size``, and of chv ``vcpus`` and ``hotplug``."""
        return self._get("vm.info")

    def counters(self) -> dict[str, dict[str, int]]:
        return self._get("vm.counters")

    # -- HTTP ----------------------------------------------------------------------

    def _get(self, endpoint: str) -> dict[str, Any]:
        answer = self._request("GET", endpoint, None).json()
        if not isinstance(answer, dict):
            raise ApiError(200, [f"{endpoint}: the answer is not an object"])
        return answer

    def _put(self, endpoint: str, body: Mapping[str, Any] | None = None) -> None:
        self._request("PUT", endpoint, None if body is None else json.dumps(body).encode())

    def _request(self, verb: str, endpoint: str, body: bytes | None) -> requests.Response:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            answer: requests.Response = self._session.request(
                verb, self._root + endpoint, data=body, headers=headers, timeout=self.timeout
            )
        except requests.Timeout:
            raise ConnectionFailed(f"{self.socket_path}: no answer to {endpoint} in time") from None
        except requests.ConnectionError as error:
            raise ConnectionFailed(f"{self.socket_path}: {_reason(error)}") from None
        if answer.status_code >= 400:
            raise ApiError(answer.status_code, _messages(answer))
        return answer


def _messages(answer: requests.Response) -> list[str]:
    """The error chain in the body; the plain text of versions that sent none."""
    try:
        body = answer.json()
    except requests.JSONDecodeError:
        body = answer.text.strip()
    if isinstance(body, list):
        return [str(message) for message in body]
    return [str(body)] if body else [f"{answer.status_code} {answer.reason}"]


def _reason(error: BaseException) -> str:
    """The operating system's words for what went wrong, from inside the libraries' wrapping."""
    link: object = error
    while isinstance(link, BaseException):
        if isinstance(link, OSError) and link.strerror:
            return f"{link.strerror}: is a VMM listening there?"
        inner = [one for one in link.args if isinstance(one, BaseException)]
        link = getattr(link, "reason", None) or link.__context__ or (inner[0] if inner else None)
    return "the connection failed"
