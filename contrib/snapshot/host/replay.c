/* SPDX-License-Identifier: MIT */
/*
 * One run, for somebody to look at: in gdb, or in a log
 *
 * The run begins with the machine stopped (SNAPSHOT_RUN_STOPPED).  All else is
 * done by QEMU's own means, over its monitor: "gdbserver", "log".
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "replay.h"
#include "vm-internal.h"

#define CONSOLE_SIZE    (64 * 1024)
#define CONSOLE_MS      300     /* until the daemon has read what is written */

#define GDB_MS          500

/* Blocks as they are executed, each alone; exceptions and interrupts */
#define TRACED          "exec,nochain,int"

/* The answer to a command that has nothing to say */
#define SILENT          "{\"return\": \"\"}"

static struct snapshot_vm *running;



static void sleep_ms(unsigned ms)
{
    struct timespec t = { ms / 1000, ms % 1000 * 1000000l };

    nanosleep(&t, NULL);
}

/* ------------------------------------------------------------------ monitor */

/* A command of the monitor for people, whose answer has @expected in it */
static int tell(struct vm_monitor *m, const char *expected, const char *format,
                ...) __attribute__((format(printf, 3, 4)));

static int tell(struct vm_monitor *m, const char *expected, const char *format,
                ...)
{
    char *command = NULL, *quoted, *arguments = NULL;
    va_list ap;
    int n, ret;

    va_start(ap, format);
    n = vasprintf(&command, format, ap);
    va_end(ap);
    quoted = n < 0 ? NULL : vm_monitor_quote(command);
    if (!quoted || asprintf(&arguments, "\"command-line\": %s", quoted) < 0) {
        ret = vm_fail_system("cannot execute", format);
    } else {
        ret = vm_monitor_execute(m, "human-monitor-command", arguments);
        if (!ret && !strstr(m->line, expected)) {
            ret = vm_fail(SNAPSHOT_VM_E_SYSTEM, "QEMU: %s: %s", command,
                          m->line);
        }
        free(arguments);
    }
    free(quoted);
    if (n >= 0) {
        free(command);
    }
    return ret;
}

/* Wait until the machine is stopped before the first instruction. */
static int wait_stopped(struct vm_monitor *m)
{
    int ms, ret;

    for (ms = 0; ms < WAIT_MONITOR; ms += 10) {
        ret = vm_monitor_execute(m, "query-status", NULL);
        if (ret || strstr(m->line, "\"running\": false")) {
            return ret;
        }
        sleep_ms(10);
    }
    return vm_fail(SNAPSHOT_VM_E_SYSTEM, "the machine does not stop at the "
                   "begin of the run");
}

/* ---------------------------------------------------------------------- run */

static void interrupted(int signal)
{
    (void)signal;
    snapshot_vm_cancel(running);
}

static int stop_gdb(struct vm_monitor *m)
{
    return tell(m, "Disabled", "gdbserver none");
}

static int start_gdb(struct vm_monitor *m, const char *directory)
{
    char pc[32] = "its first instruction";
    char *p;
    int ret = stop_gdb(m);          /* of a replay that was killed */

    if (!ret) {
        ret = tell(m, "Waiting for gdb",
                   "gdbserver unix:%s/gdb,server=on,wait=off", directory);
    }
    if (!ret) {
        ret = tell(m, "IP=", "info registers");
    }
    if (ret) {
        return ret;
    }
    p = strstr(m->line, "IP=");
    if (p) {
        snprintf(pc, sizeof(pc), "0x%.*s", (int)strcspn(p + 3, " \\\""), p + 3);
    }
    printf("The machine has the input, and is stopped at %s. To look at it:\n\n"
           "    gdb -ex 'target remote %s/gdb'\n\n"
           "What gdb lets it run, it does; Ctrl-C here ends the run.\n", pc,
           directory);
    fflush(stdout);
    return 0;
}

