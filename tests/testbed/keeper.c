/*
 * Keeps the testbed's kernel from patching its own code while guests run.
 *
 * KVM counts vCPUs without a local APIC, with it disabled, or disabled by software, in
 * static keys: when a count leaves or reaches zero the kernel patches KVM's hot paths
 * while other CPUs run them. QEMU's TCG with one thread per CPU now and then executes the
 * breakpoint of such a patch when the patching is already over; then the machine dies.
 * One vCPU of each kind, made before everything else and kept, and no count is ever zero.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define APIC_BASE_ENABLE (1ULL << 11) /* IA32_APIC_BASE, Intel SDM volume 3, 11.4.4 */

static int kvm;

static int checked(int result, const char *what)
{
	if (result < 0)
		err(1, "keeper: %s", what);
	return result;
}

static int machine(int with_apic)
{
	int vm = checked(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");

	checked(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
	if (with_apic)
		checked(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
	return vm;
}

int main(void)
{
	struct kvm_sregs sregs;
	int with, vcpu;

	kvm = checked(open("/dev/kvm", O_RDWR), "/dev/kvm");
	checked(ioctl(machine(0), KVM_CREATE_VCPU, 0), "a vCPU without APIC");
	with = machine(1);
	checked(ioctl(with, KVM_CREATE_VCPU, 0), "a vCPU with APIC, off by software after reset");
	vcpu = checked(ioctl(with, KVM_CREATE_VCPU, 1), "a vCPU with APIC, to be switched off");
	checked(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.apic_base &= ~APIC_BASE_ENABLE;
	checked(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	for (;;)
		pause();
}
