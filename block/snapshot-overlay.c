/*
 * snapshot-overlay: what is written stays in memory, and can be put back
 *
 * The node below is only read, unless somebody asks for a commit.  What is
 * written is kept by clusters of 4 KiB, of which each sector is known to be
 * here, to be zeroes, or to be as below, so that a write never has to read.
 * Clusters that find no room in memory are in a file that has no name.
 *
 * How slots are made of versions of clusters is in snapshot-overlay-slots.c,
 * requests and the file are in snapshot-overlay-io.c, and commits in
 * snapshot-overlay-commit.c.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/memalign.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "block/block-io.h"
#include "block/block_int.h"
#include "block/qdict.h"
#include "snapshot-overlay-int.h"

#define OPT_SIZE "overlay-size"
#define OPT_DIR  "overlay-dir"
/* As blkdebug has it: the image of a filename with our prefix */
#define OPT_IMAGE "x-image"

static BlockDriver bdrv_snapshot_overlay;

bool bdrv_is_snapshot_overlay(BlockDriverState *bs)
{
    return bs->drv == &bdrv_snapshot_overlay;
}

static int64_t coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_getlength(BlockDriverState *bs)
{
    BDRVSnapshotOverlayState *s = bs->opaque;

    return s->sectors * BDRV_SECTOR_SIZE;
}

/* Else it would go to the node below, whose permissions nobody asks for. */
static int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_save_vmstate(BlockDriverState *bs, QEMUIOVector *qiov,
                                 int64_t pos)
{
    return -ENOTSUP;
}

static void GRAPH_RDLOCK
snapshot_overlay_refresh_limits(BlockDriverState *bs, Error **errp)
{
    /* Less is read, merged and written by the block layer. */
    bs->bl.request_alignment = BDRV_SECTOR_SIZE;
    /* Nothing is discarded below, so what that could is of no matter. */
    bs->bl.pdiscard_alignment = 0;
}

static int GRAPH_RDLOCK
snapshot_overlay_probe_blocksizes(BlockDriverState *bs, BlockSizes *bsz)
{
    return bdrv_probe_blocksizes(bs->file->bs, bsz);
}

static int GRAPH_RDLOCK
snapshot_overlay_probe_geometry(BlockDriverState *bs, HDGeometry *geo)
{
    return bdrv_probe_geometry(bs->file->bs, geo);
}

static void GRAPH_RDLOCK
snapshot_overlay_cancel_in_flight(BlockDriverState *bs)
{
    bdrv_cancel_in_flight(bs->file->bs);
}

static BlockStatsSpecific *
snapshot_overlay_get_specific_stats(BlockDriverState *bs)
{
    BlockStatsSpecific *stats = g_new0(BlockStatsSpecific, 1);

    stats->driver = BLOCKDEV_DRIVER_SNAPSHOT_OVERLAY;
    snapshot_overlay_query(bs, &stats->u.snapshot_overlay);
    return stats;
}

static bool has_content(BDRVSnapshotOverlayState *s)
{
    QEMU_LOCK_GUARD(&s->lock);
    return s->clusters || s->zeroed || s->kept;
}

bool snapshot_overlay_is_empty(BlockDriverState *bs)
{
    BDRVSnapshotOverlayState *s = bs->opaque;

    assert(bdrv_is_snapshot_overlay(bs));
    WITH_QEMU_LOCK_GUARD(&s->lock) {
        if (s->nr_slots) {
            return false;
        }
    }
    return !has_content(s);
}

static void GRAPH_RDLOCK
snapshot_overlay_child_perm(BlockDriverState *bs, BdrvChild *c,
                            BdrvChildRole role,
                            BlockReopenQueue *reopen_queue,
                            uint64_t perm, uint64_t shared,
                            uint64_t *nperm, uint64_t *nshared)
{
    BDRVSnapshotOverlayState *s = bs->opaque;
    bool inactive = bs->open_flags & BDRV_O_INACTIVE;

    if (!(role & BDRV_CHILD_PRIMARY)) {
        *nperm = inactive ? 0 : BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE |
                                BLK_PERM_RESIZE;
        *nshared = BLK_PERM_ALL & ~(BLK_PERM_WRITE | BLK_PERM_RESIZE);
        return;
    }

    *nperm = BLK_PERM_CONSISTENT_READ;
    *nshared = BLK_PERM_ALL;
    /*
     * Whoever has the node below open for writing may be about to use this one
     * instead, see snapshot_overlay_insert().  Until somebody does, it does not
     * matter what is there.
     */
    if (!inactive && (!QLIST_EMPTY(&bs->parents) || has_content(s))) {
        *nshared &= ~(BLK_PERM_WRITE | BLK_PERM_RESIZE);
    }
    if (s->committing) {
        *nshared |= BLK_PERM_WRITE;
    }
}

static int GRAPH_RDLOCK snapshot_overlay_inactivate(BlockDriverState *bs)
{
    if (has_content(bs->opaque)) {
        error_report("Node '%s' cannot be migrated: what was written to it is "
                     "in memory only", bdrv_get_node_name(bs));
        return -ENOTSUP;
    }
    return 0;
}

