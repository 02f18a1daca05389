/*
 * The first program of a guest whose vCPUs come and go. It says on the debug console (port 0xe9), a line each:
 *
 *   I     it runs             P n   vCPU n has become present
 *   B     it begins with      O n   vCPU n is online now
 *         bringing online     R n   vCPU n is gone
 *
 * What becomes present is brought online once no other has come for a while, so that the one does not delay
 * the news of the other.
 */
#include <linux/netlink.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <unistd.h>

#include "mark.h"

#define QUIET_MS 100
#define MAX_CPUS 1024

static char offline[MAX_CPUS];

static void say(char what, int cpu)
{
	char line[32];

	if (cpu < 0)
		sprintf(line, "%c\n", what);
	else
		sprintf(line, "%c %d\n", what, cpu);
	mark(line);
}

static void bring_online(void)
{
	char path[64];
	int cpu, fd, ok;

	say('B', -1);
	for (cpu = 0; cpu < MAX_CPUS; cpu++) {
		if (!offline[cpu])
			continue;
		offline[cpu] = 0;
		sprintf(path, "/sys/devices/system/cpu/cpu%d/online", cpu);
		fd = open(path, O_WRONLY);
		ok = fd >= 0 && write(fd, "1", 1) == 1;
		if (fd >= 0)
			close(fd);
		say(ok ? 'O' : 'F', cpu);
	}
}

int main(void)
{
	static char event[8192];
	struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = 1 };
	int events = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT);
	struct pollfd ready = { .fd = events, .events = POLLIN };
	int waiting = 0, cpu, size = 4 << 20;

	setsockopt(events, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
	mark_open();
	if (mount("sysfs", "/sys", "sysfs", 0, NULL) ||
	    bind(events, (struct sockaddr *)&address, sizeof(address)))
		return 1;
	say('I', -1);
	for (;;) {
		if (poll(&ready, 1, waiting ? QUIET_MS : -1) == 0) {
			waiting = 0;
			bring_online();
			continue;
		}
		size = recv(events, event, sizeof(event) - 1, 0);
		if (size <= 0)
			continue;
		event[size] = 0;
		if (sscanf(event, "add@/devices/system/cpu/cpu%d", &cpu) == 1 && cpu < MAX_CPUS) {
			say('P', cpu);
			offline[cpu] = waiting = 1;
		} else if (sscanf(event, "remove@/devices/system/cpu/cpu%d", &cpu) == 1) {
			say('R', cpu);
		}
	}
}
