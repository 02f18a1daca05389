/*
 * Saying something to the host: on the debug console, port 0xe9, as Bochs and QEMU's isa-debugcon have it.
 *
 * QEMU's emulation refuses a nested guest's ports to user space once a VMM has read the guest's segments: it
 * then takes the busy TSS for none. Where that is so, ttyS0 is used, which the kernel writes to.
 */
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/io.h>
#include <termios.h>
#include <unistd.h>

#define PORT 0xe9

static sigjmp_buf refused;
static int serial = -1;

static void on_refusal(int number)
{
	siglongjmp(refused, number);
}

/* Call it first; /dev/ttyS0 must exist. */
static void mark_open(void)
{
	struct termios raw;

	signal(SIGSEGV, on_refusal);
	if (!sigsetjmp(refused, 1) && ioperm(PORT, 1, 1) == 0) {
		inb(PORT);
	} else {
		serial = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
		if (tcgetattr(serial, &raw) == 0) {
			cfmakeraw(&raw);
			tcsetattr(serial, TCSANOW, &raw);
		}
	}
	signal(SIGSEGV, SIG_DFL);
}

static void mark(const char *text)
{
	if (serial < 0)
		outsb(PORT, text, strlen(text));
	else if (write(serial, text, strlen(text)) < 0)
		_exit(1);
}
