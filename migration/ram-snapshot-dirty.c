/*
 * RAM snapshots, put back by copying the pages that were written to
 *
 * RAM stays where it is.  The store's file holds pages, not images: an image
 * is a table that names a page of the file for each page of RAM, and images
 * that differ in a few pages share all others.
 *
 * RAM always equals the current image but for the pages in the dirty log.  An
 * image remembers which one was current when it was saved and the pages in
 * which it differs, so that images form a tree; to put back another than the
 * current one, the pages that differ along the way are added to the log.
 *
 * An image that was opened from a file lies in it.  Pages of the file have
 * numbers as those of the store's file have, and the file is mapped where these
 * are in the view.  RAM becomes such an image by being mapped from the file.
 * A file is a node above those of the images in it, and below that of its base,
 * if it has one; then it has pages of its own where it differs from that.  RAM
 * is mapped from the file at the root of the tree.
 *
 * A page that differs restore after restore stays in the log, so that the first
 * write to it need not be trapped again; it is compared each time, and leaves
 * the log when it did not differ for a while.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitops.h"
#include "qemu/cutils.h"
#include "qemu/queue.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "exec/memory.h"
#include "exec/ram-dirty-log.h"
#include "exec/ramblock.h"
#include "exec/target_page.h"
#include "hw/qdev-core.h"
#include "system/kvm.h"
#include "ram-snapshot-int.h"
#include "trace.h"

/* Page of the file that all pages of zeroes share. */
#define ZERO_PAGE 0

/* Bytes that a save writes in one call: they are still in the cache then. */
#define MOST_AT_ONCE (256 * KiB)

/*
 * To compare a page once more than needed costs about as much as to trap the
 * first write to it: whether it is worth it is not known better than by the
 * last few restores.
 */
#define MOST_UNCHANGED 2

typedef struct ImageNode ImageNode;

struct ImageNode {
    ImageNode *from;            /* current at the save; NULL: unknown */
    unsigned children;
    bool held;                  /* by a DirtySnapshot */
    GArray *blocks;             /* of SavedBlock */
    ImageFile *file;            /* it is a file; NULL: an image */
    unsigned version;           /* of ram_list: that of its children, too */
    /* RAM pages that differ from @from's. */
    uint32_t *delta;
    uint32_t delta_len;
    /* By RAM page: page of the file.  NULL if only children need the node. */
    uint32_t *table;
    uint32_t nr_pages;          /* of @table */
    QTAILQ_ENTRY(ImageNode) next;
};

typedef struct DirtySnapshot {
    RAMSnapshot parent;
    ImageNode *node;
} DirtySnapshot;

/*
 * A file in the view: as long as a page of it is in a table.  After that its
 * numbers are kept for another file, which needs as many in a row.
 */
typedef struct Piece {
    ImageFile *file;            /* or NULL */
    uint32_t first, nr;         /* of pages */
    uint64_t used;              /* references to them; one by the image */
} Piece;

typedef struct DirtyStore {
    RAMSnapshotStore parent;
    unsigned page_bits;
    uint8_t *pages;             /* read-only view of the file */
    size_t mapped;              /* its size */
    uint32_t nr_pages;          /* of the file in use, free ones included */
    GArray *refs;               /* uint16_t by page of the file: tables */
    GArray *free;               /* uint32_t: pages of the file */
    GArray *pieces;             /* of Piece */
    ImageFile *lies_on;         /* that RAM was mapped from, or NULL */
    QTAILQ_HEAD(, ImageNode) nodes;
    RAMDirtyLog *log;
    unsigned log_version;       /* of ram_list, when the log was started */
    ImageNode *current;         /* RAM equals it but for the log's pages */
    unsigned rom_touched;       /* see rom_touched(), when that became so */
    uint16_t restores;
    uint16_t *changed;          /* by RAM page: the last that changed it */
} DirtyStore;

static DirtyStore *dirty_store(RAMSnapshotStore *store)
{
    return container_of(store, DirtyStore, parent);
}

static ImageNode *image_node(RAMSnapshot *snap)
{
    return container_of(snap, DirtySnapshot, parent)->node;
}

static void dirty_store_init(RAMSnapshotStore *store)
{
    DirtyStore *ds = dirty_store(store);
    uint16_t no_refs = 0;

    ds->page_bits = qemu_target_page_bits();
    ds->refs = g_array_new(false, true, sizeof(uint16_t));
    ds->free = g_array_new(false, false, sizeof(uint32_t));
    ds->pieces = g_array_new(false, false, sizeof(Piece));
    QTAILQ_INIT(&ds->nodes);
    ds->nr_pages = ZERO_PAGE + 1;
    g_array_append_val(ds->refs, no_refs);
}

static Piece *piece_at(const DirtyStore *ds, unsigned i)
{
    return &g_array_index(ds->pieces, Piece, i);
}

