# cython: language_level=3
"""The pieces of a request by plain system calls: preadv2, pwritev2, fdatasync, fallocate.

Also what io_uring cannot do in one operation: direct I/O with memory or sectors that are not aligned for it.
"""
from libc.errno cimport EINTR, EOPNOTSUPP, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from .._virtqueue cimport iov_copy_in, iov_copy_out, iovec
from ._block_request cimport (KEEP_SIZE, OP_RANGE, OP_READ, OP_SYNC, OP_WRITE, PENDING, PUNCH_HOLE, RANGE_UNMAP, RETRY,
                              S_IOERR, SECTOR_SHIFT, T_DISCARD, advance, chv_flag, disk, range_mode, request)

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/fs.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <sys/ioctl.h>
    #include <sys/uio.h>
    #include <unistd.h>
    static long chv_discard(int fd, uint64_t offset, uint64_t length) {
        uint64_t range[2] = { offset, length };
        return ioctl(fd, BLKDISCARD, range);
    }
    static void *chv_pages(size_t size) {
        void *at;
        errno = posix_memalign(&at, 4096, size);
        return errno ? NULL : at;
    }
    """
    long chv_discard(int fd, uint64_t offset, uint64_t length) noexcept nogil
    uint8_t *chv_pages(size_t size) noexcept nogil
    long preadv2(int, const iovec *, int, long, int) noexcept nogil
    long pwritev2(int, const iovec *, int, long, int) noexcept nogil
    long pread(int, void *, size_t, long) noexcept nogil
    long pwrite(int, const void *, size_t, long) noexcept nogil
    int fdatasync(int) noexcept nogil
    int fallocate(int, int, long, long) noexcept nogil
    int posix_fadvise(int, long, long, int) noexcept nogil
    int RWF_DSYNC
    int POSIX_FADV_DONTNEED

cdef enum:
    MAX_IOV = 1024          # of one system call (UIO_MAXIOV)
    BOUNCE_SIZE = 1 << 20


cdef inline bint sectors_aligned(disk *d, request *r) noexcept nogil:
    return (r.offset | r.left) & (d.offset_align - 1) == 0


cdef inline bint aligned(disk *d, request *r) noexcept nogil:
    """Whether direct I/O can go straight to and from the guest's memory."""
    cdef uint32_t i
    cdef uint64_t lengths = r.offset, places = 0
    for i in range(r.count):
        places |= <uint64_t>r.iov[i].iov_base
        lengths |= r.iov[i].iov_len
    return places & (d.memory_align - 1) == 0 and lengths & (d.offset_align - 1) == 0


cdef inline int64_t read_bounced(disk *d, request *r, uint8_t *buffer) noexcept nogil:
    """Read the whole blocks around the next sectors, and copy out what was asked for."""
    cdef uint64_t mask = d.offset_align - 1
    cdef uint64_t start = r.offset & ~mask, before = r.offset & mask
    cdef uint64_t wanted = min(r.left, BOUNCE_SIZE - d.offset_align - before)
    cdef int64_t got = pread(d.fd, buffer, (before + wanted + mask) & ~mask, <long>start)
    if got < 0:
        return got
    if got <= <int64_t>before:
        return 0
    return <int64_t>iov_copy_in(r.iov, r.count, 0, buffer + before, min(<uint64_t>got - before, wanted))


cdef inline int64_t write_bounced(disk *d, request *r, uint8_t *buffer) noexcept nogil:
    """Write whole blocks from a copy; parts of blocks through the page cache, which keeps no copy of them."""
    cdef uint64_t wanted = min(r.left, <uint64_t>BOUNCE_SIZE)
    cdef iovec copy
    cdef int64_t done
    cdef bint whole = sectors_aligned(d, r)
    iov_copy_out(r.iov, r.count, 0, buffer, wanted)
    copy.iov_base = buffer
    copy.iov_len = wanted
    if whole:
        return pwritev2(d.fd, &copy, 1, <long>r.offset, RWF_DSYNC if r.durable else 0)
    done = pwritev2(d.plain_fd, &copy, 1, <long>r.offset, RWF_DSYNC)
    posix_fadvise(d.plain_fd, <long>r.offset, <long>wanted, POSIX_FADV_DONTNEED)
    return done


cdef inline int64_t bounced(disk *d, request *r, uint8_t **buffer) noexcept nogil:
    if buffer[0] is NULL:
        buffer[0] = chv_pages(BOUNCE_SIZE)
        if buffer[0] is NULL:
            return -1
    return read_bounced(d, r, buffer[0]) if r.op == OP_READ else write_bounced(d, r, buffer[0])


cdef inline int64_t zero_without_zero_range(disk *d, uint64_t offset, uint64_t length) noexcept nogil:
    """Make a hole, then take the room again, which a guest that did not set UNMAP wants to keep."""
    if fallocate(d.fd, PUNCH_HOLE | KEEP_SIZE, <long>offset, <long>length):
        return -1
    if fallocate(d.fd, KEEP_SIZE, <long>offset, <long>length) and errno != EOPNOTSUPP:
        return -1
    return 0


cdef inline int64_t do_range(disk *d, request *r) noexcept nogil:
    cdef uint64_t offset = r.ranges[0].sector << SECTOR_SHIFT
    cdef uint64_t length = <uint64_t>r.ranges[0].sectors << SECTOR_SHIFT
    cdef int mode = range_mode(d, r)
    if r.type == T_DISCARD and d.device:
        return chv_discard(d.fd, offset, length)
    if not mode & PUNCH_HOLE and not chv_flag(&d.zero_range):
        return zero_without_zero_range(d, offset, length)
    return fallocate(d.fd, mode, <long>offset, <long>length)


cdef inline int64_t do_piece(disk *d, request *r, uint8_t **buffer) noexcept nogil:
    """The next piece of a request: bytes done, or a negative errno."""
    cdef int64_t result
    cdef int count = <int>min(r.count, <uint32_t>MAX_IOV)
    while True:
        if r.op == OP_SYNC:
            result = fdatasync(d.fd)
        elif r.op == OP_RANGE:
            result = do_range(d, r)
        elif d.direct and not aligned(d, r):
            result = bounced(d, r, buffer)
        elif r.op == OP_READ:
            result = preadv2(d.fd, r.iov, count, <long>r.offset, 0)
        else:
            result = pwritev2(d.fd, r.iov, count, <long>r.offset, RWF_DSYNC if r.durable else 0)
        if result >= 0:
            return result
        if errno != EINTR:
            return -errno


cdef inline int do_request(disk *d, request *r, uint8_t **buffer) noexcept nogil:
    """What is left of a request; its status."""
    cdef int status = PENDING
    cdef bint again = False
    while status == PENDING:
        status = advance(d, r, do_piece(d, r, buffer))
        if status == RETRY and not again:
            status = PENDING  # once, for a range: fallocate has no ZERO_RANGE here
            again = True
    return status if status >= 0 else S_IOERR
