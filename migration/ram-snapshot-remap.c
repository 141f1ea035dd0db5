/*
 * RAM snapshots, put back by mapping the image
 *
 * An image is an extent of a sparse file.  A RAM block is put back by mapping
 * its part of the image privately in its place; while it is mapped so, dropping
 * the private pages (MADV_DONTNEED) is all that a further restore takes.
 * Whoever wrote to RAM, and by which path, does not matter.  Blocks that cannot
 * lie on a private mapping are compared and copied.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitops.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/queue.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "exec/memory.h"
#include "exec/ramblock.h"
#include "exec/target_page.h"
#include "ram-snapshot-int.h"

/* Of any target, in bytes */
#define LARGEST_PAGE (64 * KiB)

/* Granule in which zeroes become holes of the image. */
#define IMAGE_CHUNK (64 * KiB)

typedef struct RemapSnapshot {
    RAMSnapshot parent;         /* one of its refs is the store's @mapped */
    off_t base;                 /* in the store's file */
    bool placed;
    uint8_t *image;             /* read-only view of the whole image */
    size_t image_size;
    void **prepared;            /* by block: mapping to be moved over it */
    QTAILQ_ENTRY(RemapSnapshot) next;
} RemapSnapshot;

typedef struct RemapStore {
    RAMSnapshotStore parent;
    /* Live images, in the order of their place in the file. */
    QTAILQ_HEAD(, RemapSnapshot) images;
    /* All blocks that can lie on this image; a block plugged later not. */
    RemapSnapshot *mapped;
    unsigned mapped_version;    /* of ram_list */
} RemapStore;

static void remap_store_init(RAMSnapshotStore *store)
{
    QTAILQ_INIT(&container_of(store, RemapStore, parent)->images);
}

static void remap_store_clear(RAMSnapshotStore *store)
{
    RemapStore *rs = container_of(store, RemapStore, parent);

    if (rs->mapped) {
        ram_snapshot_free(&rs->mapped->parent);
    }
    g_assert(QTAILQ_EMPTY(&rs->images));
}

static RemapSnapshot *remap(RAMSnapshot *snap)
{
    return container_of(snap, RemapSnapshot, parent);
}

static RemapStore *remap_store(RemapSnapshot *rs)
{
    return container_of(rs->parent.store, RemapStore, parent);
}

static bool block_can_remap(const RemapSnapshot *rs, const SavedBlock *b)
{
    return (!rs->parent.file || rs->parent.file->mappable) &&
        ram_block_can_lie_on(b);
}

/* @layers: files whose content is written, or NULL: what is in RAM */
static bool image_write_block(const RemapSnapshot *rs, const SavedBlock *b,
                              const GArray *layers, bool zeroed, Error **errp)
{
    g_autofree uint8_t *buf = layers ? g_malloc(IMAGE_CHUNK) : NULL;
    ram_addr_t off;

    for (off = 0; off < b->length; off += IMAGE_CHUNK) {
        size_t len = MIN(IMAGE_CHUNK, b->length - off);
        const uint8_t *from = buf ?: b->host + off;
        int ret = buf ? ram_snapshot_layers_read(layers, b->idstr, off, len,
                                                 buf) : 0;

        if (ret) {
            error_setg_errno(errp, -ret, "Reading '%s' failed", b->idstr);
            return false;
        }
        if (zeroed && buffer_is_zero(from, len)) {
            continue;
        }
        if (!ram_snapshot_pwrite(rs->parent.store, from, len,
                                 rs->base + b->pos + off, errp)) {
            return false;
        }
    }
    return true;
}

/* Take the first gap of the file that is large enough. */
static void image_place(RemapSnapshot *rs)
{
    RemapStore *store = remap_store(rs);
    RemapSnapshot *other;

    rs->placed = true;
    QTAILQ_FOREACH(other, &store->images, next) {
        if (other->base - rs->base >= rs->parent.size) {
            QTAILQ_INSERT_BEFORE(other, rs, next);
            return;
        }
        rs->base = other->base + other->parent.size;
    }
    QTAILQ_INSERT_TAIL(&store->images, rs, next);
}

static bool image_punch(const RemapSnapshot *rs)
{
    return !fallocate(rs->parent.store->fd, FALLOC_FL_PUNCH_HOLE |
                      FALLOC_FL_KEEP_SIZE, rs->base, rs->parent.size);
}

