"""The serial port with its threads: what goes in on one side comes out on the other."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chv.devices._serial import ENDED, FAILED, STOPPED, Serial
from chv.devices.backend import Backend, Fds, File, Null, Pty, Socket
from chv.devices.serial import SerialPort

from .uart import (
    DATA,
    DR,
    IER,
    LSR,
    LSR_THRE,
    NO_INTERRUPT,
    RECEIVED,
    RING,
    THRE,
    Irq,
    iir,
    receive_all,
    set_up,
)

MB = 1 << 20


@contextlib.contextmanager
def running(backend: Backend) -> Iterator[SerialPort]:
    port = SerialPort(-1, backend)
    port.start()
    try:
        yield port
    finally:
        port.close()


def wait_until(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    limit = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < limit, "did not happen in time"
        time.sleep(0.005)


def say(port: SerialPort, text: bytes) -> None:
    """Write as a polling driver does."""
    for byte in text:
        while not port.device.read(LSR, 1) & LSR_THRE:
            time.sleep(0.001)
        port.device.write(DATA, 1, byte)


def receive(fd: int, size: int, timeout: float = 5.0) -> bytes:
    """Exactly ``size`` bytes from ``fd``."""
    data = bytearray()
    while len(data) < size:
        assert select.select([fd], [], [], timeout)[0], f"only {len(data)} of {size} bytes came"
        piece = os.read(fd, size - len(data))
        assert piece, f"the line ended after {len(data)} of {size} bytes"
        data += piece
    return bytes(data)


def hear(port: SerialPort, size: int) -> bytes:
    """Exactly ``size`` bytes at the guest's side."""
    data = bytearray()
    wait_until(lambda: len(data.__iadd__(receive_all(port.device))) >= size)
    return bytes(data)


class Driver:
    """A guest's driver, driven by interrupts alone as Linux's is: a lost one makes it hang."""

    def __init__(self, device: Serial, irq: Irq, output: bytes, expected: int) -> None:
        self.device, self.irq = device, irq
        self.output, self.sent = output, 0
        self.expected = expected
        self.received = bytearray()

    def run(self) -> None:
        while self.sent < len(self.output) or len(self.received) < self.expected:
            ready = select.select([self.irq.fd], [], [], 10.0)[0]
            assert ready, f"no interrupt: sent {self.sent}, received {len(self.received)}"
            self.irq.take()
            while iir(self.device) != NO_INTERRUPT:
                self.serve()

    def serve(self) -> None:
        status = self.device.read(LSR, 1)
        for _ in range(256):
            if not status & DR:
                break
            self.received.append(self.device.read(DATA, 1))
            status = self.device.read(LSR, 1)
        if status & LSR_THRE and self.sent < len(self.output):
            for byte in self.output[self.sent : self.sent + 16]:
                self.device.write(DATA, 1, byte)
            self.sent += 16
            if self.sent >= len(self.output):
                self.device.write(IER, 1, RECEIVED)


@pytest.mark.parametrize(("kind", "size"), [("socket", MB), ("pipe", 100_000), ("pty", 100_000)])
def test_what_goes_both_ways_arrives_complete(kind: str, size: int) -> None:
    output = random.Random(1).randbytes(size)
    keyboard = random.Random(2).randbytes(size)
    irq = Irq()
    backend, in_fd, out_fd, close = ends(kind)
    port = SerialPort(irq.fd, backend)
    printed = bytearray()

    def type_all() -> None:
        sent = 0
        while sent < len(keyboard):
            sent += os.write(in_fd, keyboard[sent : sent + 5000])

    def print_all() -> None:
        while len(printed) < len(output):
            printed.extend(os.read(out_fd, 3000))

    driver = Driver(port.device, irq, output, len(keyboard))
    threads = [threading.Thread(target=f, daemon=True) for f in (type_all, print_all)]
    set_up(port.device)  # before anything can arrive: it clears the FIFO
    try:
        port.start()
        for thread in threads:
            thread.start()
        port.device.write(IER, 1, RECEIVED | THRE)
        driver.run()
        for thread in threads:
            thread.join(10)
        assert bytes(driver.received) == keyboard
        assert bytes(printed) == output
        assert port.device.counters["overruns"] == port.device.counters["dropped"] == 0
    finally:
        port.close()
        close()
        irq.close()


def ends(kind: str) -> tuple[Backend, int, int, Callable[[], object]]:
    """A backend and the far ends to write to and to read from."""
    if kind == "socket":
        near, far = socket.socketpair()
        backend: Backend = Fds(near, near)
        near.close()
        return backend, far.fileno(), far.fileno(), far.close
    if kind == "pipe":
        guest_in, in_fd = os.pipe()
        out_fd, guest_out = os.pipe()
        backend = Fds(guest_in, guest_out)
        os.close(guest_in)
        os.close(guest_out)

        def close() -> None:
            os.close(in_fd)
            os.close(out_fd)

        return backend, in_fd, out_fd, close
    backend = Pty()
    assert backend.pty_path is not None
    fd = os.open(backend.pty_path, os.O_RDWR | os.O_NOCTTY)
    return backend, fd, fd, lambda: os.close(fd)


