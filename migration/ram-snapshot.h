/*
 * RAM snapshots: the content of all RAM blocks, kept to be put back
 *
 * Everything here is called with the BQL held and the vCPUs stopped, but as
 * noted.
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
 * RAMSnapshotFileBlock: where a file has the pages of a RAM block
 */
typedef struct RAMSnapshotFileBlock {
    char *idstr;
    bool migratable;
    uint64_t length;            /* in bytes */
    uint64_t pages;             /* where the page at offset 0 is, or would be */
    uint64_t bitmap_pos;        /* where the bitmap is */
    unsigned long *bitmap;      /* by target page: is it there, or all zero? */
    uint64_t same_pos;          /* where the next one is */
    unsigned long *same;        /* is it as in the file below?  Or NULL */
} RAMSnapshotFileBlock;

/**
 * RAMSnapshotLayer: a file with pages of an image
 *
 * An image may lie in a row of them. The first has all pages, each other those
 * that differ from what the ones before it make.
 */
typedef struct RAMSnapshotLayer {
    int fd;                     /* open for reading */
    const char *name;           /* for messages */
    struct stat st;             /* as it was before anything was read of it */
    const GArray *blocks;       /* of RAMSnapshotFileBlock, in any order */
    struct ImageFile *file;     /* of ram_snapshot_open() */
} RAMSnapshotLayer;

/**
 * ram_snapshot_file_is_same: is it that file, and nobody has written to it?
 *
 * As far as its length and its time tell.  To be called in any thread.
 */
bool ram_snapshot_file_is_same(const struct stat *a, const struct stat *b);

/** image_file_read: read so many bytes, in any thread; 0 or -errno */
int image_file_read(int fd, uint8_t *buf, size_t length, off_t pos);

/**
 * ram_snapshot_layers_read: read part of a RAM block
 * @layers: of RAMSnapshotLayer; each has the block
 * @offset: of whole target pages, as @length
 *
 * It may be called in any thread, with no lock.
 *
 * Returns: 0 or -errno
 */
int ram_snapshot_layers_read(const GArray *layers, const char *idstr,
                             uint64_t offset, size_t length, uint8_t *buf);

/**
 * ram_snapshot_blocks_match: has the machine these RAM blocks, and no other?
 * @blocks: of RAMSnapshotFileBlock; of each, the name and the length count
 * @errp: set to the first block that is missing, is there twice or differs
 */
bool ram_snapshot_blocks_match(const GArray *blocks, Error **errp);

/**
 * ram_snapshot_open: make an image of a file that has one, or of several
 * @layers: of RAMSnapshotLayer; the descriptors are duplicated
 * @holes: is it known that what is not there reads as zeroes?
 *
 * Nothing is read but, without @holes, what might not be zero.  The files are
 * mapped, and RAM is mapped from the first when the image is restored: it takes
 * memory for the pages that the guest writes to and for those of the other
 * files, all others are shared with who maps the same file.  Where RAM has to
 * stay where it is, as with huge pages, and with ram=remap if there is more
 * than one file, pages are read and copied; a warning tells of that.
 *
 * Whoever changes a file changes the image; that is noticed before the next
 * restore, which fails.
 *
 * Returns: the image, or NULL with @errp set to what the file has and the
 * machine has not, or the other way round
 */
RAMSnapshot *ram_snapshot_open(RAMSnapshotStore *store, GArray *layers,
                               bool holes, Error **errp);

/**
 * RAMSnapshotTouched: what finds the pages of a file that RAM has touched
 */
typedef struct RAMSnapshotTouched RAMSnapshotTouched;

/** RAMTouchedFn: called for bytes of the file, of each block in their order */
typedef void RAMTouchedFn(off_t offset, off_t length, void *opaque);

/**
 * ram_snapshot_touched_begin: RAM was just put back from a file
 * @snap: that ram_snapshot_open() has returned
 *
 * Returns: for ram_snapshot_touched_free()
 */
RAMSnapshotTouched *ram_snapshot_touched_begin(const RAMSnapshot *snap);

/**
 * ram_snapshot_touched_find: what was touched since
 *
 * Before the next restore, of whatever image.  Called with the BQL held, vCPUs
 * may run.  A host older than Linux 6.7 maps neighbours with a page, if it has
 * read them: they count as touched.
 *
 * Returns: false with @errp set if the host does not tell
 */
bool ram_snapshot_touched_find(const RAMSnapshotTouched *t, RAMTouchedFn *fn,
                               void *opaque, Error **errp);

void ram_snapshot_touched_free(RAMSnapshotTouched *t);

/** ram_snapshot_is_mapped: is RAM mapped from a file, as far as it can be? */
bool ram_snapshot_is_mapped(const RAMSnapshot *snap);

/**
 * ram_snapshot_lies_in: is a file one that RAM, or an image, is mapped from?
 *
 * Who shortens such a file ends QEMU.
 */
bool ram_snapshot_lies_in(const RAMSnapshotStore *store, int fd);

/**
 * RAMSnapshotView: an image to be read in any thread, while the machine runs
 *
 * The image is kept until ram_snapshot_view_free(), whoever frees it.
 */
typedef struct RAMSnapshotView RAMSnapshotView;

/** ram_snapshot_view_new: returns NULL with @errp set if memory is lacking */
RAMSnapshotView *ram_snapshot_view_new(RAMSnapshot *snap, Error **errp);

void ram_snapshot_view_free(RAMSnapshotView *view);

/**
 * ram_snapshot_view_block: what is known of the i-th block
 * @b: set but for where the file has it; its strings are the image's
 *
 * Returns: false if there are not as many
 */
bool ram_snapshot_view_block(const RAMSnapshotView *view, unsigned i,
                             RAMSnapshotFileBlock *b);

/**
 * ram_snapshot_view_is_zero: is it known that bytes of the image are all zero?
 * @i: the block
 * @offset: in the block, of a target page
 * @length: in bytes
 *
 * Pages are not looked at, and may be zero even if that is not known.
 *
 * It may be called in any thread, with no lock.
 */
bool ram_snapshot_view_is_zero(const RAMSnapshotView *view, unsigned i,
                               ram_addr_t offset, ram_addr_t length);

/**
 * ram_snapshot_view_page: a target page of the image, or NULL if it is all zero
 * @i: the block
 * @offset: of the page in the block
 *
 * It may be called in any thread, with no lock.
 */
const uint8_t *ram_snapshot_view_page(const RAMSnapshotView *view, unsigned i,
                                      ram_addr_t offset);

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
