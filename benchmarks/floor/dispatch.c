/*
 * The floor of benchmarks.dispatch: exits that are replayed without KVM, told apart by C.
 *
 * Two ways: a switch, which the compiler turns into what it thinks best (the cases are generated for the
 * trace's devices and come in by -include), and a binary search in a table. Each device is a register, in a
 * function of its own as a device would be.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct access {
	uint64_t address;
	uint8_t size, is_write, is_pio, unused[5];
};

struct range {
	uint64_t base, size;
	int (*handler)(void *, uint64_t, uint32_t, uint8_t *, int);
	void *context;
};

enum { MAX_RANGES = 1024 };

static uint64_t registers[MAX_RANGES];

__attribute__((noinline)) static int device(void *context, uint64_t offset, uint32_t size, uint8_t *data, int is_write)
{
	(void)offset;
	if (is_write) {
		uint64_t value = 0;

		memcpy(&value, data, size);
		*(uint64_t *)context = value;
	} else {
		memcpy(data, context, size);
	}
	return 0;
}

#define FOUND(index, first, last) \
	(address + size - 1 <= (last) ? device(&registers[index], address - (first), size, data, is_write) : -1)

static int by_switch(const struct access *a, uint8_t *data)
{
	uint64_t address = a->address;
	uint32_t size = a->size;
	int is_write = a->is_write;

	if (a->is_pio)
		switch (address) {
			PIO_CASES
		default:
			return -1;
		}
	switch (address) {
		MMIO_CASES
	default:
		return -1;
	}
}

static struct range tables[2][MAX_RANGES];
static size_t counts[2];

/* Ranges come in the order of their addresses; 1: ports. */
void floor_add(int is_pio, uint64_t base, uint64_t size)
{
	size_t number = counts[0] + counts[1];

	tables[is_pio][counts[is_pio]++] = (struct range){ base, size, device, &registers[number] };
}

void floor_clear(void)
{
	counts[0] = counts[1] = 0;
}

static int by_search(const struct access *a, uint8_t *data)
{
	const struct range *table = tables[a->is_pio];
	size_t low = 0, high = counts[a->is_pio];

	while (low < high) {
		size_t middle = (low + high) / 2;

		if (a->address < table[middle].base) {
			high = middle;
		} else if (a->address - table[middle].base >= table[middle].size) {
			low = middle + 1;
		} else {
			uint64_t offset = a->address - table[middle].base;

			if (table[middle].size - offset < a->size)
				return -1;
			return table[middle].handler(table[middle].context, offset, a->size, data, a->is_write);
		}
	}
	return -1;
}

/* How many of the accesses belonged to a device. */
size_t replay_switch(const struct access *accesses, size_t count)
{
	uint8_t data[8] = { 0 };
	size_t claimed = 0;

	for (size_t i = 0; i < count; i++) {
		if (by_switch(&accesses[i], data) == 0)
			claimed++;
		else if (!accesses[i].is_write)
			memset(data, 0xFF, accesses[i].size);
	}
	return claimed;
}

size_t replay_search(const struct access *accesses, size_t count)
{
	uint8_t data[8] = { 0 };
	size_t claimed = 0;

	for (size_t i = 0; i < count; i++) {
		if (by_search(&accesses[i], data) == 0)
			claimed++;
		else if (!accesses[i].is_write)
			memset(data, 0xFF, accesses[i].size);
	}
	return claimed;
}
