/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: how long a restore takes
 */

#include "guest.h"

/*
 * Restores for ever, with "pages" pages written to in between, and says "."
 * each "mark" restores. scripts/bench measures, with the host's clock, and ends
 * it; here time goes back.
 */
CASE(bench)
{
    uint32_t *page = (uint32_t *)0x800000;
    unsigned pages = option("pages", 10), mark = option("mark", 100);
    unsigned pass;

    check(pages * PAGE_SIZE <= memory_top - (uintptr_t)page,
          "no room for %u pages", pages);
    memset(page, 1, pages * PAGE_SIZE);
    pass = snapshot_save();
    if (pass % mark == 0) {
        say(".");
    }
    for (unsigned i = 0; i < pages; i++) {
        page[i * PAGE_SIZE / 4] = pass;
    }
    snapshot_restore();
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
