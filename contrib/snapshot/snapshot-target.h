/* SPDX-License-Identifier: MIT */
/*
 * What snapshot-run and snapshot-shim.so share: a SysV segment, whose id stands
 * in the environment of the program that the shim is loaded into
 */

#ifndef CONTRIB_SNAPSHOT_TARGET_H
#define CONTRIB_SNAPSHOT_TARGET_H

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <unistd.h>

#include "snapshot.h"

#define SNAPSHOT_TARGET_ENV     "SNAPSHOT_TARGET"
#define SNAPSHOT_TARGET_VERSION 1
#define SNAPSHOT_TARGET_TEXT    8192

struct snapshot_target {
    uint32_t version;
    uint32_t input_size;
    uint32_t map_size;
    int32_t map_id;             /* the segment of the coverage map */
    int32_t pid;                /* of the program; its children have others */
    int32_t crash_status;       /* exit status that is a crash, -1 for none */
    int32_t whole_end;          /* the program shall end by itself */
    int32_t ready;              /* READY was given */
    int32_t error;              /* errno of a failure behind READY */
    /* Where a signal came from, if the shim has seen it */
    int32_t fault_pid;
    int32_t fault_signal;
    uint64_t fault_address;
    char preload[256];          /* LD_PRELOAD as it was before the shim */
    char file[256];             /* where the input is put; "": on stdin */
    char text[SNAPSHOT_TARGET_TEXT];
    unsigned char input[];      /* input_size bytes */
};

/*
 * Tell the device where all is, save the machine, and wait for an input. A
 * process has no pages of shared memory at first, nor behind a fork.
 */
static inline int64_t snapshot_target_ready(struct snapshot *s,
                                            struct snapshot_target *t,
                                            unsigned char *map)
{
    int64_t n;

    if (mlock(t, sizeof(*t) + t->input_size) < 0 ||
        mlock(map, t->map_size) < 0) {
        return -SNAPSHOT_E_SYSTEM;
    }
    memset(map, 0, t->map_size);
    snapshot_region(s, SNAPSHOT_REGION_TEXT, t->text, sizeof(t->text));
    t->ready = 1;
    n = snapshot_fuzz(s, t->input, t->input_size, map, t->map_size);
    if (n < 0) {
        t->ready = 0;
    }
    return n;
}

/* Returns: 0, or an errno */
static inline int snapshot_target_put_input(const struct snapshot_target *t,
                                            int fd, size_t size)
{
    size_t done = 0;

    while (done < size) {
        ssize_t n = pwrite(fd, t->input + done, size - done, done);

        if (n <= 0) {
            return n ? errno : ENOSPC;
        }
        done += n;
    }
    return 0;
}

#endif /* CONTRIB_SNAPSHOT_TARGET_H */
