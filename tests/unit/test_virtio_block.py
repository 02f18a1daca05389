"""virtio-blk's requests, on real files, with both engines (virtio 1.2, 5.2.6)."""

from __future__ import annotations

import os
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chv.virtio import block as block_module
from chv.virtio._block import io_uring_error
from chv.virtio.block import (
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_WRITE_ZEROES,
    Block,
)
from tests.block_bench import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    NOT_WRITTEN,
    OK,
    OUT,
    SECTOR,
    UNSUPP,
    WRITE_ZEROES,
    Bench,
    header,
    ranges,
)
from tests.support import require
from tests.virtio_driver import WRITE

SECTORS = 2048
Open = Callable[..., Bench]
ENGINES = ("io_uring", "sync")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SECTORS * SECTOR))
    return path


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "io_uring":
        require(io_uring_error() == 0, "io_uring is not available")
    return name


@pytest.fixture
def open_disk(engine: str, image: Path) -> Iterator[Open]:
    """Opens the image with the keywords of a DiskConfig."""
    opened: list[Bench] = []

    def open_it(**options: Any) -> Bench:
        bench = Bench(image, disable_io_uring=engine == "sync", **options)
        opened.append(bench)
        return bench

    yield open_it
    for bench in opened:
        bench.close()


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def disk(request: pytest.FixtureRequest, open_disk: Open, engine: str) -> Bench:
    bench = open_disk(direct=request.param)
    assert bench.flush() == OK
    assert bench.engine == engine
    return bench


# -- reads and writes --------------------------------------------------------------------------


def test_reads_and_writes_move_the_right_bytes(disk: Bench, image: Path) -> None:
    content = image.read_bytes()
    assert disk.read(0, 512) == (OK, content[:512])
    assert disk.read(SECTORS - 3, 1536) == (OK, content[-1536:])
    assert disk.read(0, SECTORS * SECTOR) == (OK, content)
    new = os.urandom(5 * SECTOR)
    assert disk.write(7, new) == OK
    assert disk.read(6, 7 * SECTOR) == (
        OK,
        content[6 * SECTOR : 7 * SECTOR] + new + content[12 * SECTOR : 13 * SECTOR],
    )
    assert disk.flush() == OK
    assert image.read_bytes() == content[: 7 * SECTOR] + new + content[12 * SECTOR :]


def test_the_used_length_is_the_data_and_the_status_byte(disk: Bench) -> None:
    assert disk.request([header(IN)], [1024, 1])[2] == 1025
    assert disk.request([header(OUT), bytes(512)])[2] == 1
    assert disk.request([header(FLUSH)])[2] == 1
    assert disk.request([header(IN, SECTORS)], [512, 1])[2] == 1


@pytest.mark.parametrize("indirect", [False, True])
def test_any_layout_of_the_buffers_will_do(disk: Bench, image: Path, indirect: bool) -> None:
    content = image.read_bytes()
    head = header(IN, 9)
    status, data, _ = disk.request(
        [head[:3], head[3:10], head[10:]], [100, 412, 1, 511, 1], indirect=indirect
    )
    assert (status, data) == (OK, content[9 * SECTOR : 11 * SECTOR])
    assert disk.request([head], [1025], indirect=indirect)[:2] == (OK, content[9 * SECTOR : 11 * SECTOR])
    new = os.urandom(1024)
    assert disk.request([header(OUT, 20) + new[:5], new[5:600], new[600:]], [1], indirect=indirect)[0] == OK
    assert disk.read(20, 1024) == (OK, new)
    assert disk.request([header(OUT, 20) + new[::-1]], [1], indirect=indirect)[0] == OK
    assert disk.read(20, 1024) == (OK, new[::-1])
    # More room behind than what there is to say: the status is the last byte (virtio 1.2, 5.2.6).
    status, data, written = disk.request([header(FLUSH)], [7, 5], indirect=indirect)
    assert (status, data, written) == (OK, bytes([NOT_WRITTEN]) * 11, 1)


