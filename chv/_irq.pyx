"""Interrupts of PCI devices, raised without the GIL by whatever thread has one to raise."""
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.unistd cimport write

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *, const void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_mutex_destroy(pthread_mutex_t *)

cdef extern from *:
    """
    #include <linux/kvm.h>
    #include <sys/ioctl.h>
    static void chv_set_line(int vm_fd, unsigned gsi, unsigned level) {
        struct kvm_irq_level request = { .irq = gsi, .level = level };
        ioctl(vm_fd, KVM_IRQ_LINE, &request);
    }
    #define chv_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define chv_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define chv_or8(p, v) __atomic_or_fetch((p), (v), __ATOMIC_ACQ_REL)
    #define chv_take8(p) __atomic_exchange_n((p), 0, __ATOMIC_ACQ_REL)
    """
    void chv_set_line(int vm_fd, uint32_t gsi, uint32_t level) nogil
    int chv_load(int *p) nogil
    void chv_store(int *p, int v) nogil
    uint8_t chv_or8(uint8_t *p, uint8_t v) nogil
    uint8_t chv_take8(uint8_t *p) nogil


cdef void irq_raise(irq_source *source) noexcept nogil:
    cdef uint64_t one = 1
    cdef int fd = chv_load(&source.fd)
    if fd >= 0:
        while write(fd, &one, 8) < 0 and errno == EINTR:
            pass
        return
    if fd == NOTHING or source.isr is NULL:
        return
    chv_or8(source.isr, source.isr_bit)
    if source.line is not NULL:
        line_assert(source.line, source.line_bit)


cdef void line_update(irq_line *line, uint32_t wanted, uint32_t gated) noexcept nogil:
    """Its new state; the caller holds the lock."""
    cdef bint before = line.asserted != 0
    line.wanted, line.gated = wanted, gated
    line.asserted = wanted & ~gated
    if before != (line.asserted != 0) and line.vm_fd >= 0:
        chv_set_line(line.vm_fd, line.gsi, not before)


cdef void line_assert(irq_line *line, uint32_t bit) noexcept nogil:
    pthread_mutex_lock(&line.lock)
    line_update(line, line.wanted | bit, line.gated)
    pthread_mutex_unlock(&line.lock)


cdef void line_deassert(irq_line *line, uint32_t bit) noexcept nogil:
    pthread_mutex_lock(&line.lock)
    line_update(line, line.wanted & ~bit, line.gated)
    pthread_mutex_unlock(&line.lock)


cdef class IrqLine:
    """A level-triggered GSI of the VM with descriptor ``vm_fd``, shared by up to 32 devices."""

    def __cinit__(self, int vm_fd, uint32_t gsi):
        pthread_mutex_init(&self.line.lock, NULL)
        self.line.vm_fd = vm_fd
        self.line.gsi = gsi

    def __dealloc__(self):
        pthread_mutex_destroy(&self.line.lock)

    @property
    def gsi(self) -> int:
        return self.line.gsi

    @property
    def asserted(self) -> int:
        """A bit for each device that asserts it now."""
        return self.line.asserted

    def disconnect(self) -> None:
        """The VM is about to close: nothing reaches it any more."""
        pthread_mutex_lock(&self.line.lock)
        self.line.vm_fd = -1
        pthread_mutex_unlock(&self.line.lock)


cdef class IrqStatus:
    """A device's ISR status, and the INTx pin that is asserted while it is not 0.

    ``line`` is None for a device without INTx; ``number`` (0 to 31) tells the devices of a line apart.
    """

    def __cinit__(self, IrqLine line=None, uint32_t number=0):
        self.line = line
        self.line_bit = <uint32_t>1 << (number & 31)

    def take(self) -> int:
        """Read and clear the status, as a guest does (virtio 1.2, 4.1.4.5.1): the pin goes low."""
        value = chv_take8(&self.isr)
        if self.line is not None:
            line_deassert(&self.line.line, self.line_bit)
        return value

    def gate(self, closed: bool) -> None:
        """While closed, the pin stays low whatever the status: a function's Interrupt Disable bit.

        An interrupt that waits is raised when it opens (PCI Local Bus 3.0, 6.2.2).
        """
        if self.line is None:
            return
        line = &self.line.line
        pthread_mutex_lock(&line.lock)
        line_update(line, line.wanted, line.gated | self.line_bit if closed else line.gated & ~self.line_bit)
        pthread_mutex_unlock(&line.lock)

    @property
    def value(self) -> int:
        """The status, not cleared."""
        return self.isr


cdef class IrqSource:
    """One cause of an interrupt; ``bit`` is what it sets in ``status``: 1 for a queue, 2 for the configuration.

    With ``status`` None and no vector set, interrupts go nowhere.
    """

    def __cinit__(self, IrqStatus status=None, uint8_t bit=1):
        self.status = status
        self.source.fd = -1
        if status is not None:
            self.source.isr = &status.isr
            self.source.isr_bit = bit
            if status.line is not None:
                self.source.line = &status.line.line
                self.source.line_bit = status.line_bit

    def use_message(self, fd: int) -> None:
        """From now on, interrupt by writing to the eventfd ``fd``."""
        chv_store(&self.source.fd, fd)

    def use_nothing(self) -> None:
        """From now on, raise nothing: MSI-X is on and the driver gave this cause no vector."""
        chv_store(&self.source.fd, NOTHING)

    def use_pin(self) -> None:
        """From now on, interrupt by ISR status and INTx."""
        chv_store(&self.source.fd, -1)

    def pulse(self) -> None:
        """Raise it, as a device does."""
        with nogil:
            irq_raise(&self.source)
