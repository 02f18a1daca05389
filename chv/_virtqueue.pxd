# cython: language_level=3
"""Split virtqueues (virtio 1.2, 2.7), walked without the GIL.

One thread at a time works on a queue, except vq_wake, which any thread may call.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from ._irq cimport IrqSource, irq_source

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

# -- guest RAM -----------------------------------------------------------------------

cdef enum:
    MAX_RAM_REGIONS = 64

cdef struct ram_region:
    uint64_t base
    uint64_t size
    uint8_t *host

cdef struct ram_map:
    uint32_t count
    ram_region regions[MAX_RAM_REGIONS]

# Where [address, address + length) is in this process; NULL unless it lies wholly in one region.
cdef uint8_t *ram_find(const ram_map *ram, uint64_t address, uint64_t length) noexcept nogil

cdef class RamMap:
    """The C view of a GuestMemory; keeps it alive."""
    cdef ram_map map
    cdef readonly object memory
    cdef tuple mappings     # the regions' mmap objects
    cdef object view(self, const iovec *buffer)

# -- queues ----------------------------------------------------------------------------

# Why a queue is broken; names in _virtqueue.pyx.
cdef enum vq_error:
    VQ_OK = 0
    VQ_BAD_INDEX = 1        # avail.idx is more than the queue's size ahead
    VQ_BAD_HEAD = 2         # a head or next index beyond the table
    VQ_LOOP = 3             # a chain longer than the queue
    VQ_BAD_ADDRESS = 4      # a buffer or table outside of RAM
    VQ_BAD_INDIRECT = 5     # nested, of a bad length, with NEXT, or not negotiated
    VQ_BAD_ORDER = 6        # a readable descriptor behind a writable one
    VQ_BAD_RING = 7         # ring addresses: misaligned or outside of RAM

cdef struct virtqueue:
    const ram_map *ram
    uint16_t index          # the queue's number in its device
    uint16_t size           # entries, a power of two; 0: not enabled
    bint event_idx          # VIRTIO_F_EVENT_IDX was negotiated
    bint indirect           # VIRTIO_F_INDIRECT_DESC was negotiated
    int error               # a vq_error: the ring is broken, nothing more is taken from it
    uint8_t *desc           # host addresses of the three parts
    uint8_t *avail
    uint8_t *used
    uint16_t next_avail     # free-running, as the ring's own indexes
    uint16_t next_used
    uint16_t signalled      # next_used when the guest was last interrupted
    bint signalled_valid
    int kick_fd             # the eventfd that the guest's notification writes
    int wake_fd             # an eventfd: written by vq_wake, so that a worker looks at stop
    bint stop               # the worker is to end
    irq_source *irq         # raised by vq_signal
    irq_source *config_irq  # raised when the ring breaks (DEVICE_NEEDS_RESET)
    iovec *iov              # room for `size` buffers: where vq_pop puts a chain
    uint64_t chains         # taken so far
    uint64_t interrupts     # raised so far
    uint64_t gathered_time  # what the worker had taken of the processor at the last vq_gather, in ns
    uint64_t gathered_chains
    uint16_t patience       # how often vq_gather does nothing after it was of no use
    uint16_t impatience     # how often it still has to do nothing

# A descriptor chain: iov[0:readable] the device reads, iov[readable:readable + writable] it writes.
# The buffers lie in guest RAM, whose content may change while it is looked at: read each byte once.
# A buffer of length 0 has been left out.
cdef struct chain:
    uint16_t head
    uint32_t readable
    uint32_t writable
    uint64_t readable_bytes   # may pass 2**32
    uint64_t writable_bytes
    iovec *iov                # is queue.iov: valid until the next vq_pop

# What vq_wait saw; bits.
cdef enum:
    VQ_KICKED = 1
    VQ_STOPPED = 2
    VQ_OTHER = 4      # the other descriptor is ready

cdef int vq_pop(virtqueue *q, chain *c) noexcept nogil            # 1: a chain; 0: none, or stop; -1: broken
cdef void vq_undo_pop(virtqueue *q) noexcept nogil                # give the last chain back, unused
cdef void vq_push(virtqueue *q, uint16_t head, uint32_t written) noexcept nogil  # into the used ring; the guest sees it
cdef void vq_signal(virtqueue *q) noexcept nogil                  # interrupt the guest if it wants one for what was pushed
cdef bint vq_enable_kick(virtqueue *q) noexcept nogil             # ask for notifications; True: there is something already
cdef void vq_disable_kick(virtqueue *q) noexcept nogil
cdef bint vq_gather(virtqueue *q) noexcept nogil                  # before asking: let the guest run; True: it added chains
cdef int vq_wait(virtqueue *q, int other_fd, short other_events, int timeout_ms) noexcept nogil  # clears kick_fd and wake_fd
cdef void vq_wake(virtqueue *q) noexcept nogil
cdef size_t iov_copy_out(const iovec *iov, uint32_t count, size_t offset, void *target, size_t length) noexcept nogil  # from iov; bytes copied
cdef size_t iov_copy_in(const iovec *iov, uint32_t count, size_t offset, const void *source, size_t length) noexcept nogil  # into iov

cdef class Queue:
    """A queue of one device for the life of a machine; see _virtqueue.pyi for its Python side."""
    cdef virtqueue q
    cdef readonly RamMap ram
    cdef readonly IrqSource irq          # the queue's
    cdef readonly IrqSource config_irq
    cdef readonly uint16_t max_size
    cdef uint64_t desc_address, avail_address, used_address
    cdef uint64_t generation             # counts resets: chains of an earlier one are void
    cdef list pins                       # views of all RAM: it cannot be unmapped while the queue is enabled
    cdef dict live                       # id of a Chain -> the memoryviews it gave out
    cdef void release(self, object number)

# -- statistics -----------------------------------------------------------------------------

# Latencies in nanoseconds (CLOCK_MONOTONIC); min is ~0 while there is none. One writer thread each.
cdef struct io_stats:
    uint64_t operations
    uint64_t bytes
    uint64_t errors
    uint64_t latency_sum
    uint64_t latency_min
    uint64_t latency_max

cdef void io_record(io_stats *s, uint64_t bytes, uint64_t nanoseconds) noexcept nogil
cdef uint64_t monotonic_ns() noexcept nogil
