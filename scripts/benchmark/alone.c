/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * snapshot-shim.so for a machine that no host gives inputs to: all is the same,
 * but that the program's input is in the file SEED, and that the machine puts
 * itself back at the program's end
 */

#define _GNU_SOURCE

#include "snapshot.h"

static inline int64_t alone_fuzz(struct snapshot *s, void *input, size_t size,
                                 void *map, size_t map_size)
{
    int fd = open(SEED, O_RDONLY | O_CLOEXEC);
    ssize_t n = read(fd, input, size);
    int64_t err;

    (void)map;
    (void)map_size;
    close(fd);
    if (n < 0) {
        return -SNAPSHOT_E_SYSTEM;
    }
    snapshot_await_tick();
    err = snapshot_save(s, 0);
    return err < 0 ? err : n;
}

static inline int alone_done(struct snapshot *s, uint32_t result)
{
    (void)result;
    return snapshot_restore(s, 0);
}

#define snapshot_fuzz alone_fuzz
#define snapshot_done alone_done
#include "snapshot-shim.c"