def test_the_line_rests_between_one_fifo_and_the_next() -> None:
    """A driver that reads until nothing is left comes to an end, and what it read is processed."""
    near, far = socket.socketpair()
    rests = 0
    with near, far, running(Fds(near, near)) as port:
        set_up(port.device, interrupts=RECEIVED | THRE)
        for round_ in range(20):
            far.send(bytes(range(40)))
            wait_until(lambda: port.device.pending_input == 24)
            time.sleep(0.01)  # a slow guest, for which the line rests long
            first = receive_all(port.device)
            rests += len(first) == 16
            assert first + hear(port, 40 - len(first)) == bytes(range(40)), round_
    assert rests > 0


def test_input_goes_on_after_its_end_at_the_guests_pace(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_bytes(random.Random(3).randbytes(10_000))
    with script.open("rb") as source, open("/dev/null", "wb") as sink:
        port = SerialPort(-1, Fds(source, sink))
    set_up(port.device)
    port.start()
    assert hear(port, 10_000) == script.read_bytes()
    port.close()


# -- ends and errors ---------------------------------------------------------------------


def test_stop_ends_loops_that_wait() -> None:
    a, b = os.pipe()
    device = Serial(-1)
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda: results.append(device.run_reader(a)), daemon=True),
        threading.Thread(target=lambda: results.append(device.run_writer(b)), daemon=True),
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    device.stop()
    for thread in threads:
        thread.join(5)
    os.close(a)
    os.close(b)
    assert results == [STOPPED, STOPPED]


def test_stop_ends_a_writer_that_nobody_reads_from() -> None:
    a, b = os.pipe()
    with running(Fds(b, b)) as port:
        port.device.write(DATA, 1, 0)
        say(port, bytes(RING))
        wait_until(lambda: port.device.pending_output <= RING - 16)
        before = time.monotonic()
    assert time.monotonic() - before < 3
    assert port.device.pending_output > 0
    os.close(a)
    os.close(b)


def test_stop_ends_a_reader_whose_guest_does_not_read() -> None:
    near, far = socket.socketpair()
    with near, far, running(Fds(near, near)) as port:
        far.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                far.send(bytes(4096))
        wait_until(lambda: port.device.pending_input == 16384)
        before = time.monotonic()
    assert time.monotonic() - before < 1


def test_end_of_input_leaves_output_alone() -> None:
    near, far = socket.socketpair()
    with near, far, running(Fds(near, near)) as port:
        far.send(b"last")
        far.shutdown(socket.SHUT_WR)
        assert hear(port, 4) == b"last"
        say(port, b"answer")
        assert receive(far.fileno(), 6) == b"answer"


