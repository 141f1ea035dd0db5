/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the guest's clocks and timers do across restores
 *
 *     clock restores
 *
 * Prints a line for each return from the save, in microseconds since just
 * before the save: the first reading of the monotonic clock, of the wall
 * clock, and when a timer fired that was pending, due after TIMER_US.
 * It judges nothing: memory of the earlier lines does not survive in here.
 */

#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/timerfd.h>
#include <termios.h>
#include <time.h>

#include "snapshot.h"

#define TIMER_US    5000

static int64_t now(clockid_t clock)
{
    struct timespec t;

    clock_gettime(clock, &t);
    return t.tv_sec * INT64_C(1000000) + t.tv_nsec / 1000;
}

/* Wait for the timer; how often it has expired, 0 if it does not in 5 s */
static uint64_t wait_for(int timer)
{
    struct pollfd p = { .fd = timer, .events = POLLIN };
    uint64_t expired = 0;

    if (poll(&p, 1, 5000) == 1 &&
        read(timer, &expired, sizeof(expired)) != sizeof(expired)) {
        return 0;
    }
    return expired;
}

int main(int argc, char **argv)
{
    int64_t restores = argc > 1 ? atoll(argv[1]) : 1000;
    struct itimerspec due = { .it_value.tv_nsec = TIMER_US * 1000 };
    int timer = timerfd_create(CLOCK_MONOTONIC, 0);
    int64_t n, mono, wall, mono_saved, wall_saved;
    struct snapshot s;

    n = snapshot_open(&s);
    if (n < 0) {
        printf("clock: %s\n", snapshot_strerror(n));
        return 1;
    }
    /* Before, as a busy host may stop us for longer than the timer's time. */
    wall_saved = now(CLOCK_REALTIME);
    mono_saved = now(CLOCK_MONOTONIC);
    timerfd_settime(timer, 0, &due, NULL);
    n = snapshot_save(&s, 0);
    mono = now(CLOCK_MONOTONIC) - mono_saved;
    wall = now(CLOCK_REALTIME) - wall_saved;
    if (n < 0) {
        printf("clock: %s\n", snapshot_strerror(n));
        return 1;
    }
    if (wait_for(timer) != 1) {
        printf("clock: after restore %" PRId64 " the timer did not fire\n", n);
        return 1;
    }
    printf("clock: %" PRId64 " %" PRId64 " %" PRId64 " %" PRId64 "\n",
           n, mono, wall, now(CLOCK_MONOTONIC) - mono_saved);
    fflush(stdout);
    tcdrain(STDOUT_FILENO);
    if (n < restores) {
        n = snapshot_restore(&s, 0);
        printf("clock: %s\n", snapshot_strerror(n));
        return 1;
    }
    return 0;
}
