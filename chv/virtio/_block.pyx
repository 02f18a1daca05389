"""The data path of virtio-blk: each queue's worker, without the GIL.

The worker takes chains, makes requests of them (_block_request.pxd), and has several in flight in io_uring
(_block_uring.pxd) or does one after another by plain system calls (_block_sync.pxd). With io_uring it waits
in one place for completions, the guest's kicks, and being told to stop.
"""
from libc.errno cimport errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from .._virtqueue cimport (Queue, chain, io_record, io_stats, iovec, monotonic_ns, virtqueue, vq_disable_kick,
                           vq_enable_kick, vq_gather, vq_pop, vq_push, vq_signal, vq_wait)
from ._block_request cimport (KEEP_SIZE, MAX_RANGE, MAX_RANGES, MAX_SEGMENTS, OP_RANGE, OP_READ, OP_SYNC, OP_WRITE,
                              PENDING, PUNCH_HOLE, RETRY, S_OK, SECTOR_SHIFT, SERIAL_SIZE, T_DISCARD, T_FLUSH,
                              T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, advance, chv_flag, chv_sectors, chv_set_flag,
                              chv_set_sectors, disk, parse, range_mode, request)
from ._block_sync cimport RWF_DSYNC, aligned, do_request, fallocate
from ._block_uring cimport (CHV_CQE_F_MORE, CHV_POLL_ADD_MULTI, IORING_FSYNC_DATASYNC, IORING_OP_FALLOCATE,
                            IORING_OP_FSYNC, IORING_OP_POLL_ADD, IORING_OP_READ, IORING_OP_READV, IORING_OP_WRITE,
                            IORING_OP_WRITEV, IORING_REGISTER_FILES, IOSQE_FIXED_FILE, chv_uring_register,
                            io_uring_cqe, io_uring_sqe, uring, uring_close, uring_enter, uring_open, uring_peek,
                            uring_prepare, uring_seen)

cdef extern from "<poll.h>" nogil:
    int POLLIN

cdef extern from *:
    """
    #include <fcntl.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    /* statx(2) with STATX_DIOALIGN (Linux 6.1), which headers may not have: two of the 256 bytes it fills. */
    static int chv_direct_align(int fd, uint32_t *memory, uint32_t *offset) {
        uint32_t filled[64] = { 0 };
        if (syscall(__NR_statx, fd, "", AT_EMPTY_PATH, 0x2000u, filled) || !(filled[0] & 0x2000u)) return 0;
        *memory = filled[38];
        *offset = filled[39];
        return 1;
    }
    """
    bint chv_direct_align(int fd, uint32_t *memory, uint32_t *offset) noexcept

cdef enum:
    MAX_IN_FLIGHT = 1024         # requests of one queue
    MAX_BYTES_IN_FLIGHT = 1 << 28  # more wait in the ring: stopping must not take long
    LATE = 50000                 # ns: with plain calls, what else is complete is looked at as often, and signalled
    SHORT_WRITE = 1 << 17        # bytes
    STALL = 1000000              # ns: a write to the page cache that takes so long has waited for something
    STALLED = 100000000          # ns: then the next ones may, too
    KICK = 0                     # user_data of the polls; requests have their address there
    WAKE = 1

SEGMENTS_MAX = MAX_SEGMENTS
"""The most buffers of a read or write that go to io_uring as they are."""
RANGES_MAX = MAX_RANGES
"""The most ranges of one discard or write-zeroes request."""
RANGE_MAX = MAX_RANGE
"""The most sectors of one of those ranges."""

cdef struct block_stats:
    io_stats reads
    io_stats writes
    io_stats flushes
    io_stats ranges              # discards and write-zeroes
    uint64_t errors

cdef struct worker:
    disk *d
    virtqueue *q
    block_stats *stats
    uring ring
    request *slots
    iovec *rooms
    uint8_t *buffer              # for direct I/O that is not aligned; made when first needed
    uint32_t room                # buffers that a slot has room for
    request *free_slots
    uint32_t in_flight
    uint64_t bytes_in_flight
    uint64_t now                 # when the present batch was taken
    uint64_t stalled_until
    bint ring_failed


# -- slots ---------------------------------------------------------------------------------


cdef bint worker_open(worker *w, uint32_t depth) noexcept nogil:
    """Make ``depth`` slots."""
    cdef uint32_t i
    w.room = max(<uint32_t>MAX_RANGES, min(<uint32_t>w.q.size, <uint32_t>MAX_SEGMENTS))
    w.slots = <request *>calloc(depth, sizeof(request))
    w.rooms = <iovec *>calloc(<size_t>depth * w.room, sizeof(iovec))
    if w.slots is NULL or w.rooms is NULL:
        return False
    for i in range(depth):
        w.slots[i].room = &w.rooms[i * w.room]
        w.slots[i].next = &w.slots[i + 1] if i + 1 < depth else NULL
    w.free_slots = w.slots
    return True