def test_input_from_a_file_ends_with_it(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_bytes(b"ls\n")
    device = Serial(-1)
    with script.open("rb") as file:
        assert device.run_reader(file.fileno()) == ENDED
    assert receive_all(device) == b"ls\n"


def test_a_reader_that_went_away_is_reported_and_the_guest_goes_on() -> None:
    a, b = os.pipe()
    with running(Fds(os.open("/dev/null", os.O_RDONLY), b)) as port:
        os.close(a)
        wait_until(lambda: port.device.error is not None)
        say(port, bytes(2 * RING))
        error = port.device.error
        assert isinstance(error, OSError)
        assert error.errno == errno.EPIPE
        assert port.device.counters["write_errors"] == 1
        assert port.device.discard
    os.close(b)


def test_a_full_disk_is_reported_and_the_guest_goes_on() -> None:
    with open("/dev/full", "wb", buffering=0) as full, open("/dev/null", "rb") as null:
        device = Serial(-1)
        device.write(DATA, 1, 1)
        assert device.run_writer(full.fileno()) == FAILED
        assert device.error is not None
        assert device.error.errno == errno.ENOSPC
        assert device.flush(5.0) is False
        assert device.run_reader(null.fileno()) == ENDED


def test_flush_waits_for_a_slow_reader() -> None:
    a, b = os.pipe()
    text = bytes(i % 256 for i in range(RING))
    port = SerialPort(-1, Fds(a, b))
    threading.Thread(target=lambda: port.device.run_writer(port.backend.out_fd), daemon=True).start()
    say(port, text)
    assert port.device.flush(0.05) is False
    got = bytearray()

    def read_slowly() -> None:
        while len(got) < len(text):
            got.extend(os.read(a, 8192))
            time.sleep(0.01)

    reader = threading.Thread(target=read_slowly, daemon=True)
    reader.start()
    assert port.device.flush(10.0) is True
    reader.join(5)
    port.close()
    assert bytes(got) == text
    os.close(a)
    os.close(b)


def test_the_last_words_are_in_the_file_when_close_returns(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    with running(File(str(path))) as port:
        for _ in range(200):
            say(port, b"Kernel panic - not syncing: " + bytes(100) + b"\r\n")
    assert path.read_bytes() == (b"Kernel panic - not syncing: " + bytes(100) + b"\r\n") * 200
    assert path.stat().st_mode & 0o777 == 0o600


def test_null_takes_everything() -> None:
    with running(Null()) as port:
        say(port, bytes(RING * 2))
        assert port.device.pending_output == 0


def test_a_port_is_started_once_and_closed_often() -> None:
    port = SerialPort(-1, Null())
    port.start()
    port.close()
    port.close()
    with pytest.raises(RuntimeError):
        port.start()


# -- pty -------------------------------------------------------------------------------------


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
    with running(Pty()) as port:
        wait_until(lambda: not port.device.attached)
        say(port, log)  # more than the ring holds, and nobody makes the guest wait
        assert port.device.pending_output == RING
        with opened(port.backend.pty_path) as fd:
            assert receive(fd, RING) == log[-RING:]
            say(port, b"login: ")
            assert receive(fd, 7) == b"login: "
            os.write(fd, b"root\n")
            assert hear(port, 5) == b"root\n"


def test_a_pty_serves_one_opener_after_the_other() -> None:
    with running(Pty()) as port:
        for round_ in range(3):
            wait_until(lambda: not port.device.attached)
            text = b"round %d" % round_
            say(port, text)
            with opened(port.backend.pty_path) as fd:
                assert receive(fd, len(text)) == text
                os.write(fd, text)
                assert hear(port, len(text)) == text
            with opened(port.backend.pty_path) as fd:
                os.write(fd, b"left behind")  # written, then closed at once
            assert hear(port, 11) == b"left behind"


def test_a_pty_that_nobody_has_open_costs_nothing() -> None:
    with running(Pty()) as port:
        wait_until(lambda: not port.device.attached)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.05


# -- socket ------------------------------------------------------------------------------------


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    client.settimeout(5)
    return client


def test_clients_of_a_socket_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "serial"
    with running(Socket(str(path))) as port:
        say(port, b"booting...")
        for round_ in range(3):
            with connect(path) as client:
                assert receive(client.fileno(), 10) == b"booting..."
                client.sendall(b"hello %d" % round_)
                assert hear(port, 7) == b"hello %d" % round_
            wait_until(lambda: not port.device.attached)
            say(port, b"booting...")
    assert not path.exists()


def test_a_new_client_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "serial"
    with running(Socket(str(path))) as port, connect(path) as old:
        say(port, b"1")
        assert receive(old.fileno(), 1) == b"1"
        with connect(path) as new:
            assert old.recv(1) == b""
            say(port, b"2")
            assert receive(new.fileno(), 1) == b"2"
            new.sendall(b"x")
            assert hear(port, 1) == b"x"


def test_a_client_that_only_listens(tmp_path: Path) -> None:
    path = tmp_path / "serial"
    with running(Socket(str(path))) as port, connect(path) as client:
        client.sendall(b"cmd\n")
        client.shutdown(socket.SHUT_WR)
        assert hear(port, 4) == b"cmd\n"
        say(port, b"result")
        assert receive(client.fileno(), 6) == b"result"


def test_threads_and_descriptors_are_given_back() -> None:
    def count() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    with running(Pty()):
        pass
    before = count()
    for _ in range(20):
        with running(Pty()) as port:
            say(port, b"x")
        del port
    assert count() == before


def test_everything_at_once() -> None:
    """Two vCPUs with random accesses, the host's threads, resets, breaks, saving: it stays a serial port."""
    near, far = socket.socketpair()
    irq = Irq()
    port = SerialPort(irq.fd, Fds(near, near))
    device = port.device
    over = threading.Event()
    failures: list[BaseException] = []

    def access(seed: int) -> None:
        rng = random.Random(seed)
        while not over.is_set():
            if rng.random() < 0.5:
                device.write(rng.randrange(8), rng.choice((1, 2, 4)), rng.getrandbits(32))
            else:
                assert 0 <= device.read(rng.randrange(8), 1) <= 255

    def manage() -> None:
        while not over.is_set():
            device.send_break()
            device.load(device.save())
            device.set_irq_fd(irq.fd)
            device.reset()
            device.flush(0.001)
            irq.take()
            assert device.pending_output <= RING

    def talk() -> None:
        far.settimeout(0.1)
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                far.send(bytes(1000))
                far.recv(4096)

    def guarded(loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as failure:
            failures.append(failure)

    loops = [lambda: access(1), lambda: access(2), manage, talk]
    threads = [threading.Thread(target=guarded, args=(loop,), daemon=True) for loop in loops]
    port.start()
    for thread in threads:
        thread.start()
    time.sleep(0.7)
    over.set()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert failures == []
    device.reset()
    set_up(device)
    wait_until(lambda: device.read(LSR, 1) & LSR_THRE != 0)
    port.close()
    near.close()
    far.close()
    irq.close()