static bool image_view(RemapSnapshot *rs, int fd, off_t pos, size_t size,
                       Error **errp)
{
    void *image = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, pos);

    if (image == MAP_FAILED) {
        error_setg_errno(errp, errno, "Mapping the RAM image failed");
        return false;
    }
    rs->image = image;
    rs->image_size = size;
    rs->prepared = g_new0(void *, rs->parent.blocks->len);
    return true;
}

/* Find a place.  @zeroed: does it read as zeroes? */
static bool image_reserve(RemapSnapshot *rs, bool *zeroed, Error **errp)
{
    RAMSnapshot *snap = &rs->parent;

    image_place(rs);
    *zeroed = snap->store->size <= rs->base || image_punch(rs);
    if (!ram_snapshot_grow(snap->store, rs->base + snap->size, errp)) {
        return false;
    }
    /* Memory mapped from a hole needs space when it is touched, or SIGBUS. */
    if (snap->store->path &&
        fallocate(snap->store->fd, 0, rs->base, snap->size) < 0 &&
        errno != EOPNOTSUPP) {
        error_setg_errno(errp, errno, "Reserving %" PRIu64 " bytes for the "
                         "RAM image failed", snap->size);
        return false;
    }
    return true;
}

/* @layers: as of image_write_block() */
static bool image_write(RemapSnapshot *rs, const GArray *layers, Error **errp)
{
    const RAMSnapshot *snap = &rs->parent;
    bool zeroed;
    unsigned i;

    if (!image_reserve(rs, &zeroed, errp)) {
        return false;
    }
    for (i = 0; i < snap->blocks->len; i++) {
        if (!image_write_block(rs, saved_block(snap, i), layers, zeroed,
                               errp)) {
            return false;
        }
    }

    return image_view(rs, snap->store->fd, rs->base, snap->size, errp);
}

static bool remap_save(RAMSnapshot *snap, Error **errp)
{
    return image_write(remap(snap), NULL, errp);
}

/* Several files cannot be mapped as one: their content becomes an image. */
static bool copy_layers(RAMSnapshot *snap, const GArray *layers, Error **errp)
{
    off_t pos = 0;

    warn_report("snapshot: '%s' has a base: with ram=remap it is read and "
                "copied, not mapped",
                g_array_index(layers, RAMSnapshotLayer, layers->len - 1).name);
    image_file_unref(g_steal_pointer(&snap->file));
    for (unsigned i = 0; i < snap->blocks->len; i++) {
        SavedBlock *b = saved_block(snap, i);

        g_clear_pointer(&b->bitmap, g_free);
        b->pos = pos;
        pos += b->length;
    }
    return image_write(remap(snap), layers, errp);
}

static bool remap_open(RAMSnapshot *snap, const GArray *layers, Error **errp)
{
    if (layers->len > 1) {
        return copy_layers(snap, layers, errp);
    }
    if (!image_view(remap(snap), snap->file->fd, 0, snap->file->end, errp)) {
        return false;
    }
    g_ptr_array_add(snap->store->files, snap->file);
    return true;
}

static bool block_map(RemapSnapshot *rs, unsigned i, Error **errp)
{
    const SavedBlock *b = saved_block(&rs->parent, i);
    const ImageFile *file = rs->parent.file;

    rs->prepared[i] = ram_block_map(b, file ? file->fd : rs->parent.store->fd,
                                    rs->base + b->pos, errp);
    return rs->prepared[i];
}

static bool block_move_mapping(RemapSnapshot *rs, unsigned i, Error **errp)
{
    if (!ram_block_move_mapping(saved_block(&rs->parent, i), rs->prepared[i],
                                errp)) {
        return false;
    }
    rs->prepared[i] = NULL;
    return true;
}

static void remap_cancel(RAMSnapshot *snap)
{
    RemapSnapshot *rs = remap(snap);
    unsigned i;

    for (i = 0; i < snap->blocks->len; i++) {
        if (rs->prepared[i]) {
            munmap(rs->prepared[i], saved_block(snap, i)->length);
            rs->prepared[i] = NULL;
        }
    }
}

static bool remap_prepare(RAMSnapshot *snap, Error **errp)
{
    RemapSnapshot *rs = remap(snap);
    RemapStore *store = remap_store(rs);
    unsigned i;

    if (store->mapped == rs && store->mapped_version == ram_list.version) {
        return true;
    }
    for (i = 0; i < snap->blocks->len; i++) {
        if (block_can_remap(rs, saved_block(snap, i)) &&
            !block_map(rs, i, errp)) {
            remap_cancel(snap);
            return false;
        }
    }
    return true;
}

