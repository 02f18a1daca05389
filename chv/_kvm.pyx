"""The KVM ioctls that chv uses, as methods; no policy.

Names and structures are those of linux/kvm.h; the kernel's
Documentation/virt/kvm/api.rst describes each call. A call that fails raises
:class:`chv.errors.KvmError` with the ioctl's name and errno.
"""
import os

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from .errors import KvmError

cdef extern from "sys/ioctl.h" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef enum:
    MAX_CPUID = 256
    MAX_MSRS = 1024

# function, index, flags, eax, ebx, ecx, edx
CpuidEntry = tuple[int, int, int, int, int, int, int]

CAPABILITIES = {
    "IRQCHIP": KVM_CAP_IRQCHIP,
    "USER_MEMORY": KVM_CAP_USER_MEMORY,
    "SET_TSS_ADDR": KVM_CAP_SET_TSS_ADDR,
    "EXT_CPUID": KVM_CAP_EXT_CPUID,
    "NR_VCPUS": KVM_CAP_NR_VCPUS,
    "MAX_VCPUS": KVM_CAP_MAX_VCPUS,
    "MAX_VCPU_ID": KVM_CAP_MAX_VCPU_ID,
    "MP_STATE": KVM_CAP_MP_STATE,
    "IRQ_ROUTING": KVM_CAP_IRQ_ROUTING,
    "IRQFD": KVM_CAP_IRQFD,
    "IOEVENTFD": KVM_CAP_IOEVENTFD,
    "SET_IDENTITY_MAP_ADDR": KVM_CAP_SET_IDENTITY_MAP_ADDR,
    "ADJUST_CLOCK": KVM_CAP_ADJUST_CLOCK,
    "IMMEDIATE_EXIT": KVM_CAP_IMMEDIATE_EXIT,
    "TSC_DEADLINE_TIMER": KVM_CAP_TSC_DEADLINE_TIMER,
    "X2APIC_API": KVM_CAP_X2APIC_API,
    "KVMCLOCK_CTRL": KVM_CAP_KVMCLOCK_CTRL,
    "VCPU_EVENTS": KVM_CAP_VCPU_EVENTS,
}

MP_STATES = {
    KVM_MP_STATE_RUNNABLE: "runnable",
    KVM_MP_STATE_UNINITIALIZED: "uninitialized",
    KVM_MP_STATE_INIT_RECEIVED: "init-received",
    KVM_MP_STATE_HALTED: "halted",
    KVM_MP_STATE_SIPI_RECEIVED: "sipi-received",
}
_MP_STATE_NUMBERS = {name: number for number, name in MP_STATES.items()}

GENERAL_REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12",
                     "r13", "r14", "r15", "rip", "rflags")


cdef int call(int fd, unsigned long request, void *argument, str name) except -1:
    cdef int result
    with nogil:
        result = ioctl(fd, request, argument)
    if result < 0:
        raise KvmError(errno, f"{name}: {os.strerror(errno)}")
    return result


cdef int call_value(int fd, unsigned long request, unsigned long value, str name) except -1:
    return call(fd, request, <void *>value, name)


cdef class _Fd:
    cdef readonly int fd

    def __cinit__(self):
        self.fd = -1

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def fileno(self) -> int:
        return self.fd

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


