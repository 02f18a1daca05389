# cython: language_level=3
"""How a PCI device interrupts: by a message (an eventfd that KVM turns into an MSI-X) or by its INTx pin."""
from libc.stdint cimport uint8_t, uint32_t


cdef extern from "<pthread.h>" nogil:
    ctypedef union pthread_mutex_t:
        pass

cdef enum:
    NOTHING = -2

# A level-triggered GSI. Several devices may share it; it is high while any of them asserts it.
cdef struct irq_line:
    pthread_mutex_t lock
    int vm_fd            # -1: the VM is gone
    uint32_t gsi
    uint32_t wanted      # a bit for each device with an interrupt
    uint32_t gated       # a bit for each device whose pin is disabled
    uint32_t asserted    # a bit for each device that holds the line high

# One cause of an interrupt of one device: a queue's, or that of a configuration change.
cdef struct irq_source:
    int fd               # the eventfd of its MSI-X vector; -1: by ISR status and pin; NOTHING: not at all
    uint8_t *isr         # the device's ISR status (virtio 1.2, 4.1.4.5); NULL: interrupts go nowhere
    uint8_t isr_bit      # what is set there when not by message: 1 a queue, 2 the configuration
    irq_line *line       # NULL: no INTx
    uint32_t line_bit    # the device's bit in line.asserted

cdef void irq_raise(irq_source *source) noexcept nogil
cdef void line_assert(irq_line *line, uint32_t bit) noexcept nogil
cdef void line_deassert(irq_line *line, uint32_t bit) noexcept nogil

cdef class IrqLine:
    cdef irq_line line

cdef class IrqStatus:
    """A device's ISR status byte and its INTx pin."""
    cdef uint8_t isr
    cdef readonly IrqLine line
    cdef uint32_t line_bit

cdef class IrqSource:
    cdef irq_source source
    cdef readonly IrqStatus status
