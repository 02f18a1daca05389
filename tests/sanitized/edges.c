/* Which edges of instrumented code were taken: -fsanitize-coverage=trace-pc calls this in each basic block.
 *
 * The map is AFL's idea: a counter for each pair of blocks that follow each other, told apart by a hash.
 * Threads share it; a count lost between them does no harm.
 */
#include <stdint.h>
#include <string.h>

#define SIZE 65536

static uint8_t map[SIZE];
static uint8_t known[SIZE]; /* a bit for each range of counts that was met at an edge */
static __thread uintptr_t previous;

__attribute__((no_sanitize_coverage)) void __sanitizer_cov_trace_pc(void)
{
    uintptr_t here = (uintptr_t)__builtin_return_address(0);
    here ^= here >> 15;
    uint8_t *count = &map[(here ^ previous) % SIZE];
    if (*count != 255)
        ++*count;
    previous = here >> 1;
}

static uint8_t range_of(uint8_t count)
{
    if (count < 4)
        return count == 3 ? 4 : count;
    return count < 8 ? 8 : count < 16 ? 16 : count < 32 ? 32 : count < 128 ? 64 : 128;
}

/* Forget the counts; how many edges, or ranges of counts at them, were met for the first time since chv_edges_forget. */
int chv_edges_new(void)
{
    int found = 0;
    for (int word = 0; word < SIZE; word += 8) {
        uint64_t counts;
        memcpy(&counts, &map[word], 8);
        for (int at = word; counts && at < word + 8; at++) {
            uint8_t range = range_of(map[at]);
            found += (range & ~known[at]) != 0;
            known[at] |= range;
        }
    }
    memset(map, 0, SIZE);
    return found;
}

/* As if nothing had run yet: importing modules takes thousands of edges that no input takes. */
void chv_edges_forget(void)
{
    memset(map, 0, SIZE);
    memset(known, 0, SIZE);
}

/* How many edges were ever met. */
int chv_edges_known(void)
{
    int found = 0;
    for (int at = 0; at < SIZE; at++)
        found += known[at] != 0;
    return found;
}
