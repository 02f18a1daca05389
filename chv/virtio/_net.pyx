"""The data path of virtio-net: frames between a tap and the guest's buffers, without a copy and without the GIL.

A frame is a virtio_net_hdr and what is on the wire (virtio 1.2, 5.1.6). The tap speaks the same header
(TUNSETVNETHDRSZ 12), so readv and writev move both; the kernel checks what the header says of the frame
and refuses what does not fit.
"""
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memmove

from .._virtqueue cimport *

cdef extern from "<sys/uio.h>" nogil:
    ssize_t readv(int fd, const iovec *iov, int count)
    ssize_t writev(int fd, const iovec *iov, int count)

cdef extern from "<poll.h>" nogil:
    enum:
        POLLIN
        POLLOUT

cdef enum:
    USUAL = 4096         # room to keep ready for a frame while none was larger
    REMEMBER = 64        # frames for which the room is that of the largest, after one larger than USUAL
    BATCH = 16           # frames after which the guest is interrupted although there is more to do
    RETRY_MS = 1000      # between reads of a tap that fails: its interface is gone
    SPURIOUS_MS = 10     # a tap that says it is ready, and has nothing

# What rx_fill found.
cdef enum:
    BROKEN = -1
    EMPTY = 0            # the ring has no more
    FULL = 1             # there is room enough, or no more can be used at once


# -- to the guest -----------------------------------------------------------------------------

cdef int rx_fill(virtqueue *q, receiver *s, uint64_t want) noexcept nogil:
    """Take chains until a frame of ``want`` bytes, header included, has room."""
    cdef chain c
    cdef iovec *buffers
    cdef uint32_t count, i
    cdef uint64_t size
    cdef int got
    while s.capacity < want and (s.mergeable or s.chains == 0):
        if s.buffers == MAX_BUFFERS:
            return FULL
        got = vq_pop(q, &c)
        if got <= 0:
            return EMPTY if got == 0 else BROKEN
        count = c.writable
        if count > MAX_BUFFERS - s.buffers:
            if s.chains > 0:
                vq_undo_pop(q)
                return FULL
            count = MAX_BUFFERS  # what is behind stays as it is
        buffers = c.iov + c.readable
        size = 0
        for i in range(count):
            size += buffers[i].iov_len
        if size < HEADER:  # no use for anything
            s.dropped += 1
            vq_push(q, c.head, 0)
            continue
        memcpy(&s.iov[s.buffers], buffers, count * sizeof(iovec))
        s.heads[s.chains] = c.head
        s.counts[s.chains] = count
        s.sizes[s.chains] = size
        s.chains += 1
        s.buffers += count
        s.capacity += size
    return FULL


