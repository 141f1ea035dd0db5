/*
 * RAM snapshots: which pages of a file a machine has touched
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include "qemu/bitops.h"
#include "qapi/error.h"
#include "exec/target_page.h"
#include "ram-snapshot-int.h"

/* Of /proc/PID/pagemap: a page is there, or was written to and swapped out */
#define PAGE_TOUCHED (BIT_ULL(63) | BIT_ULL(62))

/* Pages that the kernel is asked for at once */
#define PAGES 4096

struct RAMSnapshotTouched {
    GArray *blocks;             /* of SavedBlock */
    bool *mapped;               /* by block */
    int watch;                  /* see watch(), or -1 */
};

typedef struct Finder {
    int pagemap;
    RAMTouchedFn *fn;
    void *opaque;
} Finder;

/*
 * The kernel maps what it has in memory around a page that is touched, but not
 * where somebody may want to protect single pages: so ask to be somebody who
 * may, as Linux has it since 6.7, and never do.
 *
 * Returns: what to close when that is over, or -1 if it cannot be had
 */
static int watch(const RAMSnapshotTouched *t)
{
    struct uffdio_api api = {
        .api = UFFD_API,
        .features = UFFD_FEATURE_WP_ASYNC,
    };
    int fd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK |
                     UFFD_USER_MODE_ONLY);

    if (fd >= 0 && ioctl(fd, UFFDIO_API, &api) < 0) {
        close(fd);
        return -1;
    }
    for (unsigned i = 0; i < t->blocks->len && fd >= 0; i++) {
        const SavedBlock *b = &g_array_index(t->blocks, SavedBlock, i);
        struct uffdio_register range = {
            .range = { .start = (uintptr_t)b->host, .len = b->length },
            .mode = UFFDIO_REGISTER_MODE_WP,
        };

        if (t->mapped[i]) {
            /* Without it, more than what is touched is found. */
            ioctl(fd, UFFDIO_REGISTER, &range);
        }
    }
    return fd;
}

RAMSnapshotTouched *ram_snapshot_touched_begin(const RAMSnapshot *snap)
{
    RAMSnapshotTouched *t = g_new0(RAMSnapshotTouched, 1);

    t->blocks = g_array_ref(snap->blocks);
    t->mapped = g_new0(bool, snap->blocks->len);
    for (unsigned i = 0; i < snap->blocks->len; i++) {
        t->mapped[i] = snap->file->mappable &&
            ram_block_can_lie_on(saved_block(snap, i));
    }
    t->watch = watch(t);
    return t;
}

void ram_snapshot_touched_free(RAMSnapshotTouched *t)
{
    if (t->watch >= 0) {
        close(t->watch);
    }
    g_array_unref(t->blocks);
    g_free(t->mapped);
    g_free(t);
}

/* Of what is zero in the file, there is nothing to be read. */
static bool file_has(const SavedBlock *b, ram_addr_t offset, size_t size)
{
    const unsigned bits = qemu_target_page_bits();
    const size_t end = DIV_ROUND_UP(offset + size, 1 << bits);

    return find_next_bit(b->bitmap, end, offset >> bits) < end;
}

/* All that a file has was read. */
static void find_all(const Finder *f, const SavedBlock *b)
{
    const unsigned bits = qemu_target_page_bits();
    const size_t pages = b->length >> bits;
    size_t page = 0, end;

    while ((page = find_next_bit(b->bitmap, pages, page)) < pages) {
        end = find_next_zero_bit(b->bitmap, pages, page);
        f->fn(b->pos + ((off_t)page << bits), (off_t)(end - page) << bits,
              f->opaque);
        page = end;
    }
}

/* @b may be of memory that is no more: then nothing is there. */
static bool find_present(const Finder *f, const SavedBlock *b, Error **errp)
{
    const size_t size = qemu_real_host_page_size();
    const size_t first = (uintptr_t)b->host / size, pages = b->length / size;
    g_autofree uint64_t *entries = g_new(uint64_t, PAGES);

    for (size_t page = 0; page < pages; page += PAGES) {
        const size_t n = MIN(PAGES, pages - page);
        const ssize_t bytes = n * sizeof(*entries);

        if (pread(f->pagemap, entries, bytes,
                  (first + page) * sizeof(*entries)) != bytes) {
            error_setg_errno(errp, errno, "Reading /proc/self/pagemap failed");
            return false;
        }
        for (size_t i = 0; i < n; i++) {
            const ram_addr_t off = (page + i) * size;

            if (entries[i] & PAGE_TOUCHED && file_has(b, off, size)) {
                f->fn(b->pos + off, size, f->opaque);
            }
        }
    }
    return true;
}

bool ram_snapshot_touched_find(const RAMSnapshotTouched *t, RAMTouchedFn *fn,
                               void *opaque, Error **errp)
{
    Finder f = { .fn = fn, .opaque = opaque };
    bool ok = true;

    f.pagemap = qemu_open("/proc/self/pagemap", O_RDONLY, errp);
    if (f.pagemap < 0) {
        return false;
    }
    for (unsigned i = 0; i < t->blocks->len && ok; i++) {
        const SavedBlock *b = &g_array_index(t->blocks, SavedBlock, i);

        if (t->mapped[i]) {
            ok = find_present(&f, b, errp);
        } else {
            find_all(&f, b);
        }
    }
    close(f.pagemap);
    return ok;
}
