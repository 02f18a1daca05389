from libc.stdint cimport int64_t

from .._bus cimport CDevice

cdef struct pm_timer:
    int64_t origin   # CLOCK_MONOTONIC ns at which the count was 0
    int64_t frozen   # ns counted when the timer was paused; -1 while it runs

cdef class PmTimer(CDevice):
    cdef pm_timer timer
