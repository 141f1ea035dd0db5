/*
 * RAM snapshots: what the ways of putting RAM back have in common
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_RAM_SNAPSHOT_INT_H
#define MIGRATION_RAM_SNAPSHOT_INT_H

#include "qemu/notify.h"
#include "exec/ramlist.h"
#include "ram-snapshot.h"

/** SavedBlock: a RAM block as it was at the save */
typedef struct SavedBlock {
    RAMBlock *rb;
    char *idstr;
    uint8_t *host;
    ram_addr_t offset;
    ram_addr_t length;  /* in host pages; 0 if nobody can write to it */
    off_t pos;          /* in an image that holds the blocks in a row */
} SavedBlock;

/** RAMSnapshotOps: a way of putting RAM back */
typedef struct RAMSnapshotOps {
    SnapshotDeviceRam mode;
    size_t store_size;          /* of the struct that starts with the store */
    size_t snapshot_size;       /* of the struct that starts with the image */
    void (*store_init)(RAMSnapshotStore *store);
    void (*store_clear)(RAMSnapshotStore *store);
    bool (*save)(RAMSnapshot *snap, Error **errp);
    bool (*prepare)(RAMSnapshot *snap, Error **errp);   /* optional */
    void (*cancel)(RAMSnapshot *snap);                  /* optional */
    bool (*restore)(RAMSnapshot *snap, uint64_t *pages, Error **errp);
    void (*release)(RAMSnapshot *snap);
    /* The image's copy of the target page at @offset of a block. */
    const uint8_t *(*page)(const RAMSnapshot *snap, const SavedBlock *b,
                           ram_addr_t offset);
} RAMSnapshotOps;

struct RAMSnapshotStore {
    const RAMSnapshotOps *ops;
    int fd;
    char *path;                 /* NULL: anonymous memory */
    off_t size;                 /* of the file, unless another truncates it */
    Notifier exit;              /* removes @path */
};

struct RAMSnapshot {
    RAMSnapshotStore *store;
    unsigned refs;
    GArray *blocks;             /* of SavedBlock */
    uint64_t size;
};

extern const RAMSnapshotOps ram_snapshot_remap_ops;
extern const RAMSnapshotOps ram_snapshot_dirty_ops;

static inline SavedBlock *saved_block(const RAMSnapshot *snap, unsigned i)
{
    return &g_array_index(snap->blocks, SavedBlock, i);
}

/**
 * ram_snapshot_grow: make the store's file at least @size bytes long
 */
bool ram_snapshot_grow(RAMSnapshotStore *store, off_t size, Error **errp);

/**
 * ram_snapshot_pwrite: write to the store's file, all or an error
 */
bool ram_snapshot_pwrite(const RAMSnapshotStore *store, const uint8_t *buf,
                         size_t len, off_t pos, Error **errp);

/**
 * ram_snapshot_has_other_writers: is this block written to past QEMU's memory
 * API, by other processes or by a device model that holds a pointer to it?
 */
bool ram_snapshot_has_other_writers(const RAMBlock *rb);

#endif /* MIGRATION_RAM_SNAPSHOT_INT_H */
