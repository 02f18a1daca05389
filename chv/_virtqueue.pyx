"""Split virtqueues (virtio 1.2, 2.7): the ring without the GIL, and the queue API of devices written in Python.

A worker in C serves its queue like this::

    while not q.stop:
        vq_disable_kick(q)
        while vq_pop(q, &c) > 0:
            ...                          # vq_push(q, c.head, written); vq_signal(q) now and then
        vq_signal(q)
        if vq_enable_kick(q):
            continue                     # something came between the last vq_pop and asking for kicks
        vq_wait(q, -1, 0, -1)

It looks at the ring before it waits: after a resume, chains may lie there whose kick came long ago.
Once the queue is told to stop, vq_pop finds nothing more, however fast the guest adds chains.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close

import math
import os

from .errors import DeviceError

from ._irq cimport IrqSource, irq_raise

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *, unsigned long, int)
    short POLLIN

cdef extern from *:
    """
    #include <errno.h>
    #include <stdint.h>
    #include <sys/eventfd.h>
    #include <time.h>
    #include <unistd.h>
    /* What the guest may change at any time is read once, by a volatile access. A table of indirect
       descriptors may lie at any address, hence the packed types. */
    typedef struct { uint16_t value; } __attribute__((packed, may_alias)) chv_u16;
    typedef struct { uint32_t value; } __attribute__((packed, may_alias)) chv_u32;
    typedef struct { uint64_t value; } __attribute__((packed, may_alias)) chv_u64;
    #define chv_get16(p) (((const volatile chv_u16 *)(p))->value)
    #define chv_get32(p) (((const volatile chv_u32 *)(p))->value)
    #define chv_get64(p) (((const volatile chv_u64 *)(p))->value)
    #define chv_put16(p, v) (((volatile chv_u16 *)(p))->value = (v))
    #define chv_put32(p, v) (((volatile chv_u32 *)(p))->value = (v))
    /* The indexes and flags of the rings are aligned: enable() has seen to that. */
    #define chv_acquire16(p) __atomic_load_n((const uint16_t *)(p), __ATOMIC_ACQUIRE)
    #define chv_release16(p, v) __atomic_store_n((uint16_t *)(p), (v), __ATOMIC_RELEASE)
    #define chv_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    #define chv_flag(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define chv_set_flag(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    static void chv_event_add(int fd) {
        uint64_t one = 1;
        while (fd >= 0 && write(fd, &one, sizeof one) < 0 && errno == EINTR) {}
    }
    static void chv_event_clear(int fd) {
        uint64_t count;
        while (fd >= 0 && read(fd, &count, sizeof count) < 0 && errno == EINTR) {}
    }
    static uint64_t chv_clock(clockid_t clock) {
        struct timespec now;
        clock_gettime(clock, &now);
        return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    }
    static uint64_t chv_now(void) { return chv_clock(CLOCK_MONOTONIC); }
    static uint64_t chv_thread_time(void) { return chv_clock(CLOCK_THREAD_CPUTIME_ID); }
    """
    uint16_t chv_get16(const uint8_t *p) nogil
    uint32_t chv_get32(const uint8_t *p) nogil
    uint64_t chv_get64(const uint8_t *p) nogil
    void chv_put16(uint8_t *p, uint16_t v) nogil
    void chv_put32(uint8_t *p, uint32_t v) nogil
    uint16_t chv_acquire16(const uint8_t *p) nogil
    void chv_release16(uint8_t *p, uint16_t v) nogil
    void chv_fence() nogil
    int chv_flag(const int *p) nogil
    void chv_set_flag(int *p, int v) nogil
    void chv_event_add(int fd) nogil
    void chv_event_clear(int fd) nogil
    uint64_t chv_now() nogil
    uint64_t chv_thread_time() nogil
    int eventfd(unsigned int count, int flags)
    int EFD_CLOEXEC
    int EFD_NONBLOCK

KICKED = VQ_KICKED
STOPPED = VQ_STOPPED
OTHER = VQ_OTHER

# Of descriptors and rings (virtio 1.2, 2.7.5, 2.7.6, 2.7.8).
cdef enum:
    LONGEST_PATIENCE = 63
    WORTH = 16
    DESC_NEXT = 1
    DESC_WRITE = 2
    DESC_INDIRECT = 4
    DESC_SIZE = 16
    AVAIL_NO_INTERRUPT = 1
    USED_NO_NOTIFY = 1
    MAX_SIZE = 32768
    RING_FLAGS = 0
    RING_INDEX = 2
    RING_ENTRIES = 4

_WORDS = {
    VQ_BAD_INDEX: "the available index is further ahead than the queue is long",
    VQ_BAD_HEAD: "a descriptor's index is beyond its table",
    VQ_LOOP: "a descriptor chain is longer than the queue",
    VQ_BAD_ADDRESS: "a buffer or a table of descriptors is not in RAM",
    VQ_BAD_INDIRECT: "an indirect descriptor is nested, of a bad length, chained on, or was not negotiated",
    VQ_BAD_ORDER: "a readable buffer follows a writable one",
    VQ_BAD_RING: "a part of the ring is misaligned or not in RAM",
}

# -- guest RAM -----------------------------------------------------------------------


cdef uint8_t *ram_find(const ram_map *ram, uint64_t address, uint64_t length) noexcept nogil:
    cdef uint32_t i
    cdef uint64_t offset
    for i in range(ram.count):
        offset = address - ram.regions[i].base  # wraps around below the base: then it is no offset
        if address >= ram.regions[i].base and offset < ram.regions[i].size:
            if length <= ram.regions[i].size - offset:
                return ram.regions[i].host + offset
            return NULL
    return NULL


cdef class RamMap:
    """The C view of ``memory``. It does not keep the memory open: a :class:`Queue` does, while it is enabled."""

    def __cinit__(self, memory):
        cdef uint64_t base, size, host
        if len(memory.regions) > MAX_RAM_REGIONS:
            raise ValueError(f"{len(memory.regions)} regions of RAM are more than {MAX_RAM_REGIONS}")
        self.memory = memory
        self.mappings = tuple([region.mapping for region in memory.regions])
        for region in memory.regions:
            base, size, host = region.base, region.size, region.address
            self.map.regions[self.map.count] = ram_region(base=base, size=size, host=<uint8_t *><size_t>host)
            self.map.count += 1

    cdef object view(self, const iovec *buffer):
        """A memoryview of a buffer that ram_find has found: one of the mapping, which cannot close under it."""
        cdef uint32_t i
        cdef size_t start, host = <size_t>buffer.iov_base
        for i in range(self.map.count):
            start = <size_t>self.map.regions[i].host
            if start <= host < start + self.map.regions[i].size:
                start = host - start
                with memoryview(self.mappings[i]) as whole:
                    return whole[start:start + buffer.iov_len]
        raise AssertionError("a buffer outside of RAM")


# -- the ring ------------------------------------------------------------------------------


cdef int broken(virtqueue *q, int error) noexcept nogil:
    """The guest broke its ring: say so, and take nothing more from it (virtio 1.2, 2.1.2: DEVICE_NEEDS_RESET)."""
    chv_set_flag(&q.error, error)
    irq_raise(q.config_irq)
    return -1


cdef int walk(virtqueue *q, chain *c) noexcept nogil:
    """Collect the buffers of the chain at ``c.head``; a vq_error."""
    cdef const uint8_t *table = q.desc
    cdef const uint8_t *entry
    cdef uint32_t entries = q.size, at = c.head, seen = 0, length
    cdef uint64_t address
    cdef uint16_t flags, following
    cdef uint8_t *host
    cdef bint inside = False, writable_seen = False
    cdef iovec *target
    while True:
        if at >= entries:
            return VQ_BAD_HEAD
        entry = table + DESC_SIZE * at
        address = chv_get64(entry)
        length = chv_get32(entry + 8)
        flags = chv_get16(entry + 12)
        following = chv_get16(entry + 14)
        if flags & DESC_INDIRECT:  # its WRITE flag means nothing (virtio 1.2, 2.7.5.3.2)
            if inside or not q.indirect or flags & DESC_NEXT or length == 0 or length % DESC_SIZE:
                return VQ_BAD_INDIRECT
            entries = length // DESC_SIZE
            if entries > q.size - seen:
                return VQ_BAD_INDIRECT
            table = ram_find(q.ram, address, length)
            if table is NULL:
                return VQ_BAD_ADDRESS
            at = 0
            inside = True
            continue
        if seen == q.size:
            return VQ_LOOP
        seen += 1
        if flags & DESC_WRITE:
            writable_seen = True
        elif writable_seen:
            return VQ_BAD_ORDER
        if length:
            host = ram_find(q.ram, address, length)
            if host is NULL:
                return VQ_BAD_ADDRESS
            target = &c.iov[c.readable + c.writable]
            target.iov_base = host
            target.iov_len = length
            if flags & DESC_WRITE:
                c.writable += 1
                c.writable_bytes += length
            else:
                c.readable += 1
                c.readable_bytes += length
        if not flags & DESC_NEXT:
            return VQ_OK
        at = following


cdef int vq_pop(virtqueue *q, chain *c) noexcept nogil:
    cdef uint16_t ahead
    cdef int error
    if q.error != VQ_OK:
        return -1
    if q.avail is NULL or chv_flag(<int *>&q.stop):
        return 0
    # Acquire: what the driver wrote before the index is read after it.
    ahead = chv_acquire16(q.avail + RING_INDEX) - q.next_avail
    if ahead == 0:
        return 0
    if ahead > q.size:
        return broken(q, VQ_BAD_INDEX)
    memset(c, 0, sizeof(chain))
    c.iov = q.iov
    c.head = chv_get16(q.avail + RING_ENTRIES + 2 * (q.next_avail & (q.size - 1)))
    error = walk(q, c)
    if error != VQ_OK:
        return broken(q, error)
    q.next_avail += 1
    q.chains += 1
    return 1


cdef void vq_undo_pop(virtqueue *q) noexcept nogil:
    if q.avail is not NULL:
        q.next_avail -= 1
        q.chains -= 1


cdef void vq_push(virtqueue *q, uint16_t head, uint32_t written) noexcept nogil:
    cdef uint8_t *entry
    if q.used is NULL:
        return
    entry = q.used + RING_ENTRIES + 8 * <uint32_t>(q.next_used & (q.size - 1))
    chv_put32(entry, head)
    chv_put32(entry + 4, written)
    q.next_used += 1
    # Release: the driver that sees the index sees the entry, and what the device wrote into its buffers.
    chv_release16(q.used + RING_INDEX, q.next_used)
    if q.next_used == q.signalled:  # 65536 without a signal: the indexes no longer tell how many
        q.signalled_valid = False


cdef void vq_signal(virtqueue *q) noexcept nogil:
    cdef uint16_t event, old = q.signalled
    cdef bint valid = q.signalled_valid
    if q.used is NULL or (valid and old == q.next_used):
        return
    q.signalled = q.next_used
    q.signalled_valid = True
    # The driver says that it wants interrupts and then looks at used.idx; we wrote used.idx and now look
    # at what it wants. Without a full fence on both sides each could miss the other (virtio 1.2, 2.7.7.2).
    chv_fence()
    if q.event_idx:
        event = chv_get16(q.avail + RING_ENTRIES + 2 * <uint32_t>q.size)
        if valid and <uint16_t>(q.next_used - event - 1) >= <uint16_t>(q.next_used - old):
            return
    elif chv_get16(q.avail + RING_FLAGS) & AVAIL_NO_INTERRUPT:
        return
    q.interrupts += 1
    irq_raise(q.irq)


cdef bint vq_enable_kick(virtqueue *q) noexcept nogil:
    if q.used is NULL or q.error != VQ_OK or chv_flag(<int *>&q.stop):
        return False
    if q.event_idx:
        chv_put16(q.used + RING_ENTRIES + 8 * <uint32_t>q.size, q.next_avail)
    else:
        chv_put16(q.used + RING_FLAGS, 0)
    # The other half of the driver's fence between adding chains and reading what we just wrote.
    chv_fence()
    return chv_get16(q.avail + RING_INDEX) != q.next_avail


cdef void vq_disable_kick(virtqueue *q) noexcept nogil:
    # With EVENT_IDX the flags stay 0 (virtio 1.2, 2.7.10.2), and an avail_event that lies behind is quiet enough.
    if q.used is not NULL and not q.event_idx:
        chv_put16(q.used + RING_FLAGS, USED_NO_NOTIFY)


cdef bint vq_gather(virtqueue *q) noexcept nogil:
    """Give the processor away once, with notifications still off, for a worker that has just done something.

    A guest that keeps many requests in flight and shares the processor with the worker adds some more
    meanwhile, without an exit for each and without being interrupted in between. Where the worker has a
    processor for itself nobody runs meanwhile; a guest that waits for each request adds one at the most; and
    where others run, too, it takes long. So the next times, up to LONGEST_PATIENCE of them, are left out if
    fewer than two came, or if each took more than WORTH times as long as the worker works on one.
    """
    cdef uint64_t spent, away, each
    cdef uint16_t added
    if q.used is NULL or q.error != VQ_OK or chv_flag(<int *>&q.stop):
        return False
    if q.impatience:
        q.impatience -= 1
        return False
    spent = chv_thread_time()
    away = chv_now()
    sched_yield()
    away = chv_now() - away
    added = chv_get16(q.avail + RING_INDEX) - q.next_avail
    each = (spent - q.gathered_time) // max(q.chains - q.gathered_chains, <uint64_t>1)
    q.gathered_time = spent
    q.gathered_chains = q.chains
    q.patience = 0 if added > 1 and away // added <= WORTH * each else min(2 * q.patience + 1, LONGEST_PATIENCE)
    q.impatience = q.patience
    return added != 0


cdef int vq_wait(virtqueue *q, int other_fd, short other_events, int timeout_ms) noexcept nogil:
    cdef pollfd fds[3]
    cdef int seen = 0
    if chv_flag(<int *>&q.stop):
        return VQ_STOPPED
    fds[0].fd = q.kick_fd
    fds[1].fd = q.wake_fd
    fds[2].fd = other_fd  # poll leaves out what is negative
    fds[0].events = fds[1].events = POLLIN
    fds[2].events = other_events
    if poll(fds, 3, timeout_ms) > 0:
        # Cleared before the worker looks at the ring and at stop: what comes later is seen by the next poll.
        if fds[0].revents:
            chv_event_clear(q.kick_fd)
            seen |= VQ_KICKED
        if fds[1].revents:
            chv_event_clear(q.wake_fd)
        if fds[2].revents:
            seen |= VQ_OTHER
    if chv_flag(<int *>&q.stop):
        seen |= VQ_STOPPED
    return seen


cdef void vq_wake(virtqueue *q) noexcept nogil:
    chv_event_add(q.wake_fd)


cdef size_t copy(const iovec *iov, uint32_t count, size_t offset, uint8_t *flat, size_t length,
                 bint into) noexcept nogil:
    cdef uint32_t i
    cdef size_t done = 0, part
    for i in range(count):
        if offset >= iov[i].iov_len:
            offset -= iov[i].iov_len
            continue
        part = min(iov[i].iov_len - offset, length - done)
        if into:
            memcpy(<uint8_t *>iov[i].iov_base + offset, flat + done, part)
        else:
            memcpy(flat + done, <uint8_t *>iov[i].iov_base + offset, part)
        done += part
        offset = 0
        if done == length:
            break
    return done


cdef size_t iov_copy_out(const iovec *iov, uint32_t count, size_t offset, void *target, size_t length) noexcept nogil:
    return copy(iov, count, offset, <uint8_t *>target, length, False)


cdef size_t iov_copy_in(const iovec *iov, uint32_t count, size_t offset, const void *source,
                        size_t length) noexcept nogil:
    return copy(iov, count, offset, <uint8_t *>source, length, True)


# -- statistics -----------------------------------------------------------------------------


cdef void io_record(io_stats *s, uint64_t bytes, uint64_t nanoseconds) noexcept nogil:
    if s.operations == 0 or nanoseconds < s.latency_min:
        s.latency_min = nanoseconds
    if nanoseconds > s.latency_max:
        s.latency_max = nanoseconds
    s.latency_sum += nanoseconds
    s.bytes += bytes
    s.operations += 1


cdef uint64_t monotonic_ns() noexcept nogil:
    return chv_now()


# -- for devices written in Python -------------------------------------------------------------


cdef class Chain:
    """One descriptor chain. Complete it with :meth:`done`, once; in any thread and in any order.

    The memoryviews in ``readable`` and ``writable`` are guest RAM itself: the guest may change it while
    it is looked at. They are released by :meth:`done`. When the queue is reset the chain is void: its
    buffers are gone, and :meth:`done` does nothing.
    """

    cdef Queue queue
    cdef uint64_t generation     # of the queue when the chain was taken
    cdef iovec *iov
    cdef uint32_t n_readable, n_writable
    cdef readonly uint16_t head
    cdef readonly uint64_t readable_bytes    #: of all readable buffers; may pass 2**32
    cdef readonly uint64_t writable_bytes
    cdef uint64_t written        # by write(), so far
    cdef uint16_t position       # next_avail behind this chain
    cdef bint completed
    cdef list readable_views, writable_views

    def __cinit__(self):
        self.completed = True  # until pop() has filled it

    def __dealloc__(self):
        free(self.iov)

    def __del__(self):
        if self.queue is not None:
            self.queue.live.pop(id(self), None)

    cdef bint usable(self) except -1:
        """False: the queue was reset. Raises when the device is done with the chain."""
        if self.completed:
            raise DeviceError(f"chain {self.head}: it was completed already")
        return self.generation == self.queue.generation

    cdef list views(self, uint32_t first, uint32_t count):
        cdef uint32_t i
        made = [self.queue.ram.view(&self.iov[i]) for i in range(first, first + count)]
        self.queue.live.setdefault(id(self), []).extend(made)
        return made

    @property
    def readable(self) -> list:
        """The buffers that the device reads, as memoryviews, in order. None is empty."""
        if not self.usable():
            return []
        if self.readable_views is None:
            self.readable_views = self.views(0, self.n_readable)
        return self.readable_views

    @property
    def writable(self) -> list:
        """The buffers that the device writes, as memoryviews, in order. None is empty."""
        if not self.usable():
            return []
        if self.writable_views is None:
            self.writable_views = self.views(self.n_readable, self.n_writable)
        return self.writable_views

    def read(self, limit: int = 1 << 24) -> bytes:
        """The first ``limit`` bytes of all readable buffers, joined: 16 MiB unless told.

        A limit there must be: a hostile guest can name the same gigabyte 32768 times in one chain.
        """
        if limit < 0:
            raise ValueError(f"limit: {limit} is negative")
        if not self.usable():
            return b""
        cdef size_t size = min(self.readable_bytes, limit)
        joined = PyBytes_FromStringAndSize(NULL, size)
        iov_copy_out(self.iov, self.n_readable, 0, PyBytes_AS_STRING(joined), size)
        return joined

    def write(self, data) -> int:
        """Put ``data`` into the writable buffers, behind what earlier calls wrote; the bytes that fitted."""
        if not self.usable():
            return 0
        cdef const uint8_t[::1] source
        cdef size_t count = 0
        with memoryview(data) as view:
            if view.nbytes == 0:
                return 0
            with view.cast("B") as octets:
                source = octets
                count = iov_copy_in(self.iov + self.n_readable, self.n_writable, self.written,
                                    &source[0], source.shape[0])
                source = None
        self.written += count
        return count

    def done(self, written=None) -> None:
        """Give the chain back to the guest; ``written`` bytes of it were written (what write() wrote, unless told).

        The guest is not interrupted yet: iterating over the queue does that, or :meth:`Queue.signal`.
        """
        cdef uint64_t count = self.written
        if written is not None:
            if not 0 <= written <= self.writable_bytes:
                raise ValueError(f"written: {written} is not within 0-{self.writable_bytes}, "
                                 "what the chain has room for")
            count = written
        usable = self.usable()
        self.completed = True
        self.queue.release(id(self))
        if usable:
            vq_push(&self.queue.q, self.head, <uint32_t>min(count, 0xFFFFFFFF))

    def give_back(self) -> None:
        """Unread: the queue's next pop() returns this chain again. Only for the chain that was taken last."""
        usable = self.usable()
        if usable and self.position != self.queue.q.next_avail:
            raise DeviceError(f"chain {self.head}: a later one was taken, or this one given back")
        self.completed = True
        self.queue.release(id(self))
        if usable:
            vq_undo_pop(&self.queue.q)


