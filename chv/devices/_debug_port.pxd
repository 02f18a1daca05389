from libc.stdint cimport int64_t, uint8_t, uint64_t

from .._bus cimport CDevice

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass

cdef enum:
    RECORDS = 256

cdef struct debug_record:
    int64_t ns
    uint8_t code

cdef struct debug_port:
    pthread_mutex_t lock
    uint64_t writes
    uint64_t recorded
    uint8_t code
    debug_record records[RECORDS]

cdef class DebugPort(CDevice):
    cdef debug_port port