cdef class Kvm(_Fd):
    """/dev/kvm itself."""

    def __init__(self, path: str = "/dev/kvm"):
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise KvmError(error.errno, f"{path}: {error.strerror}; chv needs read and write access to it") from None
        try:
            version = call_value(self.fd, KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION")
        except KvmError as error:
            self.close()
            raise KvmError(error.errno, f"{path} is not KVM: {error.strerror}") from None
        if version != KVM_API_VERSION:
            self.close()
            raise KvmError(0, f"{path}: KVM API version is {version}; chv needs {KVM_API_VERSION}")

    def check_extension(self, name: str) -> int:
        """The value of a capability named as in CAPABILITIES; 0 when the host lacks it."""
        return call_value(self.fd, KVM_CHECK_EXTENSION, CAPABILITIES[name], "KVM_CHECK_EXTENSION")

    def vcpu_mmap_size(self) -> int:
        """Bytes of the area that a vCPU shares with this process."""
        return call_value(self.fd, KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")

    def supported_cpuid(self) -> list:
        """(function, index, flags, eax, ebx, ecx, edx) of each CPUID leaf that a guest can have."""
        cdef kvm_cpuid2 *cpuid = <kvm_cpuid2 *>calloc(1, sizeof(kvm_cpuid2) + MAX_CPUID * sizeof(kvm_cpuid_entry2))
        cdef kvm_cpuid_entry2 *e
        if cpuid is NULL:
            raise MemoryError
        cpuid.nent = MAX_CPUID
        try:
            call(self.fd, KVM_GET_SUPPORTED_CPUID, cpuid, "KVM_GET_SUPPORTED_CPUID")
            result = []
            for i in range(cpuid.nent):
                e = &cpuid.entries[i]
                result.append((e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx))
            return result
        finally:
            free(cpuid)

    def msr_indices(self) -> list:
        """The MSRs that KVM_GET_MSRS and KVM_SET_MSRS take on this host."""
        cdef kvm_msr_list *msrs = <kvm_msr_list *>calloc(1, sizeof(kvm_msr_list) + MAX_MSRS * sizeof(uint32_t))
        if msrs is NULL:
            raise MemoryError
        msrs.nmsrs = MAX_MSRS
        try:
            call(self.fd, KVM_GET_MSR_INDEX_LIST, msrs, "KVM_GET_MSR_INDEX_LIST")
            return [msrs.indices[i] for i in range(msrs.nmsrs)]
        finally:
            free(msrs)

    def create_vm(self) -> KvmVm:
        vm = KvmVm()
        while True:
            try:
                (<_Fd>vm).fd = call_value(self.fd, KVM_CREATE_VM, 0, "KVM_CREATE_VM")
                return vm
            except KvmError as error:
                if error.errno != 4:  # EINTR: a signal came while KVM waited for a lock
                    raise


cdef class KvmVm(_Fd):
    """One VM's descriptor."""

    def set_tss_address(self, address: int) -> None:
        call_value(self.fd, KVM_SET_TSS_ADDR, address, "KVM_SET_TSS_ADDR")

    def set_identity_map_address(self, address: int) -> None:
        cdef uint64_t value = address
        call(self.fd, KVM_SET_IDENTITY_MAP_ADDR, &value, "KVM_SET_IDENTITY_MAP_ADDR")

    def create_irqchip(self) -> None:
        """PICs, I/O APIC and local APICs in the kernel."""
        call_value(self.fd, KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP")

    def enable_x2apic_api(self, flags: int) -> None:
        cdef kvm_enable_cap cap
        memset(&cap, 0, sizeof(cap))
        cap.cap = KVM_CAP_X2APIC_API
        cap.args[0] = flags
        call(self.fd, KVM_ENABLE_CAP, &cap, "KVM_ENABLE_CAP(X2APIC_API)")

    def set_memory_region(self, slot: int, guest_address: int, size: int, address: int, flags: int = 0) -> None:
        """Back ``size`` bytes of guest-physical space by this process's memory; size 0 removes the slot."""
        cdef kvm_userspace_memory_region region
        region.slot = slot
        region.flags = flags
        region.guest_phys_addr = guest_address
        region.memory_size = size
        region.userspace_addr = address
        call(self.fd, KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION")

    def set_routes(self, pins: int, messages: dict) -> None:
        """Connect GSIs: 0 to ``pins`` - 1 to the I/O APIC's pins of the same number, those in ``messages`` to MSIs.

        ``messages``: GSI -> (address, data), as a PCI function would write them. GSIs in neither go nowhere.
        """
        cdef size_t count = pins + len(messages)
        cdef size_t size = sizeof(kvm_irq_routing) + count * sizeof(kvm_irq_routing_entry)
        cdef kvm_irq_routing *routing = <kvm_irq_routing *>calloc(1, size)
        cdef uint32_t i
        cdef uint32_t pin_count = pins
        cdef kvm_irq_routing_entry *entry
        if routing is NULL:
            raise MemoryError
        try:
            routing.nr = count
            for i in range(pin_count):
                routing.entries[i].gsi = i
                routing.entries[i].type = KVM_IRQ_ROUTING_IRQCHIP
                routing.entries[i].u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC
                routing.entries[i].u.irqchip.pin = i
            for i, (gsi, (address, data)) in enumerate(messages.items(), pins):
                entry = &routing.entries[i]
                entry.gsi = gsi
                entry.type = KVM_IRQ_ROUTING_MSI
                entry.u.msi.address_lo = address & 0xFFFFFFFF
                entry.u.msi.address_hi = address >> 32
                entry.u.msi.data = data
            call(self.fd, KVM_SET_GSI_ROUTING, routing, "KVM_SET_GSI_ROUTING")
        finally:
            free(routing)

    def irqfd(self, eventfd: int, gsi: int, assign: bool = True) -> None:
        """Let a write to ``eventfd`` raise ``gsi`` as an edge."""
        cdef kvm_irqfd request
        memset(&request, 0, sizeof(request))
        request.fd = eventfd
        request.gsi = gsi
        request.flags = 0 if assign else KVM_IRQFD_FLAG_DEASSIGN
        call(self.fd, KVM_IRQFD, &request, "KVM_IRQFD")

    def ioeventfd(self, eventfd: int, address: int, length: int, pio: bool = False, datamatch: int | None = None,
                  assign: bool = True) -> None:
        """Let a guest write at ``address`` signal ``eventfd`` without an exit to this process."""
        cdef kvm_ioeventfd request
        memset(&request, 0, sizeof(request))
        request.fd = eventfd
        request.addr = address
        request.len = length
        if pio:
            request.flags |= KVM_IOEVENTFD_FLAG_PIO
        if datamatch is not None:
            request.flags |= KVM_IOEVENTFD_FLAG_DATAMATCH
            request.datamatch = datamatch
        if not assign:
            request.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN
        call(self.fd, KVM_IOEVENTFD, &request, "KVM_IOEVENTFD")

    def clock(self) -> tuple:
        """(the guest's kvmclock in nanoseconds, the host's TSC at that instant, or None if it does not say)."""
        cdef kvm_clock_data data
        memset(&data, 0, sizeof(data))
        call(self.fd, KVM_GET_CLOCK, &data, "KVM_GET_CLOCK")
        return data.clock, data.host_tsc if data.flags & KVM_CLOCK_HOST_TSC else None

    def set_clock(self, nanoseconds: int) -> None:
        cdef kvm_clock_data data
        memset(&data, 0, sizeof(data))
        data.clock = nanoseconds
        call(self.fd, KVM_SET_CLOCK, &data, "KVM_SET_CLOCK")

    def create_vcpu(self, index: int) -> KvmVcpu:
        vcpu = KvmVcpu()
        (<_Fd>vcpu).fd = call_value(self.fd, KVM_CREATE_VCPU, index, f"KVM_CREATE_VCPU({index})")
        return vcpu


cdef class KvmVcpu(_Fd):
    """One vCPU's descriptor. Only the thread that runs the vCPU, or nobody, may be in KVM_RUN meanwhile."""

    def registers(self) -> dict:
        """The general registers by name."""
        cdef kvm_regs r
        call(self.fd, KVM_GET_REGS, &r, "KVM_GET_REGS")
        return {"rax": r.rax, "rbx": r.rbx, "rcx": r.rcx, "rdx": r.rdx, "rsi": r.rsi, "rdi": r.rdi, "rsp": r.rsp,
                "rbp": r.rbp, "r8": r.r8, "r9": r.r9, "r10": r.r10, "r11": r.r11, "r12": r.r12, "r13": r.r13,
                "r14": r.r14, "r15": r.r15, "rip": r.rip, "rflags": r.rflags}

    def set_registers(self, values: dict) -> None:
        """Set the general registers; those not named become 0."""
        cdef kvm_regs r
        unknown = set(values) - set(GENERAL_REGISTERS)
        if unknown:
            raise ValueError(f"registers: {', '.join(sorted(unknown))} unknown")
        get = values.get
        r.rax, r.rbx, r.rcx, r.rdx = get("rax", 0), get("rbx", 0), get("rcx", 0), get("rdx", 0)
        r.rsi, r.rdi, r.rsp, r.rbp = get("rsi", 0), get("rdi", 0), get("rsp", 0), get("rbp", 0)
        r.r8, r.r9, r.r10, r.r11 = get("r8", 0), get("r9", 0), get("r10", 0), get("r11", 0)
        r.r12, r.r13, r.r14, r.r15 = get("r12", 0), get("r13", 0), get("r14", 0), get("r15", 0)
        r.rip, r.rflags = get("rip", 0), get("rflags", 0)
        call(self.fd, KVM_SET_REGS, &r, "KVM_SET_REGS")

    def special_registers(self) -> dict:
        """Segments, descriptor tables and control registers, by name."""
        cdef kvm_sregs s
        call(self.fd, KVM_GET_SREGS, &s, "KVM_GET_SREGS")
        return {"cs": _segment(&s.cs), "ds": _segment(&s.ds), "es": _segment(&s.es), "fs": _segment(&s.fs),
                "gs": _segment(&s.gs), "ss": _segment(&s.ss), "tr": _segment(&s.tr), "ldt": _segment(&s.ldt),
                "gdt": {"base": s.gdt.base, "limit": s.gdt.limit},
                "idt": {"base": s.idt.base, "limit": s.idt.limit},
                "cr0": s.cr0, "cr2": s.cr2, "cr3": s.cr3, "cr4": s.cr4, "cr8": s.cr8, "efer": s.efer,
                "apic_base": s.apic_base}

    def set_special_registers(self, values: dict) -> None:
        """Set all of what :meth:`special_registers` returns."""
        cdef kvm_sregs s
        memset(&s, 0, sizeof(s))
        _set_segment(&s.cs, values["cs"])
        _set_segment(&s.ds, values["ds"])
        _set_segment(&s.es, values["es"])
        _set_segment(&s.fs, values["fs"])
        _set_segment(&s.gs, values["gs"])
        _set_segment(&s.ss, values["ss"])
        _set_segment(&s.tr, values["tr"])
        _set_segment(&s.ldt, values["ldt"])
        s.gdt.base, s.gdt.limit = values["gdt"]["base"], values["gdt"]["limit"]
        s.idt.base, s.idt.limit = values["idt"]["base"], values["idt"]["limit"]
        s.cr0, s.cr2, s.cr3, s.cr4 = values["cr0"], values["cr2"], values["cr3"], values["cr4"]
        s.cr8, s.efer, s.apic_base = values["cr8"], values["efer"], values["apic_base"]
        call(self.fd, KVM_SET_SREGS, &s, "KVM_SET_SREGS")

    def reset_fpu(self) -> None:
        """The x87 and SSE control words after a reset (Intel SDM vol. 3, table 10-1)."""
        cdef kvm_fpu fpu
        call(self.fd, KVM_GET_FPU, &fpu, "KVM_GET_FPU")
        fpu.fcw = 0x37F
        fpu.mxcsr = 0x1F80
        call(self.fd, KVM_SET_FPU, &fpu, "KVM_SET_FPU")

    def mp_state(self) -> str:
        """A name of MP_STATES."""
        cdef kvm_mp_state state
        call(self.fd, KVM_GET_MP_STATE, &state, "KVM_GET_MP_STATE")
        return MP_STATES.get(state.mp_state, str(state.mp_state))

    def set_mp_state(self, name: str) -> None:
        cdef kvm_mp_state state
        state.mp_state = _MP_STATE_NUMBERS[name]
        call(self.fd, KVM_SET_MP_STATE, &state, "KVM_SET_MP_STATE")

    def lapic(self) -> bytes:
        """The local APIC's 1024 bytes of registers."""
        cdef kvm_lapic_state state
        call(self.fd, KVM_GET_LAPIC, &state, "KVM_GET_LAPIC")
        return (<char *>state.regs)[:0x400]

    def set_lapic(self, registers: bytes) -> None:
        cdef kvm_lapic_state state
        if len(registers) != 0x400:
            raise ValueError(f"lapic: {len(registers)} bytes; exactly {0x400} are allowed")
        memcpy(state.regs, <char *>registers, 0x400)
        call(self.fd, KVM_SET_LAPIC, &state, "KVM_SET_LAPIC")

    def set_cpuid(self, entries: list) -> None:
        """Set the guest's CPUID leaves, in the form that Kvm.supported_cpuid returns."""
        cdef size_t count = len(entries)
        cdef kvm_cpuid2 *cpuid = <kvm_cpuid2 *>calloc(1, sizeof(kvm_cpuid2) + count * sizeof(kvm_cpuid_entry2))
        cdef kvm_cpuid_entry2 *e
        if cpuid is NULL:
            raise MemoryError
        try:
            cpuid.nent = count
            for i in range(count):
                e = &cpuid.entries[i]
                e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx = entries[i]
            call(self.fd, KVM_SET_CPUID2, cpuid, "KVM_SET_CPUID2")
        finally:
            free(cpuid)

    def set_msrs(self, values: dict) -> None:
        """Set MSRs; the error names the one that KVM refused."""
        cdef size_t count = len(values)
        cdef kvm_msrs *msrs = <kvm_msrs *>calloc(1, sizeof(kvm_msrs) + count * sizeof(kvm_msr_entry))
        if msrs is NULL:
            raise MemoryError
        try:
            msrs.nmsrs = count
            for i, (index, value) in enumerate(values.items()):
                msrs.entries[i].index = index
                msrs.entries[i].data = value
            done = call(self.fd, KVM_SET_MSRS, msrs, "KVM_SET_MSRS")
            if done != <int>count:
                raise KvmError(22, f"KVM_SET_MSRS: the host refuses MSR {list(values)[done]:#x}")
        finally:
            free(msrs)

    def msr(self, index: int) -> int:
        cdef uint64_t buffer[8]  # a header of 8 bytes and one entry of 16
        cdef kvm_msrs *msrs = <kvm_msrs *>buffer
        memset(buffer, 0, sizeof(buffer))
        msrs.nmsrs = 1
        msrs.entries[0].index = index
        if call(self.fd, KVM_GET_MSRS, msrs, "KVM_GET_MSRS") != 1:
            raise KvmError(22, f"KVM_GET_MSRS: the host does not give MSR {index:#x}")
        return msrs.entries[0].data

    def translate(self, address: int) -> int | None:
        """The guest-physical address of a linear one; None when nothing is mapped there."""
        cdef kvm_translation translation
        memset(&translation, 0, sizeof(translation))
        translation.linear_address = address
        call(self.fd, KVM_TRANSLATE, &translation, "KVM_TRANSLATE")
        return translation.physical_address if translation.valid else None

    def notify_paused(self) -> bool:
        """Tell the guest's kvmclock that it was stopped, so that its watchdogs forgive it.

        False when the guest uses no kvmclock on this vCPU (EINVAL).
        """
        try:
            call_value(self.fd, KVM_KVMCLOCK_CTRL, 0, "KVM_KVMCLOCK_CTRL")
        except KvmError as error:
            if error.errno != 22:
                raise
            return False
        return True

    def tsc_khz(self) -> int:
        """How fast the guest's TSC counts, in kHz."""
        return call_value(self.fd, KVM_GET_TSC_KHZ, 0, "KVM_GET_TSC_KHZ")

    def tsc_offset(self) -> int | None:
        """What KVM adds to the host's TSC for this vCPU; None where the host cannot tell."""
        cdef int64_t value = 0
        cdef kvm_device_attr attr
        memset(&attr, 0, sizeof(attr))
        attr.group = KVM_VCPU_TSC_CTRL
        attr.attr = KVM_VCPU_TSC_OFFSET
        attr.addr = <uint64_t><size_t>&value
        if ioctl(self.fd, KVM_HAS_DEVICE_ATTR, &attr) != 0:
            return None
        call(self.fd, KVM_GET_DEVICE_ATTR, &attr, "KVM_GET_DEVICE_ATTR(TSC_OFFSET)")
        return value

    def set_tsc_offset(self, value: int) -> None:
        cdef int64_t c_value = value
        cdef kvm_device_attr attr
        memset(&attr, 0, sizeof(attr))
        attr.group = KVM_VCPU_TSC_CTRL
        attr.attr = KVM_VCPU_TSC_OFFSET
        attr.addr = <uint64_t><size_t>&c_value
        call(self.fd, KVM_SET_DEVICE_ATTR, &attr, "KVM_SET_DEVICE_ATTR(TSC_OFFSET)")


cdef dict _segment(kvm_segment *s):
    return {"base": s.base, "limit": s.limit, "selector": s.selector, "type": s.type, "present": s.present,
            "dpl": s.dpl, "db": s.db, "s": s.s, "l": s.l, "g": s.g, "avl": s.avl, "unusable": s.unusable}


cdef int _set_segment(kvm_segment *s, dict v) except -1:
    s.base, s.limit, s.selector, s.type = v["base"], v["limit"], v["selector"], v["type"]
    s.present, s.dpl, s.db, s.s = v["present"], v["dpl"], v["db"], v["s"]
    s.l, s.g, s.avl, s.unusable = v["l"], v["g"], v["avl"], v["unusable"]
    return 0
