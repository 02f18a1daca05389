# cython: language_level=3
"""Requests of virtio-blk (virtio 1.2, 5.2.6): from a descriptor chain to what is asked of the disk.

A request is done in pieces: whatever one system call (or one io_uring operation) cannot do at once.
"""
from libc.errno cimport EAGAIN, EINTR, EOPNOTSUPP
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from .._virtqueue cimport chain, iov_copy_in, iov_copy_out, iovec

cdef extern from *:
    """
    #include <stdint.h>
    typedef struct { uint64_t value; } __attribute__((packed, may_alias)) chv_block_u64;
    #define chv_block_get64(p) (((const volatile chv_block_u64 *)(p))->value)
    #define chv_flag(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define chv_set_flag(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    """
    uint64_t chv_block_get64(const uint8_t *p) nogil
    int chv_flag(int *p) nogil
    void chv_set_flag(int *p, int v) nogil
    uint64_t chv_sectors "chv_flag"(uint64_t *p) nogil
    void chv_set_sectors "chv_set_flag"(uint64_t *p, uint64_t v) nogil

cdef enum:
    SECTOR_SHIFT = 9
    SECTOR = 512            # the unit of the protocol, whatever blk_size says
    HEADER_SIZE = 16        # type, reserved, sector
    SERIAL_SIZE = 20
    MAX_SEGMENTS = 254      # offered at most; a slot has room for as many
    MAX_RANGES = 64         # of one discard or write-zeroes request
    MAX_RANGE = 1 << 22     # sectors of one of them: 2 GiB
    MAX_TRANSFER = 1 << 30  # bytes of one read or write

# Request types and status (virtio 1.2, 5.2.6), and what else parse and advance answer.
cdef enum:
    T_IN = 0
    T_OUT = 1
    T_FLUSH = 4
    T_GET_ID = 8
    T_DISCARD = 11
    T_WRITE_ZEROES = 13
    S_OK = 0
    S_IOERR = 1
    S_UNSUPP = 2
    PENDING = -1            # there is more to do
    RETRY = -2              # do it by plain system calls

# What the next piece is.
cdef enum piece_op:
    OP_READ
    OP_WRITE
    OP_SYNC
    OP_RANGE                # fallocate, or BLKDISCARD

cdef enum:
    RANGE_UNMAP = 1         # the flag of a range
    KEEP_SIZE = 1           # of fallocate (linux/falloc.h)
    PUNCH_HOLE = 2
    ZERO_RANGE = 16

cdef struct disk:
    int fd
    int plain_fd            # the same without O_DIRECT, for what is not in whole blocks; -1: not needed
    bint readonly
    bint device             # a block device
    bint direct
    uint32_t memory_align   # of direct I/O, bytes
    uint32_t offset_align
    uint64_t sectors        # atomic
    bint discard            # offered
    bint zeroes
    bint unmap              # zeroing may punch holes
    int zero_range          # fallocate can zero a range (atomic; cleared when it turns out not to)
    int writethrough        # atomic
    uint8_t serial[SERIAL_SIZE]

cdef struct block_range:
    uint64_t sector
    uint32_t sectors
    uint32_t flags

cdef struct request:
    uint16_t head
    uint32_t type
    piece_op op
    bint durable            # not complete before it is on stable storage
    uint8_t *status         # NULL: the chain has no room for one
    uint64_t started        # monotonic_ns
    uint64_t bytes          # of data
    uint64_t left           # bytes still to move
    uint64_t offset         # in the disk, of the next piece
    iovec *iov              # memory of the next piece
    uint32_t count          # buffers or ranges left
    block_range *ranges
    iovec *room             # MAX_SEGMENTS of the slot's own, also for ranges
    request *next           # in the list of free slots


cdef inline void skip(request *r, uint64_t bytes) noexcept nogil:
    """Leave out the first ``bytes`` of the memory, of which there are as many."""
    while bytes and bytes >= r.iov[0].iov_len:
        bytes -= r.iov[0].iov_len
        r.iov += 1
        r.count -= 1
    if bytes:
        r.iov[0].iov_base = <uint8_t *>r.iov[0].iov_base + bytes
        r.iov[0].iov_len -= bytes


cdef inline bint in_disk(disk *d, uint64_t sector, uint64_t sectors) noexcept nogil:
    cdef uint64_t capacity = chv_sectors(&d.sectors)
    return sector <= capacity and sectors <= capacity - sector


cdef inline int parse_transfer(disk *d, chain *c, request *r, uint64_t sector) noexcept nogil:
    r.op = OP_READ if r.type == T_IN else OP_WRITE
    if r.op == OP_READ:
        r.iov, r.count = c.iov + c.readable, c.writable
        r.left = c.writable_bytes
    else:
        r.iov, r.count = c.iov, c.readable
        r.left = c.readable_bytes - HEADER_SIZE
        skip(r, HEADER_SIZE)
        r.durable = chv_flag(&d.writethrough)
    if r.op == OP_WRITE and d.readonly:
        return S_IOERR
    if r.left % SECTOR or r.left > MAX_TRANSFER or not in_disk(d, sector, r.left >> SECTOR_SHIFT):
        return S_IOERR
    r.bytes = r.left
    r.offset = sector << SECTOR_SHIFT
    return PENDING if r.left else S_OK


