/*
 * RAM snapshots: the content of all RAM blocks, kept to be put back
 *
 * Everything here is called with the BQL held and the vCPUs stopped.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_RAM_SNAPSHOT_H
#define MIGRATION_RAM_SNAPSHOT_H

#include "exec/cpu-common.h"
#include "qapi/qapi-types-migration.h"

/** RAMSnapshotStore: where images are kept, one file for all of them */
typedef struct RAMSnapshotStore RAMSnapshotStore;

/** RAMSnapshot: one image of all RAM */
typedef struct RAMSnapshot RAMSnapshot;

/**
 * ram_snapshot_store_new: open the file that images are kept in
 * @mode: how RAM is put back; "auto" takes the fastest that this machine can
 * @path: file to create, mode 0600, or NULL for anonymous memory
 * @errp: set if the file exists already or cannot be created, or the machine
 *        cannot do what @mode asks for
 *
 * The file is removed again by ram_snapshot_store_free().
 */
RAMSnapshotStore *ram_snapshot_store_new(SnapshotDeviceRam mode,
                                         const char *path, Error **errp);

/** ram_snapshot_store_free: all images were freed before; NULL is allowed */
void ram_snapshot_store_free(RAMSnapshotStore *store);

/** ram_snapshot_store_mode: how RAM is put back, never "auto" */
SnapshotDeviceRam ram_snapshot_store_mode(const RAMSnapshotStore *store);

/**
 * ram_snapshot_blocked: is there RAM that could not be put back?
 * @errp: set to the RAM block's name and the reason; or the store's file was
 *        truncated by another process
 */
bool ram_snapshot_blocked(const RAMSnapshotStore *store, Error **errp);

/**
 * ram_snapshot_save: write all RAM into a new image
 *
 * Takes host memory, and for the first image time, in proportion to the RAM
 * that is not zero.  RAM itself is not changed.  Until the image is freed,
 * ram_block_discard_disable() is held.
 *
 * Returns: the image, or NULL with @errp set
 */
RAMSnapshot *ram_snapshot_save(RAMSnapshotStore *store, Error **errp);

/**
 * ram_snapshot_matches: is RAM still made of the blocks that were saved?
 * @errp: set to the first block that came, went or changed its size; or the
 *        image is lost, for its file was truncated by another process
 */
bool ram_snapshot_matches(const RAMSnapshot *snap, Error **errp);

/**
 * ram_snapshot_prepare: do what may fail of a restore
 *
 * ram_snapshot_matches() holds.  To be followed by ram_snapshot_restore() or
 * ram_snapshot_cancel().
 *
 * Returns: false with @errp set if the host has no memory for it; RAM is then
 * as it was
 */
bool ram_snapshot_prepare(RAMSnapshot *snap, Error **errp);

/** ram_snapshot_cancel: take ram_snapshot_prepare() back */
void ram_snapshot_cancel(RAMSnapshot *snap);

/**
 * ram_snapshot_restore: put all RAM back
 * @pages: set to how many pages were put back, or 0 if they are not counted
 *
 * After ram_snapshot_prepare().  RAM is set dirty where it changed, code that
 * was translated from it is dropped, and so are the TLBs of TCG.
 *
 * Returns: false with @errp set if RAM is left in an undefined state
 */
bool ram_snapshot_restore(RAMSnapshot *snap, uint64_t *pages, Error **errp);

/**
 * RAMDifferenceFn: called for each page that differs
 * @offset: of the page in its block, in bytes
 * @saved: the page in the image
 * @found: the page in RAM
 */
typedef void RAMDifferenceFn(const char *block, ram_addr_t offset,
                             const uint8_t *saved, const uint8_t *found,
                             void *opaque);

/**
 * ram_snapshot_verify: find the pages of RAM that are not as in the image
 *
 * ram_snapshot_matches() holds.  All of RAM is read.
 */
void ram_snapshot_verify(const RAMSnapshot *snap, RAMDifferenceFn *fn,
                         void *opaque);

/** ram_snapshot_size: bytes of RAM in the image, zeroes counted too */
uint64_t ram_snapshot_size(const RAMSnapshot *snap);

/** ram_snapshot_free: forget an image; NULL is allowed */
void ram_snapshot_free(RAMSnapshot *snap);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(RAMSnapshot, ram_snapshot_free)

#endif /* MIGRATION_RAM_SNAPSHOT_H */
