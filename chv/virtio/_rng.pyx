"""The entropy device's loop: from a descriptor of the host straight into the guest's buffers."""
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from posix.unistd cimport read

from .._virtqueue cimport (VQ_OTHER, VQ_STOPPED, Queue, chain, io_record, io_stats, monotonic_ns, virtqueue,
                           vq_disable_kick, vq_enable_kick, vq_pop, vq_push, vq_signal, vq_undo_pop, vq_wait)

cdef extern from "<poll.h>" nogil:
    enum:
        POLLIN

cdef enum:
    MOST = 65536      # bytes in one chain: a hostile guest's may have terabytes, which nothing could interrupt
    EMPTY_MS = 1000   # how often a source that has ended or failed is tried again
    SPIN_MS = 10      # the same for one that is ready by what poll says, and has nothing


cdef ssize_t fill(int fd, const chain *c, bint *failed) noexcept nogil:
    """Read into the chain's buffers what there is; 0 or more bytes. ``failed``: by an end or error, not a pause."""
    cdef size_t total = 0, size
    cdef ssize_t count
    cdef uint32_t i
    failed[0] = False
    for i in range(c.readable, c.readable + c.writable):
        size = min(c.iov[i].iov_len, MOST - total)
        count = read(fd, c.iov[i].iov_base, size)
        if count > 0:
            total += count
        elif total == 0:
            failed[0] = count == 0 or (errno != EAGAIN and errno != EINTR)
        if count < <ssize_t>size or total == MOST:
            break
    return total


cdef void serve(virtqueue *q, int fd, io_stats *stats) noexcept nogil:
    cdef chain c
    cdef ssize_t count
    cdef uint64_t start
    cdef bint failed = False, spinning = False
    cdef int seen = 0
    while not seen & VQ_STOPPED:
        vq_disable_kick(q)
        count = 1
        while count > 0 and vq_pop(q, &c) > 0:
            start = monotonic_ns()
            # A chain without room gets nothing; all others at least a byte (virtio 1.2, 5.4.6.2).
            count = fill(fd, &c, &failed) if c.writable else 0
            if count > 0:
                io_record(stats, count, monotonic_ns() - start)
            elif c.writable:
                vq_undo_pop(q)
                break
            vq_push(q, c.head, <uint32_t>count)
            count = 1
        vq_signal(q)
        if count > 0:
            spinning = False
            seen = 0 if vq_enable_kick(q) else vq_wait(q, -1, 0, -1)
        elif failed:
            stats.errors += 1
            seen = vq_wait(q, -1, 0, EMPTY_MS)
        elif spinning:
            spinning = False
            seen = vq_wait(q, -1, 0, SPIN_MS)
        else:
            seen = vq_wait(q, fd, POLLIN, -1)
            spinning = (seen & VQ_OTHER) != 0


cdef class Source:
    """The descriptor ``fd``, non-blocking if it can block, which stays its owner's; and what came from it."""

    cdef int fd
    cdef io_stats stats

    def __cinit__(self, int fd):
        self.fd = fd
        self.stats.latency_min = ~<uint64_t>0

    def serve(self, Queue queue) -> None:
        """Fill the queue's buffers until it is told to stop. Without the GIL."""
        with nogil:
            serve(&queue.q, self.fd, &self.stats)

    @property
    def counters(self) -> dict:
        """``read_bytes``, ``read_ops``; ``read_latency_min``, ``_max`` and ``_avg`` in microseconds, of reads
        that got something; ``read_errors``: how often the source had ended or failed when it was tried.
        """
        cdef uint64_t count = self.stats.operations
        return {
            "read_bytes": self.stats.bytes,
            "read_ops": count,
            "read_errors": self.stats.errors,
            "read_latency_min": self.stats.latency_min // 1000 if count else 0,
            "read_latency_max": self.stats.latency_max // 1000,
            "read_latency_avg": self.stats.latency_sum // count // 1000 if count else 0,
        }