cdef void worker_close(worker *w) noexcept nogil:
    uring_close(&w.ring)
    free(w.slots)
    free(w.rooms)
    free(w.buffer)


cdef bint full(worker *w) noexcept nogil:
    return w.free_slots is NULL or w.bytes_in_flight >= MAX_BYTES_IN_FLIGHT


cdef bint ended(worker *w) noexcept nogil:
    """Whether nothing more is to be taken: told to stop, or the guest broke its ring, or the kernel ours."""
    return chv_flag(<int *>&w.q.stop) or w.q.error or w.ring_failed


# -- requests -------------------------------------------------------------------------------


cdef void finish(worker *w, request *r, int status, uint64_t now) noexcept nogil:
    """Give a request's chain back, and count it."""
    cdef uint64_t written = 0
    cdef io_stats *stats = NULL
    if r.status is not NULL:
        r.status[0] = <uint8_t>status
        written = 1
        if status == S_OK and (r.type == T_IN or r.type == T_GET_ID):
            written += r.bytes
    vq_push(w.q, r.head, <uint32_t>written)  # MAX_TRANSFER is less than 4 GiB
    if status != S_OK:
        w.stats.errors += 1
        return
    if r.type == T_IN:
        stats = &w.stats.reads
    elif r.type == T_OUT:
        stats = &w.stats.writes
    elif r.type == T_FLUSH:
        stats = &w.stats.flushes
    elif r.type == T_DISCARD or r.type == T_WRITE_ZEROES:
        stats = &w.stats.ranges
    if stats is not NULL:
        io_record(stats, r.bytes, now - r.started)


cdef bint must_wait(worker *w, request *r) noexcept nogil:
    """Whether io_uring cannot do it: the worker does it itself, and everything else waits."""
    if r.op == OP_RANGE:
        return (w.d.device and r.type == T_DISCARD) or not chv_flag(&w.d.zero_range)
    if r.op == OP_SYNC:
        return False
    return r.count > w.room or (w.d.direct and not aligned(w.d, r))


cdef bint is_quick(worker *w, request *r) noexcept nogil:
    """Whether it is a short write into the page cache. Most file systems let io_uring do those in threads of
    the kernel's only, which costs more than the write. While writes have to wait it is right all the same."""
    return (r.op == OP_WRITE and not r.durable and not w.d.direct and r.left <= SHORT_WRITE
            and w.now >= w.stalled_until)


cdef void do_now(worker *w, request *r) noexcept nogil:
    """Do a request by plain calls, but let what was prepared begin before."""
    cdef uint64_t begin = monotonic_ns(), end
    cdef int status
    if w.ring.fd >= 0 and w.ring.prepared != w.ring.sq_tail[0]:
        uring_enter(&w.ring, False)
    status = do_request(w.d, r, &w.buffer)
    end = monotonic_ns()
    if end - begin > STALL:
        w.stalled_until = end + STALLED
    finish(w, r, status, end)


cdef bint start(worker *w, chain *c) noexcept nogil:
    """Begin with a chain: in io_uring if it is open and can do it, else at once and to the end (True)."""
    cdef request *r = w.free_slots
    cdef int status = parse(w.d, c, r)
    r.started = w.now
    if status != PENDING:
        finish(w, r, status, w.now)
        return False
    if w.ring.fd >= 0 and not must_wait(w, r) and not is_quick(w, r):
        if r.op == OP_READ or r.op == OP_WRITE:  # the next chain needs the queue's own array
            memcpy(r.room, r.iov, r.count * sizeof(iovec))
            r.iov = r.room
        w.free_slots = r.next
        w.in_flight += 1
        w.bytes_in_flight += r.bytes
        submit(w, r)
        return False
    do_now(w, r)
    return True


# -- with io_uring ------------------------------------------------------------------------------


cdef void submit(worker *w, request *r) noexcept nogil:
    """Prepare the next piece of a request."""
    cdef io_uring_sqe *sqe = uring_prepare(&w.ring)
    sqe.fd = 0  # the first registered file
    sqe.flags = IOSQE_FIXED_FILE
    sqe.user_data = <uint64_t><size_t>r
    sqe.off = r.offset
    if r.op == OP_SYNC:
        sqe.opcode = IORING_OP_FSYNC
        sqe.fsync_flags = IORING_FSYNC_DATASYNC
        sqe.off = 0
        return
    if r.op == OP_RANGE:
        sqe.opcode = IORING_OP_FALLOCATE
        sqe.off = r.ranges[0].sector << SECTOR_SHIFT
        sqe.addr = <uint64_t>r.ranges[0].sectors << SECTOR_SHIFT
        sqe.len = range_mode(w.d, r)
        return
    if r.op == OP_WRITE and r.durable:
        sqe.rw_flags = RWF_DSYNC
    if r.count == 1:
        sqe.opcode = IORING_OP_READ if r.op == OP_READ else IORING_OP_WRITE
        sqe.addr = <uint64_t><size_t>r.iov[0].iov_base
        sqe.len = <uint32_t>r.iov[0].iov_len
    else:
        sqe.opcode = IORING_OP_READV if r.op == OP_READ else IORING_OP_WRITEV
        sqe.addr = <uint64_t><size_t>r.iov
        sqe.len = r.count


