"""The state of a 16550A, shared by vCPU threads and the two host threads under one lock."""
from libc.stdint cimport uint8_t, uint64_t

from .._bus cimport CDevice

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass

cdef enum:
    FIFO_SIZE = 16
    INPUT_SIZE = 16384     # host bytes that wait for the guest
    OUTPUT_SIZE = 131072   # guest bytes that wait for the host; both are powers of two

cdef struct uart:
    pthread_mutex_t lock
    pthread_cond_t progress   # output went out, or will not go out
    int irq_fd
    # Registers (PC16550D data sheet, table 2)
    uint8_t ier
    uint8_t fcr
    uint8_t lcr
    uint8_t mcr
    uint8_t msr
    uint8_t scr
    uint8_t dll
    uint8_t dlm
    uint8_t overrun           # LSR bit 1
    uint8_t thre              # LSR bits 5 and 6: the output ring has room for a FIFO's worth
    uint8_t thre_pending      # the interrupt of THRE, until IIR is read or THR is written
    uint8_t active            # causes that the interrupt line shows
    uint8_t looked            # IIR or LSR was read since the last pulse
    uint8_t break_waiting
    uint8_t fifo_first
    uint8_t fifo_count
    uint8_t fifo[FIFO_SIZE]
    uint8_t fifo_flags[FIFO_SIZE]   # LSR bits that belong to the character
    # The host's side
    int wake_reader
    int wake_writer
    uint8_t reader_waiting    # for room in input
    uint8_t writer_idle       # for something in output
    uint8_t stopping
    uint8_t discard           # output goes nowhere
    uint8_t lossy             # nobody reads: keep the newest output only
    int error                 # errno of the write that failed
    int input_error
    uint64_t write_errors
    uint64_t overruns
    uint64_t dropped
    uint64_t interrupts
    uint64_t input_put
    uint64_t input_taken
    uint64_t output_put
    uint64_t output_taken
    uint8_t input[INPUT_SIZE]
    uint8_t output[OUTPUT_SIZE]

cdef class Serial(CDevice):
    cdef uart u