static void dirty_store_clear(RAMSnapshotStore *store)
{
    DirtyStore *ds = dirty_store(store);

    g_assert(QTAILQ_EMPTY(&ds->nodes));
    for (unsigned i = 0; i < ds->pieces->len; i++) {
        image_file_unref(piece_at(ds, i)->file);
    }
    if (ds->lies_on) {
        ram_block_discard_disable(false);
    }
    if (ds->pages) {
        munmap(ds->pages, ds->mapped);
    }
    g_array_unref(ds->refs);
    g_array_unref(ds->free);
    g_array_unref(ds->pieces);
}

static uint16_t *page_refs(DirtyStore *ds, uint32_t file_page)
{
    return &g_array_index(ds->refs, uint16_t, file_page);
}

static Piece *find_piece(const DirtyStore *ds, uint32_t file_page)
{
    for (unsigned i = 0; i < ds->pieces->len; i++) {
        Piece *piece = piece_at(ds, i);

        if (file_page - piece->first < piece->nr) {
            return piece;
        }
    }
    return NULL;
}

static const uint8_t *image_page(const DirtyStore *ds, const uint32_t *table,
                                 uint32_t page)
{
    return ds->pages + ((size_t)table[page] << ds->page_bits);
}

static uint32_t file_page_new(DirtyStore *ds)
{
    uint16_t no_refs = 0;

    if (ds->free->len) {
        uint32_t page = g_array_index(ds->free, uint32_t, ds->free->len - 1);

        g_array_set_size(ds->free, ds->free->len - 1);
        return page;
    }
    g_array_append_val(ds->refs, no_refs);
    return ds->nr_pages++;
}

/* Map a file in its place, over what is there of the store's own. */
static bool map_piece(const DirtyStore *ds, const Piece *piece, uint8_t *view,
                      Error **errp)
{
    if (mmap(view + ((size_t)piece->first << ds->page_bits),
             (size_t)piece->nr << ds->page_bits, PROT_READ,
             MAP_SHARED | MAP_FIXED, piece->file->fd, 0) == MAP_FAILED) {
        error_setg_errno(errp, errno, "Mapping '%s' failed",
                         piece->file->name);
        return false;
    }
    return true;
}

/* A view of all pages.  Returns: NULL with @errp set */
static uint8_t *map_view(const DirtyStore *ds, size_t size, Error **errp)
{
    uint8_t *view = mmap(NULL, size, PROT_READ, MAP_SHARED, ds->parent.fd, 0);

    if (view == MAP_FAILED) {
        error_setg_errno(errp, errno, "Mapping the RAM image failed");
        return NULL;
    }
    for (unsigned i = 0; i < ds->pieces->len; i++) {
        const Piece *piece = piece_at(ds, i);

        if (piece->file && !map_piece(ds, piece, view, errp)) {
            munmap(view, size);
            return NULL;
        }
    }
    return view;
}

/* The view covers the file with room to grow, so that it seldom moves. */
static bool file_grow(DirtyStore *ds, Error **errp)
{
    size_t need = (size_t)ds->nr_pages << ds->page_bits;
    size_t size = pow2ceil(MAX(need, 16 << ds->page_bits));
    uint8_t *view;

    if (need <= ds->mapped) {
        return true;
    }
    if (!ds->pages) {
        g_autofree uint8_t *zeroes = g_malloc0(1 << ds->page_bits);

        /* To read a hole takes space on a tmpfs; if that is full, SIGBUS. */
        if (!ram_snapshot_pwrite(&ds->parent, zeroes, 1 << ds->page_bits,
                                 (off_t)ZERO_PAGE << ds->page_bits, errp)) {
            return false;
        }
    }
    if (!ram_snapshot_grow(&ds->parent, size, errp)) {
        return false;
    }
    /* Moved, what was touched of it need not be touched again. */
    if (ds->pages && !ds->pieces->len) {
        view = mremap(ds->pages, ds->mapped, size, MREMAP_MAYMOVE);
        if (view == MAP_FAILED) {
            error_setg_errno(errp, errno, "Mapping the RAM image failed");
            return false;
        }
    } else {
        view = map_view(ds, size, errp);
        if (!view) {
            return false;
        }
        if (ds->pages) {
            munmap(ds->pages, ds->mapped);
        }
    }
    ds->pages = view;
    ds->mapped = size;
    return true;
}

/* Put the store's file back in a place of the view. */
static void drop_piece(DirtyStore *ds, Piece *piece)
{
    const size_t start = (size_t)piece->first << ds->page_bits;

    /* If that fails, the file stays mapped until another one comes there. */
    mmap(ds->pages + start, (size_t)piece->nr << ds->page_bits, PROT_READ,
         MAP_SHARED | MAP_FIXED, ds->parent.fd, start);
    g_ptr_array_remove(ds->parent.files, piece->file);
    image_file_unref(g_steal_pointer(&piece->file));
}

