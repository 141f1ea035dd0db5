/* SPDX-License-Identifier: MIT */
/*
 * snapshot-shim.so, which snapshot-run loads into a program: the machine is
 * saved between the program's start and its main(), so that no run has an exec
 *
 * It tells the host of a program that ends by itself with a status that is no
 * crash. All other ends are snapshot-run's, which waits for the process.
 */

#define _GNU_SOURCE

#include <dlfcn.h>
#include <inttypes.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/shm.h>

#include "snapshot-target.h"

/* Linux 5.14's; an older kernel refuses them, and pages are had when used. */
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ      22
#define MADV_POPULATE_WRITE     23
#endif
/* A sanitizer's shadow is much larger, and not to be had as a whole. */
#define POPULATE_MOST           (16 << 20)
#define STACK_SIZE              16384

typedef int Main(int, char **, char **);

static Main *real_main;
static struct snapshot_target *target;
static struct snapshot device;
static int quick_status;

static void __attribute__((noreturn)) fail(const char *what, const char *why)
{
    dprintf(STDERR_FILENO, "snapshot-shim.so: %s: %s\n", what, why);
    _exit(1);
}

/* The program's end, unless that is for snapshot-run to tell */
static void finish(int status)
{
    status &= 0xff;
    if (target && target->ready && getpid() == target->pid &&
        status != target->crash_status && !target->whole_end) {
        snapshot_done(&device, SNAPSHOT_RESULT_OK);
    }
}

static void finish_exit(int status, void *opaque)
{
    (void)opaque;
    finish(status);
}

static void finish_quick_exit(void)
{
    finish(quick_status);
}

static void *next(const char *name)
{
    void *p = dlsym(RTLD_NEXT, name);

    if (!p) {
        fail(name, "not in the C library");
    }
    return p;
}

void __attribute__((noreturn)) _exit(int status)
{
    void (*real)(int) __attribute__((noreturn)) = next("_exit");

    finish(status);
    real(status);
}

void __attribute__((noreturn)) _Exit(int status)
{
    _exit(status);
}

void __attribute__((noreturn)) quick_exit(int status)
{
    void (*real)(int) __attribute__((noreturn)) = next("quick_exit");

    quick_status = status;
    real(status);
}

/* snapshot-run learns of the signal, but not of the address. */
static void fault(int sig, siginfo_t *info, void *context)
{
    (void)context;
    target->fault_pid = getpid();
    target->fault_signal = sig;
    target->fault_address = (uintptr_t)info->si_addr;
    signal(sig, SIG_DFL);
    if (info->si_code <= 0) {
        /* Somebody has sent it: it does not come by itself again. */
        target->fault_signal = 0;
        raise(sig);
    }
}

/* Those for which the program, or its sanitizer, has a handler are its own. */
static void watch_faults(void)
{
    static const int signals[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP };
    static char stack[STACK_SIZE];
    const stack_t alternate = { .ss_sp = stack, .ss_size = sizeof(stack) };
    struct sigaction old, action = { .sa_sigaction = fault,
                                     .sa_flags = SA_SIGINFO | SA_ONSTACK };
    stack_t used;

    if (!sigaltstack(NULL, &used) && (used.ss_flags & SS_DISABLE)) {
        sigaltstack(&alternate, NULL);
    }
    for (unsigned i = 0; i < sizeof(signals) / sizeof(*signals); i++) {
        if (!sigaction(signals[i], NULL, &old) &&
            !(old.sa_flags & SA_SIGINFO) && old.sa_handler == SIG_DFL) {
            sigaction(signals[i], &action, NULL);
        }
    }
}

/* Have all pages that the program may touch, so that no run has to get them. */
static void populate(void)
{
    FILE *f = fopen("/proc/self/maps", "re");
    uintptr_t from, to;
    char mode[5];

    while (f && fscanf(f, "%" SCNxPTR "-%" SCNxPTR " %4s%*[^\n]", &from, &to,
                       mode) == 3) {
        if (to - from <= POPULATE_MOST && mode[0] == 'r') {
            madvise((void *)from, to - from, mode[1] == 'w' ?
                    MADV_POPULATE_WRITE : MADV_POPULATE_READ);
        }
    }
    if (f) {
        fclose(f);
    }
}

static void *attach(int id, const char *what)
{
    void *p = shmat(id, NULL, 0);

    if (p == (void *)-1) {
        fail(what, strerror(errno));
    }
    return p;
}

static void start(const char *id)
{
    int fd = STDIN_FILENO, err;
    unsigned char *map;
    int64_t n;

    target = attach(atoi(id), "shared memory");
    if (target->version != SNAPSHOT_TARGET_VERSION) {
        fail("version", "snapshot-run is another's");
    }
    /* The program's children are not our business. */
    unsetenv(SNAPSHOT_TARGET_ENV);
    unsetenv("LD_BIND_NOW");
    if (*target->preload) {
        setenv("LD_PRELOAD", target->preload, 1);
    } else {
        unsetenv("LD_PRELOAD");
    }
    map = attach(target->map_id, "coverage map");
    if (*target->file) {
        fd = open(target->file, O_WRONLY | O_CLOEXEC);
        if (fd < 0) {
            fail(target->file, strerror(errno));
        }
    }
    err = snapshot_open(&device);
    if (err < 0) {
        fail("device", snapshot_strerror(err));
    }
    watch_faults();
    populate();

    n = snapshot_target_ready(&device, target, map);
    if (n < 0) {
        fail("READY", snapshot_strerror(n));
    }
    err = snapshot_target_put_input(target, fd, n);
    if (err) {
        target->error = err;
        _exit(1);
    }
    if (fd != STDIN_FILENO) {
        close(fd);
    }
}

static int shim_main(int argc, char **argv, char **envp)
{
    const char *id = getenv(SNAPSHOT_TARGET_ENV);

    if (id) {
        start(id);
    }
    return real_main(argc, argv, envp);
}

/* What the start of a C program calls */
int __libc_start_main(Main *main_, int argc, char **argv, void (*init)(void),
                      void (*fini)(void), void (*rtld_fini)(void),
                      void *stack_end)
{
    __typeof__(&__libc_start_main) real = next("__libc_start_main");

    real_main = main_;
    /* First, so that they are called last */
    on_exit(finish_exit, NULL);
    at_quick_exit(finish_quick_exit);
    return real(shim_main, argc, argv, init, fini, rtld_fini, stack_end);
}
