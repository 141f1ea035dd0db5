/*
 * RAM snapshots: the content of all RAM blocks, kept to be put back
 *
 * An image is an extent of a sparse file, usually a memfd.  A RAM block is put
 * back by mapping its part of the image privately in its place; while it is
 * mapped so, dropping the private pages (MADV_DONTNEED) is all that a further
 * restore takes.  Whoever wrote to RAM, and by which path, does not matter.
 * Blocks that cannot lie on a private mapping are compared and copied.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/madvise.h"
#include "qemu/memfd.h"
#include "qemu/queue.h"
#include "qemu/rcu.h"
#include "qemu/cutils.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "exec/memory.h"
#include "exec/ramblock.h"
#include "exec/ramlist.h"
#include "hw/boards.h"
#include "system/qtest.h"
#include "ram-snapshot.h"
#include "trace.h"

/* Granule in which zeroes become holes of the image. */
#define IMAGE_CHUNK (64 * KiB)

/*
 * A private mapping costs one page fault for each page touched after a
 * restore, and system calls.  Comparing and copying a small block is cheaper.
 */
#define REMAP_MIN (256 * KiB)

typedef struct SavedBlock {
    RAMBlock *rb;
    char *idstr;
    uint8_t *host;
    ram_addr_t length;
    off_t pos;          /* in the image */
    bool remap;
    void *prepared;     /* mapping to be moved over @host, or NULL */
} SavedBlock;

struct RAMSnapshot {
    RAMSnapshotStore *store;
    unsigned refs;      /* its owner and, while RAM lies on it, the store */
    off_t base;         /* in the file */
    uint64_t size;
    uint8_t *image;     /* read-only view of the whole image */
    GArray *blocks;     /* of SavedBlock */
    QTAILQ_ENTRY(RAMSnapshot) next;
};

struct RAMSnapshotStore {
    int fd;
    char *path;
    /* Live images, in the order of their place in the file. */
    QTAILQ_HEAD(, RAMSnapshot) images;
    /* All blocks with @remap lie on this image; a block plugged later not. */
    RAMSnapshot *mapped;
    unsigned mapped_version;
};

RAMSnapshotStore *ram_snapshot_store_new(const char *path, Error **errp)
{
    RAMSnapshotStore *store;
    int fd;

    if (path) {
        fd = qemu_create(path, O_RDWR | O_EXCL, 0600, errp);
        if (fd < 0) {
            error_append_hint(errp, "The RAM image is never written over an "
                              "existing file: remove it, or name another.\n");
        }
    } else {
        fd = qemu_memfd_create("snapshot-ram", 0, false, 0, 0, errp);
    }
    if (fd < 0) {
        return NULL;
    }

    store = g_new0(RAMSnapshotStore, 1);
    store->fd = fd;
    store->path = g_strdup(path);
    QTAILQ_INIT(&store->images);
    return store;
}

void ram_snapshot_store_free(RAMSnapshotStore *store)
{
    if (!store) {
        return;
    }
    ram_snapshot_free(store->mapped);
    g_assert(QTAILQ_EMPTY(&store->images));
    if (store->path) {
        unlink(store->path);
    }
    close(store->fd);
    g_free(store->path);
    g_free(store);
}

static const char *block_refusal(const RAMBlock *rb)
{
    if (memory_region_is_ram_device(rb->mr)) {
        return "it is a host device's own memory";
    }
    if (rb->guest_memfd >= 0) {
        return "it is private to the guest (guest_memfd)";
    }
    if (rb->flags & RAM_PMEM) {
        return "it is persistent memory (pmem=on)";
    }
    return NULL;
}

bool ram_snapshot_blocked(Error **errp)
{
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH(rb) {
        const char *reason = block_refusal(rb);

        if (reason) {
            error_setg(errp, "RAM block '%s' cannot be put back: %s",
                       rb->idstr, reason);
            return true;
        }
    }
    return false;
}

/*
 * Shared and preallocated memory must stay where others see it, a resizeable
 * block reserves more than it uses, huge pages would have to be a hugetlbfs
 * image's.
 */
static bool block_can_remap(const RAMBlock *rb, ram_addr_t length)
{
    return !(rb->flags & (RAM_SHARED | RAM_PREALLOC | RAM_RESIZEABLE)) &&
           rb->page_size == qemu_real_host_page_size() && length >= REMAP_MIN;
}

static ram_addr_t block_length(const RAMBlock *rb)
{
    return ROUND_UP(rb->used_length, qemu_real_host_page_size());
}

/* What nobody can write to needs no putting back. */
static bool block_is_constant(const RAMBlock *rb)
{
    return rb->flags & RAM_READONLY;
}

