/*
 * snapshot-overlay: write the present content to the node below
 *
 * Versions say of much that it is as below.  So before a cluster is changed
 * below, what it was is kept, and found wherever a version says that: none of
 * them has to be touched.  What is kept and as below in the present content is
 * written back by the next commit.  When there are no slots any more, all that
 * did not change since a commit is forgotten.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/memalign.h"
#include "qemu/units.h"
#include "block/block-io.h"
#include "system/block-backend.h"
#include "snapshot-overlay-int.h"

/* That is written with one request, and so how long a cancel waits for */
#define PIECE       (1 * MiB)
#define ZERO_PIECE  (128 * MiB)

struct SnapshotOverlayCommit {
    BlockDriverState *bs;
    BlockBackend *blk;          /* writes to the node below */
    bool was_read_only;         /* that node */
    uint64_t sector;            /* all before it is written */
    uint8_t *buf;               /* PIECE and parts of clusters around it */
};

static void drained_begin(void *opaque)
{
    Job *job = opaque;

    WITH_JOB_LOCK_GUARD() {
        job_pause_locked(job);
    }
}

static void drained_end(void *opaque)
{
    Job *job = opaque;

    WITH_JOB_LOCK_GUARD() {
        job_resume_locked(job);
    }
}

const BlockDevOps overlay_job_dev_ops = {
    .drained_begin = drained_begin,
    .drained_end = drained_end,
};

static bool set_committing(BlockDriverState *bs, bool committing, Error **errp)
{
    BDRVSnapshotOverlayState *s = bs->opaque;

    GRAPH_RDLOCK_GUARD_MAINLOOP();
    s->committing = committing;
    if (bdrv_child_refresh_perms(bs, bs->file, errp) < 0) {
        s->committing = !committing;
        return false;
    }
    return true;
}

static BlockDriverState *node_below(BlockDriverState *bs)
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();
    return bs->file->bs;
}

static bool is_op_blocked(BlockDriverState *bs, Error **errp)
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();
    return bdrv_op_is_blocked(bs, BLOCK_OP_TYPE_COMMIT_SOURCE, errp) ||
        bdrv_op_is_blocked(bs->file->bs, BLOCK_OP_TYPE_COMMIT_TARGET, errp);
}

SnapshotOverlayCommit *snapshot_overlay_commit_begin(BlockDriverState *bs,
                                                     Job *job, Error **errp)
{
    BlockDriverState *below;
    SnapshotOverlayCommit *c;
    ERRP_GUARD();

    GLOBAL_STATE_CODE();
    assert(bdrv_is_snapshot_overlay(bs));

    if (is_op_blocked(bs, errp)) {
        return NULL;
    }
    below = node_below(bs);
    if (below->open_flags & BDRV_O_TEMPORARY) {
        error_setg(errp, "Node '%s' is a temporary file (-snapshot), which is "
                   "gone when QEMU ends", bdrv_get_node_name(below));
        return NULL;
    }
    c = g_new0(SnapshotOverlayCommit, 1);
    c->bs = bs;
    c->was_read_only = bdrv_is_read_only(below);
    bdrv_ref(bs);
    if (c->was_read_only && bdrv_reopen_set_read_only(below, false, errp) < 0) {
        c->was_read_only = false;
        goto fail;
    }
    if (!set_committing(bs, true, errp)) {
        goto fail;
    }
    c->blk = blk_new(bdrv_get_aio_context(below), BLK_PERM_WRITE,
                     BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE_UNCHANGED);
    blk_set_disable_request_queuing(c->blk, true);
    blk_set_allow_aio_context_change(c->blk, true);
    if (blk_insert_bs(c->blk, below, errp) < 0) {
        blk_unref(c->blk);
        set_committing(bs, false, &error_abort);
        goto fail;
    }
    if (job) {
        blk_set_dev_ops(c->blk, &overlay_job_dev_ops, job);
    }
    c->buf = blk_blockalign(c->blk, PIECE + 2 * CLUSTER_SIZE);
    bdrv_drained_begin(bs);
    return c;

fail:
    error_prepend(errp, "Node '%s' cannot be written to: ",
                  bdrv_get_node_name(below));
    if (c->was_read_only) {
        bdrv_reopen_set_read_only(below, true, NULL);
    }
    bdrv_unref(bs);
    g_free(c);
    return NULL;
}