/* If RAM lies on it, that is what it is kept for. */
static void piece_unref(DirtyStore *ds, Piece *piece)
{
    if (!--piece->used && piece->file != ds->lies_on) {
        drop_piece(ds, piece);
    }
}

static Piece *file_piece(const DirtyStore *ds, const ImageFile *file)
{
    for (unsigned i = 0; i < ds->pieces->len; i++) {
        if (piece_at(ds, i)->file == file) {
            return piece_at(ds, i);
        }
    }
    g_assert_not_reached();
}

static void punch(const DirtyStore *ds, uint32_t start, uint32_t len)
{
    if (len) {
        fallocate(ds->parent.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  (off_t)start << ds->page_bits, (off_t)len << ds->page_bits);
    }
}

/* Free pages that no table names any more, and give their memory back. */
static void file_pages_unref(DirtyStore *ds, const uint32_t *table, uint32_t nr)
{
    uint32_t i, file_page, start = 0, len = 0;
    Piece *piece;

    for (i = 0; i < nr; i++) {
        file_page = table[i];
        piece = find_piece(ds, file_page);
        if (piece) {
            piece_unref(ds, piece);
            continue;
        }
        if (file_page == ZERO_PAGE || --*page_refs(ds, file_page)) {
            continue;
        }
        g_array_append_val(ds->free, file_page);
        if (file_page != start + len) {
            punch(ds, start, len);
            start = file_page;
            len = 0;
        }
        len++;
    }
    punch(ds, start, len);
}

static void file_pages_ref(DirtyStore *ds, const uint32_t *table, uint32_t nr)
{
    uint32_t i;

    for (i = 0; i < nr; i++) {
        Piece *piece = find_piece(ds, table[i]);

        if (piece) {
            piece->used++;
        } else {
            ++*page_refs(ds, table[i]);
        }
    }
}

static const SavedBlock *node_block(const ImageNode *node, unsigned i)
{
    return &g_array_index(node->blocks, SavedBlock, i);
}

/* Find the block that a page of RAM is in; neighbours are looked up in a row */
static const SavedBlock *page_block(const ImageNode *node, ram_addr_t addr,
                                    const SavedBlock *hint)
{
    unsigned i;

    if (hint && addr - hint->offset < hint->length) {
        return hint;
    }
    for (i = 0; i < node->blocks->len; i++) {
        const SavedBlock *b = node_block(node, i);

        if (addr - b->offset < b->length) {
            return b;
        }
    }
    return NULL;
}

static bool file_write_page(DirtyStore *ds, uint32_t *slot, const uint8_t *host,
                            Error **errp)
{
    size_t size = 1 << ds->page_bits;

    if (buffer_is_zero(host, size)) {
        *slot = ZERO_PAGE;
        return true;
    }
    *slot = file_page_new(ds);
    return ram_snapshot_pwrite(&ds->parent, host, size,
                               (off_t)*slot << ds->page_bits, errp);
}

/* Pages are written together if they follow each other in RAM and the file. */
static bool save_block(DirtyStore *ds, ImageNode *node, const SavedBlock *b,
                       Error **errp)
{
    const size_t size = 1 << ds->page_bits;
    const uint8_t *run = b->host;
    size_t len = 0;
    off_t start = 0;
    ram_addr_t off;

    for (off = 0; off < b->length; off += size) {
        uint32_t *slot = &node->table[(b->offset + off) >> ds->page_bits];
        const uint8_t *host = b->host + off;
        off_t pos;

        if (buffer_is_zero(host, size)) {
            *slot = ZERO_PAGE;
            continue;
        }
        *slot = file_page_new(ds);
        pos = (off_t)*slot << ds->page_bits;
        if (host != run + len || pos != start + len || len >= MOST_AT_ONCE) {
            if (!ram_snapshot_pwrite(&ds->parent, run, len, start, errp)) {
                return false;
            }
            run = host;
            start = pos;
            len = 0;
        }
        len += size;
    }
    return ram_snapshot_pwrite(&ds->parent, run, len, start, errp);
}

/* Without a current image, all pages must be read. */
static bool save_all(DirtyStore *ds, ImageNode *node, Error **errp)
{
    unsigned i;

    for (i = 0; i < node->blocks->len; i++) {
        if (!save_block(ds, node, node_block(node, i), errp)) {
            return false;
        }
    }
    return true;
}

/* All other pages are those of the current image. */
static bool save_logged(DirtyStore *ds, ImageNode *node, Error **errp)
{
    const size_t size = 1 << ds->page_bits;
    const SavedBlock *b = NULL;
    unsigned i;

    memcpy(node->table, ds->current->table, sizeof(*node->table) *
           MIN(node->nr_pages, ds->current->nr_pages));
    node->delta = g_new(uint32_t, ds->log->len);
    for (i = 0; i < ds->log->len; i++) {
        uint32_t page = ds->log->list[i];
        ram_addr_t addr = (ram_addr_t)page << ds->page_bits;
        const uint8_t *host;

        b = page_block(node, addr, b);
        if (!b) {
            continue;
        }
        host = b->host + (addr - b->offset);
        if (!memcmp(host, image_page(ds, node->table, page), size)) {
            continue;
        }
        node->delta[node->delta_len++] = page;
        if (!file_write_page(ds, &node->table[page], host, errp)) {
            return false;
        }
    }
    return true;
}

