"""Port 0x80, where firmware and kernels leave progress codes (POST codes).

Old kernels also write it as a delay, thousands of times, so a write costs a lock and, when the code
differs from the one before, a clock reading and a slot in a ring.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from .._bus cimport BUS_OK, CDevice

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *, const void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_mutex_destroy(pthread_mutex_t *)


cdef int port_read(void *ctx, uint64_t offset, uint32_t size, uint8_t *data) noexcept nogil:
    memset(data, 0, size)
    data[0] = (<debug_port *>ctx).code
    return BUS_OK


cdef int port_write(void *ctx, uint64_t offset, uint32_t size, const uint8_t *data) noexcept nogil:
    cdef debug_port *port = <debug_port *>ctx
    cdef debug_record *record
    cdef timespec t
    pthread_mutex_lock(&port.lock)
    if port.writes == 0 or data[0] != port.code:
        clock_gettime(CLOCK_MONOTONIC, &t)
        record = &port.records[port.recorded % RECORDS]
        record.ns = <int64_t>t.tv_sec * 1000000000 + t.tv_nsec
        record.code = data[0]
        port.recorded += 1
    port.writes += 1
    port.code = data[0]
    pthread_mutex_unlock(&port.lock)
    return BUS_OK


cdef class DebugPort(CDevice):
    """The debug port: reading gives the code written last."""

    def __cinit__(self):
        pthread_mutex_init(&self.port.lock, NULL)
        self.ops.read = port_read
        self.ops.write = port_write
        self.ops.ctx = &self.port

    def __dealloc__(self):
        pthread_mutex_destroy(&self.port.lock)

    @property
    def writes(self) -> int:
        """How often the guest wrote the port."""
        return self.port.writes

    def records(self) -> list:
        """(code, CLOCK_MONOTONIC in ns) of the last 256 changes of the code, oldest first.

        A code written several times in a row is one record, of its first time.
        """
        cdef debug_port copy
        cdef uint64_t i
        with nogil:
            pthread_mutex_lock(&self.port.lock)
            copy = self.port
            pthread_mutex_unlock(&self.port.lock)
        first = max(0, <int64_t>copy.recorded - RECORDS)
        result = []
        for i in range(first, copy.recorded):
            result.append((copy.records[i % RECORDS].code, copy.records[i % RECORDS].ns))
        return result

    def save(self) -> dict:
        """``code``: the code written last. The records are the host's and are not saved."""
        return {"code": self.port.code}

    def load(self, state: dict) -> None:
        self.port.code = state["code"] & 0xFF

    def reset(self) -> None:
        """A reset leaves the code as it is: it tells how far the guest came."""