static bool image_pwrite(int fd, const uint8_t *buf, size_t len, off_t pos,
                         Error **errp)
{
    while (len) {
        ssize_t n = RETRY_ON_EINTR(pwrite(fd, buf, len, pos));

        if (n <= 0) {
            error_setg_errno(errp, n ? errno : ENOSPC,
                             "Writing the RAM image failed");
            error_append_hint(errp, "The image takes as much memory, or "
                              "space with file=, as the guest's RAM.\n");
            return false;
        }
        buf += n;
        pos += n;
        len -= n;
    }
    return true;
}

static bool image_write_block(const RAMSnapshot *snap, const SavedBlock *b,
                              bool zeroed, Error **errp)
{
    ram_addr_t off;

    for (off = 0; off < b->length; off += IMAGE_CHUNK) {
        size_t len = MIN(IMAGE_CHUNK, b->length - off);

        if (zeroed && buffer_is_zero(b->host + off, len)) {
            continue;
        }
        if (!image_pwrite(snap->store->fd, b->host + off, len,
                          snap->base + b->pos + off, errp)) {
            return false;
        }
    }
    return true;
}

/* Take the first gap of the file that is large enough. */
static void image_place(RAMSnapshot *snap)
{
    RAMSnapshot *other;

    QTAILQ_FOREACH(other, &snap->store->images, next) {
        if (other->base - snap->base >= snap->size) {
            QTAILQ_INSERT_BEFORE(other, snap, next);
            return;
        }
        snap->base = other->base + other->size;
    }
    QTAILQ_INSERT_TAIL(&snap->store->images, snap, next);
}

static bool image_punch(const RAMSnapshot *snap)
{
    return !fallocate(snap->store->fd, FALLOC_FL_PUNCH_HOLE |
                      FALLOC_FL_KEEP_SIZE, snap->base, snap->size);
}

static bool image_write(RAMSnapshot *snap, Error **errp)
{
    int fd = snap->store->fd;
    struct stat st;
    bool zeroed;
    unsigned i;

    if (fstat(fd, &st) < 0 ||
        (st.st_size < snap->base + snap->size &&
         ftruncate(fd, snap->base + snap->size) < 0)) {
        error_setg_errno(errp, errno, "Growing the RAM image to %" PRIu64
                         " bytes failed", snap->base + snap->size);
        return false;
    }
    zeroed = st.st_size <= snap->base || image_punch(snap);

    for (i = 0; i < snap->blocks->len; i++) {
        if (!image_write_block(snap, &g_array_index(snap->blocks, SavedBlock,
                                                    i), zeroed, errp)) {
            return false;
        }
    }

    snap->image = mmap(NULL, snap->size, PROT_READ, MAP_SHARED, fd,
                       snap->base);
    if (snap->image == MAP_FAILED) {
        snap->image = NULL;
        error_setg_errno(errp, errno, "Mapping the RAM image failed");
        return false;
    }
    return true;
}

static void saved_block_clear(void *block)
{
    g_free(((SavedBlock *)block)->idstr);
}

RAMSnapshot *ram_snapshot_save(RAMSnapshotStore *store, Error **errp)
{
    g_autoptr(RAMSnapshot) snap = NULL;
    RAMBlock *rb;

    if (ram_block_discard_disable(true)) {
        error_setg(errp, "A device needs to discard RAM (virtio-mem?), which "
                   "a snapshot cannot allow");
        return NULL;
    }

    snap = g_new0(RAMSnapshot, 1);
    snap->store = store;
    snap->refs = 1;
    snap->blocks = g_array_new(false, true, sizeof(SavedBlock));
    g_array_set_clear_func(snap->blocks, saved_block_clear);

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH(rb) {
        SavedBlock b = {
            .rb = rb,
            .idstr = g_strdup(rb->idstr),
            .host = rb->host,
            .length = block_length(rb),
            .pos = snap->size,
        };

        if (block_is_constant(rb)) {
            b.length = 0;
        }
        b.remap = block_can_remap(rb, b.length);
        g_array_append_val(snap->blocks, b);
        snap->size += b.length;
    }
    image_place(snap);
    return image_write(snap, errp) ? g_steal_pointer(&snap) : NULL;
}

bool ram_snapshot_matches(const RAMSnapshot *snap, Error **errp)
{
    RAMBlock *rb;
    unsigned i = 0;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH(rb) {
        const SavedBlock *b = &g_array_index(snap->blocks, SavedBlock, i);

        if (i == snap->blocks->len || b->rb != rb || b->host != rb->host ||
            strcmp(b->idstr, rb->idstr)) {
            error_setg(errp, "RAM block '%s' was plugged after the save, or "
                       "another unplugged", rb->idstr);
            return false;
        }
        if (!block_is_constant(rb) && b->length != block_length(rb)) {
            error_setg(errp, "RAM block '%s' was resized after the save",
                       rb->idstr);
            return false;
        }
        i++;
    }
    if (i < snap->blocks->len) {
        error_setg(errp, "RAM block '%s' was unplugged after the save",
                   g_array_index(snap->blocks, SavedBlock, i).idstr);
        return false;
    }
    return true;
}

