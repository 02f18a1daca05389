"""Disks: what is refused and in which words, locks, formats, and what the guest is told of the disk."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chv.config.schema import (
    DiskConfig,
    ImageType,
    LockGranularity,
    RateLimiterConfig,
    VirtQueueAffinity,
)
from chv.errors import ConfigError, NotSupportedYet
from chv.virtio import block, disk_file, disk_format, disk_lock
from chv.virtio.block import Block, check
from chv.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from tests.block_bench import OK, SECTOR, Bench
from tests.support import require

CONFIG = struct.Struct("<QII4sIBBHIBxHIIIIIB3x")  # struct virtio_blk_config (virtio 1.2, 5.2.4)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(64 * SECTOR))
    return path


def open_disk(path: Path | str | None, **options: Any) -> Block:
    config = DiskConfig(path=None if path is None else str(path), **options)
    return Block.open(config, "disks[0]", "_disk0")


def message(path: Path | str | None, **options: Any) -> str:
    """What opening it is refused with."""
    with pytest.raises(ConfigError) as caught:
        open_disk(path, **options).close()
    return str(caught.value)


# -- without opening anything ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": None}, r"^disks\[3\]\.path: required, but missing$"),
        ({"path": ""}, r"^disks\[3\]\.path: required, but missing$"),
        ({"num_queues": 0}, r"^disks\[3\]\.num_queues: 0 is not in 1\.\.4"),
        ({"num_queues": 5}, r"^disks\[3\]\.num_queues: 5 is not in 1\.\.4"),
        ({"queue_size": 0}, r"^disks\[3\]\.queue_size: 0 is not a power of two from 4 to 32768$"),
        ({"queue_size": 2}, r"^disks\[3\]\.queue_size: 2 "),
        ({"queue_size": 100}, r"^disks\[3\]\.queue_size: 100 "),
        ({"queue_size": 65535}, r"^disks\[3\]\.queue_size: 65535 "),
        ({"serial": "x" * 21}, r"^disks\[3\]\.serial: 21 bytes long, at most 20 are possible$"),
        ({"serial": "ä" * 11}, r"^disks\[3\]\.serial: 22 bytes long"),
        ({"serial": "a\0b"}, r"^disks\[3\]\.serial: it contains a NUL character$"),
        ({"image_type": ImageType.QCOW2}, r"^disks\[3\]\.image_type: .* `qemu-img convert -f qcow2 -O raw`$"),
        ({"image_type": ImageType.FIXED_VHD}, r"^disks\[3\]\.image_type: .* -f vpc -O raw`$"),
        ({"image_type": ImageType.VHDX}, r"^disks\[3\]\.image_type: .* -f vhdx -O raw`$"),
        ({"image_type": ImageType.FLAT_VMDK}, r"^disks\[3\]\.image_type: .* -f vmdk -O raw`$"),
        (
            {"queue_affinity": [VirtQueueAffinity(queue_index=1, host_cpus=[0])]},
            r"^disks\[3\]\.queue_affinity: there is no queue 1 \(disks\[3\]\.num_queues: 1\)$",
        ),
        (
            {"queue_affinity": [VirtQueueAffinity(queue_index=0, host_cpus=[0])] * 2},
            r"^disks\[3\]\.queue_affinity: queue 0 is named twice$",
        ),
        (
            {"queue_affinity": [VirtQueueAffinity(queue_index=0, host_cpus=[])]},
            r"^disks\[3\]\.queue_affinity: queue 0 is given no host CPU$",
        ),
    ],
)
def test_a_wrong_configuration_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(DiskConfig(**{"path": "/disk", **options}), "disks[3]", 4)


@pytest.mark.parametrize(
    "options",
    [
        {"vhost_user": True},
        {"vhost_socket": "/socket"},
        {"rate_limit_group": "slow"},
        {"rate_limiter_config": RateLimiterConfig()},
        {"iommu": True},
        {"backing_files": True},
    ],
    ids=str,
)
def test_what_is_not_built_is_named(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(NotSupportedYet, match=rf"^disks\[0\]\.{name}: .*chv does not support this yet$"):
        check(DiskConfig(path="/disk", **options), "disks[0]", 1)


def test_all_of_this_is_fine() -> None:
    check(DiskConfig(path="/disk"), "disks[0]", 1)
    check(DiskConfig(path="/disk", num_queues=4, queue_size=32768, serial="x" * 20), "disks[0]", 4)
    check(DiskConfig(path="/disk", image_type=ImageType.RAW, disable_aio=True, queue_size=4), "disks[0]", 1)
    affinity = [VirtQueueAffinity(queue_index=n, host_cpus=[n]) for n in (1, 0)]
    check(DiskConfig(path="/disk", num_queues=2, queue_affinity=affinity), "disks[0]", 2)


# -- files that cannot be opened -----------------------------------------------------------------------


def test_files_that_cannot_be_a_disk(tmp_path: Path, image: Path) -> None:
    assert message(None) == "disks[0].path: required, but missing"
    assert message("a\0b") == "disks[0].path: it contains a NUL character"
    gone = tmp_path / "gone"
    assert message(gone) == f"disks[0].path: {gone} does not exist"
    assert message(tmp_path) == (
        f"disks[0].path: {tmp_path} is a directory, not a disk image or a block device"
    )
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert message(fifo) == f"disks[0].path: {fifo} is neither a file nor a block device"
    assert message("/dev/null") == "disks[0].path: /dev/null is neither a file nor a block device"
    assert "cannot be opened: Not a directory" in message(image / "below")
    assert "cannot be opened: File name too long" in message("/" + "x" * 300)
    for size in (0, 1, 511):
        image.write_bytes(bytes(size))
        assert message(image) == f"disks[0].path: {image} has {size} bytes, less than one sector (512)"


def test_no_permission(image: Path) -> None:
    """Asked of a process that is not root, which may write everywhere."""
    program = (
        "import os, sys; os.getuid() or os.setresuid(65534, 65534, 65534)\n"
        "from chv.config.schema import DiskConfig\n"
        "from chv.virtio.disk_file import DiskFile\n"
        "for readonly in (False, True):\n"
        "    config = DiskConfig(path=sys.argv[1], readonly=readonly)\n"
        "    try: DiskFile(config, 'disks[0]').close(); print('opened')\n"
        "    except Exception as error: print(error)\n"
    )

    def ask() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", "import chv.virtio.block\n" + program, str(path)],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        return done.stdout.splitlines()

    path = Path("/dev/shm") / f"chv-test-{os.getpid()}.img"
    require(os.access(path.parent, os.W_OK), "/dev/shm is missing")
    path.write_bytes(bytes(SECTOR))
    try:
        path.chmod(0o444)
        assert ask() == [
            f"disks[0].path: {path} cannot be opened for writing (Permission denied): "
            "change its permissions, or use readonly=on",
            "opened",
        ]
        path.chmod(0)
        assert ask()[1] == f"disks[0].path: {path} cannot be opened: Permission denied"
    finally:
        path.unlink()


def test_a_file_system_without_direct_io(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_file, "direct_alignment", lambda fd: (0, 0))
    assert message(image, direct=True) == (
        f"disks[0].direct: the file system of {image} has no direct I/O: use direct=off"
    )


def test_a_host_cpu_that_is_not_there(image: Path) -> None:
    affinity = [VirtQueueAffinity(queue_index=0, host_cpus=[4095])]
    assert "disks[0].queue_affinity: host CPU 4095 is not one" in message(image, queue_affinity=affinity)


def test_a_refused_disk_leaves_no_descriptor(image: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    image.write_bytes(b"QFI\xfb" + bytes(1000))
    message(image)
    message(image, direct=True)
    image.write_bytes(bytes(100))
    message(image)
    assert len(os.listdir("/proc/self/fd")) == before


# -- formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"QFI\xfb\0\0\0\3".ljust(1024, b"\0"), "qcow2"),
        (b"vhdxfile".ljust(1024, b"\0"), "vhdx"),
        (b"KDMV".ljust(1024, b"\0"), "vmdk"),
        (b"# Disk DescriptorFile\nversion=1".ljust(1024, b"\0"), "vmdk"),
        (b"conectix".ljust(1024, b"\0"), "vpc"),
        (bytes(1024) + b"conectix".ljust(512, b"\0"), "vpc"),
        (b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(1024, b"\0"), "vdi"),
        (b"QED\0".ljust(1024, b"\0"), "qed"),
    ],
)
def test_other_formats_are_recognized(image: Path, content: bytes, name: str) -> None:
    image.write_bytes(content)
    assert message(image) == (
        f"disks[0].path: {image} is a {name} image and chv reads raw ones: convert it with "
        f"`qemu-img convert -f {name} -O raw`. If it is a raw disk all the same, say so: "
        "image_type=raw (Raw in Python and over REST)"
    )
    open_disk(image, image_type=ImageType.RAW).close()


def test_a_raw_image_is_no_other_format(image: Path) -> None:
    with open(image, "rb") as file:
        assert disk_format.recognize(file.fileno(), 64 * SECTOR) is None


# -- locks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", list(LockGranularity))
def test_one_writer_or_many_readers(image: Path, granularity: LockGranularity) -> None:
    writer = open_disk(image, lock_granularity=granularity)
    for other in LockGranularity:
        for readonly in (False, True):
            words = message(image, lock_granularity=other, readonly=readonly)
            assert words.startswith(f"disks[0].path: {image} is in use (another disk of this process): ")
    writer.close()
    readers = [open_disk(image, readonly=True, lock_granularity=granularity) for _ in range(3)]
    assert "one VM alone, or read with readonly=on" in message(image)
    for reader in readers:
        reader.close()
    open_disk(image, lock_granularity=granularity).close()


def test_the_message_names_the_process_that_has_it(image: Path) -> None:
    program = (
        "import fcntl, struct, sys\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 0, 0))\n"
        "print('locked', flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        command = Path(f"/proc/{other.pid}/comm").read_text().strip()
        assert f"{image} is in use ({command}, process {other.pid})" in message(image)
    finally:
        other.communicate()
    open_disk(image).close()


def test_an_owner_that_cannot_be_seen(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_disk(image)
    monkeypatch.setattr(disk_lock, "_owners", lambda fd: [])
    assert "(perhaps a process of another user)" in message(image)
    first.close()


def test_a_grown_disk_is_locked_to_its_new_end(image: Path) -> None:
    with Bench(image) as bench:
        os.truncate(image, 128 * SECTOR)
        assert bench.block.refresh()
        bench.block.refresh()
        words = message(image)
    assert "is in use" in words


def test_a_file_system_without_locks_is_used_all_the_same(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("chv.virtio.disk_lock.fcntl.fcntl", no_locks)
    open_disk(image).close()
    assert f"disks[0].path: {image} cannot be locked: No locks available" in caplog.text


# -- what the guest is told -------------------------------------------------------------------------------


@pytest.fixture
def opened(image: Path) -> Iterator[Block]:
    made = open_disk(image, num_queues=2, queue_size=64)
    yield made
    made.close()


def test_the_configuration_space(opened: Block) -> None:
    fields = CONFIG.unpack(opened.config())
    assert CONFIG.size == 60
    capacity, size_max, seg_max, geometry, blk_size = fields[:5]
    assert (capacity, size_max, seg_max, geometry, blk_size) == (64, 0, 62, bytes(4), 512)
    exponent, alignment, smallest, optimal = fields[5:9]
    assert (512 << exponent, alignment, smallest * 512, optimal) == (4096, 0, 4096, 0)
    assert fields[9:11] == (1, 2)  # writeback, num_queues
    require(opened.features & block.F_DISCARD, "the file system cannot punch holes")
    assert fields[11:] == (1 << 22, 64, 8, 1 << 22, 64, 1)


@pytest.mark.parametrize(("queue_size", "seg_max"), [(4, 2), (128, 126), (256, 254), (32768, 254)])
def test_segments_fit_into_the_queue(image: Path, queue_size: int, seg_max: int) -> None:
    made = open_disk(image, queue_size=queue_size)
    assert CONFIG.unpack(made.config())[2] == seg_max
    made.close()


def test_the_features(image: Path) -> None:
    always = (
        F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | block.F_SEG_MAX | block.F_BLK_SIZE | block.F_TOPOLOGY
    )
    always |= block.F_FLUSH | block.F_CONFIG_WCE
    holes = block.F_DISCARD | block.F_WRITE_ZEROES

    def features(**options: Any) -> int:
        made = open_disk(image, **options)
        made.close()
        return made.features

    assert features(readonly=True) == always | block.F_RO
    assert features(readonly=True, num_queues=2) == always | block.F_RO | block.F_MQ
    with_holes = features()
    require(with_holes & holes, "the file system cannot punch holes")
    assert with_holes == always | holes
    assert features(sparse=False) == always | block.F_WRITE_ZEROES


def test_a_disk_without_sparse_says_that_zeroes_keep_their_room(image: Path) -> None:
    made = open_disk(image, sparse=False)
    assert CONFIG.unpack(made.config())[11:14] == (0, 0, 0)
    assert CONFIG.unpack(made.config())[16] == 0
    made.close()


def test_the_capacity_is_whole_sectors(image: Path) -> None:
    os.truncate(image, 10 * SECTOR + 511)
    made = open_disk(image)
    assert (made.capacity, CONFIG.unpack(made.config())[0]) == (10 * SECTOR, 10)
    made.close()


def test_what_a_device_is(opened: Block) -> None:
    assert (opened.ID, opened.PCI_CLASS, opened.name) == (2, 0x018000, "_disk0")
    assert opened.queue_sizes == (64, 64)
    opened.close()
    opened.close()


def test_the_default_serial_number_depends_on_the_path_alone(image: Path, tmp_path: Path) -> None:
    def serial(path: Path) -> bytes:
        made = open_disk(path)
        made.close()
        return made.serial

    first = serial(image)
    assert len(first) == 20
    image.write_bytes(bytes(SECTOR))
    assert serial(image) == first
    link = tmp_path / "link"
    link.symlink_to(image)
    assert serial(link) == first
    other = tmp_path / "other"
    other.write_bytes(bytes(SECTOR))
    assert serial(other) != first


def test_a_queue_is_served_on_the_cpus_that_it_is_given(image: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    with Bench(image, queue_affinity=[VirtQueueAffinity(queue_index=0, host_cpus=[cpu])]) as bench:
        assert bench.flush() == OK
        (thread, _), *_ = bench.block._workers
        assert thread.native_id is not None
        assert os.sched_getaffinity(thread.native_id) == {cpu}
    assert os.sched_getaffinity(0) >= {cpu}


# -- block devices ------------------------------------------------------------------------------------------


@pytest.fixture(params=[512, 4096])
def loop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A loop device of 1 MiB with sectors of the given size: its path, and that size."""
    path = tmp_path / "backing.img"
    path.write_bytes(os.urandom(1 << 20))
    try:
        done = subprocess.run(
            ["losetup", "--find", "--show", "--sector-size", str(request.param), str(path)],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("losetup is not installed")
    if done.returncode:
        pytest.skip(f"no loop device to be had: {done.stderr.strip()}")
    device = done.stdout.strip()
    yield device, request.param
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("engine", ["io_uring", "sync"])
def test_a_block_device(loop: tuple[str, int], direct: bool, engine: str) -> None:
    path, sector_size = loop
    content = bytearray(Path(path).read_bytes())
    with Bench(Path(path), direct=direct, disable_io_uring=engine == "sync") as bench:
        fields = CONFIG.unpack(bench.block.config())
        assert (fields[0], fields[4]) == (2048, sector_size)
        assert bench.block.features & block.F_WRITE_ZEROES
        for sector, count in ((0, 8), (16, 64), (3, 1), (1001, 9)):
            assert (
                bench.read(sector, count * SECTOR)[1] == content[sector * SECTOR : (sector + count) * SECTOR]
            )
            new = os.urandom(count * SECTOR)
            assert bench.write(sector, new) == OK
            content[sector * SECTOR : (sector + count) * SECTOR] = new
        if bench.block.features & block.F_DISCARD:
            assert bench.discard((512, 64, 0)) == OK
            content[512 * SECTOR : 576 * SECTOR] = bytes(64 * SECTOR)  # a loop device's discard is a hole
        assert bench.write_zeroes((256, 64, 0), (1024, 8, 1)) == OK
        content[256 * SECTOR : 320 * SECTOR] = bytes(64 * SECTOR)
        content[1024 * SECTOR : 1032 * SECTOR] = bytes(8 * SECTOR)
        assert bench.flush() == OK
        assert bench.read(0, 1 << 20) == (OK, bytes(content))
        assert "is in use" in message(path)
