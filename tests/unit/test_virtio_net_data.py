"""virtio-net: frames between rings and the wire."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chv.virtio._net import Receiver, Sender
from chv.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC
from chv.virtio.net import F_MRG_RXBUF
from tests.virtio_driver import WRITE

from .virtio_net_bench import HEADER, MAC, Bench, eventually, frame

RING_FEATURES = F_EVENT_IDX | F_INDIRECT_DESC
LONGEST = 65535 + 18
WRITEV = "20"  # the number of the system call on x86-64


def cut(data: bytes, lengths: list[int]) -> list[bytes]:
    """``data`` in pieces of these lengths, and the rest."""
    pieces = []
    for length in lengths:
        if len(data) > length:
            pieces.append(data[:length])
            data = data[length:]
    return [*pieces, data]


# -- from the guest ---------------------------------------------------------------------------


@pytest.mark.parametrize("features", [0, F_EVENT_IDX, F_INDIRECT_DESC, RING_FEATURES])
def test_frames_arrive_however_they_are_cut(features: int) -> None:
    sent = 0
    with Bench(size=64) as bench:
        bench.start(features)

        @given(st.integers(14, 5000), st.lists(st.integers(1, 600), max_size=30), st.booleans())
        @settings(max_examples=40)
        def check(length: int, lengths: list[int], indirect: bool) -> None:
            nonlocal sent
            sent += 1
            whole = struct.pack("<BBHHHHH", *[0] * 6, 0xABCD) + frame(length, seed=sent)
            indirect = indirect and bool(features & F_INDIRECT_DESC)
            head = bench.send(cut(whole, lengths), indirect=indirect)
            assert bench.far.recv(70000) == whole
            assert bench.tx.wait(1) == [(head, 0)]

        check()
        assert bench.device.counters()["tx_frames"] == sent


@pytest.mark.parametrize("mac", [None, MAC])
def test_a_frame_in_more_pieces_than_a_writev_takes(mac: bytes | None) -> None:
    with Bench(size=4096, filtered=mac is not None) as bench:
        bench.start(0)
        for count in (1023, 1024, 1025, 3000):
            whole = HEADER + frame(count + 1000, seed=count)
            bench.send(cut(whole, [1] * (count - 1)))
            assert bench.far.recv(70000) == whole
            bench.tx.wait(1)


@pytest.mark.parametrize("length", [14, 15, 1514, 65000, LONGEST])
def test_the_shortest_and_the_longest_frame(length: int) -> None:
    with Bench() as bench:
        bench.start(0)
        bench.send([HEADER, frame(length)])
        assert bench.far.recv(70000) == HEADER + frame(length)


def test_what_is_no_frame_is_dropped_and_given_back() -> None:
    with Bench() as bench:
        bench.start(0)
        bad = [
            bench.send([b"x"]),
            bench.send([HEADER]),
            bench.send([HEADER + frame(13)]),
            bench.send([HEADER, frame(LONGEST + 1)]),
            bench.tx.add([], [100]),
            bench.tx.add_buffers([(0, 8 << 20, 0)] * 4),
        ]
        good = bench.send([HEADER + frame(60)])
        assert bench.tx.wait(7) == [(head, 0) for head in [*bad, good]]
        assert bench.far.recv(70000) == HEADER + frame(60)
        assert bench.counters() == {"tx_frames": 1, "tx_bytes": 60, "tx_dropped": 6}


def test_writable_buffers_behind_a_frame_are_left_alone() -> None:
    with Bench() as bench:
        bench.start(0)
        head = bench.tx.add([HEADER + frame(60)], [100])
        bench.queues[1].kick()
        assert bench.far.recv(1000) == HEADER + frame(60)
        assert bench.tx.wait(1) == [(head, 0)]
        assert bench.tx.written(head) == bytes(100)


def test_a_full_wire_holds_frames_back_and_loses_none() -> None:
    with Bench(size=256) as bench:
        bench.wire.near[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # room for very few frames
        bench.start(0)
        for number in range(200):
            bench.tx.add([HEADER + frame(60, seed=number)])
        bench.queues[1].kick()
        eventually(lambda: bench.counters().get("tx_frames"))
        assert bench.device.counters()["tx_frames"] < 200
        came = [bench.far.recv(1000) for _ in range(200)]
        assert came == [HEADER + frame(60, seed=number) for number in range(200)]
        bench.tx.wait(200)
        assert bench.device.counters()["tx_frames"] == 200


def test_a_stop_while_the_wire_is_full_gives_the_frame_back() -> None:
    with Bench(size=256) as bench:
        bench.wire.near[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # room for very few frames
        bench.start(0)
        for number in range(200):
            bench.tx.add([HEADER + frame(60, seed=number)])
        bench.queues[1].kick()
        eventually(lambda: bench.counters().get("tx_frames"))
        bench.device.stop()
        sent = bench.device.counters()["tx_frames"]
        assert sent < 200
        assert bench.queues[1].save()["next_avail"] == len(bench.tx.used()) == sent
        bench.device.start(bench.queues, 0)
        came = [bench.far.recv(1000) for _ in range(200)]
        assert came == [HEADER + frame(60, seed=number) for number in range(200)]


def test_what_the_wire_refuses_is_counted_and_dropped() -> None:
    with Bench() as bench:
        bench.start(0)
        bench.far.close()
        head = bench.send([HEADER + frame(60)])
        assert bench.tx.wait(1) == [(head, 0)]
        assert bench.counters() == {"tx_errors": 1}


# -- filtering --------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[], [12], [12, 6], [12, 7], [1] * 40, [25], [26], [27]], ids=str)
def test_only_frames_from_the_guests_mac_leave(lengths: list[int]) -> None:
    with Bench(size=256, filtered=True) as bench:
        bench.start(0)
        others = [bytes.fromhex("02000000000b"), bytes.fromhex("12000000000a"), b"\xff" * 6, bytes(6)]
        for other in others:
            bench.send(cut(HEADER + frame(100, source=other), lengths))
        for length in (14, 100):
            bench.send(cut(HEADER + frame(length), lengths))
            assert bench.far.recv(1000) == HEADER + frame(length)
        bench.tx.wait(6)
        assert bench.counters() == {"tx_frames": 2, "tx_bytes": 114, "tx_spoofed": 4}


@pytest.mark.parametrize("lengths", [[], [20], [1] * 30], ids=str)
def test_a_mac_that_changes_after_it_was_looked_at(lengths: list[int]) -> None:
    """What leaves is what was checked: the write hangs in a full pipe while the guest changes its frame."""
    reader, writer = os.pipe()
    os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)))
    with Bench(size=64, filtered=True) as bench:
        bench.device._senders[0] = Sender(writer, MAC)
        bench.start(0, only=(1,))
        before = bench.tx.data
        bench.send(cut(HEADER + frame(60), lengths))
        call = Path(f"/proc/self/task/{bench.device._workers[0][0].native_id}/syscall")
        eventually(lambda: call.read_text().split()[0] == WRITEV)
        bench.memory.write(before, b"\xee" * 26 * 16)  # all pieces of the headers
        os.read(reader, fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ))
        bench.tx.wait(1)
        assert os.read(reader, 1000)[:26] == (HEADER + frame(60))[:26]
        bench.device.stop()
    os.close(reader)
    os.close(writer)


def test_without_a_mac_in_the_configuration_any_may_leave() -> None:
    with Bench() as bench:
        bench.start(0)
        other = frame(60, source=bytes.fromhex("02000000000b"))
        bench.send([HEADER + other])
        assert bench.far.recv(1000) == HEADER + other


# -- to the guest -----------------------------------------------------------------------------


@pytest.mark.parametrize("features", [0, F_EVENT_IDX, F_INDIRECT_DESC, RING_FEATURES])
def test_frames_are_spread_over_buffers(features: int) -> None:
    count = 0
    with Bench(size=64) as bench:
        bench.start(F_MRG_RXBUF | features)

        @given(st.integers(14, 5000), st.lists(st.integers(12, 400), min_size=1, max_size=8), st.booleans())
        @settings(max_examples=40)
        def check(length: int, pattern: list[int], indirect: bool) -> None:
            nonlocal count
            count += 1
            data = frame(length, seed=count)
            indirect = indirect and bool(features & F_INDIRECT_DESC)
            room, wanted = 0, list[int]()
            while room < length + 12:
                pieces = pattern[: max(1, len(wanted) % 4)] if len(wanted) < 40 else [6000]
                bench.rx.add(writable=pieces, indirect=indirect)
                wanted.append(min(sum(pieces), length + 12 - room))
                room += sum(pieces)
                if not indirect and len(bench.rx.free) < 9:
                    pattern = [6000]
            bench.queues[0].kick()
            bench.far.send(b"\1\2" + bytes(8) + b"\xee\xee" + data)
            back = bench.rx.wait(len(wanted))
            assert [length for _, length in back] == wanted
            whole = b"".join(bench.rx.written(head)[:length] for head, length in back)
            assert whole[:12] == b"\1\2" + bytes(8) + struct.pack("<H", len(wanted))
            assert whole[12:] == data

        check()
        assert bench.counters()["rx_frames"] == count
        assert "rx_dropped" not in bench.counters()


def test_a_stream_of_frames_arrives_in_order() -> None:
    """Buffers are taken ahead; sizes change between few and many bytes."""
    with Bench(size=256) as bench:
        bench.start(F_MRG_RXBUF)
        bench.offer(*[1536] * 256)
        sizes = [60, 60, 20000, 60, 1514, 9000, 65000] + [60] * 80 + [3000] * 20
        for number, size in enumerate(sizes):
            bench.far.send(HEADER + frame(size, seed=number))
            header, data = bench.receive()
            assert data == frame(size, seed=number)
            buffers = -(-(size + 12) // 1536)
            assert header[10:] == struct.pack("<H", buffers)
            bench.offer(*[1536] * buffers)
        assert bench.counters() == {"rx_frames": len(sizes), "rx_bytes": sum(sizes)}


def test_without_mergeable_buffers_a_frame_fits_into_one_chain_or_is_dropped() -> None:
    with Bench() as bench:
        bench.start(0)
        bench.rx.add(writable=[12, 1500])
        bench.rx.add(writable=[12, 1500])
        bench.queues[0].kick()
        bench.far.send(HEADER + frame(1501))
        bench.far.send(HEADER[:10] + b"\7\7" + frame(1500, seed=1))
        header, data = bench.receive()
        assert (header[10:], data) == (b"\1\0", frame(1500, seed=1))
        bench.far.send(HEADER + frame(60, seed=2))
        assert bench.receive()[1] == frame(60, seed=2)
        assert bench.counters() == {"rx_frames": 2, "rx_bytes": 1560, "rx_dropped": 1}


@pytest.mark.parametrize("features", [F_MRG_RXBUF, F_MRG_RXBUF | F_EVENT_IDX])
def test_frames_wait_for_buffers(features: int) -> None:
    with Bench() as bench:
        bench.start(features)
        for number in range(5):
            bench.far.send(HEADER + frame(100, seed=number))
        for number in range(5):
            eventually(lambda: bench.rx.avail_event() == bench.rx.avail_index or not features & F_EVENT_IDX)
            bench.offer(2000)
            assert bench.receive()[1] == frame(100, seed=number)


@pytest.mark.parametrize("features", [F_MRG_RXBUF, F_MRG_RXBUF | F_EVENT_IDX])
def test_a_frame_that_is_longer_than_the_buffers_waits_for_more(features: int) -> None:
    with Bench(size=8) as bench:
        bench.device._receivers[0] = Receiver(bench.wire.fds[0], 30_000)
        bench.start(features)
        bench.offer(100)
        bench.far.send(HEADER + frame(300))
        for _ in range(3):
            bench.offer(100)
        bench.far.send(HEADER + frame(300, seed=1))
        header, data = bench.receive()
        assert (header[10:], data) == (b"\4\0", frame(300))
        bench.offer(400)
        assert bench.receive()[1] == frame(300, seed=1)
        assert bench.counters() == {"rx_frames": 2, "rx_bytes": 600}


def test_a_frame_that_never_fits_is_dropped_and_its_buffers_serve_the_next() -> None:
    with Bench(size=8) as bench:
        bench.device._receivers[0] = Receiver(bench.wire.fds[0], 0)
        bench.start()
        heads = bench.offer(*[100] * 8)
        bench.far.send(HEADER + frame(1000))
        eventually(lambda: bench.counters().get("rx_dropped") == 1)
        bench.far.send(HEADER + frame(150, seed=1))
        assert bench.rx.wait(2) == [(heads[0], 100), (heads[1], 62)]


def test_a_stop_while_a_frame_waits_for_room() -> None:
    with Bench(size=8) as bench:
        bench.device._receivers[0] = Receiver(bench.wire.fds[0], 3_600_000)
        bench.start()
        bench.offer(100)
        bench.far.send(HEADER + frame(1000))
        eventually(lambda: bench.queues[0].chains)
        bench.device.stop()
        assert bench.queues[0].save()["next_avail"] == 0


def test_a_stop_gives_buffers_back_that_were_taken_ahead() -> None:
    with Bench() as bench:
        bench.start()
        heads = bench.offer(*[1536] * 16)
        eventually(lambda: bench.queues[0].chains >= 3)  # of 4 KiB
        bench.device.stop()
        assert bench.queues[0].save()["next_avail"] == 0
        bench.far.send(HEADER + frame(100))
        bench.device.start(bench.queues, F_MRG_RXBUF)
        assert bench.rx.wait(1) == [(heads[0], 112)]


def test_chains_without_room_for_a_header_are_given_back() -> None:
    with Bench() as bench:
        bench.start()
        small = [bench.rx.add(writable=[11]), bench.rx.add([b"readable"]), bench.rx.add(writable=[5, 6])]
        (good,) = bench.offer(2000)
        assert bench.rx.wait(3) == [(head, 0) for head in small]
        bench.far.send(HEADER + frame(60))
        assert bench.rx.wait(1) == [(good, 72)]
        assert bench.counters() == {"rx_dropped": 3, "rx_frames": 1, "rx_bytes": 60}


def test_what_is_no_frame_does_not_reach_the_guest() -> None:
    with Bench() as bench:
        bench.start()
        bench.offer(2000)
        for bad in (b"", b"x", HEADER, HEADER + frame(13)):
            bench.far.send(bad)
        bench.far.send(HEADER + frame(14))
        assert bench.receive()[1] == frame(14)
        assert bench.counters() == {"rx_dropped": 4, "rx_frames": 1, "rx_bytes": 14}


@pytest.mark.parametrize("count", [1000, 1023, 1024, 4000])
def test_a_chain_of_more_buffers_than_a_readv_takes(count: int) -> None:
    """As many as go are used."""
    with Bench(size=4096) as bench:
        bench.start(0)
        used = min(count, 1023)
        head = bench.rx.add(writable=[2] * count)
        (other,) = bench.offer(5000)
        bench.far.send(HEADER + frame(2 * used - 12))
        assert bench.rx.wait(1) == [(head, 2 * used)]
        assert bench.rx.written(head)[12:] == frame(2 * used - 12) + bytes(2 * (count - used))
        bench.far.send(HEADER + frame(60))
        assert bench.rx.wait(1) == [(other, 72)]


def test_chains_that_are_too_many_buffers_together() -> None:
    """A frame that needs both is dropped; each serves a frame of its own."""
    with Bench(size=4096) as bench:
        bench.start(F_MRG_RXBUF)
        heads = [bench.rx.add(writable=[2] * 600) for _ in range(2)]
        bench.queues[0].kick()
        bench.far.send(HEADER + frame(1500))
        eventually(lambda: bench.counters().get("rx_dropped") == 1)
        for head in heads:
            bench.far.send(HEADER + frame(1000))
            assert bench.rx.wait(1) == [(head, 1012)]


def test_buffers_that_are_huge() -> None:
    """All of RAM in each descriptor, 1 GiB in all; only what the frame needs is written."""
    with Bench(size=64) as bench:
        bench.start(F_MRG_RXBUF)
        base = bench.rx.data
        bench.rx.add_buffers([(base, 2 << 20, WRITE)] * 64)
        bench.queues[0].kick()
        bench.far.send(HEADER + frame(60))
        ((_, written),) = bench.rx.wait(1)
        assert written == 72
        assert bench.memory.read(base, 100) == HEADER[:10] + b"\1\0" + frame(60) + bytes(28)


def test_interrupts_come_with_frames_unless_they_are_not_wanted() -> None:
    with Bench() as bench:
        bench.start()
        bench.rx.want_interrupts(False)
        bench.offer(2000)
        bench.far.send(HEADER + frame(60))
        bench.receive()
        bench.offer(2000)
        bench.rx.want_interrupts(True)
        bench.far.send(HEADER + frame(60))
        bench.receive()
        eventually(lambda: bench.queues[0].interrupts == 1)
        assert bench.status.value == 1


def test_workers_sleep_when_there_is_nothing_to_do() -> None:
    """Neither a ring without buffers while frames wait, nor an idle wire, keeps a thread running."""
    with Bench() as bench:
        bench.start(F_MRG_RXBUF)
        bench.far.send(HEADER + frame(60))
        eventually(lambda: bench.rx.kick_wanted() and bench.tx.kick_wanted())
        assert bench.queues[0].chains == 0
        bench.offer(2000)
        assert bench.receive()[1] == frame(60)


def test_a_sender_wants_a_whole_mac() -> None:
    with pytest.raises(ValueError, match="6 bytes"):
        Sender(0, b"12345")