/* The file name of the image below opens something else. */
static void GRAPH_RDLOCK snapshot_overlay_refresh_filename(BlockDriverState *bs)
{
    bs->exact_filename[0] = '\0';
}

/* The file is not for others to open. */
static void GRAPH_RDLOCK
snapshot_overlay_gather_child_options(BlockDriverState *bs, QDict *target,
                                      bool backing_overridden)
{
    qdict_put(target, "file", qobject_ref(bs->file->bs->full_open_options));
}

static int snapshot_overlay_reopen_prepare(BDRVReopenState *reopen_state,
                                           BlockReopenQueue *queue,
                                           Error **errp)
{
    /* Options of ours that differ are refused, as they are left. */
    return 0;
}

static QemuOptsList runtime_opts = {
    .name = "snapshot-overlay",
    .head = QTAILQ_HEAD_INITIALIZER(runtime_opts.head),
    .desc = {
        {
            .name = OPT_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "most bytes of data in memory",
        },
        {
            .name = OPT_DIR,
            .type = QEMU_OPT_STRING,
            .help = "directory of the file for what is more",
        },
        {
            .name = OPT_IMAGE,
            .type = QEMU_OPT_STRING,
            .help = "[internal use only, will be removed]",
        },
        { /* end of list */ }
    },
};

static void snapshot_overlay_parse_filename(const char *filename,
                                            QDict *options, Error **errp)
{
    const char *image;

    if (!strstart(filename, "snapshot-overlay:", &image)) {
        error_setg(errp, "File name of an overlay must begin with "
                   "'snapshot-overlay:'");
        return;
    }
    qdict_put_str(options, OPT_IMAGE, image);
}

static char *create_spill_file(const char *dir, Error **errp)
{
    g_autofree char *name = NULL;
    int fd;

    if (!dir) {
        return create_tmp_file(errp);
    }
    name = g_build_filename(dir, "qemu-overlay-XXXXXX", NULL);
    fd = g_mkstemp(name);
    if (fd < 0) {
        error_setg_errno(errp, errno, "Could not create a file in '%s', "
                         "which is where what does not fit into memory is to "
                         "be", dir);
        return NULL;
    }
    close(fd);
    return g_steal_pointer(&name);
}

static BdrvChild *open_spill(BlockDriverState *bs, QDict *options,
                             const char *dir, Error **errp)
{
    g_autofree char *name = create_spill_file(dir, errp);
    BdrvChild *child;

    if (!name) {
        return NULL;
    }
    qdict_put_str(options, "spill.driver", "file");
    qdict_put_str(options, "spill.filename", name);
    qdict_put_str(options, "spill.locking", "off");
    qdict_put_str(options, "spill.read-only", "off");
    qdict_put_str(options, "spill.cache.direct", "off");
    qdict_put_str(options, "spill.cache.no-flush", "on");
    child = bdrv_open_child(NULL, options, "spill", bs, &child_of_bds,
                            BDRV_CHILD_DATA, false, errp);
    unlink(name);
    return child;
}

static void snapshot_overlay_close(BlockDriverState *bs)
{
    BDRVSnapshotOverlayState *s = bs->opaque;

    GLOBAL_STATE_CODE();
    overlay_close_slots(s);
    overlay_forget(s);
    g_ptr_array_unref(s->spare);
    g_ptr_array_unref(s->chunks);
    g_free(s->areas);
    g_free(s->in_use);
    qemu_mutex_destroy(&s->lock);
}

static int snapshot_overlay_open(BlockDriverState *bs, QDict *options,
                                 int flags, Error **errp)
{
    BDRVSnapshotOverlayState *s = bs->opaque;
    g_autofree char *image = NULL;
    g_autofree char *dir = NULL;
    QemuOpts *opts;
    int64_t length;
    int ret;

    GLOBAL_STATE_CODE();

    qemu_mutex_init(&s->lock);
    qemu_co_mutex_init(&s->growing);
    qemu_co_queue_init(&s->waiting);
    QLIST_INIT(&s->slots);
    s->spare = g_ptr_array_new();
    s->chunks = g_ptr_array_new_with_free_func(qemu_vfree);

    opts = qemu_opts_create(&runtime_opts, NULL, 0, &error_abort);
    if (!qemu_opts_absorb_qdict(opts, options, errp)) {
        qemu_opts_del(opts);
        ret = -EINVAL;
        goto fail;
    }
    s->max_data = qemu_opt_get_size(opts, OPT_SIZE, 1 * GiB) / CLUSTER_SIZE;
    dir = g_strdup(qemu_opt_get(opts, OPT_DIR));
    image = g_strdup(qemu_opt_get(opts, OPT_IMAGE));
    qemu_opts_del(opts);

    /* A node that is there is left to those who made it. */
    if (!qdict_haskey(options, "file")) {
        qdict_set_default_str(options, "file.read-only", "on");
    }
    bdrv_open_child(image, options, "file", bs, &child_of_bds,
                    BDRV_CHILD_DATA | BDRV_CHILD_PRIMARY, false, errp);

    bdrv_graph_rdlock_main_loop();
    length = bs->file ? bdrv_getlength(bs->file->bs) : -EINVAL;
    bdrv_graph_rdunlock_main_loop();
    if (length < 0) {
        if (bs->file) {
            error_setg_errno(errp, -length, "Could not get the length");
        }
        ret = length;
        goto fail;
    }
    s->sectors = length / BDRV_SECTOR_SIZE;
    s->areas = g_try_new0(Area, DIV_ROUND_UP(s->sectors, AREA_SECTORS));
    if (!s->areas && s->sectors) {
        error_setg(errp, "No memory for an overlay over %" PRIi64 " bytes",
                   length);
        ret = -ENOMEM;
        goto fail;
    }

    s->spill = open_spill(bs, options, dir, errp);
    if (!s->spill) {
        ret = -EINVAL;
        goto fail;
    }

    bs->supported_write_flags = BDRV_REQ_WRITE_UNCHANGED | BDRV_REQ_FUA;
    bs->supported_zero_flags = BDRV_REQ_WRITE_UNCHANGED | BDRV_REQ_FUA |
        BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK;
    return 0;

fail:
    snapshot_overlay_close(bs);
    return ret;
}

