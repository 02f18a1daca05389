"""The host's end of TCP transfers with a guest, whose end is busybox's nc."""

from __future__ import annotations

import contextlib
import hashlib
import socketserver
import threading
from collections.abc import Iterator

TIMEOUT = 60.0
"""Seconds that a connection may be silent."""


class Source(socketserver.BaseRequestHandler):
    """Sends the server's ``data`` to whoever connects."""

    server: Server

    def handle(self) -> None:
        self.request.settimeout(TIMEOUT)
        self.request.sendall(self.server.data)


class Sink(socketserver.BaseRequestHandler):
    """Takes all that comes; its SHA-256 is in the server's ``digests`` before the connection is closed."""

    server: Server

    def handle(self) -> None:
        self.request.settimeout(TIMEOUT)
        digest = hashlib.sha256()
        while piece := self.request.recv(1 << 18):
            digest.update(piece)
        self.server.digests.append(digest.hexdigest())


class Server(socketserver.ThreadingTCPServer):
    """Listens on a port of its own choice; each connection has a thread."""

    allow_reuse_address = True

    def __init__(self, address: str, handler: type[Source | Sink], data: bytes = b"") -> None:
        super().__init__((address, 0), handler)
        self.data = data
        self.digests: list[str] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])


@contextlib.contextmanager
def serving(address: str, handler: type[Source | Sink], data: bytes = b"") -> Iterator[Server]:
    """A server in the network namespace of the calling thread; leaving waits for its connections' end."""
    with Server(address, handler, data) as server:
        # A thread has the namespace of the one that it was started by.
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="server")
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
