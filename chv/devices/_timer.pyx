"""The ACPI power management timer.

A free-running 32-bit counter at 3.579545 MHz (ACPI 6.5, 4.8.3.3 and the FADT flag TMR_VAL_EXT),
made from CLOCK_MONOTONIC. Reads take no lock.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from .._bus cimport BUS_OK, CDevice

cdef extern from *:
    """
    #define chv_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define chv_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    """
    int64_t chv_load(int64_t *p) nogil
    void chv_store(int64_t *p, int64_t v) nogil

cdef enum:
    NS = 1000000000
    HZ = 3579545

FREQUENCY = HZ
"""Counts per second."""


cdef int64_t now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * NS + t.tv_nsec


cdef int64_t elapsed_ns(pm_timer *timer) noexcept nogil:
    cdef int64_t frozen = chv_load(&timer.frozen)
    return frozen if frozen >= 0 else now_ns() - chv_load(&timer.origin)


cdef int timer_read(void *ctx, uint64_t offset, uint32_t size, uint8_t *data) noexcept nogil:
    cdef uint64_t elapsed = <uint64_t>elapsed_ns(<pm_timer *>ctx)
    # Seconds and the rest apart: the product of nanoseconds and frequency leaves 64 bits after 43 minutes.
    cdef uint64_t count = elapsed // NS * HZ + elapsed % NS * HZ // NS
    memset(data, 0, size)
    if offset < 4:
        memcpy(data, <uint8_t *>&count + offset, min(size, <uint32_t>(4 - offset)))
    return BUS_OK


cdef int timer_write(void *ctx, uint64_t offset, uint32_t size, const uint8_t *data) noexcept nogil:
    return BUS_OK


cdef class PmTimer(CDevice):
    """The PM timer's four bytes: any part reads as it is at that moment, writes are ignored."""

    def __cinit__(self):
        self.timer.origin = now_ns()
        self.timer.frozen = -1
        self.ops.read = timer_read
        self.ops.write = timer_write
        self.ops.ctx = &self.timer

    def pause(self) -> None:
        """Stand still. Pausing twice is pausing once."""
        if self.timer.frozen < 0:
            chv_store(&self.timer.frozen, now_ns() - self.timer.origin)

    def resume(self) -> None:
        """Go on from the count at which :meth:`pause` stopped."""
        if self.timer.frozen >= 0:
            chv_store(&self.timer.origin, now_ns() - self.timer.frozen)
            chv_store(&self.timer.frozen, -1)

    def save(self) -> dict:
        """``elapsed_ns``: how long the timer has counted."""
        return {"elapsed_ns": elapsed_ns(&self.timer)}

    def load(self, state: dict) -> None:
        """Take over a saved count; a paused timer stays paused."""
        cdef int64_t elapsed = max(0, state["elapsed_ns"])
        if self.timer.frozen >= 0:
            chv_store(&self.timer.frozen, elapsed)
        else:
            chv_store(&self.timer.origin, now_ns() - elapsed)
