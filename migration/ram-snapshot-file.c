/*
 * RAM snapshots: images in files, to be mapped from there and to be written
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitops.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/rcu.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "exec/memory.h"
#include "exec/ramblock.h"
#include "exec/target_page.h"
#include "ram-snapshot-int.h"

/* So much is read at once, in bytes, to see whether it is zero. */
#define READ_AHEAD (64 * KiB)

/* Of a RAM block, in bytes: to read it takes a time that is noticed */
#define LARGE (32 * MiB)

struct RAMSnapshotView {
    RAMSnapshot *snap;
    const uint8_t *base;
    size_t mapped;              /* bytes, to be unmapped */
};

bool ram_snapshot_file_is_same(const struct stat *a, const struct stat *b)
{
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino &&
        a->st_size == b->st_size &&
        a->st_mtim.tv_sec == b->st_mtim.tv_sec &&
        a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

bool image_file_is_same(const ImageFile *a, const ImageFile *b)
{
    return ram_snapshot_file_is_same(&a->st, &b->st) && a->end == b->end;
}

bool image_file_is_as_opened(const ImageFile *file, Error **errp)
{
    struct stat st;

    if (!fstat(file->fd, &st) && ram_snapshot_file_is_same(&file->st, &st)) {
        return true;
    }
    error_setg(errp, "The file '%s', which RAM is mapped from, was changed",
               file->name);
    error_append_hint(errp, "The machine and its snapshots are lost. Start "
                      "QEMU anew. To replace a file, rename another over "
                      "it.\n");
    return false;
}

static bool is_file_of(int fd, const struct stat *st)
{
    struct stat here;

    return fd >= 0 && !fstat(fd, &here) && here.st_dev == st->st_dev &&
        here.st_ino == st->st_ino;
}

bool ram_snapshot_lies_in(const RAMSnapshotStore *store, int fd)
{
    struct stat st;
    RAMBlock *rb;

    if (fstat(fd, &st) < 0) {
        return false;
    }
    for (unsigned i = 0; i < store->files->len; i++) {
        const ImageFile *file = g_ptr_array_index(store->files, i);

        if (is_file_of(file->fd, &st)) {
            return true;
        }
    }
    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH(rb) {
        if (is_file_of(rb->fd, &st)) {
            return true;
        }
    }
    return is_file_of(store->fd, &st);
}

static void image_file_close(gpointer opaque)
{
    ImageFile *file = opaque;

    close(file->fd);
    g_free(file->name);
}

void image_file_unref(ImageFile *file)
{
    if (file) {
        g_rc_box_release_full(file, image_file_close);
    }
}

/* Is [@from, @to) of the file zero? */
static bool reads_as_zeroes(int fd, off_t from, off_t to)
{
    g_autofree char *buf = g_malloc(READ_AHEAD);

    while (from < to) {
        ssize_t n = pread(fd, buf, MIN(READ_AHEAD, to - from), from);

        if (n <= 0 || !buffer_is_zero(buf, n)) {
            return false;
        }
        from += n;
    }
    return true;
}

/*
 * A file that was written to while its machine ran may have what a page was
 * before it became zero.  Only what is no hole has to be looked at.
 */
static bool block_has_holes(int fd, const RAMSnapshotFileBlock *b)
{
    const unsigned bits = qemu_target_page_bits();
    const off_t end = b->pages + b->length;
    off_t data, hole;

    for (data = lseek(fd, b->pages, SEEK_DATA); data >= 0 && data < end;
         data = lseek(fd, hole, SEEK_DATA)) {
        size_t page = (data - b->pages) >> bits, last;

        hole = MIN(lseek(fd, data, SEEK_HOLE), end);
        if (hole < data) {
            return false;
        }
        last = (hole - b->pages - 1) >> bits;
        while ((page = find_next_zero_bit(b->bitmap, last + 1, page)) <= last) {
            size_t next = find_next_bit(b->bitmap, last + 1, page);

            if (!reads_as_zeroes(fd, b->pages + ((off_t)page << bits),
                                 b->pages + ((off_t)next << bits))) {
                return false;
            }
            page = next;
        }
    }
    return data >= 0 ? data >= end : errno == ENXIO;
}

static RAMSnapshotLayer *nth_layer(const GArray *layers, unsigned i)
{
    return &g_array_index(layers, RAMSnapshotLayer, i);
}

static RAMSnapshotFileBlock *file_block(const GArray *blocks, unsigned i)
{
    return &g_array_index(blocks, RAMSnapshotFileBlock, i);
}

static RAMSnapshotFileBlock *find_file_block(const GArray *blocks,
                                             const char *idstr)
{
    for (unsigned i = 0; i < blocks->len; i++) {
        if (!strcmp(file_block(blocks, i)->idstr, idstr)) {
            return file_block(blocks, i);
        }
    }
    return NULL;
}

const RAMSnapshotFileBlock *layer_block(const GArray *layers, unsigned i,
                                        const SavedBlock *b)
{
    return find_file_block(nth_layer(layers, i)->blocks, b->idstr);
}

static const SavedBlock *find_saved_block(const RAMSnapshot *snap,
                                          const char *idstr)
{
    for (unsigned i = 0; i < snap->blocks->len; i++) {
        if (!strcmp(saved_block(snap, i)->idstr, idstr)) {
            return saved_block(snap, i);
        }
    }
    return NULL;
}

static bool block_matches(const GArray *blocks, const RAMBlock *rb,
                          Error **errp)
{
    const char *idstr = ram_block_name(rb);
    const RAMSnapshotFileBlock *f = find_file_block(blocks, idstr);

    if (!f) {
        error_setg(errp, "RAM block '%s' of the machine is not in it", idstr);
        return false;
    }
    if (f->length != rb->used_length) {
        error_setg(errp, "RAM block '%s' has %" PRIu64 " bytes in it, and "
                   "%" PRIu64 " in the machine", idstr, f->length,
                   (uint64_t)rb->used_length);
        return false;
    }
    return true;
}

static bool machine_has_block(const char *idstr)
{
    RAMBlock *rb;

    RAMBLOCK_FOREACH(rb) {
        if (!ram_block_is_outside(rb) && !strcmp(ram_block_name(rb), idstr)) {
            return true;
        }
    }
    return false;
}

bool ram_snapshot_blocks_match(const GArray *blocks, Error **errp)
{
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH(rb) {
        if (!ram_block_is_outside(rb) && !block_matches(blocks, rb, errp)) {
            return false;
        }
    }
    /* The first that is not known ends this, however many there are. */
    for (unsigned i = 0; i < blocks->len; i++) {
        const char *idstr = file_block(blocks, i)->idstr;

        if (!machine_has_block(idstr)) {
            error_setg(errp, "It has a RAM block '%s', which the machine has "
                       "not", idstr);
            return false;
        }
        if (find_file_block(blocks, idstr) != file_block(blocks, i)) {
            error_setg(errp, "It has two RAM blocks '%s'", idstr);
            return false;
        }
    }
    return true;
}

static bool add_block(RAMSnapshot *snap, const GArray *blocks, RAMBlock *rb,
                      Error **errp)
{
    const char *idstr = ram_block_name(rb);
    const RAMSnapshotFileBlock *f;
    SavedBlock *b;

    if (find_saved_block(snap, idstr)) {
        error_setg(errp, "The machine has two RAM blocks '%s'", idstr);
        return false;
    }
    b = ram_snapshot_add_block(snap, rb);
    f = find_file_block(blocks, idstr);
    b->pos = f->pages;
    b->bitmap = g_memdup2(f->bitmap,
                          BITS_TO_LONGS(f->length / qemu_target_page_size()) *
                          sizeof(unsigned long));
    return true;
}

static bool add_blocks(RAMSnapshot *snap, const GArray *blocks, Error **errp)
{
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH(rb) {
        if (!ram_block_is_outside(rb) && !add_block(snap, blocks, rb, errp)) {
            return false;
        }
    }
    return true;
}

static bool all_have_holes(int fd, const GArray *blocks)
{
    for (unsigned i = 0; i < blocks->len; i++) {
        if (!block_has_holes(fd, file_block(blocks, i))) {
            return false;
        }
    }
    return true;
}

/* Small blocks are copied in any case. */
static void warn_of_copies(const RAMSnapshot *snap)
{
    const ImageFile *file = snap->file;

    if (!file->mappable) {
        warn_report("snapshot: '%s' has old content where pages are zero: it "
                    "is read in parallel and copied, not mapped", file->name);
        return;
    }
    for (unsigned i = 0; i < snap->blocks->len; i++) {
        const SavedBlock *b = saved_block(snap, i);

        if (b->length >= LARGE && !ram_block_can_lie_on(b)) {
            warn_report("snapshot: RAM block '%s' is shared, of huge pages or "
                        "bound to a NUMA node: it is read in parallel from "
                        "'%s' and copied, not mapped", b->idstr, file->name);
        }
    }
}

static ImageFile *open_layer(const RAMSnapshotLayer *layer, Error **errp)
{
    ImageFile *file = g_rc_box_new0(ImageFile);

    file->fd = qemu_dup(layer->fd);
    file->name = g_strdup(layer->name);
    if (file->fd < 0 || fstat(file->fd, &file->st) < 0) {
        error_setg_errno(errp, errno, "Keeping '%s' open failed", file->name);
    } else if (!ram_snapshot_file_is_same(&file->st, &layer->st)) {
        error_setg(errp, "'%s' was changed while it was read", file->name);
    } else {
        return file;
    }
    image_file_unref(file);
    return NULL;
}

static bool open_layers(RAMSnapshot *snap, GArray *layers, Error **errp)
{
    for (unsigned i = 0; i < layers->len; i++) {
        RAMSnapshotLayer *layer = nth_layer(layers, i);

        if (!ram_snapshot_blocks_match(layer->blocks, errp)) {
            return false;
        }
        layer->file = open_layer(layer, errp);
        if (!layer->file) {
            return false;
        }
    }
    snap->file = g_rc_box_acquire(nth_layer(layers, 0)->file);
    return add_blocks(snap, nth_layer(layers, 0)->blocks, errp);
}

/* Of what nobody can write to, a file may have any or no pages. */
static void find_ends(const RAMSnapshot *snap, const GArray *layers)
{
    for (unsigned i = 0; i < layers->len; i++) {
        ImageFile *file = nth_layer(layers, i)->file;

        for (unsigned k = 0; k < snap->blocks->len; k++) {
            const SavedBlock *b = saved_block(snap, k);

            if (b->length) {
                file->end = MAX(file->end, layer_block(layers, i, b)->pages +
                                b->length);
            }
        }
    }
}

RAMSnapshot *ram_snapshot_open(RAMSnapshotStore *store, GArray *layers,
                               bool holes, Error **errp)
{
    g_autoptr(RAMSnapshot) snap = ram_snapshot_new(store, errp);
    const RAMSnapshotLayer *first = nth_layer(layers, 0);
    bool ok;

    if (!snap) {
        return NULL;
    }
    ok = open_layers(snap, layers, errp);
    if (ok) {
        find_ends(snap, layers);
        snap->file->mappable = holes || all_have_holes(first->fd,
                                                       first->blocks);
        warn_of_copies(snap);
        ok = store->ops->open(snap, layers, errp);
    }
    for (unsigned i = 0; i < layers->len; i++) {
        image_file_unref(nth_layer(layers, i)->file);
    }
    return ok ? g_steal_pointer(&snap) : NULL;
}

/* Which of the layers has a page of a block?  -1: it is zero */
static int page_layer(RAMSnapshotFileBlock **blocks, int n, size_t page)
{
    while (n-- > 0) {
        if (test_bit(page, blocks[n]->bitmap)) {
            return n;
        }
        if (!blocks[n]->same || !test_bit(page, blocks[n]->same)) {
            break;
        }
    }
    return -1;
}

int image_file_read(int fd, uint8_t *buf, size_t length, off_t pos)
{
    while (length) {
        ssize_t n = RETRY_ON_EINTR(pread(fd, buf, length, pos));

        if (n <= 0) {
            return n ? -errno : -ENODATA;
        }
        buf += n;
        pos += n;
        length -= n;
    }
    return 0;
}

int ram_snapshot_layers_read(const GArray *layers, const char *idstr,
                             uint64_t offset, size_t length, uint8_t *buf)
{
    const unsigned bits = qemu_target_page_bits();
    const size_t end = (offset + length) >> bits;
    const int n = layers->len;
    g_autofree RAMSnapshotFileBlock **blocks = g_new(RAMSnapshotFileBlock *, n);
    size_t page = offset >> bits;
    int ret = 0;

    for (int i = 0; i < n; i++) {
        blocks[i] = find_file_block(nth_layer(layers, i)->blocks, idstr);
    }
    while (page < end && !ret) {
        const size_t first = page;
        const int layer = page_layer(blocks, n, page);

        while (++page < end && page_layer(blocks, n, page) == layer) {
            /* Neighbours are read at once. */
        }
        length = (page - first) << bits;
        if (layer >= 0) {
            ret = image_file_read(nth_layer(layers, layer)->fd, buf, length,
                                  blocks[layer]->pages + (first << bits));
        } else {
            memset(buf, 0, length);
        }
        buf += length;
    }
    return ret;
}

bool ram_snapshot_is_mapped(const RAMSnapshot *snap)
{
    return snap->file;
}

RAMSnapshotView *ram_snapshot_view_new(RAMSnapshot *snap, Error **errp)
{
    RAMSnapshotView *view = g_new0(RAMSnapshotView, 1);

    view->base = snap->store->ops->view(snap, &view->mapped, errp);
    if (!view->base) {
        g_free(view);
        return NULL;
    }
    view->snap = snap;
    snap->refs++;
    return view;
}

void ram_snapshot_view_free(RAMSnapshotView *view)
{
    if (view->mapped) {
        munmap((void *)view->base, view->mapped);
    }
    ram_snapshot_free(view->snap);
    g_free(view);
}

bool ram_snapshot_view_block(const RAMSnapshotView *view, unsigned i,
                             RAMSnapshotFileBlock *b)
{
    const SavedBlock *saved;

    if (i >= view->snap->blocks->len) {
        return false;
    }
    saved = saved_block(view->snap, i);
    *b = (RAMSnapshotFileBlock) {
        .idstr = saved->idstr,
        .migratable = saved->migratable,
        .length = saved->used_length,
    };
    return true;
}

bool ram_snapshot_view_is_zero(const RAMSnapshotView *view, unsigned i,
                               ram_addr_t offset, ram_addr_t length)
{
    const RAMSnapshotOps *ops = view->snap->store->ops;
    const SavedBlock *b = saved_block(view->snap, i);
    const ram_addr_t end = MIN(offset + length, b->length);

    while (offset < end && ops->is_zero(view->snap, b, offset)) {
        offset += qemu_target_page_size();
    }
    return offset >= end;
}

const uint8_t *ram_snapshot_view_page(const RAMSnapshotView *view, unsigned i,
                                      ram_addr_t offset)
{
    const RAMSnapshotOps *ops = view->snap->store->ops;
    const SavedBlock *b = saved_block(view->snap, i);
    const uint8_t *page;

    if (offset >= b->length || ops->is_zero(view->snap, b, offset)) {
        return NULL;
    }
    page = ops->page(view->snap, b, offset, view->base);
    return buffer_is_zero(page, qemu_target_page_size()) ? NULL : page;
}