/* Log the pages of a block that are not as in an image. */
static void log_differences(DirtyStore *ds, const ImageNode *node,
                            const SavedBlock *b)
{
    const size_t size = 1 << ds->page_bits;
    ram_addr_t off;

    for (off = 0; off < b->length; off += size) {
        uint32_t page = (b->offset + off) >> ds->page_bits;

        if (memcmp(b->host + off, image_page(ds, node->table, page), size)) {
            ram_dirty_log_add(ds->log, b->offset + off, size);
        }
    }
}

/* A device like flash, which only writes when it is accessed */
static bool is_rom_device(const RAMBlock *rb)
{
    return rb->mr->rom_device && rb->mr->dev &&
        !(rb->flags & (RAM_SHARED | RAM_PREALLOC));
}

/* A number that is another one once one of these devices was accessed */
static unsigned rom_touched(const ImageNode *node)
{
    unsigned i, sum = 0;

    for (i = 0; i < node->blocks->len; i++) {
        const RAMBlock *rb = node_block(node, i)->rb;

        if (is_rom_device(rb)) {
            sum += qatomic_read(&rb->mr->dev->touched);
        }
    }
    return sum;
}

static void log_other_writers(DirtyStore *ds, const ImageNode *node)
{
    bool roms = rom_touched(node) != ds->rom_touched;
    unsigned i;

    for (i = 0; i < node->blocks->len; i++) {
        const SavedBlock *b = node_block(node, i);

        if (is_rom_device(b->rb) ? roms :
            ram_snapshot_has_other_writers(b->rb)) {
            log_differences(ds, node, b);
        }
    }
}

/* Complete the log.  Returns: false if it cannot tell what was written to. */
static bool log_complete(DirtyStore *ds)
{
    if (!ram_dirty_log_sync() || !ds->current) {
        return false;
    }
    log_other_writers(ds, ds->current);
    return true;
}

static void log_all(DirtyStore *ds, const ImageNode *node)
{
    unsigned i;

    for (i = 0; i < node->blocks->len; i++) {
        log_differences(ds, node, node_block(node, i));
    }
}

static unsigned node_depth(const ImageNode *node)
{
    unsigned n = 0;

    for (; node->from; node = node->from) {
        n++;
    }
    return n;
}

static ImageNode *log_step_up(DirtyStore *ds, const ImageNode *node)
{
    uint32_t i;

    for (i = 0; i < node->delta_len; i++) {
        ram_dirty_log_add(ds->log,
                          (ram_addr_t)node->delta[i] << ds->page_bits, 1);
    }
    return node->from;
}

/*
 * Log all pages in which an image may differ from the current one.
 *
 * Returns: false if the two have no ancestor in common
 */
static bool log_path(DirtyStore *ds, ImageNode *node)
{
    ImageNode *a = ds->current, *b = node;
    unsigned da = node_depth(a), db = node_depth(b);

    for (; da > db; da--) {
        a = log_step_up(ds, a);
    }
    for (; db > da; db--) {
        b = log_step_up(ds, b);
    }
    while (a != b && a->from) {
        a = log_step_up(ds, a);
        b = log_step_up(ds, b);
    }
    return a == b;
}

static int compare_pages(const void *a, const void *b)
{
    uint32_t pa = *(const uint32_t *)a, pb = *(const uint32_t *)b;

    return (pa > pb) - (pa < pb);
}

/* @node's parent is about to go: take over what differs from its parent. */
static void node_merge_delta(ImageNode *node)
{
    const ImageNode *from = node->from;
    uint32_t i, len = node->delta_len + from->delta_len;

    if (!from->from) {
        g_clear_pointer(&node->delta, g_free);
        node->delta_len = 0;
        return;
    }
    if (!from->delta_len) {
        return;
    }
    node->delta = g_renew(uint32_t, node->delta, len);
    memcpy(node->delta + node->delta_len, from->delta,
           from->delta_len * sizeof(*from->delta));
    qsort(node->delta, len, sizeof(*node->delta), compare_pages);
    node->delta_len = 0;
    for (i = 0; i < len; i++) {
        if (!i || node->delta[i] != node->delta[i - 1]) {
            node->delta[node->delta_len++] = node->delta[i];
        }
    }
}

static void node_free(DirtyStore *ds, ImageNode *node)
{
    if (node->file) {
        piece_unref(ds, file_piece(ds, node->file));
        image_file_unref(node->file);
    }
    QTAILQ_REMOVE(&ds->nodes, node, next);
    g_array_unref(node->blocks);
    g_free(node->delta);
    g_free(node);
}

