/*
 * snapshot-overlay: write what a slot has to a qcow2 image over the node below
 *
 * Data of a slot stays where it is and does not change, and a slot that is held
 * stays.  So it takes a copy of where all is, at the beginning, and nothing has
 * to be locked after that, whatever is done to the node.
 *
 * The image has clusters of 4 KiB, as the overlay, or the next size that qcow2
 * can address the disk with.  Larger ones would have to be filled from below
 * for each few KiB that a guest writes.  Subclusters (extended_l2) of a sector
 * would need nothing from below at all; but they leave holes around what is
 * written, so that the file is longer and in more pieces, and few programs but
 * QEMU know them.  A cluster of which the slot has only some sectors is filled
 * here, not by qcow2: then the image needs no backing node while it is written.
 * The node below does not change, as commits are blocked.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/memalign.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "block/aio_task.h"
#include "block/block-io.h"
#include "block/thread-pool.h"
#include "system/block-backend.h"
#include "qcow2.h"
#include "snapshot-overlay-int.h"

#define REQUEST         (1 * MiB)
#define ZERO_REQUEST    (128 * MiB)

/* With one call, at most: how long a cancel waits for */
#define PIECE           (4 * MiB)
#define PIECE_REQUESTS  256

/* In flight: clusters that are not neighbours need many, to be fast. */
#define MAX_REQUESTS    64

/*
 * The least average of requests that the host's page cache is not used for.
 * qcow2 puts in a row what is not, but with a request for each: those that are
 * small are several times as fast if the host puts them together.
 */
#define DIRECT_REQUEST  (512 * KiB)

/* What a qcow2 header has room for */
#define MAX_BACKING     1023

struct SnapshotOverlayExport {
    SnapshotOverlaySlot *slot;
    BlockDriverState *bs;
    Area *areas;                /* what the slot has */
    Error *blocker;             /* of commits */
    char *filename;
    int fd;                     /* of the file, to sync it; -1: there is none */
    BlockBackend *blk;          /* the image */
    uint64_t cluster_sectors;   /* of the image */
    uint64_t bytes;             /* that are to be written */
    uint64_t sector;            /* all before it is written */
    uint8_t *buf;               /* PIECE */
    Error *err;                 /* of the first request that failed */
};

typedef struct Request {
    AioTask task;
    SnapshotOverlayExport *x;
    uint64_t sector;
    uint64_t n;
    uint8_t *buf;               /* NULL: zeroes */
} Request;

/* ---- The name of what is below ---- */

/* Can another process open all that is at @bs and below it, by name? */
static bool GRAPH_RDLOCK can_be_opened(BlockDriverState *bs, Error **errp)
{
    const char *why = NULL;
    BdrvChild *child;

    if (!bs->drv) {
        why = "has no medium";
    } else if (bs->open_flags & BDRV_O_TEMPORARY) {
        why = "is a temporary file (-snapshot), which is gone when QEMU ends";
    } else if (bdrv_is_snapshot_overlay(bs)) {
        why = "is an overlay too, whose content is in memory";
    } else if (strstart(bs->exact_filename, "/dev/fdset/", NULL)) {
        why = "is a file descriptor, which another process does not have";
    }
    if (why) {
        error_setg(errp, "Node '%s' cannot be the backing file of an image: it "
                   "%s", bdrv_get_node_name(bs), why);
        return false;
    }
    QLIST_FOREACH(child, &bs->children, next) {
        if (!can_be_opened(child->bs, errp)) {
            return false;
        }
    }
    return true;
}

static bool is_local_file(const BlockDriverState *bs)
{
    return !strcmp(bs->drv->format_name, "file") ||
        strstart(bs->drv->format_name, "host_", NULL);
}

/* Is the file name of a node the path of a file on this host? */
static bool GRAPH_RDLOCK is_path(BlockDriverState *bs)
{
    BlockDriverState *file = bs;

    while (bdrv_primary_bs(file)) {
        file = bdrv_primary_bs(file);
    }
    return is_local_file(file) &&
        !strcmp(bs->exact_filename, file->exact_filename);
}

