/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: what is fuzzed, also as a native program
 *
 * EDGE(n) counts a branch as AFL does, in the MAP_SIZE bytes at "map", which
 * who includes this has.
 */

#ifndef SNAPSHOT_FUZZ_TARGET_H
#define SNAPSHOT_FUZZ_TARGET_H

#define MAP_SIZE    65536

static unsigned previous;

#define EDGE(n)                                                         \
    do {                                                                \
        map[((n) ^ previous) % MAP_SIZE]++;                             \
        previous = (n) >> 1;                                            \
    } while (0)

/* Bytes that the target writes to, as its work */
static unsigned char target_memory[16 * 4096];

/* Returns: the letter behind "FUZ!", 0 without */
static inline unsigned target(const unsigned char *data, unsigned long size)
{
    unsigned sum = 0;
    unsigned long i;

    for (i = 0; i < size && i < sizeof(target_memory) / 1024; i++) {
        sum += data[i];
        target_memory[i * 1024] += sum;
    }
    EDGE(0x101);
    if (size > 0 && data[0] == 'F') {
        EDGE(0x213);
        if (size > 1 && data[1] == 'U') {
            EDGE(0x345);
            if (size > 2 && data[2] == 'Z') {
                EDGE(0x467);
                if (size > 3 && data[3] == '!') {
                    EDGE(0x589);
                    return size > 4 ? data[4] : 0;
                }
            }
        }
    } else if (size > 1 && (data[0] & 1)) {
        EDGE(0x6ab);
    }
    return 0;
}

#endif /* SNAPSHOT_FUZZ_TARGET_H */
