"""A signal that kills the process must not leave the user's terminal in raw mode.

tcsetattr() may be called in a signal handler (POSIX.1-2017, 2.4.3), so this works whatever Python is doing.
"""
cdef extern from *:
    """
    #include <signal.h>
    #include <string.h>
    #include <termios.h>
    #include <unistd.h>
    static struct termios chv_guard_settings;
    static volatile sig_atomic_t chv_guard_fd = -1;
    static pid_t chv_guard_pid;
    static const int chv_guard_signals[] = {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGABRT,
                                            SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    #define CHV_GUARD_SIGNALS (sizeof chv_guard_signals / sizeof *chv_guard_signals)
    static void chv_guard_handler(int sig) {
        if (chv_guard_fd >= 0 && getpid() == chv_guard_pid)
            tcsetattr(chv_guard_fd, TCSANOW, &chv_guard_settings);
        raise(sig);   /* SA_RESETHAND: with its default action, as soon as this handler returns */
    }
    static int chv_guard(int fd) {
        struct sigaction action, old;
        size_t i;
        if (tcgetattr(fd, &chv_guard_settings) < 0)
            return -1;
        chv_guard_pid = getpid();
        chv_guard_fd = fd;
        memset(&action, 0, sizeof action);
        action.sa_handler = chv_guard_handler;
        action.sa_flags = SA_RESETHAND | SA_ONSTACK;
        sigfillset(&action.sa_mask);   /* SIGTTOU too: the terminal may belong to another group by now */
        for (i = 0; i < CHV_GUARD_SIGNALS; i++)
            if (sigaction(chv_guard_signals[i], 0, &old) == 0 && !(old.sa_flags & SA_SIGINFO)
                    && old.sa_handler == SIG_DFL)
                sigaction(chv_guard_signals[i], &action, 0);
        return 0;
    }
    static void chv_unguard(void) {
        struct sigaction old;
        size_t i;
        for (i = 0; i < CHV_GUARD_SIGNALS; i++)
            if (sigaction(chv_guard_signals[i], 0, &old) == 0 && !(old.sa_flags & SA_SIGINFO)
                    && old.sa_handler == chv_guard_handler)
                signal(chv_guard_signals[i], SIG_DFL);
        chv_guard_fd = -1;
    }
    """
    int chv_guard(int fd)
    void chv_unguard()