/* Drop what of a node, and of its ancestors, nobody needs any more. */
static void node_prune(DirtyStore *ds, ImageNode *node)
{
    while (node && !node->held && node != ds->current) {
        ImageNode *from = node->from, *child;

        if (node->table) {
            file_pages_unref(ds, node->table, node->nr_pages);
            g_clear_pointer(&node->table, g_free);
        }
        /* What its children differ from may have to be mapped. */
        if (node->children > (node->file ? 0 : 1)) {
            return;
        }
        if (node->children) {
            QTAILQ_FOREACH(child, &ds->nodes, next) {
                if (child->from == node) {
                    node_merge_delta(child);
                    child->from = from;
                    break;
                }
            }
            from = NULL;
        } else if (from) {
            from->children--;
        }
        node_free(ds, node);
        node = from;
    }
}

static void set_current(DirtyStore *ds, ImageNode *node)
{
    ImageNode *old = ds->current;

    ds->current = node;
    ds->rom_touched = node ? rom_touched(node) : 0;
    if (old != node) {
        node_prune(ds, old);
    }
}

/* RAM is made up as it was when the current image was saved or put back. */
static bool log_is_valid(const DirtyStore *ds)
{
    return ds->log && ds->log_version == ram_list.version;
}

/* See to it that there is a log of all RAM. */
static bool log_start(DirtyStore *ds, Error **errp)
{
    RAMDirtyLog *log;

    if (log_is_valid(ds)) {
        return true;
    }
    log = ram_dirty_log_start(errp);
    if (!log) {
        return false;
    }
    ds->log = log;
    ds->log_version = ram_list.version;
    g_free(ds->changed);
    ds->changed = g_new0(uint16_t, log->nr_pages);
    ds->restores = 1;           /* None is of the last restore, which is 0. */
    set_current(ds, NULL);
    return true;
}

/* If there is no image, nothing is to be put back. */
static void log_stop_if_unused(DirtyStore *ds)
{
    ImageNode *node;

    QTAILQ_FOREACH(node, &ds->nodes, next) {
        if (node->held) {
            return;
        }
    }
    ram_dirty_log_stop();
    ds->log = NULL;
    g_clear_pointer(&ds->changed, g_free);
    set_current(ds, NULL);
}

static ImageNode *node_new(DirtyStore *ds, RAMSnapshot *snap)
{
    ImageNode *node = g_new0(ImageNode, 1);

    node->blocks = g_array_ref(snap->blocks);
    node->version = ds->log_version;
    QTAILQ_INSERT_TAIL(&ds->nodes, node, next);
    return node;
}

static void node_give_table(const DirtyStore *ds, ImageNode *node)
{
    node->nr_pages = ds->log->nr_pages;
    node->table = g_new0(uint32_t, node->nr_pages);
}

static void node_set_from(ImageNode *node, ImageNode *from)
{
    node->from = from;
    if (from) {
        from->children++;
    }
}

/* A failed save: pages that it wrote are in no table but the node's. */
static void save_undo(DirtyStore *ds, ImageNode *node)
{
    uint32_t i, page;

    for (i = 0; i < node->nr_pages; i++) {
        page = node->table[i];
        if (page != ZERO_PAGE && !find_piece(ds, page) &&
            !*page_refs(ds, page)) {
            g_array_append_val(ds->free, page);
        }
    }
    g_free(node->table);
    node_free(ds, node);
}

static bool dirty_save(RAMSnapshot *snap, Error **errp)
{
    DirtyStore *ds = dirty_store(snap->store);
    ImageNode *node;
    bool ok;

    if (!log_start(ds, errp)) {
        return false;
    }
    if (!log_complete(ds)) {
        set_current(ds, NULL);
    }
    node = node_new(ds, snap);
    node_give_table(ds, node);
    ok = ds->current ? save_logged(ds, node, errp) : save_all(ds, node, errp);
    if (!ok || !file_grow(ds, errp)) {
        save_undo(ds, node);
        log_stop_if_unused(ds);
        return false;
    }

    file_pages_ref(ds, node->table, node->nr_pages);
    node_set_from(node, ds->current);
    node->held = true;
    container_of(snap, DirtySnapshot, parent)->node = node;
    ram_dirty_log_clear(ds->log, 0);
    set_current(ds, node);
    return true;
}

/* Enter the pages that a file has of a block in a node's table. */
static void add_file_block(const DirtyStore *ds, ImageNode *node,
                           const SavedBlock *b, const RAMSnapshotFileBlock *f,
                           Piece *piece)
{
    const size_t pages = b->length >> ds->page_bits;
    const uint32_t to = b->offset >> ds->page_bits;
    const uint32_t from = piece->first + (f->pages >> ds->page_bits);
    size_t i = 0, end;

    while ((i = find_next_bit(f->bitmap, pages, i)) < pages) {
        end = find_next_zero_bit(f->bitmap, pages, i);
        piece->used += end - i;
        for (; i < end; i++) {
            node->table[to + i] = from + i;
        }
    }
}

