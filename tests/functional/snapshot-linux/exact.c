/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The same instructions after each restore
 *
 *     exact
 *
 * Saves to slot 0, works, stops the machine with a panic device at port 0x505,
 * and restores slot 0, for ever. The host compares what it finds at each stop.
 * No register of the device is read, as those do not go back.
 */

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

#include "snapshot.h"

#define PAGES   256

static int work(void)
{
    char *p = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct timespec t, nap = { .tv_nsec = 2000000 };
    double sum = 0;
    int fd, i, status;
    pid_t child;

    if (p == MAP_FAILED) {
        return -1;
    }
    for (i = 0; i < PAGES; i++) {
        memset(p + i * 4096, i, 1 + i * 16);
        clock_gettime(CLOCK_MONOTONIC, &t);
        sum = sum * 1.25 + t.tv_nsec;
        memcpy(p + i * 4096 + 8, &sum, sizeof(sum));
    }
    fd = open("/tmp/exact", O_CREAT | O_WRONLY | O_TRUNC, 0600);
    if (fd < 0 || write(fd, p, PAGES * 4096) != PAGES * 4096) {
        return -1;
    }
    close(fd);
    child = fork();
    if (child == 0) {
        nanosleep(&nap, NULL);
        _exit(p[4096]);
    }
    if (child < 0 || waitpid(child, &status, 0) != child) {
        return -1;
    }
    return munmap(p, PAGES * 4096);
}

int main(void)
{
    struct snapshot s;
    int n = snapshot_open(&s);

    if (n < 0) {
        printf("exact: %s\n", snapshot_strerror(n));
        return 1;
    }
    if (iopl(3)) {
        perror("exact: iopl");
        return 1;
    }
    snapshot_put32(&s, SNAPSHOT_REG_SLOT, 0);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    snapshot_put32(&s, SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_SAVE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (work()) {
        perror("exact");
        return 1;
    }
    outb(1, 0x505);
    snapshot_put32(&s, SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_RESTORE);
    printf("exact: ran past a restore\n");
    return 1;
}