static const char *GRAPH_RDLOCK find_relative_path(BlockDriverState *bs)
{
    const char *path = NULL;
    BdrvChild *child;

    if (is_local_file(bs) && !g_path_is_absolute(bs->exact_filename)) {
        return bs->exact_filename;
    }
    QLIST_FOREACH(child, &bs->children, next) {
        path = path ?: find_relative_path(child->bs);
    }
    return path;
}

/*
 * The file name of the node below, as it can be in the header of an image that
 * is in any directory; and its format.
 */
static char *backing_filename(BlockDriverState *bs, const char **format,
                              Error **errp)
{
    g_autofree char *name = NULL;
    BlockDriverState *below;

    ERRP_GUARD();

    GRAPH_RDLOCK_GUARD_MAINLOOP();
    /* What a filter does to requests is not part of the content. */
    below = bdrv_skip_filters(bs->file->bs);
    bdrv_refresh_filename(below);
    if (!can_be_opened(below, errp)) {
        return NULL;
    }
    *format = below->drv->format_name;
    if (!below->exact_filename[0]) {
        const char *relative = find_relative_path(below);

        if (relative) {
            error_setg(errp, "Node '%s' cannot be the backing file of an "
                       "image: it has options, which would look for '%s' in "
                       "another directory", bdrv_get_node_name(below),
                       relative);
            error_append_hint(errp, "Open it by its absolute file name.\n");
            return NULL;
        }
        name = g_strdup(below->filename);
    } else {
        if (below->drv->protocol_name) {
            *format = "raw";
        }
        name = is_path(below) ?
            g_canonicalize_filename(below->exact_filename, NULL) :
            g_strdup(below->exact_filename);
    }
    if (strlen(name) > MAX_BACKING) {
        error_setg(errp, "Node '%s' cannot be the backing file of an image: "
                   "its file name has more than %d bytes: %s",
                   bdrv_get_node_name(below), MAX_BACKING, name);
        return NULL;
    }
    return g_steal_pointer(&name);
}

/* ---- What is to be written ---- */

/*
 * As overlay_next_run(), but of clusters of the image, where @sector begins
 * one.  HERE: not all is as below, nor all zeroes.
 */
static uint64_t next_run(SnapshotOverlayExport *x, uint64_t sector,
                         Where *where)
{
    BDRVSnapshotOverlayState *s = x->bs->opaque;
    uint64_t end = MIN(sector + x->cluster_sectors, s->sectors);
    Cluster *c;
    Where next;
    uint64_t n;

    n = overlay_next_run(x->areas, sector, s->sectors, where, &c);
    if (sector + n == s->sectors) {
        return n;
    }
    if (sector + n >= end) {
        return QEMU_ALIGN_DOWN(n, x->cluster_sectors);
    }
    for (sector += n; sector < end;) {
        uint64_t more = overlay_next_run(x->areas, sector, end, &next, &c);

        if (next != *where) {
            *where = HERE;
        }
        sector += more;
        n += more;
    }
    return n;
}

/*
 * What is not as below from @sector on, up to @max bytes for data.  Returns how
 * many sectors; 0: there is no more.
 */
static uint64_t next_request(SnapshotOverlayExport *x, uint64_t *sector,
                             uint64_t max, bool *zero)
{
    BDRVSnapshotOverlayState *s = x->bs->opaque;
    uint64_t n = 0, more;
    Where where = BELOW, next;

    for (; *sector < s->sectors; *sector += n) {
        n = next_run(x, *sector, &where);
        if (where != BELOW) {
            break;
        }
    }
    if (where == BELOW) {
        return 0;
    }
    *zero = where == ZERO;
    max = (*zero ? ZERO_REQUEST : max) / BDRV_SECTOR_SIZE;
    while (n < max && *sector + n < s->sectors) {
        more = next_run(x, *sector + n, &next);
        if (next != where) {
            break;
        }
        n += more;
    }
    return MIN(n, max);
}