def test_a_request_in_more_pieces_than_io_uring_is_given_at_once(open_disk: Open, image: Path) -> None:
    bench = open_disk(queue_size=2048, ring_size=2048)
    content = image.read_bytes()
    status, data, _ = bench.request([header(IN, 1)], [*([16] * 1500), 64, 1], indirect=True)
    assert (status, data) == (OK, content[512 : 512 + 1500 * 16 + 64])
    pieces = [bytes([n % 251]) * 512 for n in range(1400)]
    assert bench.request([header(OUT, 3), *pieces], indirect=True)[0] == OK
    assert bench.read(3, 1400 * 512) == (OK, b"".join(pieces))


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("pieces", [1, 7])
def test_large_writes_and_flushes_among_short_ones(disk: Bench, image: Path, pieces: int) -> None:
    """Some of them by io_uring and some by plain calls, with slots that are used again."""
    large = os.urandom(700 * SECTOR)
    for n in range(6):
        for sector in range(4):
            disk.add([header(OUT, 1000 + sector), bytes([n]) * SECTOR])
        disk.add([header(OUT, n), *cut(large, 100 * SECTOR)[:pieces]])
        disk.add([header(FLUSH)])
        disk.queues[0].kick()
        assert {answer[0] for answer in disk.answers(6).values()} == {OK}
        content = image.read_bytes()
        assert content[n * SECTOR : (n + 100 * pieces) * SECTOR] == large[: 100 * pieces * SECTOR]
        assert content[1000 * SECTOR : 1004 * SECTOR] == bytes([n]) * 4 * SECTOR
        large = os.urandom(700 * SECTOR)


def test_many_requests_at_once_all_come_back(open_disk: Open, image: Path) -> None:
    bench = open_disk(queue_size=256, ring_size=256)
    content = image.read_bytes()
    sectors = {bench.add([header(IN, n)], [512, 1], indirect=True): n for n in range(256)}
    bench.queues[0].kick()
    answers = bench.answers(256)
    assert {head: answer[:2] for head, answer in answers.items()} == {
        head: (OK, content[n * SECTOR : (n + 1) * SECTOR]) for head, n in sectors.items()
    }
    assert bench.queues[0].interrupts < 256, "completions come in batches"


def test_queues_work_side_by_side(open_disk: Open) -> None:
    bench = open_disk(num_queues=3)
    written = {}
    for n in range(30):
        written[n] = os.urandom(SECTOR)
        assert bench.write(n, written[n], queue=n % 3) == OK
    assert bench.read(0, 30 * SECTOR, queue=1) == (OK, b"".join(written.values()))
    assert bench.block.counters()["write_ops"] == 30


def test_no_data_at_all_is_done_at_once(disk: Bench) -> None:
    assert disk.read(0, 0) == (OK, b"")
    assert disk.request([header(OUT, 5)])[0] == OK


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sector", "length"),
    [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (0, 511),
        (0, 513),
        (1 << 55, 512),
        ((1 << 64) - 1, 512),
        ((1 << 64) - 1, 1024),
    ],
)
def test_sectors_that_are_not_there_are_an_error(disk: Bench, image: Path, sector: int, length: int) -> None:
    content = image.read_bytes()
    assert disk.read(sector, length)[0] == IOERR
    assert disk.write(sector, bytes(length)) == IOERR
    assert image.read_bytes() == content


def test_unknown_requests_are_unsupported(disk: Bench) -> None:
    for kind in (2, 3, 5, 10, 14, 0x80000000, 0xFFFFFFFF):
        assert disk.request([header(kind)], [512, 1])[0] == UNSUPP


def test_a_short_header_is_an_error(disk: Bench) -> None:
    assert disk.request([header(FLUSH)[:15]])[0] == IOERR
    assert disk.request([])[0] == IOERR


def test_a_chain_without_room_for_a_status_comes_back_untouched(disk: Bench, image: Path) -> None:
    content = image.read_bytes()
    errors = disk.block.counters()["io_errors"]
    assert disk.request([header(OUT), bytes(512)], [])[2] == 0
    assert disk.request([header(FLUSH)], [])[2] == 0
    assert disk.block.counters()["io_errors"] == errors + 2
    assert image.read_bytes() == content
    assert disk.read(0, 512)[0] == OK, "and the queue goes on"


def test_a_readonly_disk_is_not_written(open_disk: Open, image: Path) -> None:
    bench = open_disk(readonly=True)
    content = image.read_bytes()
    assert bench.write(0, bytes(512)) == IOERR
    assert bench.discard((0, 8, 0)) == IOERR
    assert bench.write_zeroes((0, 8, 0)) == IOERR
    assert bench.flush() == OK
    assert bench.read(0, 512) == (OK, content[:512])
    assert image.read_bytes() == content


