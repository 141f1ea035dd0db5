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
    off_t pos;          /* in the image: a row of blocks, or a file */
    ram_addr_t used_length;     /* as QEMU has it */
    bool migratable;    /* as QEMU has it: part of its migration stream */
    unsigned long *bitmap;      /* of a file: by page, is it there? or NULL */
} SavedBlock;

/**
 * ImageFile: a file, of another process perhaps, that an image is mapped from
 *
 * Counted by g_rc_box_acquire(), to be released by image_file_unref().
 */
typedef struct ImageFile {
    int fd;
    char *name;
    struct stat st;             /* as it was when the image was opened */
    off_t end;                  /* of its pages */
    bool mappable;              /* a page that is not there reads as zeroes */
} ImageFile;

/** RAMSnapshotOps: a way of putting RAM back */
typedef struct RAMSnapshotOps {
    SnapshotDeviceRam mode;
    size_t store_size;          /* of the struct that starts with the store */
    size_t snapshot_size;       /* of the struct that starts with the image */
    void (*store_init)(RAMSnapshotStore *store);
    void (*store_clear)(RAMSnapshotStore *store);
    bool (*save)(RAMSnapshot *snap, Error **errp);
    /*
     * Make an image of files, of which @snap->file is the first.  They are the
     * store's if this succeeds.
     */
    bool (*open)(RAMSnapshot *snap, const GArray *layers, Error **errp);
    bool (*prepare)(RAMSnapshot *snap, Error **errp);   /* optional */
    void (*cancel)(RAMSnapshot *snap);                  /* optional */
    bool (*restore)(RAMSnapshot *snap, uint64_t *pages, Error **errp);
    void (*release)(RAMSnapshot *snap);
    /* A view of the image that stays where it is; NULL: fails with @errp set */
    const uint8_t *(*view)(RAMSnapshot *snap, size_t *size, Error **errp);
    /*
     * The image's copy of the target page at @offset of a block, in @view or,
     * if that is NULL, where it is at the moment.
     */
    const uint8_t *(*page)(const RAMSnapshot *snap, const SavedBlock *b,
                           ram_addr_t offset, const uint8_t *view);
    /* Is it known, without a look at it, that this page is all zero? */
    bool (*is_zero)(const RAMSnapshot *snap, const SavedBlock *b,
                    ram_addr_t offset);
} RAMSnapshotOps;

struct RAMSnapshotStore {
    const RAMSnapshotOps *ops;
    int fd;
    char *path;                 /* NULL: anonymous memory */
    off_t size;                 /* of the file, unless another truncates it */
    Notifier exit;              /* removes @path */
    GPtrArray *files;           /* of ImageFile: those that images lie in */
};

struct RAMSnapshot {
    RAMSnapshotStore *store;
    unsigned refs;
    GArray *blocks;             /* of SavedBlock */
    uint64_t size;
    ImageFile *file;            /* that RAM is mapped from, or NULL */
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

/** ram_snapshot_new: an image without blocks; holds off RAM discards */
RAMSnapshot *ram_snapshot_new(RAMSnapshotStore *store, Error **errp);

/** ram_snapshot_add_block: add a block as it is now, at the image's end */
SavedBlock *ram_snapshot_add_block(RAMSnapshot *snap, RAMBlock *rb);

/**
 * ram_block_is_outside: is this block no part of what is saved?
 *
 * What is kept is no part of the machine, nor is a backend that nothing uses:
 * it may be one that will be kept.
 */
bool ram_block_is_outside(const RAMBlock *rb);

/** ram_block_name: its name in the stream, or if it has none its region's */
const char *ram_block_name(const RAMBlock *rb);

/**
 * ram_block_can_lie_on: may a private mapping of a file replace this memory?
 *
 * Shared and preallocated memory must stay where others see it, and memory of
 * certain NUMA nodes on them; a resizeable block reserves more than it uses,
 * huge pages would have to be a hugetlbfs image's.  Nor is it worth it for a
 * small block: a mapping costs a page fault for each page that is touched.
 */
bool ram_block_can_lie_on(const SavedBlock *b);

/**
 * ram_block_map: map part of a file, as memory of a block
 *
 * Returns: the mapping, to be moved over the block, or NULL with @errp set
 */
void *ram_block_map(const SavedBlock *b, int fd, off_t pos, Error **errp);

/** ram_block_move_mapping: replace a block's memory; on failure it is as was */
bool ram_block_move_mapping(const SavedBlock *b, void *mapping, Error **errp);

/**
 * ram_snapshot_read: make blocks what they are in a file, in several threads
 * @blocks: of SavedBlock, each with a bitmap
 * @pages: set to how many differed
 *
 * Only pages that differ are written to, and those that are zero in the file
 * and were never written to are not even read.  Who has to know of writes to
 * RAM is told.
 *
 * Returns: false with @errp set if the file cannot be read: then the blocks are
 * neither what they were nor what is in it
 */
bool ram_snapshot_read(const ImageFile *file, const GPtrArray *blocks,
                       uint64_t *pages, Error **errp);

/** ram_snapshot_flush_tcg: forget what TCG knows of RAM, all of it is new */
void ram_snapshot_flush_tcg(void);

/** layer_block: what a file of an image has of a block */
const RAMSnapshotFileBlock *layer_block(const GArray *layers, unsigned i,
                                        const SavedBlock *b);

/** image_file_is_as_opened: false with @errp set if somebody changed it */
bool image_file_is_as_opened(const ImageFile *file, Error **errp);

/** image_file_is_same: is it one file, that nobody changed in between? */
bool image_file_is_same(const ImageFile *a, const ImageFile *b);

void image_file_unref(ImageFile *file);

/**
 * ram_snapshot_has_other_writers: is this block written to past QEMU's memory
 * API, by other processes or by a device model that holds a pointer to it?
 */
bool ram_snapshot_has_other_writers(const RAMBlock *rb);

#endif /* MIGRATION_RAM_SNAPSHOT_INT_H */