cdef inline int parse_ranges(disk *d, chain *c, request *r) noexcept nogil:
    cdef uint64_t size = c.readable_bytes - HEADER_SIZE
    cdef uint32_t i, count, known = RANGE_UNMAP if r.type == T_WRITE_ZEROES else 0
    if not (d.discard if r.type == T_DISCARD else d.zeroes):
        return S_UNSUPP
    if size == 0 or size % sizeof(block_range) or size > MAX_RANGES * sizeof(block_range):
        return S_IOERR
    r.op = OP_RANGE
    r.ranges = <block_range *>r.room
    r.count = 0
    count = <uint32_t>(size // sizeof(block_range))
    iov_copy_out(c.iov, c.readable, HEADER_SIZE, r.ranges, size)
    for i in range(count):
        if r.ranges[i].flags & ~known:
            return S_UNSUPP
    for i in range(count):
        if r.ranges[i].sectors > MAX_RANGE or not in_disk(d, r.ranges[i].sector, r.ranges[i].sectors):
            return S_IOERR
        if r.ranges[i].sectors:  # fallocate takes no empty range
            r.bytes += <uint64_t>r.ranges[i].sectors << SECTOR_SHIFT
            r.ranges[r.count] = r.ranges[i]
            r.count += 1
    r.durable = r.type == T_WRITE_ZEROES and chv_flag(&d.writethrough)
    return PENDING if r.count else S_OK


cdef inline int parse(disk *d, chain *c, request *r) noexcept nogil:
    """Take a chain apart, whatever its layout (virtio 1.2, 2.7.4): PENDING, or the status of what is done already.

    The request's memory is the chain's own array of buffers, changed in place.
    """
    cdef uint64_t header[2]
    cdef iovec *last
    r.head = c.head
    r.type = <uint32_t>-1
    r.durable = False
    r.bytes = r.left = r.offset = 0
    r.count = 0
    r.status = NULL
    if c.writable == 0:
        return S_IOERR
    last = &c.iov[c.readable + c.writable - 1]
    last.iov_len -= 1
    r.status = <uint8_t *>last.iov_base + last.iov_len
    c.writable_bytes -= 1
    if last.iov_len == 0:
        c.writable -= 1
    if c.readable_bytes < HEADER_SIZE:
        return S_IOERR
    if c.iov[0].iov_len >= HEADER_SIZE:
        header[0] = chv_block_get64(<uint8_t *>c.iov[0].iov_base)
        header[1] = chv_block_get64(<uint8_t *>c.iov[0].iov_base + 8)
    else:
        iov_copy_out(c.iov, c.readable, 0, header, HEADER_SIZE)
    r.type = <uint32_t>header[0]
    if r.type == T_IN or r.type == T_OUT:
        return parse_transfer(d, c, r, header[1])
    if r.type == T_FLUSH:
        r.op = OP_SYNC
        return PENDING
    if r.type == T_GET_ID:
        r.bytes = iov_copy_in(c.iov + c.readable, c.writable, 0, d.serial, SERIAL_SIZE)
        return S_OK
    if r.type == T_DISCARD or r.type == T_WRITE_ZEROES:
        return S_IOERR if d.readonly else parse_ranges(d, c, r)
    return S_UNSUPP


cdef inline int range_mode(disk *d, request *r) noexcept nogil:
    """fallocate's mode for the next range."""
    if r.type == T_DISCARD or (r.ranges[0].flags & RANGE_UNMAP and d.unmap):
        return PUNCH_HOLE | KEEP_SIZE
    return ZERO_RANGE | KEEP_SIZE


cdef inline int failed(disk *d, request *r, int64_t error) noexcept nogil:
    if error == -EINTR or error == -EAGAIN:
        return RETRY
    if r.op == OP_RANGE and error == -EOPNOTSUPP:
        if r.type == T_DISCARD:
            return S_UNSUPP
        if chv_flag(&d.zero_range):
            chv_set_flag(&d.zero_range, 0)
            return RETRY
    return S_IOERR


cdef inline int advance(disk *d, request *r, int64_t result) noexcept nogil:
    """Take the result of a piece, bytes or a negative errno: PENDING, RETRY, or the request's status."""
    if result < 0:
        return failed(d, r, result)
    if r.op == OP_SYNC:
        return S_OK
    if r.op == OP_RANGE:
        r.ranges += 1
        r.count -= 1
        if r.count:
            return PENDING
        r.op = OP_SYNC
        return PENDING if r.durable else S_OK
    if result == 0:
        return S_IOERR  # a read behind the end: the file was truncated
    r.left -= <uint64_t>result
    if r.left == 0:
        return S_OK
    r.offset += <uint64_t>result
    skip(r, <uint64_t>result)
    return PENDING
