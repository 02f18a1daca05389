# cython: language_level=3
"""The C-level devices of the exit benchmarks, as a user's own package would have them.

``benchmarks.build`` compiles this file beside chv's ``_bus.pxd``; docs/devices.md describes the interface.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from chv._bus cimport BUS_OK, BUS_SHUTDOWN, CDevice

cdef extern from *:
    """
    #include <stdint.h>
    #include <time.h>
    #include <unistd.h>
    #include <x86intrin.h>
    static inline uint64_t bench_ticks(void) { return __rdtsc(); }
    static void bench_wait(void) {
        struct timespec time = { .tv_nsec = 300 * 1000 };
        nanosleep(&time, 0);
    }
    /* As the floor's wake(): raise the interrupt when the guest has halted, the guest's TSC beside it. */
    static int bench_wake(volatile uint32_t *ready, volatile uint32_t *stamp, uint32_t count, int64_t offset,
                          int fd, const volatile int *stop) {
        uint64_t one = 1;
        for (uint32_t i = 1; i <= count; i++) {
            while (*ready < i) {
                if (*stop)
                    return 0;
                bench_wait();
            }
            bench_wait();
            *stamp = __rdtsc() + offset;
            if (write(fd, &one, 8) < 0)
                return -1;
        }
        return 0;
    }
    """
    uint64_t bench_ticks() noexcept nogil
    int bench_wake(uint32_t *ready, uint32_t *stamp, uint32_t count, int64_t offset, int fd,
                   const int *stop) noexcept nogil


def ticks() -> int:
    """The host's TSC."""
    return bench_ticks()


cdef class Waker:
    """Wakes a guest that halts, without the GIL; ``ready`` and ``stamp`` are addresses in this process."""

    cdef int stopped

    def run(self, size_t ready, size_t stamp, uint32_t count, int64_t offset, int fd) -> None:
        """Raise the interrupt ``count`` times; returns then, or after :meth:`stop`."""
        cdef int result
        with nogil:
            result = bench_wake(<uint32_t *>ready, <uint32_t *>stamp, count, offset, fd, &self.stopped)
        if result < 0:
            raise OSError("writing the eventfd")

    def stop(self) -> None:
        self.stopped = 1


cdef int register_read(void *ctx, uint64_t offset, uint32_t size, uint8_t *data) noexcept nogil:
    cdef uint64_t value = (<uint64_t *>ctx)[0]
    memcpy(data, &value, size)
    return BUS_OK


cdef int register_write(void *ctx, uint64_t offset, uint32_t size, const uint8_t *data) noexcept nogil:
    cdef uint64_t value = 0
    memcpy(&value, data, size)
    (<uint64_t *>ctx)[0] = value
    return BUS_OK


cdef class Register(CDevice):
    """What was written last is read; the floor's device does the same."""

    cdef uint64_t value

    def __cinit__(self):
        self.ops.read = register_read
        self.ops.write = register_write
        self.ops.ctx = &self.value


cdef struct output:
    uint8_t *bytes
    size_t used
    size_t capacity


cdef int output_read(void *ctx, uint64_t offset, uint32_t size, uint8_t *data) noexcept nogil:
    memset(data, 0xFF, size)
    return BUS_OK


cdef int output_write(void *ctx, uint64_t offset, uint32_t size, const uint8_t *data) noexcept nogil:
    cdef output *o = <output *>ctx
    if o.used < o.capacity:
        o.bytes[o.used] = data[0]
        o.used += 1
    return BUS_OK


cdef class Output(CDevice):
    """A port whose bytes are kept, up to ``capacity`` of them."""

    cdef output state

    def __cinit__(self, size_t capacity):
        self.state.bytes = <uint8_t *>malloc(capacity)
        if self.state.bytes is NULL:
            raise MemoryError
        self.state.capacity = capacity
        self.ops.read = output_read
        self.ops.write = output_write
        self.ops.ctx = &self.state

    def __dealloc__(self):
        free(self.state.bytes)

    def take(self) -> bytes:
        """What was written."""
        return self.state.bytes[:self.state.used]


cdef int done_write(void *ctx, uint64_t offset, uint32_t size, const uint8_t *data) noexcept nogil:
    return BUS_SHUTDOWN


cdef class Done(CDevice):
    """A write to it switches the machine off."""

    def __cinit__(self):
        self.ops.read = output_read
        self.ops.write = done_write
