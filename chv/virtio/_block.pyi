from .._virtqueue import Queue

SEGMENTS_MAX: int
RANGES_MAX: int
RANGE_MAX: int

def direct_alignment(fd: int) -> tuple[int, int] | None: ...
def punch_hole(fd: int, offset: int, length: int) -> int: ...
def io_uring_error() -> int: ...

class BlockDisk:
    sectors: int
    writethrough: bool
    def __init__(
        self,
        fd: int,
        sectors: int,
        *,
        plain_fd: int = -1,
        readonly: bool = False,
        device: bool = False,
        memory_align: int = 0,
        offset_align: int = 0,
        discard: bool = False,
        zeroes: bool = False,
        unmap: bool = False,
        serial: bytes = b"",
    ) -> None: ...

class BlockQueue:
    engine: str
    errors: int
    def __init__(self, disk: BlockDisk) -> None: ...
    def serve(self, queue: Queue, io_uring: bool = True) -> None: ...
    def statistics(self) -> dict[str, dict[str, int]]: ...