/* What the guest has written since @from, after @result, to @file */
static int write_log(struct snapshot_vm *vm, const char *file, uint64_t from,
                     const struct snapshot_vm_result *r)
{
    static char text[CONSOLE_SIZE];
    FILE *f = fopen(file, "we");

    if (!f) {
        return vm_fail(SNAPSHOT_VM_E_SYSTEM, "%s: %s", file, strerror(errno));
    }
    sleep_ms(CONSOLE_MS);
    fprintf(f, "result: %s\ncause: %s\nhost: %llu ns\nguest: %llu ns\n"
            "text: %.*s\n", snapshot_vm_result_name(r->result),
            snapshot_vm_cause_name(r->cause), (unsigned long long)r->host_ns,
            (unsigned long long)r->guest_ns, (int)r->text_length, r->text);
    fputs("console:\n", f);
    fwrite(text, 1, snapshot_vm_console_since(snapshot_vm_directory(vm), &from,
                                              text, sizeof(text)), f);
    if (fclose(f)) {
        return vm_fail(SNAPSHOT_VM_E_SYSTEM, "%s: %s", file, strerror(errno));
    }
    printf("%s has what the guest said\n", file);
    return 0;
}

/* QEMU has a directory of its own, and a monitor that reads some characters. */
static int trace_to(struct vm_monitor *m, const char *file)
{
    char *directory = *file == '/' ? strdup("") : getcwd(NULL, 0);
    int ret;

    if (!directory || strpbrk(directory, "\"\\%\n") ||
        strpbrk(file, "\"\\%\n")) {
        free(directory);
        return vm_fail(SNAPSHOT_VM_E_SYSTEM, "%s: QEMU cannot write to a file "
                       "of such a name", file);
    }
    ret = tell(m, SILENT, "logfile \"%s/%s\"", directory, file);
    free(directory);
    return ret ? ret : tell(m, SILENT, "log " TRACED);
}

static int begin(struct snapshot_vm *vm, struct vm_monitor *m,
                 enum replay_how how, const char *file)
{
    int ret = wait_stopped(m);

    if (ret) {
        return ret;
    }
    if (how == REPLAY_GDB) {
        return start_gdb(m, snapshot_vm_directory(vm));
    }
    ret = trace_to(m, file);
    return ret ? ret : vm_monitor_execute(m, "cont", NULL);
}

/* A debugger may have stopped the machine, or the run's begin has. */
static int end(struct vm_monitor *m, enum replay_how how)
{
    int ret = vm_monitor_execute(m, "cont", NULL);

    if (ret) {
        return ret;
    }
    if (how == REPLAY_TRACE) {
        return tell(m, SILENT, "log none");
    }
    /* A gdb that has let go of the machine is about to read the answer. */
    sleep_ms(GDB_MS);
    return stop_gdb(m);
}

int replay(struct snapshot_vm *vm, size_t length, enum replay_how how,
           const char *file, struct snapshot_vm_result *result)
{
    struct sigaction act = { .sa_handler = interrupted }, old;
    struct vm_monitor m = { .fd = -1 };
    struct snapshot_vm_limits limits;
    uint64_t from = 0;
    int ret = 0, ended;

    snapshot_vm_console_since(snapshot_vm_directory(vm), &from, NULL, 0);
    snapshot_vm_limits(vm, &limits);
    if (how != REPLAY_LOG) {
        /* A person takes time, and so does a log; Ctrl-C is there. */
        limits.host_ns = 0;
        limits.flags = SNAPSHOT_RUN_STOPPED;
        ret = vm_monitor_open(&m, snapshot_vm_directory(vm));
    }
    if (!ret) {
        ret = snapshot_vm_begin(vm, length, &limits);
    }
    if (ret) {
        vm_monitor_close(&m);
        return ret;
    }
    running = vm;
    sigaction(SIGINT, &act, &old);
    if (how != REPLAY_LOG) {
        ret = begin(vm, &m, how, file);
        if (ret) {
            snapshot_vm_cancel(vm);
        }
    }
    ended = snapshot_vm_end(vm, result);
    sigaction(SIGINT, &old, NULL);
    if (ret) {
        /* Why it did not begin is what matters. */
        char *why = strdup(snapshot_vm_error());

        end(&m, how);
        vm_fail(-ret, "%s", why ? why : "out of memory");
        free(why);
    } else if (how == REPLAY_LOG) {
        ret = ended < 0 ? 0 : write_log(vm, file, from, result);
    } else {
        ret = end(&m, how);
        if (!ret && how == REPLAY_TRACE) {
            printf("%s has each block of code that was executed\n", file);
        }
    }
    vm_monitor_close(&m);
    return ret ? ret : ended;
}