/* Forget what a table has of the layers below where a file differs. */
static void drop_file_block(const DirtyStore *ds, ImageNode *node,
                            const SavedBlock *b, const RAMSnapshotFileBlock *f)
{
    const size_t pages = b->length >> ds->page_bits;
    uint32_t *entry = node->table + (b->offset >> ds->page_bits);
    size_t i = 0;

    while (f->same && (i = find_next_zero_bit(f->same, pages, i)) < pages) {
        Piece *piece = find_piece(ds, entry[i]);

        if (piece) {
            piece->used--;
        }
        entry[i++] = ZERO_PAGE;
    }
}

/* List the pages in which a file differs from its base. */
static void node_give_delta(const DirtyStore *ds, ImageNode *node,
                            const GArray *layers, unsigned layer)
{
    g_autoptr(GArray) delta = g_array_new(false, false, sizeof(uint32_t));

    for (unsigned i = 0; i < node->blocks->len; i++) {
        const SavedBlock *b = node_block(node, i);
        const RAMSnapshotFileBlock *f = layer_block(layers, layer, b);
        const size_t pages = b->length >> ds->page_bits;
        size_t k = 0;

        while ((k = find_next_zero_bit(f->same, pages, k)) < pages) {
            const uint32_t page = (b->offset >> ds->page_bits) + k++;

            g_array_append_val(delta, page);
        }
    }
    node->delta_len = delta->len;
    node->delta = (uint32_t *)g_array_free(g_steal_pointer(&delta), false);
}

/* The smallest row of numbers that once was a file's and is long enough */
static Piece *find_free_piece(const DirtyStore *ds, uint32_t nr)
{
    Piece *found = NULL;

    for (unsigned i = 0; i < ds->pieces->len; i++) {
        Piece *piece = piece_at(ds, i);

        if (!piece->file && piece->nr >= nr &&
            (!found || piece->nr < found->nr)) {
            found = piece;
        }
    }
    return found;
}

/* Returns: NULL with @errp set if the host lacks memory or addresses for it */
static Piece *new_piece(DirtyStore *ds, uint32_t nr, Error **errp)
{
    const uint32_t align = qemu_real_host_page_size() >> ds->page_bits;
    const uint64_t first = ROUND_UP((uint64_t)ds->nr_pages, MAX(align, 1));
    const Piece piece = { .first = first, .nr = nr };
    const uint32_t nr_pages = ds->nr_pages;

    if (first + nr > UINT32_MAX) {
        error_setg(errp, "There are too many pages of RAM in images");
        return NULL;
    }
    ds->nr_pages = first + nr;
    if (!file_grow(ds, errp)) {
        ds->nr_pages = nr_pages;
        return NULL;
    }
    g_array_set_size(ds->refs, ds->nr_pages);
    g_array_append_val(ds->pieces, piece);
    return piece_at(ds, ds->pieces->len - 1);
}

/* Returns: NULL with @errp set if the host lacks memory or addresses for it */
static Piece *add_piece(DirtyStore *ds, ImageFile *file, Error **errp)
{
    const uint64_t nr = DIV_ROUND_UP(file->end, 1 << ds->page_bits);
    Piece *piece;

    if (nr > UINT32_MAX) {
        error_setg(errp, "There are too many pages of RAM in images");
        return NULL;
    }
    piece = find_free_piece(ds, nr) ?: new_piece(ds, nr, errp);
    if (!piece) {
        return NULL;
    }
    piece->file = g_rc_box_acquire(file);
    piece->used = 1;
    if (!map_piece(ds, piece, ds->pages, errp)) {
        image_file_unref(g_steal_pointer(&piece->file));
        piece->used = 0;
        return NULL;
    }
    g_ptr_array_add(ds->parent.files, file);
    return piece;
}

/* A node of the same file, and of the same ones that it is based on */
static ImageNode *find_file_node(const DirtyStore *ds, const ImageNode *from,
                                 const ImageFile *file)
{
    ImageNode *node;

    QTAILQ_FOREACH(node, &ds->nodes, next) {
        if (node->file && node->from == from &&
            node->version == ds->log_version &&
            image_file_is_same(node->file, file)) {
            return node;
        }
    }
    return NULL;
}

/* A node of the file of a layer, below @from, that of the layer before it */
static ImageNode *add_file_node(RAMSnapshot *snap, ImageNode *from,
                                const GArray *layers, unsigned layer,
                                Error **errp)
{
    DirtyStore *ds = dirty_store(snap->store);
    ImageFile *file = g_array_index(layers, RAMSnapshotLayer, layer).file;
    ImageNode *node;

    if (!add_piece(ds, file, errp)) {
        return NULL;
    }
    node = node_new(ds, snap);
    node->file = g_rc_box_acquire(file);
    node_set_from(node, from);
    if (from) {
        node_give_delta(ds, node, layers, layer);
    }
    return node;
}