static void unmark_kept(BDRVSnapshotOverlayState *s)
{
    QEMU_LOCK_GUARD(&s->lock);
    for (uint64_t i = 0; i < DIV_ROUND_UP(s->sectors, AREA_SECTORS); i++) {
        for (int j = 0; s->areas[i].kept && j < AREA_CLUSTERS; j++) {
            s->areas[i].kept[j].marked = false;
        }
    }
}

void snapshot_overlay_commit_end(SnapshotOverlayCommit *c)
{
    BlockDriverState *bs = c->bs;

    GLOBAL_STATE_CODE();
    /* Nobody else could become a writer meanwhile. */
    blk_set_perm(c->blk, 0, BLK_PERM_ALL, &error_abort);
    set_committing(bs, false, &error_abort);
    blk_unref(c->blk);
    unmark_kept(bs->opaque);
    bdrv_drained_end(bs);
    if (c->was_read_only) {
        bdrv_reopen_set_read_only(node_below(bs), true, NULL);
    }
    bdrv_unref(bs);
    qemu_vfree(c->buf);
    g_free(c);
}

static uint64_t next_run(BDRVSnapshotOverlayState *s, uint64_t sector,
                         Where *where)
{
    Cluster *c;
    uint64_t n = overlay_next_run(s->areas, sector, s->sectors, where, &c);

    /* Kept for what this commit wrote to the same cluster: it still is below */
    if (*where != BELOW && c && c->kept && c->marked) {
        *where = BELOW;
    }
    return n;
}

/*
 * What the image does not have for sure from @sector on, up to @max sectors of
 * the same kind.  Returns how many; 0: there is no more.
 */
static uint64_t next_piece(BDRVSnapshotOverlayState *s, uint64_t *sector,
                           uint64_t max_zero, bool *zero)
{
    uint64_t n = 0, more, max;
    Where where = BELOW, next;

    QEMU_LOCK_GUARD(&s->lock);
    for (; *sector < s->sectors; *sector += n) {
        n = next_run(s, *sector, &where);
        if (where != BELOW) {
            break;
        }
    }
    if (where == BELOW) {
        return 0;
    }
    *zero = where == ZERO;
    max = (*zero ? max_zero : PIECE) / BDRV_SECTOR_SIZE;
    while (n < max && *sector + n < s->sectors) {
        more = next_run(s, *sector + n, &next);
        if (next != where) {
            break;
        }
        n += more;
    }
    return MIN(n, max);
}

uint64_t snapshot_overlay_commit_bytes(SnapshotOverlayCommit *c)
{
    BDRVSnapshotOverlayState *s = c->bs->opaque;
    uint64_t sector = 0, n, sum = 0;
    bool zero;

    while ((n = next_piece(s, &sector, ZERO_PIECE, &zero))) {
        sector += n;
        sum += n;
    }
    return sum * BDRV_SECTOR_SIZE;
}

/* Keep a cluster, which is at @data.  s->lock is held, but not all the time. */
static int coroutine_fn GRAPH_RDLOCK
keep_cluster(BDRVSnapshotOverlayState *s, Cluster *kept, const uint8_t *data)
{
    Cluster new = { .kept = true, .marked = true };
    int ret;

    if (buffer_is_zero(data, CLUSTER_SIZE)) {
        new.zero = ALL_SECTORS;
    } else {
        new.valid = ALL_SECTORS;
        ret = overlay_store(s, &new, data);
        if (ret < 0) {
            return ret;
        }
    }
    *kept = new;
    s->kept++;
    return 0;
}