/*
 * A temporary file (-snapshot) has no name any more, so that it cannot be
 * opened anew, and by nobody else.
 */
static bool stays_as_it_is(BlockDriverState *bs)
{
    return bdrv_is_read_only(bs) ||
        (bs->open_flags & BDRV_O_TEMPORARY && !bs->copy_on_read);
}

BlockDriverState *snapshot_overlay_insert(BlockDriverState *bs, QDict *options,
                                          Error **errp)
{
    BlockDriverState *overlay;
    bool stays = stays_as_it_is(bs);
    int ret;

    GLOBAL_STATE_CODE();

    options = options ?: qdict_new();
    qdict_put_str(options, "driver", "snapshot-overlay");
    qdict_put_str(options, "file", bdrv_get_node_name(bs));
    overlay = bdrv_insert_node(bs, options, BDRV_O_RDWR |
                               (bs->open_flags & BDRV_O_UNMAP), errp);
    if (!overlay) {
        return NULL;
    }
    overlay->detect_zeroes = bs->detect_zeroes;

    ret = stays ? 0 : bdrv_reopen_set_read_only(bs, true, errp);
    if (ret < 0) {
        bdrv_ref(bs);
        bdrv_drained_begin(bs);
        bdrv_drained_begin(overlay);
        bdrv_graph_wrlock();
        bdrv_replace_node(overlay, bs, &error_abort);
        bdrv_graph_wrunlock();
        bdrv_drained_end(overlay);
        bdrv_drained_end(bs);
        bdrv_unref(overlay);
        bdrv_unref(bs);
        return NULL;
    }
    return overlay;
}

static BlockDriver bdrv_snapshot_overlay = {
    .format_name                = "snapshot-overlay",
    .protocol_name              = "snapshot-overlay",
    .instance_size              = sizeof(BDRVSnapshotOverlayState),

    .bdrv_parse_filename        = snapshot_overlay_parse_filename,
    .bdrv_open                  = snapshot_overlay_open,
    .bdrv_close                 = snapshot_overlay_close,
    .bdrv_reopen_prepare        = snapshot_overlay_reopen_prepare,
    .bdrv_child_perm            = snapshot_overlay_child_perm,
    .bdrv_inactivate            = snapshot_overlay_inactivate,
    .bdrv_refresh_limits        = snapshot_overlay_refresh_limits,
    .bdrv_refresh_filename      = snapshot_overlay_refresh_filename,
    .bdrv_gather_child_options  = snapshot_overlay_gather_child_options,
    .bdrv_probe_blocksizes      = snapshot_overlay_probe_blocksizes,
    .bdrv_probe_geometry        = snapshot_overlay_probe_geometry,
    .bdrv_cancel_in_flight      = snapshot_overlay_cancel_in_flight,
    .bdrv_get_specific_stats    = snapshot_overlay_get_specific_stats,

    .bdrv_co_getlength          = snapshot_overlay_co_getlength,
    .bdrv_co_preadv_part        = snapshot_overlay_co_preadv_part,
    .bdrv_co_pwritev_part       = snapshot_overlay_co_pwritev_part,
    .bdrv_co_pwrite_zeroes      = snapshot_overlay_co_pwrite_zeroes,
    .bdrv_co_pdiscard           = snapshot_overlay_co_pdiscard,
    .bdrv_co_flush              = snapshot_overlay_co_flush,
    .bdrv_co_block_status       = snapshot_overlay_co_block_status,
    .bdrv_co_save_vmstate       = snapshot_overlay_co_save_vmstate,
};

static void bdrv_snapshot_overlay_init(void)
{
    bdrv_register(&bdrv_snapshot_overlay);
}

block_init(bdrv_snapshot_overlay_init);