# Chains between two looks at whether the guest wants an interrupt, while it keeps adding more.
cdef enum:
    BATCH = 64


cdef class Queue:
    """Queue number ``index`` of a device; ``irq`` is raised for used chains, ``config_irq`` when the ring breaks.

    ``max_size`` is a power of two of 1 to 32768 (else ValueError). A device's worker serves it like this::

        while not queue.stopping:
            for chain in queue:
                ...
                chain.done()
            queue.wait()

    One thread at a time works on a queue; :meth:`stop`, :meth:`wake` and :meth:`kick` are for any thread.
    While a queue is enabled, it keeps the guest memory from closing: reset or close it before.
    """

    def __cinit__(self, RamMap ram not None, index, max_size, IrqSource irq not None,
                  IrqSource config_irq not None):
        self.q.kick_fd = self.q.wake_fd = -1
        if not 1 <= max_size <= MAX_SIZE or max_size & (max_size - 1):
            raise ValueError(f"max_size: {max_size} is not a power of two of 1 to {MAX_SIZE}")
        self.ram = ram
        self.irq = irq
        self.config_irq = config_irq
        self.max_size = max_size
        self.pins = []
        self.live = {}
        self.q.ram = &ram.map
        self.q.index = index
        self.q.irq = &irq.source
        self.q.config_irq = &config_irq.source
        self.q.signalled_valid = True
        self.q.kick_fd = _eventfd()
        self.q.wake_fd = _eventfd()

    def __dealloc__(self):
        free(self.q.iov)
        for fd in (self.q.kick_fd, self.q.wake_fd):
            if fd >= 0:
                close(fd)

    @property
    def index(self) -> int:
        """The queue's number in its device."""
        return self.q.index

    @property
    def size(self) -> int:
        """Entries; 0: not enabled."""
        return self.q.size

    @property
    def error(self):
        """Why the ring is broken, in words; None: it is not. A broken ring delivers nothing until it is reset."""
        cdef int error = chv_flag(&self.q.error)
        return None if error == VQ_OK else f"queue {self.q.index}: {_WORDS[error]}"

    @property
    def kick_fd(self) -> int:
        """The eventfd that the guest's notification writes; non-blocking. -1 when closed."""
        return self.q.kick_fd

    @property
    def wake_fd(self) -> int:
        """The eventfd that ends :meth:`wait` for the host's reasons; non-blocking. -1 when closed."""
        return self.q.wake_fd

    @property
    def chains(self) -> int:
        """Chains taken so far, over resets."""
        return self.q.chains

    @property
    def interrupts(self) -> int:
        """Interrupts raised so far, over resets."""
        return self.q.interrupts

    @property
    def stopping(self) -> bool:
        """The worker is to end."""
        return chv_flag(<int *>&self.q.stop) != 0

    # -- the transport's side

    def enable(self, size, uint64_t desc, uint64_t avail, uint64_t used, *,
               bint event_idx=False, bint indirect=False) -> None:
        """Begin with an empty ring of ``size`` entries at three guest-physical addresses.

        ``event_idx`` and ``indirect``: VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC were negotiated.
        Addresses that cannot be are the guest's mistake: the ring is then broken (:attr:`error`) from the
        start. Raises ValueError for a size that is no power of two of 1 to ``max_size``.
        """
        if not 1 <= size <= self.max_size or size & (size - 1):
            raise ValueError(f"size: {size} is not a power of two of 1 to {self.max_size}")
        self.reset()
        self.q.iov = <iovec *>malloc(sizeof(iovec) * <size_t>size)
        if self.q.iov is NULL:
            raise MemoryError
        self.q.size = size
        self.q.event_idx = event_idx
        self.q.indirect = indirect
        self.desc_address, self.avail_address, self.used_address = desc, avail, used
        # Sizes and alignments: virtio 1.2, 2.7. The event fields are there whether negotiated or not.
        cdef uint8_t *desc_host = ram_find(&self.ram.map, desc, DESC_SIZE * <uint64_t>size)
        cdef uint8_t *avail_host = ram_find(&self.ram.map, avail, 6 + 2 * <uint64_t>size)
        cdef uint8_t *used_host = ram_find(&self.ram.map, used, 6 + 8 * <uint64_t>size)
        if desc % 16 or avail % 2 or used % 4 or not (desc_host and avail_host and used_host):
            broken(&self.q, VQ_BAD_RING)
            return
        self.pins = [memoryview(mapping) for mapping in self.ram.mappings]
        self.q.desc, self.q.avail, self.q.used = desc_host, avail_host, used_host
        chv_put16(used_host + RING_FLAGS, 0)

    def reset(self) -> None:
        """Forget the ring: not enabled, not broken. Called with no worker; chains not done become void."""
        for number in list(self.live):
            self.release(number)
        self.generation += 1
        self.q.desc = self.q.avail = self.q.used = NULL
        self.q.size = self.q.next_avail = self.q.next_used = self.q.signalled = 0
        self.q.signalled_valid = True
        self.q.event_idx = self.q.indirect = False
        self.desc_address = self.avail_address = self.used_address = 0
        chv_set_flag(&self.q.error, VQ_OK)
        free(self.q.iov)
        self.q.iov = NULL
        for view in self.pins:
            view.release()
        self.pins = []
        chv_event_clear(self.q.kick_fd)

    def close(self) -> None:
        """Reset it and give back its descriptors. Called with no worker; a second time it does nothing."""
        cdef int kick_fd = self.q.kick_fd, wake_fd = self.q.wake_fd
        self.reset()
        self.q.kick_fd = self.q.wake_fd = -1
        if kick_fd >= 0:
            close(kick_fd)
            close(wake_fd)

    def save(self) -> dict:
        """Plain integers and None; called with no worker. Chains that are not done are not in it."""
        return {
            "size": self.q.size,
            "desc": self.desc_address,
            "avail": self.avail_address,
            "used": self.used_address,
            "event_idx": int(self.q.event_idx),
            "indirect": int(self.q.indirect),
            "next_avail": self.q.next_avail,
            "next_used": self.q.next_used,
            "signalled": self.q.signalled,
            "signalled_valid": int(self.q.signalled_valid),
            "error": self.q.error,
        }

    def load(self, state) -> None:
        """Go on where :meth:`save` was called, on the same guest memory.

        Raises ValueError for a state that no queue of this ``max_size`` can have.
        """
        for name in ("next_avail", "next_used", "signalled"):
            if not 0 <= state[name] <= 0xFFFF:
                raise ValueError(f"{name}: {state[name]} is not within 0-65535")
        if state["error"] != VQ_OK and state["error"] not in _WORDS:
            raise ValueError(f"error: {state['error']} is not within 0-{VQ_BAD_RING}")
        if state["size"] == 0:
            self.reset()
            return
        self.enable(state["size"], state["desc"], state["avail"], state["used"],
                    event_idx=state["event_idx"], indirect=state["indirect"])
        self.q.next_avail = state["next_avail"]
        self.q.next_used = state["next_used"]
        self.q.signalled = state["signalled"]
        self.q.signalled_valid = state["signalled_valid"]
        if self.q.error == VQ_OK:
            chv_set_flag(&self.q.error, state["error"])

    # -- the worker's side

    def prepare(self) -> None:
        """Before a worker starts: it is not told to stop, and nothing old wakes it."""
        chv_set_flag(<int *>&self.q.stop, False)
        chv_event_clear(self.q.wake_fd)

    def wait(self, other_fd: int = -1, timeout=None) -> int:
        """Wait for a kick, for :meth:`stop` or :meth:`wake`, or until ``other_fd`` can be read.

        ``timeout`` is in seconds; None: none. Returns bits: KICKED, STOPPED, OTHER; 0 after a timeout,
        :meth:`wake`, or a signal. The kick is for chains that came after the iteration over the queue (or
        :meth:`enable_kick`) found no more: one that left chains behind must come back for them unasked.
        """
        cdef int fd = other_fd, milliseconds = -1, seen
        if timeout is not None:
            milliseconds = min(max(0, math.ceil(timeout * 1000)), 0x7FFFFFFF)
        with nogil:
            seen = vq_wait(&self.q, fd, POLLIN, milliseconds)
        PyErr_CheckSignals()
        return seen

    def pop(self):
        """The next :class:`Chain`; None when there is none, the ring is broken, or the worker is to stop."""
        cdef chain c
        cdef Chain taken
        if vq_pop(&self.q, &c) <= 0:
            return None
        cdef size_t size = sizeof(iovec) * (c.readable + c.writable)
        taken = Chain.__new__(Chain)
        taken.iov = <iovec *>malloc(size or 1)
        if taken.iov is NULL:
            vq_undo_pop(&self.q)
            raise MemoryError
        memcpy(taken.iov, c.iov, size)
        taken.completed = False
        taken.queue = self
        taken.generation = self.generation
        taken.head = c.head
        taken.position = self.q.next_avail
        taken.n_readable = c.readable
        taken.n_writable = c.writable
        taken.readable_bytes = c.readable_bytes
        taken.writable_bytes = c.writable_bytes
        return taken

    def __iter__(self):
        """The chains that are there, until there are no more or the worker is to stop.

        Notifications are off meanwhile and on afterwards. The guest is interrupted, if it wants to be, for
        the chains done: at the end, when the iteration is left early, and every 64 chains.
        """
        cdef uint32_t taken = 0, before
        cdef bint more = True, promised = False
        try:
            while more:
                before = taken
                vq_disable_kick(&self.q)
                while (chain := self.pop()) is not None:
                    yield chain
                    taken += 1
                    if taken % BATCH == 0:
                        vq_signal(&self.q)
                vq_signal(&self.q)
                if promised and taken == before and self.q.error == VQ_OK and not chv_flag(<int *>&self.q.stop):
                    # There was a chain and is none: an index that goes back, as where the used ring lies over
                    # the available one. Asking again and again would never end, with the GIL held.
                    broken(&self.q, VQ_BAD_INDEX)
                promised = more = vq_enable_kick(&self.q)
        finally:
            if more:  # left early
                vq_signal(&self.q)
                vq_enable_kick(&self.q)

    def signal(self) -> None:
        """Interrupt the guest, if it wants to be, for the chains done since the last time."""
        vq_signal(&self.q)

    def enable_kick(self) -> bool:
        """Ask the guest for notifications. True: there is a chain already, look before you wait."""
        return vq_enable_kick(&self.q)

    def disable_kick(self) -> None:
        """Tell the guest that the queue is being looked at and needs no notifications."""
        vq_disable_kick(&self.q)

    # -- for any thread

    def stop(self) -> None:
        """Tell the worker to end: it finds no more chains, and :meth:`wait` returns STOPPED until :meth:`prepare`."""
        chv_set_flag(<int *>&self.q.stop, True)
        vq_wake(&self.q)

    def wake(self) -> None:
        """End the worker's :meth:`wait`."""
        vq_wake(&self.q)

    def kick(self) -> None:
        """Notify the queue, as the guest does through the ioeventfd."""
        chv_event_add(self.q.kick_fd)

    cdef void release(self, object number):
        """Release the views that a chain gave out, except where somebody still works on one."""
        for view in self.live.pop(number, ()):
            try:
                view.release()
            except BufferError:
                pass


cdef int _eventfd() except -1:
    cdef int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    if fd < 0:
        raise OSError(errno, os.strerror(errno))
    return fd