cdef void watch(worker *w, uint64_t what) noexcept nogil:
    """Let each write to the queue's eventfd be a completion. Their counts are never read: a poll with MULTI
    tells of each write (and of what was there before), whatever the count is."""
    cdef io_uring_sqe *sqe = uring_prepare(&w.ring)
    sqe.opcode = IORING_OP_POLL_ADD
    sqe.fd = w.q.kick_fd if what == KICK else w.q.wake_fd
    sqe.poll32_events = POLLIN
    sqe.len = CHV_POLL_ADD_MULTI
    sqe.user_data = what


cdef void complete(worker *w, request *r, int64_t result, uint64_t now) noexcept nogil:
    cdef int status = advance(w.d, r, result)
    if status == PENDING:
        submit(w, r)
        return
    if status == RETRY:
        status = do_request(w.d, r, &w.buffer)
    w.in_flight -= 1
    w.bytes_in_flight -= r.bytes
    finish(w, r, status, now)
    r.next = w.free_slots
    w.free_slots = r


cdef void reap(worker *w) noexcept nogil:
    """Take what is complete."""
    cdef io_uring_cqe *cqe = uring_peek(&w.ring)
    cdef uint64_t now, what
    cdef int32_t result
    cdef uint32_t flags
    if cqe is NULL:
        return
    now = monotonic_ns()
    while cqe is not NULL:
        what, result, flags = cqe.user_data, cqe.res, cqe.flags
        uring_seen(&w.ring)
        if what > WAKE:
            complete(w, <request *><size_t>what, result, now)
        elif result < 0:
            w.ring_failed = True
        elif not flags & CHV_CQE_F_MORE:
            watch(w, what)
        cqe = uring_peek(&w.ring)


cdef bint take(worker *w) noexcept nogil:
    """Start what is in the ring. True: it stopped on the way, there may be more."""
    cdef chain c
    cdef uint32_t i
    if full(w):
        return False
    vq_disable_kick(w.q)
    w.now = monotonic_ns()
    for i in range(w.q.size):
        if full(w) or vq_pop(w.q, &c) <= 0:
            return False
        if start(w, &c) and monotonic_ns() - w.now > LATE:
            break
    return True


cdef void serve_ring(worker *w) noexcept nogil:
    """Until told to stop, and then until nothing is in flight."""
    cdef bint more, busy = False  # busy: something was taken since notifications were asked for
    cdef uint16_t before
    watch(w, KICK)
    watch(w, WAKE)
    while True:
        reap(w)
        more = False
        before = w.q.next_avail
        if not ended(w):
            more = take(w)
            busy = busy or w.q.next_avail != before
        vq_signal(w.q)
        if ended(w):
            if w.in_flight == 0:
                return
        elif not more and not full(w):
            if busy:
                if w.ring.prepared != w.ring.sq_tail[0]:
                    uring_enter(&w.ring, False)
                more = vq_gather(w.q)
            if not more:
                more = vq_enable_kick(w.q)
                busy = False
        uring_enter(&w.ring, not more)


cdef bint open_ring(worker *w, uint32_t depth) noexcept nogil:
    # Each slot has at most one submission waiting; the polls have one each.
    if uring_open(&w.ring, 2 * depth):
        return False
    if chv_uring_register(w.ring.fd, IORING_REGISTER_FILES, &w.d.fd, 1):
        uring_close(&w.ring)
        return False
    return True


# -- by plain system calls -----------------------------------------------------------------------


cdef void serve_plainly(worker *w) noexcept nogil:
    cdef chain c
    cdef uint64_t told = 0
    while not ended(w):
        vq_disable_kick(w.q)
        w.now = monotonic_ns()
        while vq_pop(w.q, &c) > 0:
            start(w, &c)
            w.now = monotonic_ns()
            if w.now - told > LATE:
                vq_signal(w.q)
                told = w.now
        vq_signal(w.q)
        if not vq_gather(w.q) and not vq_enable_kick(w.q) and not ended(w):
            vq_wait(w.q, -1, 0, -1)


# -- for Python --------------------------------------------------------------------------------------


def direct_alignment(fd: int):
    """(memory, offset) in bytes that direct I/O on ``fd`` must be aligned to; None if the kernel does not say.

    Zeros: the file cannot do direct I/O (statx(2), STATX_DIOALIGN).
    """
    cdef uint32_t memory = 0, offset = 0
    if not chv_direct_align(fd, &memory, &offset):
        return None
    return memory, offset


