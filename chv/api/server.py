"""The REST server: waitress on the API's Unix socket, in threads of its own."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import msgspec
from waitress import create_server, wasyncore
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask

from ..vmm import Vmm
from .app import BODY_LIMIT, SERVER_NAME, Application
from .listener import open_listener

THREADS = 4  # requests served at once; a slow boot must not keep vm.info waiting for a thread
DRAIN = 5.0  # seconds that stop() gives answers to leave


class _JsonErrorTask(ErrorTask):  # type: ignore[misc]  # waitress has no types
    """What waitress itself refuses (malformed HTTP, a body over the limit), in the API's words."""

    def execute(self) -> None:
        error = self.request.error
        body = msgspec.json.encode(["Error from API", f"{error.reason}: {error.body}"])
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Channel(HTTPChannel):  # type: ignore[misc]
    error_task_class = _JsonErrorTask

    @property
    def busy(self) -> bool:
        """Whether a request is being served or part of an answer has not been sent."""
        return bool(self.requests or self.total_outbufs_len)


class ApiServer:
    """Serves ``vmm`` on a Unix socket from :meth:`start` to :meth:`stop`.

    ``spec`` is what ``--api-socket`` takes: a path, ``path=PATH``, or ``fd=NUMBER`` for a listening
    socket that the process was given. Raises :class:`chv.errors.ConfigError` if it cannot be used.
    """

    def __init__(self, vmm: Vmm, spec: str) -> None:
        logging.getLogger("waitress").setLevel(logging.ERROR)  # it warns of every queued request
        self._listener = open_listener(spec)
        self.path = self._listener.path
        self._map: dict[int, Any] = {}
        self._server = create_server(
            Application(vmm),
            map=self._map,
            sockets=[self._listener.socket],
            threads=THREADS,
            ident=SERVER_NAME,
            max_request_body_size=BODY_LIMIT,
            clear_untrusted_proxy_headers=True,
        )
        self._server.channel_class = _Channel
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="chv-api", daemon=True)

    def start(self) -> ApiServer:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Let the answers that are under way leave, then close and remove the socket. Idempotent."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._thread.is_alive():
            self._server.pull_trigger()
            self._thread.join()
        self._server.task_dispatcher.shutdown(timeout=1)
        wasyncore.close_all(self._map, ignore_all=True)
        self._server.trigger.close()
        self._listener.close()

    def __enter__(self) -> ApiServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _serve(self) -> None:
        while not self._stopping.is_set():
            self._poll(1.0)
        self._server.accepting = False  # what arrives from now on finds nobody
        deadline = time.monotonic() + DRAIN
        while time.monotonic() < deadline and any(channel.busy for channel in self._channels()):
            self._poll(0.02)

    def _poll(self, timeout: float) -> None:
        # poll(), not select(): a VM with many vCPUs has file descriptors above 1023
        wasyncore.loop(timeout=timeout, use_poll=True, map=self._map, count=1)

    def _channels(self) -> list[_Channel]:
        return list(self._server.active_channels.values())