cdef int rx_make_room(virtqueue *q, receiver *s, uint64_t want) noexcept nogil:
    """A frame was longer than the chains. 1: now it is not; 0: it does not fit; -1: stop."""
    cdef uint64_t now = monotonic_ns()
    cdef uint64_t deadline = now + <uint64_t>s.patience_ms * 1000000
    cdef int found, bits
    while True:
        found = rx_fill(q, s, want)
        if found == BROKEN:
            return -1
        if s.capacity >= want:
            return 1
        now = monotonic_ns()
        if found == FULL or now >= deadline:
            return 0
        vq_signal(q)
        if not vq_enable_kick(q):
            bits = vq_wait(q, -1, 0, <int>((deadline - now) // 1000000) + 1)
            if bits & VQ_STOPPED:
                return -1
        vq_disable_kick(q)


cdef void push_all(virtqueue *q, const uint16_t *heads, const uint32_t *lengths, uint32_t count) noexcept nogil:
    """Complete chains so that the guest sees all of them or none: a frame's buffers belong together.

    All but the last go into used ring entries (virtio 1.2, 2.7.8) that the ring's index does not cover yet.
    A batch of frames is shorter than 65536 entries, so vq_push sees when the indexes have gone around.
    """
    cdef uint32_t *entry
    cdef uint32_t i
    for i in range(count - 1):
        entry = <uint32_t *>(q.used + 4 + 8 * (<uint16_t>(q.next_used + i) & (q.size - 1)))
        entry[0] = heads[i]
        entry[1] = lengths[i]
    q.next_used += <uint16_t>(count - 1)
    vq_push(q, heads[count - 1], lengths[count - 1])


cdef uint64_t chains_size(const receiver *s, uint32_t count) noexcept nogil:
    cdef uint64_t size = 0
    cdef uint32_t i
    for i in range(count):
        size += s.sizes[i]
    return size


cdef void rx_deliver(virtqueue *q, receiver *s, uint64_t length) noexcept nogil:
    """Hand the first chains over, which hold a frame of ``length`` bytes with its header."""
    cdef uint64_t left = length
    cdef uint32_t used = 0, buffers = 0, i
    cdef uint16_t number
    while left > 0:
        s.lengths[used] = <uint32_t>min(left, s.sizes[used])
        left -= s.lengths[used]
        buffers += s.counts[used]
        used += 1
    number = <uint16_t>used
    iov_copy_in(s.iov, s.counts[0], HEADER - 2, &number, 2)  # num_buffers
    push_all(q, s.heads, s.lengths, used)
    s.capacity -= chains_size(s, used)
    s.chains -= used
    s.buffers -= buffers
    memmove(s.heads, &s.heads[used], s.chains * sizeof(uint16_t))
    memmove(s.counts, &s.counts[used], s.chains * sizeof(uint32_t))
    memmove(s.sizes, &s.sizes[used], s.chains * sizeof(uint64_t))
    memmove(s.iov, &s.iov[buffers], s.buffers * sizeof(iovec))
    s.frames += 1
    s.bytes += length - HEADER


cdef int rx_frame(virtqueue *q, receiver *s, uint64_t length) noexcept nogil:
    """Bring to the guest what was read into the chains, and behind them into the spill. -1: stop."""
    cdef uint64_t had = s.capacity
    cdef int room
    if length < HEADER + ETHERNET:
        s.dropped += 1
        return 0
    if length > had:
        room = 0
        if s.mergeable and length <= had + MAX_BYTES:
            room = rx_make_room(q, s, length)
        if room <= 0:
            s.dropped += 1
            return room
        iov_copy_in(s.iov, s.buffers, had, s.spill, length - had)
    rx_deliver(q, s, length)
    return 1


cdef void rx_loop(virtqueue *q, receiver *s) noexcept nogil:
    cdef uint32_t unsignalled = 0, large = 0, i
    cdef int bits = 0, found
    cdef ssize_t length
    s.chains = s.buffers = 0
    s.capacity = 0
    while not q.stop:
        if rx_fill(q, s, MAX_BYTES if large else USUAL) == BROKEN:
            return
        if s.chains == 0:
            vq_signal(q)
            unsignalled = 0
            if not vq_enable_kick(q):
                bits = vq_wait(q, -1, 0, -1)
            vq_disable_kick(q)
            bits = 0
            continue
        s.iov[s.buffers].iov_base = s.spill
        s.iov[s.buffers].iov_len = MAX_BYTES
        length = readv(s.fd, s.iov, s.buffers + 1)
        if length >= 0:
            bits = 0
            large = REMEMBER if length > USUAL else large - (large > 0)
            found = rx_frame(q, s, length)
            if found < 0:
                break
            unsignalled += found
            if unsignalled >= BATCH:
                vq_signal(q)
                unsignalled = 0
            continue
        if errno == EINTR:
            continue
        if errno != EAGAIN:
            s.errors += 1
        found = errno
        vq_signal(q)
        unsignalled = 0
        if found != EAGAIN:
            bits = vq_wait(q, -1, 0, RETRY_MS) & ~VQ_OTHER
        elif bits & VQ_OTHER:
            bits = vq_wait(q, -1, 0, SPURIOUS_MS) & ~VQ_OTHER
        else:
            bits = vq_wait(q, s.fd, POLLIN, -1)
    if q.error == VQ_OK:
        for i in range(s.chains):
            vq_undo_pop(q)
    s.chains = 0
    vq_signal(q)


# -- from the guest ---------------------------------------------------------------------------

cdef uint32_t tx_vector(sender *s, const chain *c) noexcept nogil:
    """Put a frame's pieces into s.iov, its first bytes replaced by the copy in s.headers; how many."""
    cdef uint64_t skip = HEADER + ETHERNET
    cdef uint32_t i, count = 1
    s.iov[0].iov_base = s.headers
    s.iov[0].iov_len = HEADER + ETHERNET
    for i in range(c.readable):
        if skip >= c.iov[i].iov_len:
            skip -= c.iov[i].iov_len
            continue
        if count > MAX_BUFFERS:
            memcpy(s.bounce, s.headers, HEADER + ETHERNET)
            s.iov[0].iov_base = s.bounce
            s.iov[0].iov_len = HEADER + ETHERNET + iov_copy_out(
                c.iov, c.readable, HEADER + ETHERNET, s.bounce + HEADER + ETHERNET,
                c.readable_bytes - HEADER - ETHERNET)
            return 1
        s.iov[count].iov_base = <uint8_t *>c.iov[i].iov_base + skip
        s.iov[count].iov_len = c.iov[i].iov_len - skip
        skip = 0
        count += 1
    return count


cdef bint tx_frame(sender *s, const chain *c) noexcept nogil:
    """Send a chain, or drop it; False: the tap has no room for it now."""
    cdef const iovec *iov = c.iov
    cdef uint32_t count = c.readable
    cdef ssize_t sent
    if c.readable_bytes < HEADER + ETHERNET or c.readable_bytes > MAX_BYTES:
        s.dropped += 1
        return True
    if s.filter or count > MAX_BUFFERS:
        # The guest may write to its buffers at any time: what is sent is the copy that is looked at.
        iov_copy_out(c.iov, c.readable, 0, s.headers, HEADER + ETHERNET)
        if s.filter and memcmp(&s.headers[HEADER + 6], s.mac, 6) != 0:
            s.spoofed += 1
            return True
        count = tx_vector(s, c)
        iov = s.iov
    while True:
        sent = writev(s.fd, iov, count)
        if sent >= 0:
            s.frames += 1
            s.bytes += c.readable_bytes - HEADER
            return True
        if errno == EAGAIN:
            return False
        if errno != EINTR:
            s.errors += 1
            return True


cdef void tx_loop(virtqueue *q, sender *s) noexcept nogil:
    cdef chain c
    cdef uint32_t unsignalled = 0
    cdef int got
    cdef bint busy = False  # something was sent since notifications were asked for
    while not q.stop:
        got = vq_pop(q, &c)
        if got < 0:
            return
        if got == 0:
            vq_signal(q)
            unsignalled = 0
            if busy and vq_gather(q):
                continue
            busy = False
            if not vq_enable_kick(q):
                vq_wait(q, -1, 0, -1)
            vq_disable_kick(q)
            continue
        busy = True
        if tx_frame(s, &c):
            vq_push(q, c.head, 0)
            unsignalled += 1
            if unsignalled >= BATCH:
                vq_signal(q)
                unsignalled = 0
        else:
            vq_undo_pop(q)
            vq_signal(q)
            unsignalled = 0
            vq_wait(q, s.fd, POLLOUT, -1)
    vq_signal(q)


# -- their Python side ------------------------------------------------------------------------

cdef class Receiver:
    """From the descriptor ``fd``, a tap's, to a receive queue. Counts as long as it lives.

    A frame that is longer than the buffers that the guest has given waits ``patience_ms`` for more.
    """

    def __cinit__(self, int fd, int patience_ms=100):
        self.state = <receiver *>calloc(1, sizeof(receiver))
        if self.state is NULL:
            raise MemoryError
        self.state.fd = fd
        self.state.patience_ms = max(patience_ms, 0)

    def __dealloc__(self):
        free(self.state)

    def run(self, Queue queue, bint mergeable) -> None:
        """Bring frames until the queue is stopped or breaks; ``mergeable``: MRG_RXBUF was negotiated."""
        self.state.mergeable = mergeable
        with nogil:
            rx_loop(&queue.q, self.state)

    @property
    def frames(self) -> int:
        return self.state.frames

    @property
    def total_bytes(self) -> int:
        """Of the frames, without their virtio_net_hdr."""
        return self.state.bytes

    @property
    def dropped(self) -> int:
        """Frames that the guest gave no room for, and chains that have none for a header."""
        return self.state.dropped

    @property
    def errors(self) -> int:
        """Reads of the tap that failed."""
        return self.state.errors


cdef class Sender:
    """From a transmit queue to ``fd``; with a ``mac`` only frames that come from it.

    Counts as long as it lives.
    """

    def __cinit__(self, int fd, bytes mac=None):
        if mac is not None and len(mac) != 6:
            raise ValueError("a MAC address has 6 bytes")
        self.state = <sender *>calloc(1, sizeof(sender))
        if self.state is NULL:
            raise MemoryError
        self.state.fd = fd
        if mac is not None:
            self.state.filter = True
            memcpy(self.state.mac, <const uint8_t *>mac, 6)

    def __dealloc__(self):
        free(self.state)

    def run(self, Queue queue) -> None:
        """Send frames until the queue is stopped or breaks."""
        with nogil:
            tx_loop(&queue.q, self.state)

    @property
    def frames(self) -> int:
        return self.state.frames

    @property
    def total_bytes(self) -> int:
        """Of the frames, without their virtio_net_hdr."""
        return self.state.bytes

    @property
    def dropped(self) -> int:
        """Frames that are too short or too long."""
        return self.state.dropped

    @property
    def spoofed(self) -> int:
        """Frames from another MAC address than the guest's."""
        return self.state.spoofed

    @property
    def errors(self) -> int:
        """Frames that the tap refused: its link is down, or their header does not fit them."""
        return self.state.errors
