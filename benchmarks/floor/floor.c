/*
 * The floor: the least C that runs the guests of benchmarks/guests.py and answers their exits.
 *
 *   floor ROM CPUS [WAKES]
 *
 * The guest's COM1 goes to standard output; how many exits reached the device, to standard error.
 * WAKES: how often to raise GSI 10 for a guest that halts. Nothing is configured that the guests do
 * not need: the vCPUs start at the reset vector as KVM makes them. Ioctls and exits: the kernel's
 * Documentation/virt/kvm/api.rst.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

enum { MEMORY = 32 << 20, ROM_SIZE = 0x10000, MAX_CPUS = 2, MAX_CPUID = 256 };
enum { PIO = 0xC010, PIO_EVENT = 0xC084, REGISTER_SIZE = 16, COM1 = 0x3F8, DONE_PORT = 0xF4, WAKE_GSI = 10 };
#define MMIO 0xD0000010u
#define MMIO_EVENT 0xD0000801u
#define MAILBOX 0x80000

static int vm;
static size_t run_size;
static unsigned char *memory;
static unsigned long wakes;
static _Atomic unsigned long pio_exits, mmio_exits;
static volatile uint64_t value; /* the device: what was written is read */

static int check(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

static void *map(size_t size, int flags, int fd)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);

	check(at == MAP_FAILED ? -1 : 0, "mmap");
	return at;
}

static void device(void *data, unsigned size, int is_write)
{
	uint64_t v = 0;

	if (is_write) {
		memcpy(&v, data, size);
		value = v;
	} else {
		v = value;
		memcpy(data, &v, size);
	}
}

static void finish(void)
{
	fflush(stdout);
	fprintf(stderr, "pio %lu mmio %lu\n", pio_exits, mmio_exits);
	_exit(0);
}

static void io(struct kvm_run *run)
{
	unsigned char *data = (unsigned char *)run + run->io.data_offset;
	int is_write = run->io.direction == KVM_EXIT_IO_OUT;
	unsigned i;

	if (run->io.port >= PIO && run->io.port < PIO + REGISTER_SIZE) {
		pio_exits++;
		for (i = 0; i < run->io.count; i++)
			device(data + i * run->io.size, run->io.size, is_write);
	} else if (run->io.port == COM1 && is_write) {
		fwrite(data, run->io.size, run->io.count, stdout);
	} else if (run->io.port == DONE_PORT && is_write) {
		finish();
	} else if (!is_write) {
		memset(data, 0xFF, run->io.size * run->io.count);
	}
}

static void mmio(struct kvm_run *run)
{
	if (run->mmio.phys_addr >= MMIO && run->mmio.phys_addr < MMIO + REGISTER_SIZE) {
		mmio_exits++;
		device(run->mmio.data, run->mmio.len, run->mmio.is_write);
	} else if (!run->mmio.is_write) {
		memset(run->mmio.data, 0xFF, run->mmio.len);
	}
}

static void *run_vcpu(void *argument)
{
	int fd = *(int *)argument;
	struct kvm_run *run = map(run_size, MAP_SHARED, fd);

	for (;;) {
		if (ioctl(fd, KVM_RUN, 0) < 0) {
			if (errno != EINTR && errno != EAGAIN)
				check(-1, "KVM_RUN");
		} else if (run->exit_reason == KVM_EXIT_IO) {
			io(run);
		} else if (run->exit_reason == KVM_EXIT_MMIO) {
			mmio(run);
		} else {
			fprintf(stderr, "exit reason %u\n", run->exit_reason);
			_exit(1);
		}
	}
}

static void set_cpuid(int kvm, int vcpu)
{
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + MAX_CPUID * sizeof cpuid->entries[0]);

	cpuid->nent = MAX_CPUID;
	check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
	check(ioctl(vcpu, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
	free(cpuid);
}

static void add_memory(unsigned slot, uint64_t base, size_t size, void *at)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .guest_phys_addr = base, .memory_size = size, .userspace_addr = (uintptr_t)at,
	};

	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
}

static void add_ioeventfd(uint64_t address, unsigned flags)
{
	struct kvm_ioeventfd request = {
		.addr = address, .len = 1, .fd = check(eventfd(0, 0), "eventfd"), .flags = flags,
	};

	check(ioctl(vm, KVM_IOEVENTFD, &request), "KVM_IOEVENTFD");
}

static void wait_a_little(void)
{
	struct timespec time = { .tv_nsec = 300 * 1000 };

	nanosleep(&time, NULL);
}

/* Raise the interrupt when the guest has halted, the guest's TSC of that moment beside it. */
static void *wake(void *argument)
{
	int64_t offset = *(int64_t *)argument;
	struct kvm_irqfd request = { .fd = check(eventfd(0, 0), "eventfd"), .gsi = WAKE_GSI };
	_Atomic uint32_t *ready = (_Atomic uint32_t *)(memory + MAILBOX);
	volatile uint32_t *stamp = (volatile uint32_t *)(memory + MAILBOX + 4);
	uint64_t one = 1;
	unsigned long i;

	check(ioctl(vm, KVM_IRQFD, &request), "KVM_IRQFD");
	for (i = 1; i <= wakes; i++) {
		while (*ready < i)
			wait_a_little();
		wait_a_little();
		*stamp = __rdtsc() + offset;
		check(write(request.fd, &one, 8), "write");
	}
	return NULL;
}

int main(int count, char **arguments)
{
	int kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	int cpus = count > 2 ? atoi(arguments[2]) : 1;
	int vcpus[MAX_CPUS];
	int rom_fd, i;
	unsigned char *rom;
	pthread_t thread;
	int64_t tsc_offset = 0;
	struct kvm_device_attr attribute = {
		.group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)&tsc_offset,
	};

	if (count < 2 || cpus < 1 || cpus > MAX_CPUS) {
		fprintf(stderr, "usage: floor ROM CPUS [WAKES]; 1 or 2 CPUs\n");
		return 2;
	}
	wakes = count > 3 ? strtoul(arguments[3], NULL, 10) : 0;
	vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	check(ioctl(vm, KVM_SET_TSS_ADDR, 0xF8000000), "KVM_SET_TSS_ADDR");
	check(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
	memory = map(MEMORY, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	rom = memory + 0xF0000;
	rom_fd = check(open(arguments[1], O_RDONLY), arguments[1]);
	check(read(rom_fd, rom, ROM_SIZE) == ROM_SIZE ? 0 : -1, "reading the image");
	add_memory(0, 0, MEMORY, memory);
	add_memory(1, 0xFFFF0000, ROM_SIZE, rom);
	add_ioeventfd(PIO_EVENT, KVM_IOEVENTFD_FLAG_PIO);
	add_ioeventfd(MMIO_EVENT, 0);
	run_size = check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	for (i = 0; i < cpus; i++) {
		vcpus[i] = check(ioctl(vm, KVM_CREATE_VCPU, i), "KVM_CREATE_VCPU");
		set_cpuid(kvm, vcpus[i]);
	}
	for (i = 1; i < cpus; i++)
		check(-pthread_create(&thread, NULL, run_vcpu, &vcpus[i]), "pthread_create");
	if (wakes) {
		check(ioctl(vcpus[0], KVM_GET_DEVICE_ATTR, &attribute), "KVM_GET_DEVICE_ATTR");
		check(-pthread_create(&thread, NULL, wake, &tsc_offset), "pthread_create");
	}
	run_vcpu(&vcpus[0]);
}
