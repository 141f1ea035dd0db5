/*
 * RAM snapshots: read from a file what cannot be mapped from it
 *
 * Several threads read, so that the disk has more than one request at a time
 * and more than one CPU compares.  Each takes a stripe, and then the next one.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/bitops.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "exec/cpu-common.h"
#include "exec/memory.h"
#include "exec/ramblock.h"
#include "exec/target_page.h"
#include "ram-snapshot-int.h"
#include "trace.h"

/* Threads: while some wait for the disk, others compare and copy. */
#define READERS 4

/* What one takes at a time: words of a bitmap are never of two stripes. */
#define STRIPE (4 * MiB)

/* What is read in one call, in bytes */
#define CHUNK MiB

typedef struct Stripe {
    unsigned block;
    ram_addr_t offset;
} Stripe;

typedef struct Reader {
    const ImageFile *file;
    const GPtrArray *blocks;    /* of SavedBlock */
    unsigned long **changed;    /* by block and page */
    GArray *stripes;
    unsigned next;              /* of @stripes, atomic */
    int error;                  /* -errno, atomic: of any thread */
} Reader;

/* Part of a block, and what is known of where its memory is all zero */
typedef struct Extent {
    const SavedBlock *b;
    ram_addr_t data, hole;      /* there may be something from, and before */
} Extent;

static const SavedBlock *nth_block(const Reader *r, unsigned i)
{
    return g_ptr_array_index(r->blocks, i);
}

/* Of memory that is a file, too, the file system knows what is a hole. */
static void find_data(Extent *extent, ram_addr_t offset)
{
    const RAMBlock *rb = extent->b->rb;
    const off_t start = rb->fd_offset;
    off_t found;

    extent->data = offset;
    extent->hole = extent->b->length;
    if (!(rb->flags & RAM_SHARED) || rb->fd < 0) {
        return;
    }
    found = lseek(rb->fd, start + offset, SEEK_DATA);
    if (found < 0) {
        extent->data = errno == ENXIO ? extent->hole : offset;
        return;
    }
    extent->data = MIN(found - start, extent->hole);
    found = lseek(rb->fd, found, SEEK_HOLE);
    if (found >= 0) {
        extent->hole = MIN(found - start, extent->hole);
    }
}

/* To read what was never written to would take memory for it. */
static bool is_zero(Extent *extent, ram_addr_t offset, size_t size)
{
    if (offset >= extent->hole) {
        find_data(extent, offset);
    }
    return offset + size <= extent->data ||
        buffer_is_zero(extent->b->host + offset, size);
}

/* Pages that are in the file.  Returns: 0 or -errno */
static int put_pages(const Reader *r, const SavedBlock *b, ram_addr_t start,
                     ram_addr_t end, uint8_t *buf, unsigned long *changed)
{
    const size_t size = qemu_target_page_size();
    int ret = image_file_read(r->file->fd, buf, end - start, b->pos + start);

    for (ram_addr_t off = start; off < end && !ret; off += size) {
        const uint8_t *page = buf + (off - start);

        if (memcmp(b->host + off, page, size)) {
            memcpy(b->host + off, page, size);
            set_bit(off / size, changed);
        }
    }
    return ret;
}

static void put_zeroes(Extent *extent, ram_addr_t start, ram_addr_t end,
                       unsigned long *changed)
{
    const size_t size = qemu_target_page_size();

    for (ram_addr_t off = start; off < end; off += size) {
        if (!is_zero(extent, off, size)) {
            memset(extent->b->host + off, 0, size);
            set_bit(off / size, changed);
        }
    }
}

static int put_stripe(const Reader *r, const Stripe *stripe, uint8_t *buf)
{
    const unsigned bits = qemu_target_page_bits();
    const SavedBlock *b = nth_block(r, stripe->block);
    unsigned long *changed = r->changed[stripe->block];
    const size_t end = MIN(stripe->offset + STRIPE, b->length) >> bits;
    Extent extent = { .b = b };
    size_t page = stripe->offset >> bits, next;
    int ret = 0;

    while (page < end && !ret) {
        next = find_next_bit(b->bitmap, end, page);
        put_zeroes(&extent, (ram_addr_t)page << bits, (ram_addr_t)next << bits,
                   changed);
        page = next;
        next = find_next_zero_bit(b->bitmap, end, page);
        next = MIN(next, page + (CHUNK >> bits));
        ret = put_pages(r, b, (ram_addr_t)page << bits,
                        (ram_addr_t)next << bits, buf, changed);
        page = next;
    }
    return ret;
}

static void *put_stripes(void *opaque)
{
    Reader *r = opaque;
    g_autofree uint8_t *buf = g_malloc(CHUNK);
    unsigned i;

    while ((i = qatomic_fetch_inc(&r->next)) < r->stripes->len &&
           !qatomic_read(&r->error)) {
        int ret = put_stripe(r, &g_array_index(r->stripes, Stripe, i), buf);

        if (ret) {
            qatomic_set(&r->error, ret);
        }
    }
    return NULL;
}

/* Small blocks, which are always among them, are not worth a thread. */
static void put_all(Reader *r, uint64_t bytes)
{
    QemuThread threads[READERS - 1];
    const unsigned others = MIN(ARRAY_SIZE(threads), bytes / STRIPE);

    for (unsigned i = 0; i < others; i++) {
        qemu_thread_create(&threads[i], "snapshot-read", put_stripes, r,
                           QEMU_THREAD_JOINABLE);
    }
    put_stripes(r);
    for (unsigned i = 0; i < others; i++) {
        qemu_thread_join(&threads[i]);
    }
}

/* Returns: the number of pages */
static uint64_t tell_of_changes(const SavedBlock *b,
                                const unsigned long *changed)
{
    const unsigned bits = qemu_target_page_bits();
    const size_t pages = b->length >> bits;
    uint64_t count = 0;
    size_t page = 0, end;

    while ((page = find_next_bit(changed, pages, page)) < pages) {
        end = find_next_zero_bit(changed, pages, page);
        ram_block_written(b->rb, (ram_addr_t)page << bits,
                          (ram_addr_t)(end - page) << bits);
        count += end - page;
        page = end;
    }
    return count;
}

static void add_stripes(Reader *r, unsigned block)
{
    Stripe stripe = { .block = block };

    for (; stripe.offset < nth_block(r, block)->length;
         stripe.offset += STRIPE) {
        g_array_append_val(r->stripes, stripe);
    }
}

bool ram_snapshot_read(const ImageFile *file, const GPtrArray *blocks,
                       uint64_t *pages, Error **errp)
{
    Reader r = { .file = file, .blocks = blocks };
    const int64_t start = get_clock();
    uint64_t bytes = 0;

    *pages = 0;
    r.stripes = g_array_new(false, false, sizeof(Stripe));
    r.changed = g_new0(unsigned long *, blocks->len);
    for (unsigned i = 0; i < blocks->len; i++) {
        r.changed[i] = bitmap_new(nth_block(&r, i)->length >>
                                  qemu_target_page_bits());
        add_stripes(&r, i);
        bytes += nth_block(&r, i)->length;
    }
    put_all(&r, bytes);
    for (unsigned i = 0; i < blocks->len; i++) {
        *pages += tell_of_changes(nth_block(&r, i), r.changed[i]);
        g_free(r.changed[i]);
    }
    trace_ram_snapshot_read(r.stripes->len, *pages, get_clock() - start);
    g_free(r.changed);
    g_array_unref(r.stripes);
    if (r.error) {
        error_setg_errno(errp, -r.error, "Reading RAM from '%s' failed",
                         file->name);
    }
    return !r.error;
}
