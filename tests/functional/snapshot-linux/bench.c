/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What scripts/bench runs in a Linux guest
 *
 *     bench        reads one line, a command, and then goes on for ever:
 *
 *     restore PAGES MARK [read FILE | write FILE | send INTERFACE]
 *                          save; write to PAGES pages, have a device's driver
 *                          read or write a page, or send a packet, restore; a
 *                          "." each MARK restores
 *     touch PAGES          write to PAGES pages each millisecond: a guest for
 *                          what saves and restores from outside
 *
 * The host takes it back to the reading of the line with a snapshot of its own.
 * Dots go to the debug port, which has no driver to keep them.
 */

#define _GNU_SOURCE     /* O_DIRECT */

#include <arpa/inet.h>
#include <fcntl.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netpacket/packet.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>

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

/* What a device does between save and restore */
typedef struct Work {
    char kind[8], where[40];
    int fd;
} Work;

/* A page past what any cache has: O_DIRECT where there is one */
static char buffer[PAGE] __attribute__((aligned(PAGE)));

static bool begin_work(Work *w)
{
    int mode = strcmp(w->kind, "read") ? O_WRONLY : O_RDONLY;
    struct ifreq ifr = { .ifr_flags = IFF_UP };
    struct sockaddr_ll to = {
        .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL),
    };

    if (!strcmp(w->kind, "send")) {
        w->fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));
        strncpy(ifr.ifr_name, w->where, IFNAMSIZ - 1);
        to.sll_ifindex = if_nametoindex(w->where);
        return w->fd >= 0 && !ioctl(w->fd, SIOCSIFFLAGS, &ifr) &&
               !bind(w->fd, (struct sockaddr *)&to, sizeof(to));
    }
    /* A driver may still be looking at what there is on its bus. */
    for (int i = 0; i < 600; i++) {
        w->fd = open(w->where, mode | O_DIRECT);
        if (w->fd < 0) {
            w->fd = open(w->where, mode);
        }
        if (w->fd >= 0) {
            return true;
        }
        usleep(50000);
    }
    return false;
}

static bool do_work(Work *w)
{
    if (!strcmp(w->kind, "send")) {
        memset(buffer, 0xff, ETH_ALEN);
        return write(w->fd, buffer, ETH_ZLEN) == ETH_ZLEN;
    }
    return !strcmp(w->kind, "read") ? read(w->fd, buffer, PAGE) > 0
                                    : write(w->fd, buffer, PAGE) > 0;
}

/*
 * A timer that is due soon after the save is so in each run, which takes
 * several times as long.  So what has been started comes to its end, and then
 * the kernel's next tick is milliseconds away.
 */
static void wait_for_quiet(void)
{
    struct timespec before, now;

    usleep(300000);
    clock_gettime(CLOCK_MONOTONIC_COARSE, &before);
    do {
        clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    } while (now.tv_nsec == before.tv_nsec);
}

static int restore(unsigned pages, unsigned mark, Work *w)
{
    struct snapshot s;
    int64_t n;

    if (*w->kind && !(begin_work(w) && do_work(w))) {
        perror("bench: FAIL");
        return 1;
    }
    n = snapshot_open(&s);
    if (n == 0) {
        wait_for_quiet();
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
    if (*w->kind && !do_work(w)) {
        perror("bench: FAIL");
    }
    printf("bench: %s\n", snapshot_strerror(snapshot_restore(&s, 0)));
    return 1;
}

int main(void)
{
    char line[80];
    unsigned pages, mark;
    Work work = { };

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
    if (sscanf(line, "restore %u %u %7s %39s", &pages, &mark, work.kind,
               work.where) >= 2 && pages <= MOST && mark) {
        return restore(pages, mark, &work);
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
