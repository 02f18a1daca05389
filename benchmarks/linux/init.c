/*
 * The first program of a guest whose boot is timed: it sends the byte 2 (start of text) to the debug console,
 * then the kernel's log with what took long, then the byte 4 (end of transmission).
 *
 * It mounts nothing and needs no shell, so nothing of these is in the figure.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <time.h>
#include <unistd.h>

#include "mark.h"

#define SYSLOG_ACTION_READ_ALL 3
#define MIN_USECS 1000
/* Whoever counts exits has until then before the log adds its own. */
#define QUIET_USECS 200000

/* A byte costs an exit: only milestones and what took long go out. */
static int interesting(const char *line)
{
	static const char *const wanted[] = { "smp: Br", "smpboot: Total", "Unpacking initramfs", "Run /init" };
	const char *after = strstr(line, " after ");
	size_t i;

	for (i = 0; i < sizeof(wanted) / sizeof(*wanted); i++)
		if (strstr(line, wanted[i]))
			return 1;
	return strstr(line, "] initcall ") && after && atol(after + 7) >= MIN_USECS;
}

/* Busy: a guest that sleeps depends on its timer, which an emulated machine may lose. */
static void wait_usecs(long usecs)
{
	struct timespec start, now;

	clock_gettime(CLOCK_MONOTONIC, &start);
	do
		clock_gettime(CLOCK_MONOTONIC, &now);
	while ((now.tv_sec - start.tv_sec) * 1000000 + (now.tv_nsec - start.tv_nsec) / 1000 < usecs);
}

int main(void)
{
	static char log[1 << 20];
	char *line, *rest = log;

	mark_open();
	mark("\2");
	wait_usecs(QUIET_USECS);
	if (klogctl(SYSLOG_ACTION_READ_ALL, log, sizeof(log) - 1) > 0)
		while ((line = strsep(&rest, "\n")))
			if (interesting(line)) {
				mark(line);
				mark("\n");
			}
	mark("\4");
	for (;;)
		pause();
}
