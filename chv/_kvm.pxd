# cython: language_level=3
"""What chv uses of linux/kvm.h (Documentation/virt/kvm/api.rst describes each)."""
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "linux/kvm.h" nogil:
    enum:
        KVM_API_VERSION
        KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE
        KVM_GET_SUPPORTED_CPUID, KVM_GET_MSR_INDEX_LIST
        KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR, KVM_CREATE_IRQCHIP, KVM_SET_USER_MEMORY_REGION
        KVM_IRQFD, KVM_IOEVENTFD, KVM_SET_GSI_ROUTING, KVM_CREATE_VCPU, KVM_GET_CLOCK, KVM_SET_CLOCK
        KVM_ENABLE_CAP, KVM_IRQ_LINE, KVM_GET_IRQCHIP
        KVM_GET_REGS, KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS, KVM_GET_FPU, KVM_SET_FPU
        KVM_GET_MP_STATE, KVM_SET_MP_STATE, KVM_GET_LAPIC, KVM_SET_LAPIC, KVM_SET_CPUID2
        KVM_GET_MSRS, KVM_SET_MSRS, KVM_TRANSLATE, KVM_KVMCLOCK_CTRL, KVM_RUN, KVM_NMI
        KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, KVM_GET_TSC_KHZ
        KVM_SET_DEVICE_ATTR, KVM_GET_DEVICE_ATTR, KVM_HAS_DEVICE_ATTR
        KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVM_CLOCK_HOST_TSC
        KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI
        KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC
        KVM_IOEVENTFD_FLAG_PIO, KVM_IOEVENTFD_FLAG_DATAMATCH, KVM_IOEVENTFD_FLAG_DEASSIGN
        KVM_CPUID_FLAG_SIGNIFCANT_INDEX

        KVM_CAP_IRQCHIP, KVM_CAP_USER_MEMORY, KVM_CAP_SET_TSS_ADDR, KVM_CAP_EXT_CPUID, KVM_CAP_NR_VCPUS
        KVM_CAP_MP_STATE, KVM_CAP_IRQ_ROUTING, KVM_CAP_IRQFD, KVM_CAP_IOEVENTFD
        KVM_CAP_SET_IDENTITY_MAP_ADDR, KVM_CAP_ADJUST_CLOCK, KVM_CAP_MAX_VCPUS, KVM_CAP_IMMEDIATE_EXIT
        KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_X2APIC_API, KVM_CAP_KVMCLOCK_CTRL, KVM_CAP_VCPU_EVENTS
        KVM_CAP_MAX_VCPU_ID, KVM_CAP_GET_TSC_KHZ, KVM_CAP_VCPU_ATTRIBUTES

        KVM_EXIT_UNKNOWN, KVM_EXIT_EXCEPTION, KVM_EXIT_IO, KVM_EXIT_HYPERCALL, KVM_EXIT_DEBUG, KVM_EXIT_HLT
        KVM_EXIT_MMIO, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_SHUTDOWN, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTR
        KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_IOAPIC_EOI
        KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT
        KVM_SYSTEM_EVENT_SHUTDOWN, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_CRASH

        KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_INIT_RECEIVED
        KVM_MP_STATE_HALTED, KVM_MP_STATE_SIPI_RECEIVED

    struct kvm_regs:
        uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp
        uint64_t r8, r9, r10, r11, r12, r13, r14, r15
        uint64_t rip, rflags

    struct kvm_segment:
        uint64_t base
        uint32_t limit
        uint16_t selector
        uint8_t type, present, dpl, db, s, l, g, avl, unusable

    struct kvm_dtable:
        uint64_t base
        uint16_t limit

    struct kvm_sregs:
        kvm_segment cs, ds, es, fs, gs, ss, tr, ldt
        kvm_dtable gdt, idt
        uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base
        uint64_t interrupt_bitmap[4]

    struct kvm_fpu:
        uint16_t fcw
        uint32_t mxcsr

    struct kvm_mp_state:
        uint32_t mp_state

    struct kvm_lapic_state:
        char regs[0x400]

    struct kvm_userspace_memory_region:
        uint32_t slot, flags
        uint64_t guest_phys_addr, memory_size, userspace_addr

    struct kvm_cpuid_entry2:
        uint32_t function, index, flags, eax, ebx, ecx, edx

    struct kvm_cpuid2:
        uint32_t nent
        kvm_cpuid_entry2 entries[0]

    struct kvm_msr_entry:
        uint32_t index
        uint64_t data

    struct kvm_msrs:
        uint32_t nmsrs
        kvm_msr_entry entries[0]

    struct kvm_msr_list:
        uint32_t nmsrs
        uint32_t indices[0]

    struct kvm_translation:
        uint64_t linear_address, physical_address
        uint8_t valid

    struct kvm_irqfd:
        uint32_t fd, gsi, flags, resamplefd

    struct kvm_ioeventfd:
        uint64_t datamatch, addr
        uint32_t len
        int32_t fd
        uint32_t flags

    struct _routing_irqchip "kvm_irq_routing_irqchip":
        uint32_t irqchip, pin

    struct _routing_msi "kvm_irq_routing_msi":
        uint32_t address_lo, address_hi, data

    union _routing_u:
        _routing_irqchip irqchip
        _routing_msi msi

    struct kvm_irq_routing_entry:
        uint32_t gsi, type, flags
        _routing_u u

    struct kvm_irq_routing:
        uint32_t nr, flags
        kvm_irq_routing_entry entries[0]

    struct kvm_clock_data:
        uint64_t clock
        uint32_t flags
        uint64_t realtime
        uint64_t host_tsc

    struct kvm_enable_cap:
        uint32_t cap, flags
        uint64_t args[4]

    struct kvm_device_attr:
        uint32_t flags, group
        uint64_t attr, addr

    struct _run_io:
        uint8_t direction, size
        uint16_t port
        uint32_t count
        uint64_t data_offset

    struct _run_mmio:
        uint64_t phys_addr
        uint8_t data[8]
        uint32_t len
        uint8_t is_write

    struct _run_hw:
        uint64_t hardware_exit_reason

    struct _run_fail_entry:
        uint64_t hardware_entry_failure_reason
        uint32_t cpu

    struct _run_internal:
        uint32_t suberror, ndata
        uint64_t data[16]

    struct _run_system_event:
        uint32_t type

    struct _run_ex:
        uint32_t exception, error_code

    struct kvm_run:
        uint8_t request_interrupt_window
        uint8_t immediate_exit
        uint32_t exit_reason
        uint8_t ready_for_interrupt_injection, if_flag
        uint64_t cr8, apic_base
        _run_hw hw
        _run_fail_entry fail_entry
        _run_ex ex
        _run_io io
        _run_mmio mmio
        _run_internal internal
        _run_system_event system_event
