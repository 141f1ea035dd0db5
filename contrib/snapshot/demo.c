/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The program that the snapshot device was first shown with, in July 2022
 *
 *     demo [restores]
 *
 * It saves the machine with a = 0, makes a 1, restores, and finds a at 0.
 * The first restores are told one by one, the rest go as fast as they can.
 *
 * How long the rest takes can be seen from outside only, where the clock does
 * not go back.  For that, a slot is discarded just before, and one just after:
 * QEMU's trace (vm_snapshot_discard) has the times.  Neither is used, and what
 * they hold slot 0 has too, so that discarding them takes no time.
 */

#include <inttypes.h>
#include <stdlib.h>
#include <termios.h>
#include <time.h>

#include "snapshot.h"

/* How many restores are told one by one */
#define TOLD    3

/*
 * Let all that was printed leave the machine.
 *
 * Text in stdio's buffer or in the tty's is part of the machine. Left there
 * at a save, it would go out after every restore; at a restore, it would be
 * lost, as the machine goes back to where it was not yet written.
 */
static void drain(void)
{
    fflush(stdout);
    tcdrain(STDOUT_FILENO);
}

/* This machine's own clock, in milliseconds since it booted */
static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static int fail(const char *what, int64_t err)
{
    fflush(stdout);
    fprintf(stderr, "demo: %s: %s\n", what, snapshot_strerror(err));
    return 1;
}

int main(int argc, char **argv)
{
    /* volatile, so that it is really read back: the compiler knows it is 0 */
    volatile int a = 0;
    int64_t restores = argc > 1 ? atoll(argv[1]) : TOLD;
    struct snapshot s;
    double saved_at, ended_at;
    int64_t n;
    int err;

    err = snapshot_open(&s);
    if (err) {
        return fail("cannot open the device", err);
    }
    /* ARGUMENT, which no restore reverts, will add up what restores take */
    snapshot_set_argument(&s, 0);
    for (n = 1; n <= 2 && n < snapshot_slots(&s); n++) {
        err = snapshot_save(&s, n);
        if (err) {
            return fail("cannot save", err);
        }
    }
    saved_at = now();
    drain();

    n = snapshot_save(&s, 0);
    if (n < 0) {
        return fail("cannot save", n);
    }
    if (n > 0) {
        snapshot_set_argument(&s, snapshot_argument(&s) +
                                  snapshot_nanoseconds(&s));
    }
    if (a != 0) {
        printf("restored, but a = %d\n", a);
        return 1;
    }
    if (n < restores) {
        if (n == 0) {
            printf("before: a = %d\n", a);
        } else if (n <= TOLD) {
            printf("before: a = %d, by restore %" PRId64 ", %" PRIu64
                   " us\n", a, n, snapshot_nanoseconds(&s) / 1000);
        }
        a = 1;
        if (n < TOLD) {
            printf("middle: a = %d\n", a);
            drain();
        } else if (n == TOLD) {
            printf("...\n");
            drain();
            snapshot_discard(&s, 1);
        }
        err = snapshot_restore(&s, 0);
        return fail("cannot restore", err);
    }

    ended_at = now();
    snapshot_discard(&s, 2);
    printf("after:  a = %d, by restore %" PRId64 "; %" PRIu64 " us each\n",
           a, n, n ? snapshot_argument(&s) / n / 1000 : 0);
    printf("clock:  %.0f ms before the save, %.0f ms now\n", saved_at,
           ended_at);
    snapshot_discard(&s, 0);
    snapshot_close(&s);
    return 0;
}