/*
 * Nodes of all files.  They are shared with images that have them already, so
 * that the way from one to the other is short.
 *
 * Returns: that of the last, or NULL with @errp set
 */
static ImageNode *add_file_nodes(RAMSnapshot *snap, const GArray *layers,
                                 Error **errp)
{
    DirtyStore *ds = dirty_store(snap->store);
    ImageNode *node = NULL;

    for (unsigned i = 0; i < layers->len; i++) {
        const ImageFile *file = g_array_index(layers, RAMSnapshotLayer,
                                              i).file;
        ImageNode *from = node;

        node = find_file_node(ds, from, file) ?:
            add_file_node(snap, from, layers, i, errp);
        if (!node) {
            node_prune(ds, from);
            return NULL;
        }
    }
    return node;
}

/* The file that RAM can be mapped from, to become an image, or NULL */
static const ImageNode *node_root_file(const ImageNode *node)
{
    while (node->from) {
        node = node->from;
    }
    return node->file ? node : NULL;
}

/* Enter what a file, and those that it is based on, have. */
static void fill_table(DirtyStore *ds, ImageNode *node, const ImageNode *file,
                       const GArray *layers, unsigned layer)
{
    Piece *piece;

    if (layer) {
        fill_table(ds, node, file->from, layers, layer - 1);
    }
    piece = file_piece(ds, file->file);
    for (unsigned i = 0; i < node->blocks->len; i++) {
        const SavedBlock *b = node_block(node, i);
        const RAMSnapshotFileBlock *f = layer_block(layers, layer, b);

        drop_file_block(ds, node, b, f);
        add_file_block(ds, node, b, f, piece);
    }
}

static bool dirty_open(RAMSnapshot *snap, const GArray *layers, Error **errp)
{
    DirtyStore *ds = dirty_store(snap->store);
    ImageNode *node, *file;

    if (!log_start(ds, errp)) {
        return false;
    }
    file = add_file_nodes(snap, layers, errp);
    if (!file) {
        log_stop_if_unused(ds);
        return false;
    }
    node = node_new(ds, snap);
    node_set_from(node, file);
    node_give_table(ds, node);
    fill_table(ds, node, file, layers, layers->len - 1);
    /* Others may have opened it before. */
    image_file_unref(snap->file);
    snap->file = g_rc_box_acquire(node_root_file(node)->file);
    node->held = true;
    container_of(snap, DirtySnapshot, parent)->node = node;
    return true;
}

static bool dirty_prepare(RAMSnapshot *snap, Error **errp)
{
    return log_start(dirty_store(snap->store), errp);
}

/*
 * Shall a page stay in the log?  With KVM it would save nothing: to ask which
 * pages were written to protects them again.
 */
static bool page_recurs(DirtyStore *ds, uint32_t page, bool was_kept,
                        bool changed)
{
    uint16_t ago = ds->restores - ds->changed[page];

    if (changed) {
        ds->changed[page] = ds->restores;
        return (was_kept || ago == 1) && !kvm_enabled();
    }
    return ago <= MOST_UNCHANGED;
}

/*
 * The hot path: its cost is that of the pages in the log.  Of those that were
 * kept in it, nobody knows but by comparing whether they were written to.
 *
 * Puts the pages that are to be kept at the front of the log's list.
 */
static uint64_t copy_logged(DirtyStore *ds, const ImageNode *node,
                            unsigned *keep)
{
    const size_t size = 1 << ds->page_bits;
    const SavedBlock *b = NULL, *written = NULL;
    ram_addr_t start = 0, length = 0;
    uint32_t *list = ds->log->list;
    uint64_t copied = 0;
    unsigned i;

    ds->restores++;
    *keep = 0;
    for (i = 0; i < ds->log->len; i++) {
        uint32_t page = list[i];
        ram_addr_t addr = (ram_addr_t)page << ds->page_bits;
        bool was_kept = i < ds->log->kept, changed;
        const uint8_t *saved;
        uint8_t *host;

        b = page_block(node, addr, b);
        if (!b) {
            continue;
        }
        addr -= b->offset;
        host = b->host + addr;
        saved = image_page(ds, node->table, page);
        changed = !was_kept || memcmp(host, saved, size);
        if (changed) {
            memcpy(host, saved, size);
            copied++;
            if (b != written || addr != start + length) {
                if (length) {
                    ram_block_written(written->rb, start, length);
                }
                written = b;
                start = addr;
                length = 0;
            }
            length += size;
        }
        if (page_recurs(ds, page, was_kept, changed)) {
            list[i] = list[*keep];
            list[(*keep)++] = page;
        }
    }
    if (length) {
        ram_block_written(written->rb, start, length);
    }
    return copied;
}

