# cython: language_level=3
"""io_uring by its system calls: a ring of one thread (io_uring_setup(2), io_uring_enter(2); linux/io_uring.h)."""
from libc.errno cimport EINTR, errno
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.unistd cimport close, usleep

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/io_uring.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    /* Newer than the headers that we may be built with. */
    #define CHV_SETUP_COOP_TASKRUN (1U << 8)
    #define CHV_SETUP_SINGLE_ISSUER (1U << 12)
    #define CHV_SETUP_DEFER_TASKRUN (1U << 13)
    #define CHV_FEAT_RSRC_TAGS (1U << 10)
    #define CHV_POLL_ADD_MULTI (1U << 0)
    #define CHV_CQE_F_MORE (1U << 1)
    static int chv_uring_setup(unsigned entries, struct io_uring_params *p) {
        return (int)syscall(__NR_io_uring_setup, entries, p);
    }
    static int chv_uring_enter(int fd, unsigned submit, unsigned wait) {
        return (int)syscall(__NR_io_uring_enter, fd, submit, wait, IORING_ENTER_GETEVENTS, NULL, 0);
    }
    static int chv_uring_register(int fd, unsigned what, void *arg, unsigned count) {
        return (int)syscall(__NR_io_uring_register, fd, what, arg, count);
    }
    static void *chv_uring_map(int fd, size_t size, off_t offset) {
        void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);
        return at == MAP_FAILED ? NULL : at;
    }
    #define chv_load32(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define chv_store32(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    """
    struct io_sqring_offsets:
        uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array
    struct io_cqring_offsets:
        uint32_t head, tail, ring_mask, ring_entries, overflow, cqes
    struct io_uring_params:
        uint32_t sq_entries, cq_entries, flags, features
        io_sqring_offsets sq_off
        io_cqring_offsets cq_off
    struct io_uring_sqe:
        uint8_t opcode, flags
        int32_t fd
        uint64_t off, addr, user_data
        uint32_t len, rw_flags, fsync_flags, poll32_events
    struct io_uring_cqe:
        uint64_t user_data
        int32_t res
        uint32_t flags
    struct io_uring_probe_op:
        uint8_t op
        uint16_t flags
    struct io_uring_probe:
        uint8_t last_op, ops_len
        io_uring_probe_op *ops
    enum:
        IORING_FEAT_SINGLE_MMAP, IORING_FEAT_NODROP, IORING_FEAT_SUBMIT_STABLE
        IORING_OFF_SQ_RING, IORING_OFF_SQES
        IORING_REGISTER_FILES, IORING_REGISTER_PROBE
        IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_READ, IORING_OP_WRITE
        IORING_OP_FSYNC, IORING_OP_FALLOCATE, IORING_OP_POLL_ADD
        IORING_FSYNC_DATASYNC
        IOSQE_FIXED_FILE
        IO_URING_OP_SUPPORTED
        CHV_SETUP_COOP_TASKRUN, CHV_SETUP_SINGLE_ISSUER, CHV_SETUP_DEFER_TASKRUN
        CHV_FEAT_RSRC_TAGS, CHV_POLL_ADD_MULTI, CHV_CQE_F_MORE
    int chv_uring_setup(unsigned entries, io_uring_params *p) noexcept nogil
    int chv_uring_enter(int fd, unsigned submit, unsigned wait) noexcept nogil
    int chv_uring_register(int fd, unsigned what, void *arg, unsigned count) noexcept nogil
    void *chv_uring_map(int fd, size_t size, long offset) noexcept nogil
    int munmap(void *, size_t) noexcept nogil
    uint32_t chv_load32(uint32_t *p) noexcept nogil
    void chv_store32(uint32_t *p, uint32_t v) noexcept nogil

cdef enum:
    PROBED_OPS = 64

cdef struct uring:
    int fd
    uint8_t *rings          # both rings in one mapping (IORING_FEAT_SINGLE_MMAP)
    size_t rings_size
    io_uring_sqe *sqes
    size_t sqes_size
    uint32_t *sq_head
    uint32_t *sq_tail
    uint32_t sq_mask
    uint32_t prepared       # our tail: published when the kernel is entered
    uint32_t *cq_head
    uint32_t *cq_tail
    uint32_t cq_mask
    io_uring_cqe *cqes


cdef inline void uring_close(uring *u) noexcept nogil:
    if u.sqes is not NULL:
        munmap(u.sqes, u.sqes_size)
    if u.rings is not NULL:
        munmap(u.rings, u.rings_size)
    if u.fd >= 0:
        close(u.fd)
    memset(u, 0, sizeof(uring))
    u.fd = -1


