"""The console: what goes in at one side comes out at the other, whoever waits, leaves or comes back."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chv.config import ConsoleConfig, ConsoleMode
from chv.devices.backend import Backend, Fds, File, Null, Pty, Socket, Tty
from chv.devices.line import INPUT_SIZE, OUTPUT_SIZE
from chv.errors import ConfigError
from chv.virtio.console import F_EMERG_WRITE, F_SIZE, RECEIVE, TRANSMIT, Console, check
from chv.virtio.device import F_VERSION_1

from .virtio_machine import Machine, machine

TEXT = bytes(range(256)) * 400  # 100 KB


class Guest:
    """A driver of the console."""

    def __init__(self, m: Machine) -> None:
        self.machine = m
        self.rx, self.tx = m.rings[RECEIVE], m.rings[TRANSMIT]
        self._got = bytearray()
        self._order: list[int] = []

    def say(self, data: bytes, piece: int = 16, wait: bool = True) -> None:
        """As Linux does: a few bytes, then wait for them to be taken."""
        for start in range(0, len(data), piece):
            self.tx.add(readable=[data[start : start + piece]])
            self.machine.queues[TRANSMIT].kick()
            if wait:
                self.tx.wait()

    def offer(self, *sizes: int) -> None:
        self.rx.add(writable=sizes)
        self.machine.queues[RECEIVE].kick()

    def hear(self, count: int, size: int = 4096) -> bytes:
        """``count`` bytes, through buffers of ``size``, four at a time."""
        outstanding = self.rx.size - len(self.rx.free)
        limit = time.monotonic() + 20
        while len(self._got) < count:
            while outstanding < min(4, self.rx.size):
                self.offer(size)
                outstanding += 1
            for head, written in self.rx.used():
                assert 0 < written <= size
                self._got += self.rx.written(head)[:written]
                outstanding -= 1
            assert time.monotonic() < limit, f"only {len(self._got)} of {count} bytes came"
            time.sleep(0.0002)
        data = bytes(self._got[:count])
        del self._got[:count]
        return data


@contextlib.contextmanager
def running(backend: Backend, ring_size: int = 8) -> Iterator[tuple[Console, Guest]]:
    console = Console("__console", backend)
    try:
        with machine(console, ring_size=ring_size) as m:
            yield console, Guest(m)
    finally:
        console.close()


def until(condition: Callable[[], bool], timeout: float = 10) -> None:
    limit = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < limit, "did not happen in time"
        time.sleep(0.002)


def receive(fd: int, size: int) -> bytes:
    """Exactly ``size`` bytes from ``fd``."""
    data = bytearray()
    while len(data) < size:
        assert select.select([fd], [], [], 10)[0], f"only {len(data)} of {size} bytes came"
        piece = os.read(fd, size - len(data))
        assert piece, f"it ended after {len(data)} of {size} bytes"
        data += piece
    return bytes(data)


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def pair() -> Iterator[tuple[Backend, socket.socket]]:
    near, far = socket.socketpair()
    far.settimeout(10)
    with near, far:
        yield Fds(near, near), far


# -- identity and configuration ------------------------------------------------------------


def test_what_it_is() -> None:
    console = Console("__console", Null())
    assert (console.ID, console.PCI_CLASS) == (3, 0x078000)
    assert console.features == F_VERSION_1 | F_SIZE | F_EMERG_WRITE
    assert console.queue_sizes == (256, 256)
    assert console.config() == struct.pack("<HHII", 0, 0, 1, 0)
    assert console.pty_path is None
    console.close()
    console.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ConsoleConfig(mode=ConsoleMode.OFF), "console.mode: 'Off'; allowed are"),
        (ConsoleConfig(mode=ConsoleMode.FILE), "console.file: missing; mode File needs a path"),
        (ConsoleConfig(mode=ConsoleMode.FILE, file="/"), "console.file: cannot write '/': Is a directory"),
        (ConsoleConfig(mode=ConsoleMode.SOCKET), "console.socket: missing; mode Socket needs a path"),
        (
            ConsoleConfig(mode=ConsoleMode.SOCKET, socket="/x/y"),
            "console.socket: cannot listen on '/x/y': No",
        ),
        (
            ConsoleConfig(mode=ConsoleMode.SOCKET, socket="/dev/null"),
            "console.socket: '/dev/null' exists and",
        ),
    ],
)
def test_what_cannot_be_opened(config: ConsoleConfig, message: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        Console.open(config, "console", "__console")
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_terminal_of_another_console() -> None:
    with open("/dev/null", "r+b", buffering=0) as null:
        first = Tty(null.fileno(), null.fileno())
        with pytest.raises(ConfigError, match=r"^console\.mode: Tty is in use"):
            Console.open(ConsoleConfig(mode=ConsoleMode.TTY), "console", "__console")
        first.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ConsoleConfig(mode=ConsoleMode.FILE), "console.file: required with mode File"),
        (ConsoleConfig(mode=ConsoleMode.FILE, file="a\0b"), "console.file: it contains a NUL"),
        (ConsoleConfig(mode=ConsoleMode.SOCKET, socket="x" * 108), "console.socket: 108 bytes long"),
    ],
)
def test_check(config: ConsoleConfig, message: str) -> None:
    check(ConsoleConfig(mode=ConsoleMode.FILE, file="/nonexistent/x"), "console", 1)
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        check(config, "console", 1)


def test_an_emergency_write_needs_no_queue(tmp_path: Path) -> None:
    path = tmp_path / "log"
    console = Console("__console", File(str(path)))
    console.write_config(8, b"!\0\0\0")
    console.write_config(8, b"?")
    console.write_config(0, b"x")
    console.write_config(9, b"x")
    console.write_config(8, b"")
    console.close()
    assert path.read_bytes() == b"!?"
    console.write_config(8, b"!")  # a vCPU that is late


# -- bytes ---------------------------------------------------------------------------------------


def test_an_echo(pair: tuple[Backend, socket.socket]) -> None:
    backend, far = pair
    with running(backend) as (console, guest):
        far.sendall(b"hello\r")
        assert guest.hear(6) == b"hello\r"
        guest.say(b"hello\r\n")
        assert receive(far.fileno(), 7) == b"hello\r\n"
        counters = console.counters()
    assert counters == {"sent": 7, "received": 6, "dropped": 0, "write_errors": 0, "read_errors": 0}


@pytest.mark.parametrize(("size", "ring_size"), [(1, 8), (7, 2), (4096, 1), (65536, 8)])
def test_100_kb_to_the_guest(pair: tuple[Backend, socket.socket], size: int, ring_size: int) -> None:
    """More than waits in the device: the sender is made to wait, and nothing is lost."""
    backend, far = pair
    text = TEXT if size > 7 else TEXT[:20_000]
    with running(backend, ring_size=ring_size) as (console, guest):
        sender = in_thread(lambda: far.sendall(text))
        until(lambda: console.line.pending_input >= INPUT_SIZE)
        assert guest.hear(len(text), size) == text
        sender.join(5)
        assert console.counters()["received"] == len(text)


@pytest.mark.parametrize("piece", [16, 4096, 100_000])
def test_100_kb_from_the_guest(pair: tuple[Backend, socket.socket], piece: int) -> None:
    backend, far = pair
    with running(backend) as (console, guest):
        text = TEXT if piece > 16 else TEXT[:10_000]
        speaker = in_thread(lambda: guest.say(text, piece))
        assert receive(far.fileno(), len(text)) == text
        speaker.join(5)
        assert console.counters()["dropped"] == 0


def test_both_ways_at_once(pair: tuple[Backend, socket.socket]) -> None:
    backend, far = pair
    heard: list[bytes] = []
    with running(backend) as (_, guest):
        threads = [
            in_thread(lambda: guest.say(TEXT, 100)),
            in_thread(lambda: far.sendall(TEXT)),
            in_thread(lambda: heard.append(guest.hear(len(TEXT)))),
        ]
        assert receive(far.fileno(), len(TEXT)) == TEXT
        for thread in threads:
            thread.join(20)
    assert heard == [TEXT]


def test_buffers_in_pieces(pair: tuple[Backend, socket.socket]) -> None:
    backend, far = pair
    with running(backend) as (_, guest):
        guest.offer(1, 2, 3)
        far.sendall(b"abcdefgh")
        ((head, written),) = guest.rx.wait()
        data = guest.rx.written(head)[:written]
        assert data == b"abcdef"[:written]
        assert data + guest.hear(8 - written) == b"abcdefgh"
        guest.tx.add(readable=[b"a", b"", b"bc", b"d" * 5000])
        guest.machine.queues[TRANSMIT].kick()
        assert receive(far.fileno(), 5003) == b"abc" + b"d" * 5000


def test_buffers_without_room_lose_nothing(pair: tuple[Backend, socket.socket]) -> None:
    backend, far = pair
    with running(backend) as (_, guest):
        useless = guest.rx.add(readable=[b"x"])
        guest.offer(5)
        far.sendall(b"abc")
        assert guest.rx.wait(2)[0] == (useless, 0)


def test_a_reader_who_is_slow_is_waited_for(pair: tuple[Backend, socket.socket]) -> None:
    backend, far = pair
    text = bytes(i % 251 for i in range(4 * OUTPUT_SIZE))
    with running(backend) as (console, guest):
        speaker = in_thread(lambda: guest.say(text, 4000))
        got = bytearray()
        while len(got) < len(text):
            time.sleep(0.001)
            got += far.recv(16384)
        speaker.join(5)
        assert bytes(got) == text
        assert console.counters()["dropped"] == 0


def test_a_reader_who_stalls_does_not_stop_the_guest(pair: tuple[Backend, socket.socket]) -> None:
    """Linux would stand still with interrupts off. It loses the oldest output instead, and none later."""
    backend, far = pair
    with running(backend) as (console, guest):
        guest.say(bytes(8 * OUTPUT_SIZE), 4096)  # one patience in all, not one for each
        dropped = console.counters()["dropped"]
        assert dropped > 0
        assert console.line.pending_output == OUTPUT_SIZE
        receive(far.fileno(), 8 * OUTPUT_SIZE - dropped)
        guest.say(b"back")
        assert receive(far.fileno(), 4) == b"back"
        assert console.counters()["dropped"] == dropped


def test_last_words_are_in_the_file_when_close_returns(tmp_path: Path) -> None:
    path = tmp_path / "log"
    console = Console.open(ConsoleConfig(mode=ConsoleMode.FILE, file=str(path)), "console", "__console")
    with machine(console) as m:
        Guest(m).say(TEXT, 1000)
    console.close()
    assert path.read_bytes() == TEXT
    assert path.stat().st_mode & 0o777 == 0o600


def test_null_takes_everything_and_has_no_thread() -> None:
    before = threading.active_count()
    console = Console.open(ConsoleConfig(mode=ConsoleMode.NULL), "console", "__console")
    assert threading.active_count() == before
    with machine(console) as m:
        Guest(m).say(TEXT, 1000)
        assert console.counters()["sent"] == console.counters()["dropped"] == len(TEXT)
    console.close()


def test_a_write_error_is_counted_and_the_guest_goes_on() -> None:
    with open("/dev/full", "wb", buffering=0) as full, open("/dev/null", "rb") as null:
        console = Console("__console", Fds(null, full))
        with machine(console) as m:
            Guest(m).say(b"x" * 1000)
            until(lambda: console.counters()["write_errors"] == 1)
            Guest(m).say(b"y" * 10)
        assert console.counters()["dropped"] == 1010
        console.close()


def test_standard_descriptors_that_are_no_terminal(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    log = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    os.write(log, b"before ")
    with running(Tty(reader, log)) as (console, guest):
        os.write(writer, b"input")
        assert guest.hear(5) == b"input"
        os.close(writer)
        guest.say(b"output")
        assert console.size == (0, 0)
    os.write(log, b" after")
    assert os.pread(log, 100, 0) == b"before output after"
    os.close(reader)
    os.close(log)


@pytest.mark.parametrize("fds", [(9998, 9999), None])
def test_standard_descriptors_that_are_closed_or_null(fds: tuple[int, int] | None) -> None:
    with open("/dev/null", "r+b", buffering=0) as null:
        backend = Tty(*(fds or (null.fileno(), null.fileno())))
        with running(backend) as (console, guest):
            guest.say(b"x" * 100)
            until(lambda: console.line.pending_output == 0)
            before = time.process_time()
            time.sleep(0.3)
            assert time.process_time() - before < 0.1


# -- stop, reset, reboot ---------------------------------------------------------------------------


def test_stop_while_both_workers_wait(pair: tuple[Backend, socket.socket]) -> None:
    """The reader takes nothing, the guest has no buffers; then all goes on, nothing lost or twice."""
    backend, far = pair
    with running(backend, ring_size=64) as (console, guest):
        in_thread(lambda: far.sendall(TEXT))
        text = bytes(i % 253 for i in range(5 * OUTPUT_SIZE))
        guest.say(text, 64 << 10, wait=False)
        until(lambda: not console.line.has_room())
        console.stop()
        used = len(guest.tx.used())
        assert used < len(text) // (64 << 10)
        guest.machine.start()
        assert receive(far.fileno(), len(text)) == text
        assert guest.hear(len(TEXT)) == TEXT
        assert console.counters()["dropped"] == 0


def test_stop_in_an_endless_chain() -> None:
    """A hostile guest names the same memory again and again."""
    with running(Null()) as (console, guest):
        table = [(guest.rx.data, 4 << 20, 0)] * 250
        guest.machine.memory.write(guest.rx.data, bytes(16))
        ring = guest.tx
        ring.free = []
        table_at = guest.rx.data
        entries = b"".join(
            struct.pack("<QIHH", address, length, 1 if n < 249 else 0, n + 1)
            for n, (address, length, _) in enumerate(table)
        )
        guest.machine.memory.write(table_at, entries)
        console.stop()
        queue = guest.machine.queues[TRANSMIT]
        queue.enable(256, table_at, ring.avail, ring.used_ring)
        ring.size = 256
        ring.avail_index = 0
        ring.publish(0)
        guest.machine.start()
        until(lambda: console.counters()["dropped"] > 0)
        console.stop()
        assert console.counters()["dropped"] == 250 * (4 << 20)


def test_over_a_reboot_the_line_stays(pair: tuple[Backend, socket.socket]) -> None:
    backend, far = pair
    console = Console("__console", backend)
    far.sendall(b"too early")
    with machine(console) as m:
        assert Guest(m).hear(9) == b"too early"
        Guest(m).say(b"first")
    far.sendall(b"between")
    with machine(console) as m:
        Guest(m).say(b"second")
        assert Guest(m).hear(7) == b"between"
    assert receive(far.fileno(), 11) == b"firstsecond"
    console.close()


def test_saved_and_loaded(pair: tuple[Backend, socket.socket]) -> None:
    backend, far = pair
    with running(backend) as (console, _):
        far.sendall(b"typed ahead")
        until(lambda: console.line.pending_input == 11)
        console.resize(80, 25)
        console.stop()
        state = console.save()
    other = Console("__console", Null())
    other.load(state)
    assert (other.size, other.accepted) == ((80, 25), other.features)
    with machine(other) as m:
        assert Guest(m).hear(11) == b"typed ahead"
    other.close()


def test_a_broken_ring_waits_for_a_reset(pair: tuple[Backend, socket.socket]) -> None:
    backend, far = pair
    console = Console("__console", backend)
    with machine(console) as m:
        far.sendall(b"x")
        for ring, queue in zip(m.rings, m.queues, strict=True):
            ring.publish(4711)
            queue.kick()
        until(lambda: all(queue.error for queue in m.queues))
    with machine(console) as m:
        assert Guest(m).hear(1) == b"x"
        Guest(m).say(b"y")
        assert far.recv(1) == b"y"
    console.close()


def test_threads_and_descriptors_are_given_back() -> None:
    def count() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    with running(Pty()):
        pass
    before = count()
    for _ in range(20):
        with running(Pty()) as (_, guest):
            guest.say(b"x")
        del guest
    assert count() == before


# -- the terminal's size -------------------------------------------------------------------------------


def size_of(console: Console) -> tuple[int, ...]:
    return struct.unpack("<HH", console.config()[:4])


def test_resize() -> None:
    changes: list[tuple[int, ...]] = []
    console = Console("__console", Null())
    console.config_changed = lambda: changes.append(size_of(console))
    console.resize(80, 25)
    assert changes == []  # there is no driver
    with machine(console):
        until(lambda: changes == [(80, 25)])  # Linux does not look before it is told to
        console.resize(132, 43)
        console.resize(132, 43)
        assert changes == [(80, 25), (132, 43)]
    for columns, rows in ((-1, 0), (0, 65536)):
        with pytest.raises(ConfigError, match=r"__console: .* not within 0-65535"):
            console.resize(columns, rows)
    with machine(console, started=False) as m:
        m.start(F_VERSION_1)
        console.resize(1, 2)
        assert changes == [(80, 25), (132, 43)]  # a driver that does not know about sizes
    console.close()


def test_the_size_of_a_terminal_is_followed() -> None:
    master, slave = os.openpty()
    set_size(slave, 100, 30)
    changes: list[tuple[int, ...]] = []
    console = Console("__console", Tty(slave, slave))
    assert size_of(console) == (100, 30)
    console.config_changed = lambda: changes.append(size_of(console))
    with machine(console):
        until(lambda: changes == [(100, 30)])
        set_size(master, 120, 50)
        until(lambda: changes == [(100, 30), (120, 50)])
        console.resize(10, 5)  # which stays until the terminal changes again
        os.write(master, b"x")
        until(lambda: console.line.pending_input == 1)
        assert size_of(console) == (10, 5)
        set_size(master, 80, 25)
        until(lambda: size_of(console) == (80, 25))
    console.close()
    os.close(master)
    os.close(slave)


def test_the_size_of_a_pty_is_followed() -> None:
    with running(Pty()) as (console, _), opened(console.pty_path) as fd:
        assert size_of(console) == (0, 0)
        set_size(fd, 90, 20)
        until(lambda: size_of(console) == (90, 20))


def set_size(fd: int, columns: int, rows: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("<HHHH", rows, columns, 0, 0))


# -- pty -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: str | None) -> Iterator[int]:
    assert path is not None
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    try:
        yield fd
    finally:
        os.close(fd)


def test_a_late_opener_of_a_pty_sees_the_recent_log() -> None:
    log = b"".join(b"line %07d\r\n" % i for i in range(20_000))
    with running(Pty()) as (console, guest):
        until(lambda: not console.line.attached)
        guest.say(log, 4096)  # more than is kept, and nobody makes the guest wait
        assert console.line.pending_output == OUTPUT_SIZE
        with opened(console.pty_path) as fd:
            assert receive(fd, OUTPUT_SIZE) == log[-OUTPUT_SIZE:]
            guest.say(b"login: ")
            assert receive(fd, 7) == b"login: "
            os.write(fd, b"root\n")
            assert guest.hear(5) == b"root\n"


def test_a_pty_serves_one_opener_after_the_other() -> None:
    with running(Pty()) as (console, guest):
        for round_ in range(3):
            until(lambda: not console.line.attached)
            text = b"round %d" % round_
            guest.say(text)
            with opened(console.pty_path) as fd:
                assert receive(fd, len(text)) == text
                os.write(fd, text)
                assert guest.hear(len(text)) == text
            with opened(console.pty_path) as fd:
                os.write(fd, b"left behind")  # written, then closed at once
            assert guest.hear(11) == b"left behind"


def test_a_pty_that_nobody_has_open_costs_little() -> None:
    with running(Pty()) as (console, _):
        until(lambda: not console.line.attached)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.05


# -- sockets -----------------------------------------------------------------------------------------


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    client.settimeout(10)
    return client


def test_clients_of_a_socket_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "console"
    with running(Socket(str(path))) as (console, guest):
        guest.say(b"booting...")
        for round_ in range(3):
            with connect(path) as client:
                assert receive(client.fileno(), 10) == b"booting..."
                client.sendall(b"hello %d" % round_)
                assert guest.hear(7) == b"hello %d" % round_
            until(lambda: not console.line.attached)
            guest.say(b"booting...")
    assert not path.exists()


def test_a_client_that_leaves_at_once_is_heard(tmp_path: Path) -> None:
    """Also if the guest has no room yet, and another client has come meanwhile."""
    path = tmp_path / "console"
    with running(Socket(str(path))) as (console, guest):
        with connect(path) as client:
            client.sendall(TEXT)
        with connect(path) as other:
            guest.say(b"for the other")
            assert receive(other.fileno(), 13) == b"for the other"
            other.sendall(b"!")
            assert guest.hear(len(TEXT) + 1) == TEXT + b"!"
        until(lambda: not console.line.attached)


def test_a_new_client_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "console"
    with running(Socket(str(path))) as (_, guest), connect(path) as old:
        guest.say(b"1")
        assert receive(old.fileno(), 1) == b"1"
        with connect(path) as new:
            assert old.recv(1) == b""
            guest.say(b"2")
            assert receive(new.fileno(), 1) == b"2"
            new.sendall(b"x")
            assert guest.hear(1) == b"x"


def test_a_client_that_only_listens(tmp_path: Path) -> None:
    path = tmp_path / "console"
    with running(Socket(str(path))) as (console, guest):
        with connect(path) as client:
            client.sendall(b"cmd\n")
            client.shutdown(socket.SHUT_WR)
            assert guest.hear(4) == b"cmd\n"
            guest.say(b"result")
            assert receive(client.fileno(), 6) == b"result"
        until(lambda: not console.line.attached)


def test_a_client_that_reads_nothing_and_leaves(tmp_path: Path) -> None:
    """What it did not take is there for the next one, up to what is kept."""
    path = tmp_path / "console"
    with running(Socket(str(path))) as (console, guest):
        with connect(path):
            until(lambda: console.line.attached)
            guest.say(bytes(OUTPUT_SIZE), 4096)
        until(lambda: not console.line.attached)
        guest.say(b"z" * OUTPUT_SIZE, 4096)
        with connect(path) as client:
            assert receive(client.fileno(), OUTPUT_SIZE) == b"z" * OUTPUT_SIZE
