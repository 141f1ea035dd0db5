/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A program that a signal interrupts the moment before it asks for a run, and
 * whose handler cancels that run
 */

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "snapshot-host.h"

static struct snapshot_vm *vm;
static volatile sig_atomic_t armed;

static void on_signal(int number)
{
    (void)number;
    snapshot_vm_cancel(vm);
}

/* In place of the C library's: what the snapshot library calls */
ssize_t send(int fd, const void *data, size_t len, int flags)
{
    struct snapshot_message m;

    memcpy(&m, data, sizeof(m));
    if (armed && m.type == SNAPSHOT_MSG_RUN) {
        armed = 0;
        raise(SIGALRM);
    }
    return sendto(fd, data, len, flags, NULL, 0);
}

int main(int argc, char **argv)
{
    const struct snapshot_vm_limits none = { 0 };
    struct snapshot_vm_result r;
    size_t size;

    if (argc != 2) {
        return 2;
    }
    signal(SIGALRM, on_signal);
    vm = snapshot_vm_open(argv[1], -1, 0);
    if (!vm) {
        puts(snapshot_vm_error());
        return 1;
    }
    memcpy(snapshot_vm_input(vm, &size), "FUZ!H", 5);
    armed = 1;
    if (snapshot_vm_run(vm, 5, &none, &r) < 0) {
        puts(snapshot_vm_error());
        return 1;
    }
    printf("%s, %s\n", snapshot_vm_result_name(r.result),
           snapshot_vm_cause_name(r.cause));
    snapshot_vm_close(vm);
    return 0;
}