static uint64_t image_cluster_sectors(uint64_t sectors)
{
    uint64_t bytes = sectors * BDRV_SECTOR_SIZE;
    uint64_t size = CLUSTER_SIZE;

    while (bytes / size / (size / L2E_SIZE_NORMAL) >=
           QCOW_MAX_L1_SIZE / L1E_SIZE) {
        size *= 2;
    }
    return size / BDRV_SECTOR_SIZE;
}

/* Returns how many requests there will be */
static uint64_t count_requests(SnapshotOverlayExport *x)
{
    uint64_t sector = 0, requests = 0, n;
    bool zero;

    for (; (n = next_request(x, &sector, REQUEST, &zero)); sector += n) {
        x->bytes += n * BDRV_SECTOR_SIZE;
        requests++;
    }
    return requests;
}

uint64_t snapshot_overlay_export_bytes(SnapshotOverlayExport *x)
{
    return x->bytes;
}

/* ---- The image ---- */

static bool create_image(SnapshotOverlayExport *x, Error **errp)
{
    BDRVSnapshotOverlayState *s = x->bs->opaque;
    g_autofree char *backing = NULL;
    g_autofree char *options = NULL;
    uint64_t cluster_size = x->cluster_sectors * BDRV_SECTOR_SIZE;
    const char *format;
    ERRP_GUARD();

    backing = backing_filename(x->bs, &format, errp);
    if (!backing) {
        return false;
    }
    /* Only a file that is not there is created, not what has the name since. */
    x->fd = qemu_create(x->filename, O_RDWR | O_EXCL, 0600, errp);
    if (x->fd < 0) {
        return false;
    }
    options = g_strdup_printf("%s=%" PRIu64, BLOCK_OPT_CLUSTER_SIZE,
                              cluster_size);
    bdrv_img_create(x->filename, "qcow2", backing, format, options,
                    s->sectors * BDRV_SECTOR_SIZE, BDRV_O_NO_BACKING, true,
                    errp);
    return !*errp;
}

static BlockBackend *open_image(SnapshotOverlayExport *x, bool direct,
                                Error **errp)
{
    QDict *options = qdict_new();

    qdict_put_str(options, "driver", "qcow2");
    qdict_put_bool(options, BDRV_OPT_CACHE_DIRECT, direct);
    /*
     * qcow2 flushes whenever it needs a new L2 table, in case of a crash.  An
     * image that is not complete is of no use: x->fd is synced, once.
     */
    qdict_put_bool(options, BDRV_OPT_CACHE_NO_FLUSH, true);
    return blk_new_open(x->filename, NULL, options,
                        BDRV_O_RDWR | BDRV_O_NO_BACKING, errp);
}

static bool block_commits(SnapshotOverlayExport *x, Error **errp)
{
    BDRVSnapshotOverlayState *s = x->bs->opaque;

    if (s->committing) {
        error_setg(errp, "Node '%s' is being committed",
                   bdrv_get_node_name(x->bs));
        return false;
    }
    error_setg(&x->blocker, "a slot is being exported");
    bdrv_op_block(x->bs, BLOCK_OP_TYPE_COMMIT_SOURCE, x->blocker);
    return true;
}

SnapshotOverlayExport *
snapshot_overlay_export_begin(SnapshotOverlaySlot *slot, const char *filename,
                              Job *job, Error **errp)
{
    BDRVSnapshotOverlayState *s;
    SnapshotOverlayExport *x;
    uint64_t requests;

    GLOBAL_STATE_CODE();
    if (!slot->bs) {
        error_setg(errp, "The disk of the slot is gone");
        return NULL;
    }
    x = g_new0(SnapshotOverlayExport, 1);
    x->bs = slot->bs;
    bdrv_ref(x->bs);
    x->fd = -1;
    /* Absolute, so that it is not taken for a protocol */
    x->filename = filename ? g_canonicalize_filename(filename, NULL) : NULL;
    if (!block_commits(x, errp)) {
        goto fail;
    }
    /* First, as all that follows polls. */
    x->areas = overlay_hold_slot(slot);
    if (!x->areas) {
        error_setg(errp, "No memory to export a slot of node '%s'",
                   bdrv_get_node_name(x->bs));
        goto fail;
    }
    x->slot = slot;
    s = x->bs->opaque;
    x->cluster_sectors = image_cluster_sectors(s->sectors);
    requests = count_requests(x);
    if (!filename) {
        return x;
    }
    if (!create_image(x, errp)) {
        goto fail;
    }
    if (x->bytes / DIRECT_REQUEST >= requests) {
        x->blk = open_image(x, true, NULL);
    }
    if (!x->blk) {
        x->blk = open_image(x, false, errp);
    }
    if (!x->blk) {
        goto fail;
    }
    blk_set_disable_request_queuing(x->blk, true);
    if (job) {
        blk_set_dev_ops(x->blk, &overlay_job_dev_ops, job);
    }
    x->buf = blk_blockalign(x->blk, PIECE);
    return x;

fail:
    if (x->fd >= 0) {
        unlink(x->filename);
    }
    snapshot_overlay_export_end(x);
    return NULL;
}