def test_a_request_larger_than_a_gigabyte_is_an_error(open_disk: Open, image: Path) -> None:
    os.truncate(image, 3 << 30)
    bench = open_disk(queue_size=512, ring_size=512)
    ring = bench.rings[0]
    request, status = ring._place(header(IN)), ring._place(b"\xee")
    same = (ring.data, 4 << 20, WRITE)
    ring.add_buffers([(request, 16, 0), *([same] * 257), (status, 1, WRITE)], indirect=True)
    bench.queues[0].kick()
    ring.wait(1)
    assert bench.memory.read(status, 1) == bytes([IOERR])


def test_a_broken_ring_ends_the_worker_and_what_was_taken_comes_back(open_disk: Open) -> None:
    bench = open_disk()
    for n in range(8):
        bench.add([header(IN, n)], [512, 1])
    bench.rings[0].describe(bench.rings[0].free[-1], 0xFFFF_FFFF_0000, 16)
    bench.rings[0].publish(bench.rings[0].free[-1])
    bench.queues[0].kick()
    bench.rings[0].wait(8)
    for thread, _ in bench.block._workers:
        thread.join(30)
        assert not thread.is_alive()
    assert bench.queues[0].error is not None
    assert bench.status.value & 2, "the driver was told that the device needs a reset"
    bench.block.stop()
    bench.block.reset()
    bench.rings[0].clear()
    bench.queues[0].reset()
    bench.rings[0].enable(bench.queues[0], event_idx=True)
    bench.start()
    assert bench.flush() == OK


# -- ids, discards, zeroes -----------------------------------------------------------------------


def test_the_id_is_the_serial_number(open_disk: Open) -> None:
    bench = open_disk(serial="0123456789abcdefghij")
    assert bench.request([header(GET_ID)], [20, 1]) == (OK, b"0123456789abcdefghij", 21)
    assert bench.request([header(GET_ID)], [5, 1]) == (OK, b"01234", 6)
    assert bench.request([header(GET_ID)], [3, 30, 1])[:2] == (
        OK,
        b"0123456789abcdefghij" + bytes([NOT_WRITTEN]) * 13,
    )


def test_a_short_serial_number_is_filled_up_with_nul(open_disk: Open) -> None:
    assert open_disk(serial="abc").request([header(GET_ID)], [20, 1])[1] == b"abc".ljust(20, b"\0")


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def holes(path: Path) -> bool:
    with open(path, "rb") as file:
        return os.lseek(file.fileno(), 0, os.SEEK_HOLE) < path.stat().st_size


def test_a_discard_gives_the_room_back(disk: Bench, image: Path) -> None:
    require(disk.block.features & F_DISCARD, "the file system cannot punch holes")
    content, before = image.read_bytes(), allocated(image)
    assert disk.discard((256, 512, 0), (1024, 256, 0)) == OK
    assert holes(image)
    assert allocated(image) == before - 768 * SECTOR
    assert image.stat().st_size == SECTORS * SECTOR
    assert disk.read(0, 256 * SECTOR) == (OK, content[: 256 * SECTOR])
    assert disk.read(256, 512 * SECTOR) == (OK, bytes(512 * SECTOR))


@pytest.mark.parametrize("unmap", [0, 1])
def test_zeroes_are_written_with_and_without_a_hole(disk: Bench, image: Path, unmap: int) -> None:
    require(disk.block.features & F_WRITE_ZEROES, "the file system cannot punch holes")
    content, before = image.read_bytes(), allocated(image)
    assert disk.write_zeroes((256, 512, unmap), (3, 1, unmap)) == OK
    assert disk.read(256, 512 * SECTOR) == (OK, bytes(512 * SECTOR))
    assert (
        disk.read(0, 256 * SECTOR)[1]
        == content[: 3 * SECTOR] + bytes(SECTOR) + content[4 * SECTOR : 256 * SECTOR]
    )
    assert allocated(image) == (before - 512 * SECTOR if unmap else before)


def test_without_sparse_the_room_is_kept(open_disk: Open, image: Path) -> None:
    bench = open_disk(sparse=False)
    require(bench.block.features & F_WRITE_ZEROES, "the file system cannot punch holes")
    before = allocated(image)
    assert bench.discard((0, 512, 0)) == UNSUPP
    assert bench.write_zeroes((0, 512, 1)) == OK
    assert bench.read(0, 512 * SECTOR) == (OK, bytes(512 * SECTOR))
    assert allocated(image) == before