/* Keep what is below for slots, of a piece of at most PIECE bytes. */
static int coroutine_fn keep(SnapshotOverlayCommit *c, uint64_t sector,
                             uint64_t n, Error **errp)
{
    BlockDriverState *bs = c->bs;
    BDRVSnapshotOverlayState *s = bs->opaque;
    uint64_t first = sector / CLUSTER_SECTORS;
    uint64_t clusters = DIV_ROUND_UP(sector + n, CLUSTER_SECTORS) - first;
    int64_t offset = first * CLUSTER_SIZE;
    int64_t bytes = MIN(clusters * CLUSTER_SIZE,
                        s->sectors * BDRV_SECTOR_SIZE - offset);
    int64_t ret;

    GRAPH_RDLOCK_GUARD();
    /* The last cluster may not be whole. */
    memset(c->buf + bytes, 0, clusters * CLUSTER_SIZE - bytes);
    ret = bdrv_co_pread(bs->file, offset, bytes, c->buf, 0);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not read what node '%s' has at 0x%"
                         PRIx64 ", to keep it",
                         bdrv_get_node_name(bs->file->bs), offset);
        return ret;
    }

    qemu_mutex_lock(&s->lock);
    for (uint64_t i = 0; i < clusters && ret >= 0; i++) {
        Cluster **table = &s->areas[(first + i) / AREA_CLUSTERS].kept;
        Cluster *kept = overlay_find_or_create(table, first + i);

        if (!kept) {
            ret = -ENOMEM;
        } else if (is_below(kept)) {
            ret = keep_cluster(s, kept, c->buf + i * CLUSTER_SIZE);
        }
    }
    qemu_mutex_unlock(&s->lock);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not keep what node '%s' has at 0x%"
                         PRIx64, bdrv_get_node_name(bs->file->bs), offset);
    }
    return ret;
}

static int coroutine_fn read_content(SnapshotOverlayCommit *c, int64_t offset,
                                     int64_t bytes)
{
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, c->buf, bytes);

    GRAPH_RDLOCK_GUARD();
    return snapshot_overlay_co_preadv_part(c->bs, offset, bytes, &qiov, 0, 0);
}

static bool coroutine_fn is_zero_below(SnapshotOverlayCommit *c,
                                       int64_t offset, int64_t bytes)
{
    GRAPH_RDLOCK_GUARD();
    return bdrv_co_is_zero_fast(c->bs->file->bs, offset, bytes) == 1;
}

static int coroutine_fn write_piece(SnapshotOverlayCommit *c, uint64_t n,
                                    bool zero, Error **errp)
{
    BDRVSnapshotOverlayState *s = c->bs->opaque;
    int64_t offset = c->sector * BDRV_SECTOR_SIZE;
    int64_t bytes = n * BDRV_SECTOR_SIZE;
    int ret;

    if (s->base) {
        ret = keep(c, c->sector, n, errp);
        if (ret < 0) {
            return ret;
        }
    }
    if (zero) {
        ret = blk_co_pwrite_zeroes(c->blk, offset, bytes, BDRV_REQ_MAY_UNMAP);
    } else {
        ret = read_content(c, offset, bytes);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not read what is to be written "
                             "to node '%s' at 0x%" PRIx64,
                             bdrv_get_node_name(blk_bs(c->blk)), offset);
            return ret;
        }
        ret = blk_co_pwrite(c->blk, offset, bytes, c->buf, 0);
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not write to node '%s' at 0x%"
                         PRIx64, bdrv_get_node_name(blk_bs(c->blk)), offset);
    }
    return ret;
}

int64_t coroutine_fn snapshot_overlay_co_commit(SnapshotOverlayCommit *c,
                                                Error **errp)
{
    BDRVSnapshotOverlayState *s = c->bs->opaque;
    bool zero;
    uint64_t n = next_piece(s, &c->sector, ZERO_PIECE, &zero);
    int ret;

    /* Until all is flushed: a write that fails may leave anything there. */
    s->committed = false;
    if (!n) {
        ret = blk_co_flush(c->blk);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not flush node '%s'",
                             bdrv_get_node_name(blk_bs(c->blk)));
            return ret;
        }
        QEMU_LOCK_GUARD(&s->lock);
        if (s->base) {
            overlay_set_committed(s);
        } else {
            overlay_forget(s);
        }
        return 0;
    }

    if (!zero || !is_zero_below(c, c->sector * BDRV_SECTOR_SIZE,
                                n * BDRV_SECTOR_SIZE)) {
        if (zero && s->base) {
            n = MIN(n, PIECE / BDRV_SECTOR_SIZE);
        }
        /* What this overlay's memory is copied by counts as no request. */
        blk_inc_in_flight(c->blk);
        ret = write_piece(c, n, zero, errp);
        blk_dec_in_flight(c->blk);
        if (ret < 0) {
            return ret;
        }
    }
    c->sector += n;
    return n * BDRV_SECTOR_SIZE;
}
