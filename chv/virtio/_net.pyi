from .._virtqueue import Queue

class Receiver:
    """From the descriptor ``fd``, a tap's, to a receive queue; a frame waits ``patience_ms`` for room."""

    frames: int
    total_bytes: int
    dropped: int
    errors: int
    def __init__(self, fd: int, patience_ms: int = 100) -> None: ...
    def run(self, queue: Queue, mergeable: bool) -> None: ...

class Sender:
    """From a transmit queue to ``fd``; with a ``mac`` only frames that come from it."""

    frames: int
    total_bytes: int
    dropped: int
    spoofed: int
    errors: int
    def __init__(self, fd: int, mac: bytes | None = None) -> None: ...
    def run(self, queue: Queue) -> None: ...