static void release_slot(SnapshotOverlayExport *x)
{
    bool discarded = x->slot->discarded;

    if (discarded) {
        bdrv_drained_begin(x->bs);
    }
    overlay_release_slot(x->slot);
    if (discarded) {
        bdrv_drained_end(x->bs);
    }
}

void snapshot_overlay_export_end(SnapshotOverlayExport *x)
{
    GLOBAL_STATE_CODE();
    blk_unref(x->blk);
    if (x->fd >= 0) {
        close(x->fd);
    }
    if (x->slot) {
        release_slot(x);
        overlay_free_areas(x->bs->opaque, x->areas);
    }
    if (x->blocker) {
        bdrv_op_unblock(x->bs, BLOCK_OP_TYPE_COMMIT_SOURCE, x->blocker);
        error_free(x->blocker);
    }
    bdrv_unref(x->bs);
    qemu_vfree(x->buf);
    error_free(x->err);
    g_free(x->filename);
    g_free(x);
}

/* ---- Requests ---- */

/* Read what is in one place of the file, or below; of any length */
static int64_t coroutine_fn GRAPH_RDLOCK
read_run(SnapshotOverlayExport *x, uint64_t sector, uint64_t end, uint8_t *buf)
{
    BDRVSnapshotOverlayState *s = x->bs->opaque;
    uint64_t n, in_cluster = sector % CLUSTER_SECTORS * BDRV_SECTOR_SIZE;
    Cluster *c, *next;
    Where where, other;
    int ret = 0;

    n = overlay_next_run(x->areas, sector, end, &where, &c);
    if (where == ZERO) {
        memset(buf, 0, n * BDRV_SECTOR_SIZE);
    } else if (where == BELOW) {
        ret = bdrv_co_pread(x->bs->file, sector * BDRV_SECTOR_SIZE,
                            n * BDRV_SECTOR_SIZE, buf, 0);
    } else if (!c->in_file) {
        memcpy(buf, c->data + in_cluster, n * BDRV_SECTOR_SIZE);
    } else {
        while (sector + n < end && (sector + n) % CLUSTER_SECTORS == 0) {
            uint64_t more = overlay_next_run(x->areas, sector + n, end, &other,
                                             &next);

            if (other != HERE || !next->in_file || next->offset !=
                c->offset + in_cluster + n * BDRV_SECTOR_SIZE) {
                break;
            }
            n += more;
        }
        ret = bdrv_co_pread(s->spill, c->offset + in_cluster,
                            n * BDRV_SECTOR_SIZE, buf, 0);
    }
    return ret < 0 ? ret : n;
}

static int coroutine_fn read_content(const Request *r)
{
    uint64_t end = r->sector + r->n;
    uint8_t *buf = r->buf;
    int64_t n;

    GRAPH_RDLOCK_GUARD();
    for (uint64_t sector = r->sector; sector < end; sector += n) {
        n = read_run(r->x, sector, end, buf);
        if (n < 0) {
            return n;
        }
        buf += n * BDRV_SECTOR_SIZE;
    }
    return 0;
}

static bool coroutine_fn is_zero_below(SnapshotOverlayExport *x, int64_t offset,
                                       int64_t bytes)
{
    GRAPH_RDLOCK_GUARD();
    return bdrv_co_is_zero_fast(x->bs->file->bs, offset, bytes) == 1;
}

