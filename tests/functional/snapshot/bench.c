/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: how long a restore takes
 */

#include "guest.h"

/*
 * Restores n times with "pages" pages written in between. With "print=1", says
 * NANOSECONDS after each; without, only start and end, for the host's clock.
 */
CASE(bench)
{
    uint32_t *page = (uint32_t *)0x800000;
    unsigned pages = option("pages", 10), n = option("n", 1000);
    bool print = option("print", 0);
    unsigned pass;

    check(pages * PAGE_SIZE <= memory_top - (uintptr_t)page,
          "no room for %u pages", pages);
    memset(page, 1, pages * PAGE_SIZE);
    pass = snapshot_save();
    if (pass == 0) {
        say("START\n");
    } else if (print) {
        say("NS %llx\n", snapshot_read64(SNAPSHOT_REG_NANOSECONDS));
    }
    for (unsigned i = 0; i < pages; i++) {
        page[i * PAGE_SIZE / 4] = pass;
    }
    if (pass < n) {
        snapshot_restore();
    }
    say("END\n");
}

/* The host stops and continues the machine while this restores for ever. */
CASE(endless)
{
    unsigned pass = snapshot_save();

    if (pass % repeats(64) == 0) {
        say("%u\n", pass);
    }
    snapshot_restore();
}