def test_zeroes_where_fallocate_cannot_zero_a_range(engine: str) -> None:
    """tmpfs punches holes, and has no ZERO_RANGE."""
    require(os.access("/dev/shm", os.W_OK), "/dev/shm is missing")
    path = Path("/dev/shm") / f"chv-test-{os.getpid()}.img"
    path.write_bytes(os.urandom(SECTORS * SECTOR))
    try:
        with Bench(path, disable_io_uring=engine == "sync") as bench:
            require(bench.block.features & F_WRITE_ZEROES, "/dev/shm cannot punch holes")
            before = allocated(path)
            assert bench.write_zeroes((8, 64, 0), (128, 8, 0)) == OK
            assert bench.write_zeroes((1024, 8, 0)) == OK
            for sector, count in ((8, 64), (128, 8), (1024, 8)):
                assert bench.read(sector, count * SECTOR) == (OK, bytes(count * SECTOR))
            assert allocated(path) == before
            assert bench.write_zeroes((8, 64, 1)) == OK
            assert allocated(path) == before - 64 * SECTOR
    finally:
        path.unlink()


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
def test_wrong_ranges_are_refused_and_nothing_is_done(disk: Bench, image: Path, kind: int) -> None:
    require(disk.block.features & F_DISCARD, "the file system cannot punch holes")
    content = image.read_bytes()

    def ask(data: bytes) -> int:
        return disk.request([header(kind), data])[0]

    good = ranges((0, 8, 0))
    assert ask(b"") == IOERR
    assert ask(good[:15]) == IOERR
    assert ask(good + b"x") == IOERR
    assert ask(good * 65) == IOERR
    assert ask(good + ranges((SECTORS - 1, 2, 0))) == IOERR
    assert ask(good + ranges(((1 << 64) - 1, 8, 0))) == IOERR
    assert ask(good + ranges((0, (1 << 22) + 1, 0))) == IOERR
    assert ask(good + ranges((0, 8, 2))) == UNSUPP
    assert ask(good + ranges((0, 8, 0x80000000))) == UNSUPP
    if kind == DISCARD:  # whose UNMAP must be 0 (virtio 1.2, 5.2.6.2)
        assert ask(good + ranges((0, 8, 1))) == UNSUPP
    assert image.read_bytes() == content
    assert ask(ranges((5, 0, 0))) == OK
    assert ask(ranges((5, 0, 0), (SECTORS, 0, 0))) == OK
    assert image.read_bytes() == content


def test_discards_of_many_ranges(disk: Bench, image: Path) -> None:
    require(disk.block.features & F_DISCARD, "the file system cannot punch holes")
    content = bytearray(image.read_bytes())
    assert disk.discard(*((n * 16, 8, 0) for n in range(64))) == OK
    for n in range(64):
        content[n * 16 * SECTOR : (n * 16 + 8) * SECTOR] = bytes(8 * SECTOR)
    assert disk.read(0, SECTORS * SECTOR) == (OK, bytes(content))


# -- direct I/O --------------------------------------------------------------------------------