/* Map a block from the file.  Returns: false with the block as it was */
static bool map_block(const ImageFile *file, const SavedBlock *b)
{
    void *mapping;

    if (!file->mappable || !ram_block_can_lie_on(b)) {
        return false;
    }
    mapping = ram_block_map(b, file->fd, b->pos, NULL);
    if (mapping && !ram_block_move_mapping(b, mapping, NULL)) {
        munmap(mapping, b->length);
        return false;
    }
    return mapping;
}

/* RAM lies on @file, and no longer on what it lay on before. */
static void set_lies_on(DirtyStore *ds, ImageFile *file)
{
    ImageFile *old = ds->lies_on;

    if (!old) {
        /* A discard would bring back what is in the file, not zeroes. */
        ram_block_discard_disable(true);
    }
    ds->lies_on = file;
    if (old && old != file && !file_piece(ds, old)->used) {
        drop_piece(ds, file_piece(ds, old));
    }
}

/*
 * Make RAM what the file is that an image has at the root of its tree: map what
 * can be, read the rest, and log what differs on the way from there.
 */
static bool place(DirtyStore *ds, const ImageNode *root, const ImageNode *node,
                  uint64_t *pages, Error **errp)
{
    g_autoptr(GPtrArray) others = g_ptr_array_new();
    unsigned i;
    bool ok;

    for (i = 0; i < root->blocks->len; i++) {
        const SavedBlock *b = node_block(root, i);

        if (!map_block(root->file, b)) {
            g_ptr_array_add(others, (void *)b);
        } else if (memory_region_get_dirty_log_mask(b->rb->mr) &
                   BIT(DIRTY_MEMORY_VGA)) {
            /* Who draws what is in it has to look at it again. */
            memory_region_set_dirty(b->rb->mr, 0, b->used_length);
        }
    }
    set_lies_on(ds, root->file);
    ok = ram_snapshot_read(root->file, others, pages, errp);
    ram_snapshot_flush_tcg();
    ram_dirty_log_clear(ds->log, 0);
    while (node != root) {
        node = log_step_up(ds, node);
    }
    return ok;
}

static bool dirty_restore(RAMSnapshot *snap, uint64_t *pages, Error **errp)
{
    DirtyStore *ds = dirty_store(snap->store);
    ImageNode *node = image_node(snap);
    bool is_related = log_complete(ds) && log_path(ds, node);
    const ImageNode *root = is_related ? NULL : node_root_file(node);
    unsigned logged, keep;

    *pages = 0;
    if (root) {
        if (!place(ds, root, node, pages, errp)) {
            set_current(ds, NULL);
            return false;
        }
    } else if (!is_related) {
        log_all(ds, node);
    }
    logged = ds->log->len;
    *pages += copy_logged(ds, node, &keep);
    ram_dirty_log_clear(ds->log, keep);
    trace_ram_snapshot_put_back(logged, *pages, keep);
    set_current(ds, node);
    return !(*pages || root) || !kvm_enabled() || kvm_ram_written(errp);
}

static void dirty_release(RAMSnapshot *snap)
{
    DirtyStore *ds = dirty_store(snap->store);
    ImageNode *node = image_node(snap);

    if (!node) {
        return;
    }
    node->held = false;
    node_prune(ds, node);
    log_stop_if_unused(ds);
}

static const uint8_t *dirty_view(RAMSnapshot *snap, size_t *size, Error **errp)
{
    const DirtyStore *ds = dirty_store(snap->store);

    *size = ds->mapped;
    return map_view(ds, ds->mapped, errp);
}

/* In pages */
static size_t place_in_file(const RAMSnapshot *snap, const SavedBlock *b,
                            ram_addr_t offset)
{
    const DirtyStore *ds = container_of(snap->store, DirtyStore, parent);
    const ImageNode *node = container_of(snap, DirtySnapshot, parent)->node;

    return node->table[(b->offset + offset) >> ds->page_bits];
}

static const uint8_t *dirty_page(const RAMSnapshot *snap, const SavedBlock *b,
                                 ram_addr_t offset, const uint8_t *view)
{
    const DirtyStore *ds = container_of(snap->store, DirtyStore, parent);

    return (view ?: ds->pages) +
        (place_in_file(snap, b, offset) << ds->page_bits);
}

static bool dirty_is_zero(const RAMSnapshot *snap, const SavedBlock *b,
                          ram_addr_t offset)
{
    return place_in_file(snap, b, offset) == ZERO_PAGE;
}

const RAMSnapshotOps ram_snapshot_dirty_ops = {
    .mode = SNAPSHOT_DEVICE_RAM_DIRTY,
    .store_size = sizeof(DirtyStore),
    .snapshot_size = sizeof(DirtySnapshot),
    .store_init = dirty_store_init,
    .store_clear = dirty_store_clear,
    .save = dirty_save,
    .open = dirty_open,
    .prepare = dirty_prepare,
    .restore = dirty_restore,
    .release = dirty_release,
    .view = dirty_view,
    .page = dirty_page,
    .is_zero = dirty_is_zero,
};