/* A guest that trims a disk zeroes much that is zeroes below. */
static int coroutine_fn write_zeroes(SnapshotOverlayExport *x, int64_t offset,
                                     int64_t bytes)
{
    int64_t end = offset + bytes, n;
    int ret = 0;

    if (is_zero_below(x, offset, bytes)) {
        return 0;
    }
    for (; offset < end && ret >= 0; offset += n) {
        n = MIN(AREA_CLUSTERS * CLUSTER_SIZE -
                offset % (AREA_CLUSTERS * CLUSTER_SIZE), end - offset);
        if (!is_zero_below(x, offset, n)) {
            ret = blk_co_pwrite_zeroes(x->blk, offset, n, 0);
        }
    }
    return ret;
}

static int coroutine_fn do_request(AioTask *task)
{
    Request *r = container_of(task, Request, task);
    SnapshotOverlayExport *x = r->x;
    int64_t offset = r->sector * BDRV_SECTOR_SIZE;
    int64_t bytes = r->n * BDRV_SECTOR_SIZE;
    int ret;

    if (r->buf) {
        ret = read_content(r);
        if (ret < 0) {
            if (!x->err) {
                error_setg_errno(&x->err, -ret, "Could not read what is to be "
                                 "written to '%s', of node '%s' at 0x%" PRIx64,
                                 x->filename, bdrv_get_node_name(x->bs),
                                 offset);
            }
            return ret;
        }
        ret = blk_co_pwrite(x->blk, offset, bytes, r->buf, 0);
    } else {
        ret = write_zeroes(x, offset, bytes);
    }
    if (ret < 0 && !x->err) {
        error_setg_errno(&x->err, -ret, "Could not write to '%s', which is to "
                         "have what node '%s' has at 0x%" PRIx64, x->filename,
                         bdrv_get_node_name(x->bs), offset);
    }
    return ret;
}

static int sync_file(void *opaque)
{
    SnapshotOverlayExport *x = opaque;

    if (qemu_fdatasync(x->fd) < 0) {
        return -errno;
    }
#ifdef CONFIG_LINUX
    /* What the host has cached was for nobody to read.  A hint: may fail. */
    posix_fadvise(x->fd, 0, 0, POSIX_FADV_DONTNEED);
#endif
    return 0;
}

static int coroutine_fn complete(SnapshotOverlayExport *x, Error **errp)
{
    int ret = blk_co_flush(x->blk);

    if (ret >= 0) {
        ret = thread_pool_submit_co(sync_file, x);
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not flush '%s'", x->filename);
    }
    return ret;
}

int64_t coroutine_fn snapshot_overlay_co_export(SnapshotOverlayExport *x,
                                                Error **errp)
{
    AioTaskPool *pool = aio_task_pool_new(MAX_REQUESTS);
    uint64_t n, sum = 0, used = 0;
    int ret;
    bool zero;

    for (unsigned i = 0; i < PIECE_REQUESTS && used < PIECE &&
         sum < ZERO_REQUEST / BDRV_SECTOR_SIZE &&
         aio_task_pool_status(pool) == 0; i++) {
        Request *r;

        n = next_request(x, &x->sector, MIN(REQUEST, PIECE - used), &zero);
        if (!n) {
            break;
        }
        r = g_new(Request, 1);
        *r = (Request) {
            .task.func = do_request,
            .x = x,
            .sector = x->sector,
            .n = n,
            .buf = zero ? NULL : x->buf + used,
        };
        if (!zero) {
            used += ROUND_UP(n * BDRV_SECTOR_SIZE, CLUSTER_SIZE);
        }
        x->sector += n;
        sum += n;
        aio_task_pool_start_task(pool, &r->task);
    }
    aio_task_pool_wait_all(pool);
    ret = aio_task_pool_status(pool);
    aio_task_pool_free(pool);
    if (ret < 0) {
        error_propagate(errp, g_steal_pointer(&x->err));
        return ret;
    }
    if (!sum) {
        return complete(x, errp);
    }
    return sum * BDRV_SECTOR_SIZE;
}
