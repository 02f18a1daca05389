# cython: language_level=3
"""Buses: address ranges, their handlers and the statistics of what was handled.

A device on the hot path is a subclass of CDevice that keeps its state in a C
struct and sets `ops` to two functions that get a pointer to that struct. They
run without the GIL, on any vCPU thread and on several at once, so they lock.
"""
from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t

# What a handler returns.
cdef enum:
    BUS_OK = 0
    BUS_RESET = 1        # the guest asked for a reset: leave the run loop
    BUS_SHUTDOWN = 2     # the guest asked for power off: leave the run loop
    BUS_DEFERRED = 3     # a C handler leaves this access to the device's deferred_read or deferred_write
    BUS_EXCEPTION = -2   # a Python handler raised; the exception is kept by the caller

# offset is relative to the range. size is 1, 2, 4 or 8; the access lies wholly in the range.
# data is little-endian guest bytes: `size` of them to fill (read) or to take (write).
ctypedef int (*bus_read_fn)(void *ctx, uint64_t offset, uint32_t size, uint8_t *data) noexcept nogil
ctypedef int (*bus_write_fn)(void *ctx, uint64_t offset, uint32_t size, const uint8_t *data) noexcept nogil

ctypedef struct device_ops:
    bus_read_fn read
    bus_write_fn write
    void *ctx

cdef class CDevice:
    cdef device_ops ops

cdef struct bus_range:
    uint64_t base
    uint64_t size
    device_ops ops       # ops.read is NULL for a Python handler
    PyObject *handler    # borrowed: the Bus keeps it alive
    uint32_t slot

cdef struct bus_table:
    bus_table *older      # the table that this one took the place of; it lives as long as the bus
    uint64_t *bases       # of the ranges, close together: a search looks at nothing else
    uint32_t count
    bus_range ranges[1]

cdef enum:
    MAX_MOVABLE = 256

cdef enum:
    HISTOGRAM_BUCKETS = 256   # four to each power of two of a tick count
    MAX_SLOTS = 2048

cpdef enum:
    FIRST_DEVICE_SLOT = 64    # slots below are KVM exit reasons

cdef struct slot_stats:
    uint64_t reads
    uint64_t writes
    uint64_t ticks
    uint64_t max_ticks
    uint64_t histogram[HISTOGRAM_BUCKETS]

cdef struct exit_stats:
    slot_stats *slots[MAX_SLOTS]

cdef class Bus:
    cdef bus_table *table
    cdef readonly str name
    cdef uint64_t limit
    cdef uint32_t hint    # of accesses that come from Python
    cdef object slots
    cdef list entries
    cdef dict handlers
    cdef bus_range *movable[MAX_MOVABLE]   # BARs: each stays where it is in memory, only its base changes
    cdef uint32_t movable_count
    cdef int _access(self, uint64_t address, uint32_t size, uint8_t *data, bint is_write) except? -1
    cdef bus_range *find(self, uint64_t address, uint64_t size, uint32_t *hint, uint64_t *offset) noexcept nogil
    cdef bus_range *find_movable(self, uint64_t address, uint64_t size, uint64_t *offset) noexcept nogil

cdef int bus_access(bus_range *entry, uint64_t offset, uint32_t size, uint8_t *data,
                    bint is_write, PyObject **error) noexcept nogil
cdef int bus_access_many(bus_range *entry, uint64_t offset, uint32_t size, uint32_t count, uint8_t *data,
                         bint is_write, PyObject **error) noexcept nogil
cdef object take_error(PyObject *error)
cdef int stats_record(exit_stats *stats, uint32_t slot, bint is_write, uint64_t ticks) noexcept nogil
cdef void stats_free(exit_stats *stats) noexcept nogil
cdef dict stats_snapshot(exit_stats *stats)