def test_buffers_at_any_address_with_direct_io(open_disk: Open, image: Path) -> None:
    bench = open_disk(direct=True)
    content = bytearray(image.read_bytes())
    ring = bench.rings[0]
    for shift in (1, 3, 256, 511):
        where = -(-ring._place(bytes(8192)) // 512) * 512 + shift
        bench.memory.write(where, bytes(4096))
        head, status = ring._place(header(IN, 3)), ring._place(b"\xee")
        ring.add_buffers([(head, 16, 0), (where, 2048, WRITE), (status, 1, WRITE)])
        bench.queues[0].kick()
        assert ring.wait(1)[0][1] == 2049
        assert bench.memory.read(where, 2048) == content[3 * SECTOR : 7 * SECTOR]
        new = os.urandom(1536)
        bench.memory.write(where, new)
        head = ring._place(header(OUT, 11))
        ring.add_buffers([(head, 16, 0), (where, 1536, 0), (status, 1, WRITE)])
        bench.queues[0].kick()
        ring.wait(1)
        content[11 * SECTOR : 14 * SECTOR] = new
        assert bench.flush() == OK
        assert image.read_bytes() == content


def test_more_than_the_bounce_buffer_holds(open_disk: Open, image: Path) -> None:
    os.truncate(image, 4 << 20)
    bench = open_disk(direct=True)
    new = os.urandom((3 << 20) - 512)
    assert bench.request([header(OUT, 1) + new])[0] == OK  # misaligned by the header before it
    assert bench.request([header(IN, 1)], [len(new) + 1])[:2] == (OK, new)
    assert bench.request([header(IN, 1)], [1, len(new)])[:2] == (OK, new)


def test_parts_of_blocks_with_direct_io(engine: str, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with blocks of 4096 bytes: the host must not be asked for less."""
    monkeypatch.setattr("chv.virtio.disk_file.direct_alignment", lambda fd: (512, 4096))
    content = bytearray(image.read_bytes())
    with Bench(image, direct=True, disable_io_uring=engine == "sync") as bench:
        assert bench.block.file.plain_fd >= 0
        for sector, count in ((0, 1), (7, 1), (7, 2), (8, 8), (3, 30), (SECTORS - 1, 1)):
            assert bench.read(sector, count * SECTOR) == (
                OK,
                bytes(content[sector * SECTOR : (sector + count) * SECTOR]),
            )
            new = os.urandom(count * SECTOR)
            assert bench.write(sector, new) == OK
            content[sector * SECTOR : (sector + count) * SECTOR] = new
            assert bench.read(0, SECTORS * SECTOR) == (OK, bytes(content))
    assert image.read_bytes() == content


# -- a disk that fails ---------------------------------------------------------------------------


def test_a_truncated_file_is_an_error_and_the_rest_still_works(disk: Bench, image: Path) -> None:
    content = image.read_bytes()
    os.truncate(image, 1000 * SECTOR + 100)
    assert disk.read(1001, 512)[0] == IOERR
    assert disk.read(1000, 512)[0] == IOERR
    assert disk.read(998, 8 * 512)[0] == IOERR
    assert disk.read(992, 8 * 512) == (OK, content[992 * SECTOR : 1000 * SECTOR])
    assert disk.write(1500, b"w" * 512) == OK
    assert disk.read(1500, 512) == (OK, b"w" * 512)


def test_a_full_disk_is_an_error_and_the_rest_still_works(open_disk: Open, image: Path) -> None:
    """RLIMIT_FSIZE makes writes behind it fail, as a full file system does."""
    os.truncate(image, 0)
    os.truncate(image, SECTORS * SECTOR)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * SECTOR, before[1]))
        bench = open_disk()
        assert bench.write(1500, bytes(512)) == IOERR
        assert bench.write(1020, bytes(16 * 512)) == IOERR, "half of it fits"
        assert bench.write(0, b"a" * 512) == OK
        assert bench.read(0, 512) == (OK, b"a" * 512)
        assert bench.block.counters()["io_errors"] == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# -- flush and the write cache -----------------------------------------------------------------------


def test_the_cache_is_off_when_the_driver_says_so_or_cannot_flush(open_disk: Open) -> None:
    bench = open_disk(start=False)
    block = bench.block
    default = F_FLUSH | F_CONFIG_WCE
    for accepted, writes, writeback in (
        (default, None, True),
        (default, 0, False),
        (default, 1, True),
        (F_FLUSH, None, True),
        (F_FLUSH, 0, True),  # not negotiated: it means nothing
        (F_CONFIG_WCE, None, False),
        (F_CONFIG_WCE, 1, True),
        (0, None, False),
    ):
        block.reset()
        assert block.config()[32] == 1
        if writes is not None:
            block.write_config(32, bytes([writes]))
        block.start(dict(enumerate(bench.queues)), (block.features & ~default) | accepted)
        try:
            assert block.config()[32] == writeback, (accepted, writes)
            assert bench.write(3, b"d" * 512) == OK
            assert bench.read(3, 512) == (OK, b"d" * 512)
        finally:
            block.stop()


def test_the_driver_switches_the_cache_while_it_runs(open_disk: Open) -> None:
    bench = open_disk()
    bench.block.write_config(0, bytes(32))
    assert bench.block.config()[32] == 1, "only writeback can be written"
    bench.block.write_config(32, b"\0")
    assert bench.block.config()[32] == 0
    assert bench.write(0, bytes(512)) == OK
    assert bench.write_zeroes((0, 8, 0)) == OK
    state = bench.block.save()
    bench.block.stop()
    bench.block.reset()
    bench.block.load(state)
    bench.start()
    assert bench.block.config()[32] == 0


# -- its life ------------------------------------------------------------------------------------


def test_stopping_completes_what_was_taken_and_starting_goes_on(open_disk: Open) -> None:
    bench = open_disk(queue_size=256, ring_size=256)
    for round_number in range(20):
        heads = [bench.add([header(OUT, n), bytes([round_number]) * 512]) for n in range(50)]
        bench.queues[0].kick()
        bench.block.stop()
        used = bench.rings[0].used()
        assert bench.queues[0].chains == round_number * 50 + len(used)
        bench.start()
        assert len(used) + len(bench.rings[0].wait(50 - len(used))) == len(heads)
    assert bench.read(0, 50 * 512) == (OK, bytes([19]) * 50 * 512)


def test_one_queue_is_stopped_and_started_alone(open_disk: Open) -> None:
    bench = open_disk(num_queues=2)
    bench.block.stop_queue(1)
    assert bench.read(0, 512, queue=0)[0] == OK
    bench.queues[1].reset()
    bench.rings[1].clear()
    bench.rings[1].enable(bench.queues[1], event_idx=True)
    bench.block.start_queue(bench.queues[1])
    assert bench.read(0, 512, queue=1)[0] == OK


def test_no_descriptor_or_thread_is_left(engine: str, image: Path) -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    def one_life() -> None:
        with Bench(image, disable_io_uring=engine == "sync", num_queues=2) as bench:
            assert bench.write(0, bytes(512)) == OK

    one_life()
    before = count()
    for _ in range(20):
        one_life()
    assert count()[0] == before[0]
    assert count()[1] <= before[1] + 8, "threads of io_uring's own end a moment later"


def test_without_io_uring_in_the_kernel_plain_calls_are_used(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_module, "io_uring_error", lambda: 1)
    with Bench(image) as bench:
        assert bench.read(0, 512)[0] == OK
        assert (bench.block.engine, bench.engine) == ("sync", "sync")


def test_plain_calls_are_used_when_no_ring_can_be_made_later(image: Path) -> None:
    require(io_uring_error() == 0, "io_uring is not available")
    with Bench(image, start=False) as bench:
        assert bench.block.engine == "io_uring"
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest)]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, before[1]))
            bench.start()
            assert bench.read(0, 512)[0] == OK
            assert bench.engine == "sync"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for fd in taken:
                os.close(fd)


def test_the_counters_are_cloud_hypervisors(disk: Bench) -> None:
    names = {"bytes", "ops", "latency_min", "latency_max", "latency_avg"}
    assert set(disk.block.counters()) == {f"{what}_{n}" for what in ("read", "write") for n in names} | {
        "io_errors"
    }
    before = disk.block.counters()
    disk.read(0, 4096)
    disk.read(0, 512)
    disk.write(0, bytes(1024))
    after = disk.block.counters()
    assert after["read_bytes"] - before["read_bytes"] == 4608
    assert after["read_ops"] - before["read_ops"] == 2
    assert (after["write_bytes"], after["write_ops"]) == (1024, 1)
    assert 0 < after["read_latency_avg"] <= after["read_latency_max"]
    assert after["write_latency_min"] == after["write_latency_max"] == after["write_latency_avg"]


def test_a_resized_file_is_noticed_when_asked(open_disk: Open, image: Path) -> None:
    bench = open_disk()
    told = []
    bench.block.config_changed = lambda: told.append(bench.block.config()[:8])
    assert not bench.block.refresh()
    os.truncate(image, (SECTORS + 8) * SECTOR + 100)
    assert bench.read(SECTORS, 512)[0] == IOERR
    assert bench.block.refresh()
    assert told == [struct.pack("<Q", SECTORS + 8)]
    assert bench.block.capacity == (SECTORS + 8) * SECTOR
    assert bench.read(SECTORS + 7, 512) == (OK, bytes(512))
    os.truncate(image, 8 * SECTOR)
    assert bench.block.refresh()
    assert bench.read(8, 512)[0] == IOERR
    assert isinstance(bench.block, Block)
