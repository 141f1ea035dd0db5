/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What scripts/bench runs in a Linux guest
 *
 *     bench        reads one line, a command, and then goes on for ever:
 *
 *     restore PAGES MARK   save; write to PAGES pages, restore; a "." each MARK
 *                          restores
 *     touch PAGES          write to PAGES pages each millisecond: a guest for
 *                          what saves and restores from outside
 *
 * The host takes it back to the reading of the line with a snapshot of its own.
 * Dots go to the debug port, which has no driver to keep them.
 */

#include <stdlib.h>
#include <sys/io.h>

#include "snapshot.h"

#define DEBUG_PORT      0xe9            /* isa-debugcon */
#define PAGE            4096
#define MOST            10000           /* pages */

/* volatile: stores that nobody reads are the point */
static volatile char memory[MOST * PAGE] __attribute__((aligned(PAGE)));

static void touch(unsigned pages, char value)
{
    for (unsigned i = 0; i < pages; i++) {
        memory[i * PAGE] = value;
    }
}

static int restore(unsigned pages, unsigned mark)
{
    struct snapshot s;
    int64_t n;

    n = snapshot_open(&s);
    if (n == 0) {
        n = snapshot_save(&s, 0);
    }
    if (n < 0) {
        printf("bench: %s\n", snapshot_strerror(n));
        return 1;
    }
    if (n % mark == 0) {
        outb('.', DEBUG_PORT);
    }
    touch(pages, n);
    printf("bench: %s\n", snapshot_strerror(snapshot_restore(&s, 0)));
    return 1;
}

int main(void)
{
    char line[80];
    unsigned pages, mark;

    if (ioperm(DEBUG_PORT, 1, 1)) {
        perror("bench: ioperm");
        return 1;
    }
    touch(MOST, 1);
    printf("bench: ready\n");
    fflush(stdout);
    if (!fgets(line, sizeof(line), stdin)) {
        return 1;
    }
    if (sscanf(line, "restore %u %u", &pages, &mark) == 2 &&
        pages <= MOST && mark) {
        return restore(pages, mark);
    }
    if (sscanf(line, "touch %u", &pages) == 1 && pages <= MOST) {
        outb('.', DEBUG_PORT);
        for (char value = 0;; value++) {
            touch(pages, value);
            usleep(1000);
        }
    }
    printf("bench: what is this? %s", line);
    return 1;
}