def punch_hole(fd: int, offset: int, length: int) -> int:
    """Make a hole in a file, which keeps its size (fallocate(2)); an errno, or 0."""
    cdef int file = fd
    cdef int64_t start = offset, size = length
    cdef int result
    with nogil:
        result = fallocate(file, PUNCH_HOLE | KEEP_SIZE, start, size)
    return errno if result else 0


def io_uring_error() -> int:
    """Why io_uring cannot be used here, an errno; 0: it can."""
    cdef uring ring
    cdef int error = uring_open(&ring, 8)
    if error == 0:
        uring_close(&ring)
    return error


cdef class BlockDisk:
    """What all queues of a disk share. The descriptors stay the caller's.

    ``memory_align`` and ``offset_align`` are those of direct I/O, powers of two in bytes. With an offset_align
    above 512, ``plain_fd`` is the same file opened without O_DIRECT.
    """

    cdef disk d

    def __cinit__(self, fd: int, sectors: int, *, plain_fd: int = -1, readonly: bool = False, device: bool = False,
                  memory_align: int = 0, offset_align: int = 0, discard: bool = False, zeroes: bool = False,
                  unmap: bool = False, serial: bytes = b""):
        if len(serial) > SERIAL_SIZE:
            raise ValueError(f"serial: {len(serial)} bytes are more than {SERIAL_SIZE}")
        self.d.fd = fd
        self.d.plain_fd = plain_fd
        self.d.sectors = sectors
        self.d.readonly = readonly
        self.d.device = device
        self.d.direct = memory_align > 0
        self.d.memory_align = memory_align
        self.d.offset_align = offset_align
        self.d.discard = discard
        self.d.zeroes = zeroes
        self.d.unmap = unmap
        self.d.zero_range = True
        memcpy(self.d.serial, <const char *>serial, len(serial))

    @property
    def sectors(self) -> int:
        """The capacity, in sectors of 512 bytes. Requests behind it fail; set it when the disk changes size."""
        return chv_sectors(&self.d.sectors)

    @sectors.setter
    def sectors(self, value: int) -> None:
        chv_set_sectors(&self.d.sectors, value)

    @property
    def writethrough(self) -> bool:
        """Whether a write is complete only when it is on stable storage."""
        return chv_flag(&self.d.writethrough)

    @writethrough.setter
    def writethrough(self, value: bool) -> None:
        chv_set_flag(&self.d.writethrough, value)


cdef class BlockQueue:
    """One queue's worker and its statistics, which add up over all its runs."""

    cdef BlockDisk disk
    cdef block_stats stats
    cdef str _engine

    def __cinit__(self, BlockDisk disk):
        self.disk = disk
        self._engine = ""

    @property
    def engine(self) -> str:
        """What the last run used: "io_uring" or "sync"; "" before the first."""
        return self._engine

    @property
    def errors(self) -> int:
        """Requests that failed, or could not be answered."""
        return self.stats.errors

    def serve(self, Queue queue, io_uring: bool = True) -> None:
        """Serve ``queue`` until it is told to stop, and what was taken from it is complete.

        Without io_uring, or when the kernel has none to give, by plain system calls.
        """
        cdef worker w
        cdef uint32_t depth = max(1, min(<uint32_t>queue.q.size, <uint32_t>MAX_IN_FLIGHT))
        cdef bint use_ring = io_uring, opened
        memset(&w, 0, sizeof(worker))
        w.ring.fd = -1
        w.q = &queue.q
        w.d = &self.disk.d
        w.stats = &self.stats
        with nogil:
            opened = worker_open(&w, depth)
            use_ring = opened and use_ring and open_ring(&w, depth)
        self._engine = "io_uring" if use_ring else "sync"
        with nogil:
            if use_ring:
                serve_ring(&w)
                uring_close(&w.ring)
                w.ring_failed = False
            if opened:
                serve_plainly(&w)
            worker_close(&w)
        if not opened:
            raise MemoryError

    def statistics(self) -> dict:
        """Of reads, writes, flushes and ranges (discards and write-zeroes): operations, bytes, and latency_sum,
        latency_min and latency_max in nanoseconds, 0 while there is none.
        """
        return {
            "reads": _plain(&self.stats.reads),
            "writes": _plain(&self.stats.writes),
            "flushes": _plain(&self.stats.flushes),
            "ranges": _plain(&self.stats.ranges),
        }


cdef dict _plain(io_stats *s):
    return {
        "operations": s.operations,
        "bytes": s.bytes,
        "latency_sum": s.latency_sum,
        "latency_min": s.latency_min if s.operations else 0,
        "latency_max": s.latency_max,
    }