cdef inline int uring_setup(uring *u, uint32_t entries, io_uring_params *p) noexcept nogil:
    """The ring's descriptor, with the most sparing way of completion that the kernel has; -1 with errno."""
    cdef uint32_t flags[3]
    cdef int i
    # Completions are made where we wait for them, not by interrupting the thread (Linux 6.1; 5.19).
    flags[0] = CHV_SETUP_SINGLE_ISSUER | CHV_SETUP_DEFER_TASKRUN
    flags[1] = CHV_SETUP_COOP_TASKRUN
    flags[2] = 0
    for i in range(3):
        memset(p, 0, sizeof(io_uring_params))
        p.flags = flags[i]
        u.fd = chv_uring_setup(entries, p)
        if u.fd >= 0 or errno != 22:  # EINVAL: a flag that this kernel does not know
            break
    return u.fd


cdef inline bint uring_has_operations(uring *u) noexcept nogil:
    """Whether the kernel knows all operations that are used here."""
    cdef uint32_t needed[7]
    cdef size_t size = sizeof(io_uring_probe) + PROBED_OPS * sizeof(io_uring_probe_op)
    cdef io_uring_probe *probe = <io_uring_probe *>calloc(1, size)
    cdef bint known = probe is not NULL
    cdef int i
    needed[:] = [IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_READ, IORING_OP_WRITE,
                 IORING_OP_FSYNC, IORING_OP_FALLOCATE, IORING_OP_POLL_ADD]
    if known:
        known = chv_uring_register(u.fd, IORING_REGISTER_PROBE, probe, PROBED_OPS) == 0
    for i in range(7):
        known = known and needed[i] <= probe.last_op and probe.ops[needed[i]].flags & IO_URING_OP_SUPPORTED
    free(probe)
    return known


cdef inline int uring_open(uring *u, uint32_t entries) noexcept nogil:
    """Make a ring for ``entries`` (a power of two) submissions at a time; 0, or an errno. Only this thread may use it."""
    cdef io_uring_params p
    cdef uint32_t i, needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE
    cdef uint32_t *array
    cdef int error
    memset(u, 0, sizeof(uring))
    u.fd = -1
    if uring_setup(u, entries, &p) < 0:
        return errno
    # RSRC_TAGS came with Linux 5.13, as multishot polls did, which have no flag of their own.
    needed |= CHV_FEAT_RSRC_TAGS
    if p.features & needed != needed or not uring_has_operations(u):
        uring_close(u)
        return 38  # ENOSYS
    u.rings_size = max(p.sq_off.array + p.sq_entries * sizeof(uint32_t),
                       p.cq_off.cqes + p.cq_entries * sizeof(io_uring_cqe))
    u.sqes_size = p.sq_entries * sizeof(io_uring_sqe)
    u.rings = <uint8_t *>chv_uring_map(u.fd, u.rings_size, IORING_OFF_SQ_RING)
    if u.rings is not NULL:
        u.sqes = <io_uring_sqe *>chv_uring_map(u.fd, u.sqes_size, IORING_OFF_SQES)
    if u.sqes is NULL:
        error = errno
        uring_close(u)
        return error
    u.sq_head = <uint32_t *>(u.rings + p.sq_off.head)
    u.sq_tail = <uint32_t *>(u.rings + p.sq_off.tail)
    u.sq_mask = p.sq_entries - 1
    u.cq_head = <uint32_t *>(u.rings + p.cq_off.head)
    u.cq_tail = <uint32_t *>(u.rings + p.cq_off.tail)
    u.cq_mask = p.cq_entries - 1
    u.cqes = <io_uring_cqe *>(u.rings + p.cq_off.cqes)
    array = <uint32_t *>(u.rings + p.sq_off.array)
    for i in range(p.sq_entries):
        array[i] = i
    return 0


cdef inline io_uring_sqe *uring_prepare(uring *u) noexcept nogil:
    """An empty submission, handed over by the next uring_enter. The caller never has more than ``entries``."""
    cdef io_uring_sqe *sqe = &u.sqes[u.prepared & u.sq_mask]
    u.prepared += 1
    memset(sqe, 0, sizeof(io_uring_sqe))
    return sqe


cdef inline void uring_enter(uring *u, bint wait) noexcept nogil:
    """Hand over what is prepared; with ``wait``, until something is complete. It may come back early."""
    cdef uint32_t waiting = u.prepared - chv_load32(u.sq_head)
    chv_store32(u.sq_tail, u.prepared)
    if chv_load32(u.cq_tail) != u.cq_head[0]:
        wait = False
    if chv_uring_enter(u.fd, waiting, wait) < 0 and errno != EINTR:
        usleep(100)  # EAGAIN, EBUSY: the kernel is short of memory; what is in flight frees some


cdef inline io_uring_cqe *uring_peek(uring *u) noexcept nogil:
    """The oldest completion; NULL: none."""
    cdef uint32_t head = u.cq_head[0]
    if head == chv_load32(u.cq_tail):
        return NULL
    return &u.cqes[head & u.cq_mask]


cdef inline void uring_seen(uring *u) noexcept nogil:
    chv_store32(u.cq_head, u.cq_head[0] + 1)