static bool remap_is_zero(const RAMSnapshot *snap, const SavedBlock *b,
                          ram_addr_t offset)
{
    return b->bitmap &&
        !test_bit(offset >> qemu_target_page_bits(), b->bitmap);
}

static const uint8_t *remap_page(const RAMSnapshot *snap, const SavedBlock *b,
                                 ram_addr_t offset, const uint8_t *view)
{
    static const uint8_t zeroes[LARGEST_PAGE];

    if (remap_is_zero(snap, b, offset)) {
        return zeroes;
    }
    view = view ?: container_of(snap, RemapSnapshot, parent)->image;
    return view + b->pos + offset;
}

/* Pages that did not change are only read, so that they stay shared. */
static void block_copy(const RemapSnapshot *rs, const SavedBlock *b)
{
    const size_t size = qemu_target_page_size();
    ram_addr_t off;

    for (off = 0; off < b->length; off += size) {
        const uint8_t *page = remap_page(&rs->parent, b, off, NULL);

        if (memcmp(b->host + off, page, size)) {
            memcpy(b->host + off, page, size);
        }
    }
}

/* What cannot be mapped, if RAM was no image of the file before */
static bool read_blocks(RemapSnapshot *rs, Error **errp)
{
    g_autoptr(GPtrArray) blocks = g_ptr_array_new();
    uint64_t pages;

    for (unsigned i = 0; i < rs->parent.blocks->len; i++) {
        if (!block_can_remap(rs, saved_block(&rs->parent, i))) {
            g_ptr_array_add(blocks, saved_block(&rs->parent, i));
        }
    }
    return ram_snapshot_read(rs->parent.file, blocks, &pages, errp);
}

static bool block_restore(RemapSnapshot *rs, unsigned i, bool was_read,
                          Error **errp)
{
    const SavedBlock *b = saved_block(&rs->parent, i);

    if (!block_can_remap(rs, b)) {
        if (!was_read) {
            block_copy(rs, b);
        }
    } else if (rs->prepared[i]) {
        return block_move_mapping(rs, i, errp);
    } else if (madvise(b->host, b->length, MADV_DONTNEED) < 0) {
        /* Locked pages (-overcommit mem-lock=on) are not dropped so. */
        return block_map(rs, i, errp) && block_move_mapping(rs, i, errp);
    }
    return true;
}

static bool remap_restore(RAMSnapshot *snap, uint64_t *pages, Error **errp)
{
    RemapSnapshot *rs = remap(snap);
    RemapStore *store = remap_store(rs);
    const bool read = snap->file && store->mapped != rs;
    unsigned i;

    if (read && !read_blocks(rs, errp)) {
        return false;
    }
    for (i = 0; i < snap->blocks->len; i++) {
        const SavedBlock *b = saved_block(snap, i);

        if (!block_restore(rs, i, read, errp)) {
            /* RAM lies on two images now: keep both, trust neither. */
            snap->refs++;
            store->mapped_version = ram_list.version - 1;
            return false;
        }
        if (b->length) {
            memory_region_set_dirty(b->rb->mr, 0, b->rb->used_length);
        }
    }

    if (store->mapped != rs) {
        if (store->mapped) {
            ram_snapshot_free(&store->mapped->parent);
        }
        store->mapped = rs;
        snap->refs++;
    }
    store->mapped_version = ram_list.version;

    /* Which pages changed is not known. */
    ram_snapshot_flush_tcg();
    *pages = 0;
    return true;
}

static void remap_release(RAMSnapshot *snap)
{
    RemapSnapshot *rs = remap(snap);

    if (rs->image) {
        munmap(rs->image, rs->image_size);
    }
    g_ptr_array_remove(snap->store->files, snap->file);
    if (rs->placed) {
        image_punch(rs);
        QTAILQ_REMOVE(&remap_store(rs)->images, rs, next);
    }
    g_free(rs->prepared);
}

static const uint8_t *remap_view(RAMSnapshot *snap, size_t *size, Error **errp)
{
    *size = 0;
    return remap(snap)->image;
}

const RAMSnapshotOps ram_snapshot_remap_ops = {
    .mode = SNAPSHOT_DEVICE_RAM_REMAP,
    .store_size = sizeof(RemapStore),
    .snapshot_size = sizeof(RemapSnapshot),
    .store_init = remap_store_init,
    .store_clear = remap_store_clear,
    .save = remap_save,
    .open = remap_open,
    .prepare = remap_prepare,
    .cancel = remap_cancel,
    .restore = remap_restore,
    .release = remap_release,
    .view = remap_view,
    .page = remap_page,
    .is_zero = remap_is_zero,
};