static bool block_map(const RAMSnapshot *snap, SavedBlock *b, Error **errp)
{
    int flags = b->rb->flags & RAM_NORESERVE ? MAP_NORESERVE : 0;
    void *p = mmap(NULL, b->length, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | flags, snap->store->fd, snap->base + b->pos);

    if (p == MAP_FAILED) {
        error_setg_errno(errp, errno, "Mapping %" PRIu64 " bytes of the RAM "
                         "image for '%s' failed", (uint64_t)b->length,
                         b->idstr);
        return false;
    }
    /* As ram_block_add() does for the mapping that this one replaces. */
    if (!machine_dump_guest_core(current_machine)) {
        qemu_madvise(p, b->length, QEMU_MADV_DONTDUMP);
    }
    if (!qtest_enabled()) {
        qemu_madvise(p, b->length, QEMU_MADV_DONTFORK);
    }
    b->prepared = p;
    return true;
}

static bool block_move_mapping(SavedBlock *b, Error **errp)
{
    void *p = mremap(b->prepared, b->length, b->length,
                     MREMAP_MAYMOVE | MREMAP_FIXED, b->host);

    if (p == MAP_FAILED) {
        error_setg_errno(errp, errno, "Moving the RAM image over '%s' failed",
                         b->idstr);
        return false;
    }
    b->prepared = NULL;
    return true;
}

static bool ram_is_mapped_from(const RAMSnapshot *snap)
{
    return snap->store->mapped == snap &&
           snap->store->mapped_version == ram_list.version;
}

bool ram_snapshot_prepare(RAMSnapshot *snap, Error **errp)
{
    unsigned i;

    if (ram_is_mapped_from(snap)) {
        return true;
    }
    for (i = 0; i < snap->blocks->len; i++) {
        SavedBlock *b = &g_array_index(snap->blocks, SavedBlock, i);

        if (b->remap && !block_map(snap, b, errp)) {
            ram_snapshot_cancel(snap);
            return false;
        }
    }
    return true;
}

void ram_snapshot_cancel(RAMSnapshot *snap)
{
    unsigned i;

    for (i = 0; i < snap->blocks->len; i++) {
        SavedBlock *b = &g_array_index(snap->blocks, SavedBlock, i);

        if (b->prepared) {
            munmap(b->prepared, b->length);
            b->prepared = NULL;
        }
    }
}

/* Pages that did not change are only read, so that they stay shared. */
static void block_copy(const RAMSnapshot *snap, const SavedBlock *b)
{
    const size_t page = qemu_real_host_page_size();
    const uint8_t *from = snap->image + b->pos;
    ram_addr_t off;

    for (off = 0; off < b->length; off += page) {
        if (memcmp(b->host + off, from + off, page)) {
            memcpy(b->host + off, from + off, page);
        }
    }
}

static bool block_restore(const RAMSnapshot *snap, SavedBlock *b, Error **errp)
{
    if (!b->remap) {
        block_copy(snap, b);
    } else if (b->prepared) {
        return block_move_mapping(b, errp);
    } else if (madvise(b->host, b->length, MADV_DONTNEED) < 0) {
        /* Locked pages (-overcommit mem-lock=on) are not dropped so. */
        return block_map(snap, b, errp) && block_move_mapping(b, errp);
    }
    return true;
}

bool ram_snapshot_restore(RAMSnapshot *snap, Error **errp)
{
    RAMSnapshotStore *store = snap->store;
    unsigned i;

    for (i = 0; i < snap->blocks->len; i++) {
        SavedBlock *b = &g_array_index(snap->blocks, SavedBlock, i);

        if (!block_restore(snap, b, errp)) {
            return false;
        }
        if (b->length) {
            memory_region_set_dirty(b->rb->mr, 0, b->rb->used_length);
        }
    }

    if (store->mapped != snap) {
        ram_snapshot_free(store->mapped);
        store->mapped = snap;
        snap->refs++;
    }
    store->mapped_version = ram_list.version;
    return true;
}

uint64_t ram_snapshot_size(const RAMSnapshot *snap)
{
    return snap->size;
}

void ram_snapshot_free(RAMSnapshot *snap)
{
    if (!snap || --snap->refs) {
        return;
    }
    if (snap->image) {
        munmap(snap->image, snap->size);
    }
    if (QTAILQ_IN_USE(snap, next)) {
        image_punch(snap);
        QTAILQ_REMOVE(&snap->store->images, snap, next);
    }
    g_array_unref(snap->blocks);
    g_free(snap);
    ram_block_discard_disable(false);
}
