/*
 * Test of the snapshot-overlay block driver
 *
 * A node over an image, and beside it a plain buffer that the same is done to:
 * they have to be equal whatever is done, in any order, at any alignment.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qemu/memalign.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "block/block_int.h"
#include "block/dirty-bitmap.h"
#include "block/snapshot-overlay.h"
#include "system/block-backend.h"
#include "iothread.h"

#define SECTOR          512
#define CLUSTER         4096
#define AREA            (2 * MiB)
#define MAX_SLOTS       6

static char *dir;
static char *image;             /* the file below */
static uint8_t *image_content;
static int64_t image_areas;

/*
 * One area or some, the last cut short in a cluster. The last sector of the
 * image is not whole, either: what is behind it reads as zeroes.
 */
#define IMAGE_SIZE      (image_areas * AREA + 37 * CLUSTER + 3 * SECTOR - 100)
#define DISK_SIZE       ROUND_UP(IMAGE_SIZE, SECTOR)
/* For what has to be a multiple of clusters */
#define EVEN_SIZE       (image_areas * AREA + 32 * CLUSTER)

static void write_image(void)
{
    g_assert_true(g_file_set_contents(image, (char *)image_content, IMAGE_SIZE,
                                      NULL));
}

static void create_image(int64_t areas)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(1);

    image_areas = areas;
    g_free(image_content);
    image_content = g_malloc0(DISK_SIZE);
    for (int i = 0; i < IMAGE_SIZE; i++) {
        image_content[i] = g_rand_int(rand) | 1;
    }
    write_image();
}

/* Catches all that is written below. */
static void check_image(void)
{
    g_autofree char *content = NULL;
    gsize length;

    g_assert_true(g_file_get_contents(image, &content, &length, NULL));
    g_assert_cmpmem(content, length, image_content, IMAGE_SIZE);
}

static QDict *overlay_options(uint64_t memory)
{
    QDict *options = qdict_new();
    g_autofree char *size = g_strdup_printf("%" PRIu64, memory);

    qdict_put_str(options, "driver", "snapshot-overlay");
    qdict_put_str(options, "overlay-size", size);
    qdict_put_str(options, "overlay-dir", dir);
    qdict_put_str(options, "discard", "unmap");
    qdict_put_str(options, "file.driver", "raw");
    qdict_put_str(options, "file.file.driver", "file");
    qdict_put_str(options, "file.file.filename", image);
    return options;
}

static BlockBackend *open_blk(QDict *options)
{
    return blk_new_open(NULL, NULL, options, BDRV_O_RDWR | BDRV_O_RESIZE,
                        &error_abort);
}

/* ---- The model ---- */

typedef struct Saved {
    SnapshotOverlaySlot *slot;
    uint8_t *content;
} Saved;

typedef struct Export Export;

typedef struct Model {
    BlockBackend *blk;
    BlockDriverState *bs;
    GRand *rand;
    int64_t size;
    uint8_t *present;
    uint8_t *buf;
    Saved slots[MAX_SLOTS];
    unsigned nr_slots;
    bool may_fail;              /* with ENOSPC */
    bool backing;               /* below is not all in the same file */
    bool commits;
    uint8_t *below;             /* what the image has to have */
    bool exports;
    Export *export;             /* that has begun */
    uint64_t exported;
    uint64_t pieces;            /* of those */
    uint64_t failed;
    uint64_t restored;
    uint64_t committed;
    uint64_t not_committed;
} Model;

static Model *model_new(QDict *options, int64_t size, uint32_t seed)
{
    Model *m = g_new0(Model, 1);

    m->blk = open_blk(options);
    m->bs = blk_bs(m->blk);
    m->rand = g_rand_new_with_seed(seed);
    m->size = size;
    g_assert_cmpint(blk_getlength(m->blk), ==, size);
    m->present = g_memdup2(image_content, size);
    m->below = g_memdup2(image_content, size);
    m->buf = qemu_memalign(CLUSTER, size);
    return m;
}

static uint64_t below(Model *m, uint64_t n)
{
    return g_rand_int(m->rand) % n;
}

/* Often at borders, mostly short */
static void any_range(Model *m, int64_t *offset, int64_t *bytes)
{
    static const int alignments[] = { 1, SECTOR, CLUSTER, 64 * KiB, AREA };
    static const int sizes[] = { SECTOR, CLUSTER, 3 * CLUSTER, 64 * KiB };
    int align = alignments[below(m, 4)];

    if (below(m, 400) == 0) {
        align = AREA;
        *bytes = below(m, m->size) + 1;
    } else {
        *bytes = below(m, sizes[below(m, ARRAY_SIZE(sizes))]) + 1;
    }
    if (below(m, 3)) {
        *bytes = ROUND_UP(*bytes, align);
    }
    /* All in one place now and then, so that the same is changed again */
    *offset = below(m, below(m, 2) ? m->size : 40 * CLUSTER);
    if (below(m, 3)) {
        *offset = QEMU_ALIGN_DOWN(*offset, align);
    }
    if (below(m, 20) == 0) {
        *offset = MAX(0, m->size - *bytes);
    }
    *bytes = MIN(*bytes, m->size - *offset);
}

static void compare(Model *m, int64_t offset, int64_t bytes)
{
    memset(m->buf, 0x55, bytes);
    g_assert_cmpint(blk_pread(m->blk, offset, bytes, m->buf, 0), ==, 0);
    g_assert_cmpmem(m->buf, bytes, m->present + offset, bytes);
}

/*
 * A request has failed for want of space. Each sector is either as it was or as
 * it was to be; what is outside of the request is as it was.
 */
static void take_over(Model *m, int64_t offset, int64_t bytes,
                      const uint8_t *wanted)
{
    int64_t start = QEMU_ALIGN_DOWN(offset, SECTOR);
    int64_t end = ROUND_UP(offset + bytes, SECTOR);
    g_autofree uint8_t *before = g_memdup2(m->present + start, end - start);
    uint8_t *was = m->present + start;

    m->failed++;
    g_assert_cmpint(blk_pread(m->blk, start, end - start, m->buf, 0), ==, 0);
    memcpy(m->present + offset, wanted, bytes);
    for (int64_t i = 0; i < end - start; i += SECTOR) {
        if (memcmp(m->buf + i, was + i, SECTOR)) {
            g_assert_cmpmem(m->buf + i, SECTOR, before + i, SECTOR);
            memcpy(was + i, before + i, SECTOR);
        }
    }
}

static void changed(Model *m, int ret, int64_t offset, int64_t bytes,
                    const uint8_t *wanted)
{
    if (ret < 0) {
        g_assert_true(m->may_fail);
        g_assert_cmpint(ret, ==, -ENOSPC);
        take_over(m, offset, bytes, wanted);
    } else {
        memcpy(m->present + offset, wanted, bytes);
    }
}

static void fill(Model *m, uint8_t *data, int64_t bytes)
{
    uint32_t x = g_rand_int(m->rand);

    for (int64_t i = 0; i < bytes; i++) {
        x = x * 1664525 + 1013904223;
        data[i] = x >> 24;
    }
}

static void do_write(Model *m)
{
    g_autofree uint8_t *data = NULL;
    int64_t offset, bytes;

    any_range(m, &offset, &bytes);
    data = g_malloc(bytes);
    fill(m, data, bytes);
    changed(m, blk_pwrite(m->blk, offset, bytes, data,
                          below(m, 4) ? 0 : BDRV_REQ_FUA),
            offset, bytes, data);
}

static void do_zero(Model *m)
{
    static const BdrvRequestFlags flags[] = {
        0, BDRV_REQ_MAY_UNMAP, BDRV_REQ_FUA, BDRV_REQ_NO_FALLBACK,
    };
    bool aligned;
    g_autofree uint8_t *zeroes = NULL;
    int64_t offset, bytes;

    any_range(m, &offset, &bytes);
    zeroes = g_malloc0(bytes);
    aligned = QEMU_IS_ALIGNED(offset | bytes, SECTOR);
    changed(m, blk_pwrite_zeroes(m->blk, offset, bytes,
                                 flags[below(m, aligned ? 4 : 3)]),
            offset, bytes, zeroes);
}

/* Whole sectors read as zeroes then; of the others nothing is changed. */
static void do_discard(Model *m)
{
    g_autofree uint8_t *zeroes = NULL;
    int64_t offset, bytes, end;
    int ret;

    any_range(m, &offset, &bytes);
    ret = blk_pdiscard(m->blk, offset, bytes, 0);
    end = QEMU_ALIGN_DOWN(offset + bytes, SECTOR);
    offset = ROUND_UP(offset, SECTOR);
    if (offset < end) {
        zeroes = g_malloc0(end - offset);
        changed(m, ret, offset, end - offset, zeroes);
    }
}

static void do_read(Model *m)
{
    int64_t offset, bytes;

    any_range(m, &offset, &bytes);
    compare(m, offset, bytes);
}

static void do_flush_and_resize(Model *m)
{
    g_assert_cmpint(blk_flush(m->blk), ==, 0);
    g_assert_cmpint(blk_truncate(m->blk, below(m, 2 * m->size), true,
                                 PREALLOC_MODE_OFF, 0, NULL), ==, -ENOTSUP);
    g_assert_cmpint(blk_getlength(m->blk), ==, m->size);
}

static void do_status(Model *m)
{
    int64_t offset, bytes;

    any_range(m, &offset, &bytes);
    bytes = MIN(bytes, 64 * CLUSTER);
    while (bytes) {
        BlockDriverState *file = NULL;
        int64_t n, map;
        int ret;

        bdrv_graph_rdlock_main_loop();
        ret = bdrv_block_status(m->bs, offset, bytes, &n, &map, &file);
        bdrv_graph_rdunlock_main_loop();
        g_assert_cmpint(ret, >=, 0);
        g_assert_cmpint(n, >, 0);
        g_assert_cmpint(n, <=, bytes);
        /* Else it is taken for zeroes. */
        g_assert_true(ret & BDRV_BLOCK_ALLOCATED);
        g_assert_true(ret & (BDRV_BLOCK_DATA | BDRV_BLOCK_ZERO));
        if (ret & BDRV_BLOCK_ZERO) {
            g_assert_true(buffer_is_zero(m->present + offset, n));
        }
        if (file && file != m->bs) {
            /* As it is below, and at the same place */
            if (offset < QEMU_ALIGN_DOWN(IMAGE_SIZE, SECTOR)) {
                g_assert_true(ret & BDRV_BLOCK_OFFSET_VALID);
                g_assert_true(m->backing || map == offset);
            }
            g_assert_cmpmem(m->present + offset, n, m->below + offset, n);
        }
        offset += n;
        bytes -= n;
    }
}

typedef struct Piece {
    Model *m;
    int64_t offset;
    int64_t bytes;
    enum { WRITE, WRITE_ZEROES, READ, PIECES } what;
    uint8_t *data;
    QEMUIOVector qiov;
    bool zeroed;                /* at the same time */
    int ret;                    /* the worst, then */
} Piece;

static void piece_done(void *opaque, int ret)
{
    Piece *p = opaque;

    p->ret = p->ret == -EINPROGRESS ? ret : MIN(p->ret, ret);
}

static void piece_read(Piece *p, Model *m, int64_t offset, int64_t bytes)
{
    *p = (Piece) {
        .m = m,
        .offset = offset,
        .bytes = bytes,
        .what = READ,
        .data = g_malloc0(bytes),
        .ret = -EINPROGRESS,
    };
    qemu_iovec_init_buf(&p->qiov, p->data, bytes);
    blk_aio_preadv(m->blk, offset, &p->qiov, 0, piece_done, p);
}

/* What is there of sectors when several requests for them are in flight */
typedef struct Racing {
    int64_t start;
    int64_t bytes;
    uint8_t *before;
    uint8_t *wanted;
    bool *zeroed;               /* by sector: this, too */
} Racing;

/* Each sector is as it was before, or as it is to be. */
static void check_racing(const Racing *r, int64_t offset, int64_t bytes,
                         const uint8_t *data)
{
    offset -= r->start;
    for (int64_t i = 0; i < bytes; i += SECTOR) {
        int64_t at = offset + i;

        if (memcmp(data + i, r->before + at, SECTOR) &&
            !(r->zeroed[at / SECTOR] && buffer_is_zero(data + i, SECTOR))) {
            g_assert_cmpmem(data + i, SECTOR, r->wanted + at, SECTOR);
        }
    }
}

/* Written and zeroed at the same time: each sector is one or the other. */
static void take_zeroed(Model *m, Piece *p)
{
    g_assert_cmpint(blk_pread(m->blk, p->offset, p->bytes, m->buf, 0), ==, 0);
    for (int64_t i = 0; i < p->bytes; i += SECTOR) {
        if (buffer_is_zero(m->buf + i, SECTOR)) {
            memset(p->data + i, 0, SECTOR);
        } else if (!m->may_fail) {
            g_assert_cmpmem(m->buf + i, SECTOR, p->data + i, SECTOR);
        }
    }
}

/*
 * Requests for neighbours, of the same clusters too, that are in flight at the
 * same time, and two that read all of that. Catches one that undoes what
 * another does to the same cluster while it waits for the file, or for threads
 * that copy, and a read that goes on in memory which is another cluster's
 * meanwhile.
 */
static void do_many(Model *m)
{
    Piece pieces[12], reads[2];
    /* With long ones, for which threads copy, it is all of the disk. */
    const bool is_long = below(m, 20) == 0;
    const int most = is_long ? 340 : 24;
    bool zero_area = is_long && below(m, 4) == 0;
    int64_t sectors = m->size / SECTOR;
    int64_t sector = below(m, sectors - ARRAY_SIZE(pieces) * most);
    Racing r = { };
    int i;

    if (below(m, 2)) {
        sector %= 40 * CLUSTER / SECTOR;
    }
    r.start = sector * SECTOR;
    for (i = 0; i < ARRAY_SIZE(pieces); i++) {
        Piece *p = &pieces[i];
        int64_t n = below(m, most) + 1;

        *p = (Piece) {
            .m = m,
            .offset = sector * SECTOR,
            .bytes = n * SECTOR,
            .what = below(m, PIECES),
            .data = g_malloc0(n * SECTOR),
            .ret = -EINPROGRESS,
        };
        sector += n;
        if (p->what == WRITE) {
            fill(m, p->data, p->bytes);
            p->zeroed = below(m, 4) == 0;
        }
        qemu_iovec_init_buf(&p->qiov, p->data, p->bytes);
    }
    r.bytes = sector * SECTOR - r.start;
    r.before = g_memdup2(m->present + r.start, r.bytes);
    r.wanted = g_memdup2(m->present + r.start, r.bytes);
    r.zeroed = g_new0(bool, r.bytes / SECTOR);
    for (i = 0; i < ARRAY_SIZE(pieces); i++) {
        Piece *p = &pieces[i];
        int64_t at = p->offset - r.start;

        if (p->what != READ) {
            memcpy(r.wanted + at, p->data, p->bytes);
        }
        memset(&r.zeroed[at / SECTOR], p->zeroed, p->bytes / SECTOR);
    }
    for (i = 0; zero_area && r.start + i * SECTOR < AREA &&
         i < r.bytes / SECTOR; i++) {
        r.zeroed[i] = true;
    }
    if (is_long && below(m, 2)) {
        /* So that the first read need not wait for the image */
        blk_pwrite(m->blk, r.start, r.bytes, r.before, 0);
    }

    piece_read(&reads[0], m, r.start, r.bytes);
    for (i = 0; i < ARRAY_SIZE(pieces); i++) {
        Piece *p = &pieces[i];

        switch (p->what) {
        case WRITE:
            blk_aio_pwritev(m->blk, p->offset, &p->qiov, 0, piece_done, p);
            if (p->zeroed) {
                blk_aio_pwrite_zeroes(m->blk, p->offset, p->bytes, 0,
                                      piece_done, p);
            }
            break;
        case WRITE_ZEROES:
            blk_aio_pwrite_zeroes(m->blk, p->offset, p->bytes, 0, piece_done,
                                  p);
            break;
        default:
            blk_aio_preadv(m->blk, p->offset, &p->qiov, 0, piece_done, p);
            break;
        }
    }
    if (zero_area) {
        Piece area = { .ret = -EINPROGRESS };

        blk_aio_pwrite_zeroes(m->blk, 0, AREA, 0, piece_done, &area);
        blk_drain(m->blk);
        g_assert_cmpint(area.ret, ==, 0);
        memset(m->present, 0, AREA);
    }
    piece_read(&reads[1], m, r.start, r.bytes);
    blk_drain(m->blk);

    for (i = 0; i < ARRAY_SIZE(reads); i++) {
        g_assert_cmpint(reads[i].ret, >=, 0);
        check_racing(&r, r.start, r.bytes, reads[i].data);
        g_free(reads[i].data);
    }
    for (i = 0; i < ARRAY_SIZE(pieces); i++) {
        Piece *p = &pieces[i];

        if (p->what == READ) {
            g_assert_cmpint(p->ret, >=, 0);
            check_racing(&r, p->offset, p->bytes, p->data);
        } else {
            if (p->zeroed || zero_area) {
                take_zeroed(m, p);
            }
            changed(m, MIN(p->ret, 0), p->offset, p->bytes, p->data);
        }
        g_free(p->data);
    }
    g_free(r.before);
    g_free(r.wanted);
    g_free(r.zeroed);
}

static void do_save(Model *m)
{
    Saved *s;

    if (m->nr_slots == MAX_SLOTS) {
        return;
    }
    s = &m->slots[m->nr_slots++];
    bdrv_drained_begin(m->bs);
    s->slot = snapshot_overlay_save(m->bs);
    bdrv_drained_end(m->bs);
    s->content = g_memdup2(m->present, m->size);
    g_assert_true(snapshot_overlay_slot_bs(s->slot) == m->bs);
}

static void do_restore(Model *m)
{
    Saved *s;

    if (!m->nr_slots) {
        return;
    }
    s = &m->slots[below(m, m->nr_slots)];
    bdrv_drained_begin(m->bs);
    snapshot_overlay_restore(s->slot);
    g_assert_cmpuint(snapshot_overlay_restore(s->slot), ==, 0);
    bdrv_drained_end(m->bs);
    memcpy(m->present, s->content, m->size);
    m->restored++;
    if (below(m, 8) == 0) {
        compare(m, 0, m->size);
    }
}

static void do_discard_slot(Model *m)
{
    unsigned i;

    if (!m->nr_slots) {
        return;
    }
    i = below(m, m->nr_slots);
    bdrv_drained_begin(m->bs);
    snapshot_overlay_discard(m->slots[i].slot);
    bdrv_drained_end(m->bs);
    g_free(m->slots[i].content);
    m->slots[i] = m->slots[--m->nr_slots];
    if (below(m, 8) == 0) {
        compare(m, 0, m->size);
    }
}

static void discard_slots(Model *m)
{
    while (m->nr_slots) {
        do_discard_slot(m);
    }
}

/* ---- Commits ---- */

typedef struct Commit {
    SnapshotOverlayCommit *c;
    unsigned steps;             /* at most */
    uint64_t bytes;             /* that are written */
    int64_t ret;
    Error *err;
    bool done;
} Commit;

static void coroutine_fn commit_entry(void *opaque)
{
    Commit *commit = opaque;

    commit->ret = 1;
    while (commit->ret > 0 && commit->steps--) {
        commit->ret = snapshot_overlay_co_commit(commit->c, &commit->err);
        if (commit->ret > 0) {
            commit->bytes += commit->ret;
        }
    }
    commit->done = true;
}

/* Returns 0 or a negative error; 1 if it was ended before all was written */
static int64_t run_commit(SnapshotOverlayCommit *c, BlockDriverState *bs,
                          unsigned steps)
{
    uint64_t bytes = snapshot_overlay_commit_bytes(c);
    Commit commit = { .c = c, .steps = steps };

    qemu_coroutine_enter(qemu_coroutine_create(commit_entry, &commit));
    BDRV_POLL_WHILE(bs, !commit.done);
    g_assert_cmpint(commit.ret < 0, ==, commit.err != NULL);
    error_free(commit.err);
    if (commit.ret == 0) {
        g_assert_cmpuint(commit.bytes, ==, bytes);
    } else {
        g_assert_cmpuint(commit.bytes, <=, bytes);
    }
    return MIN(commit.ret, 1);
}

static void read_below(BlockDriverState *bs, uint8_t *buf, int64_t size)
{
    BlockBackend *blk;

    blk = blk_new_with_bs(bs->file->bs, BLK_PERM_CONSISTENT_READ, BLK_PERM_ALL,
                          &error_abort);
    memset(buf, 0x55, size);
    g_assert_cmpint(blk_pread(blk, 0, size, buf, 0), ==, 0);
    blk_unref(blk);
}

/*
 * The present content, or that of a slot as the snapshot engine does it. Then
 * the image has just that, whatever it had; and all reads as before, also if it
 * was ended half way.
 */
static void do_commit(Model *m)
{
    BlockStatsSpecificSnapshotOverlay stats;
    SnapshotOverlaySlot *saved = NULL;
    SnapshotOverlayCommit *c;
    const uint8_t *content = m->present;
    bool was_read_only = bdrv_is_read_only(m->bs->file->bs);
    int64_t ret;

    if (m->export) {
        Error *err = NULL;

        g_assert_null(snapshot_overlay_commit_begin(m->bs, NULL, &err));
        error_free_or_abort(&err);
        return;
    }
    c = snapshot_overlay_commit_begin(m->bs, NULL, &error_abort);
    if (m->nr_slots && below(m, 2)) {
        Saved *s = &m->slots[below(m, m->nr_slots)];

        saved = snapshot_overlay_save(m->bs);
        snapshot_overlay_restore(s->slot);
        content = s->content;
    }
    ret = run_commit(c, m->bs, below(m, 4) ? UINT_MAX : below(m, 20));
    if (saved) {
        snapshot_overlay_restore(saved);
        snapshot_overlay_discard(saved);
    }
    snapshot_overlay_commit_end(c);
    g_assert_true(bdrv_is_read_only(m->bs->file->bs) == was_read_only);

    read_below(m->bs, m->buf, m->size);
    if (ret == 0) {
        g_assert_cmpmem(m->buf, m->size, content, m->size);
        m->committed++;
    } else {
        int64_t i = 0;

        g_assert_true(ret > 0 || m->may_fail);
        m->not_committed++;
        /* In ascending order: behind what is missing, all is as it was. */
        while (i < m->size && !memcmp(m->buf + i, content + i, SECTOR)) {
            i += SECTOR;
        }
        g_assert_cmpmem(m->buf + i, m->size - i, m->below + i, m->size - i);
    }
    memcpy(m->below, m->buf, m->size);
    if (!saved && below(m, 4) == 0) {
        discard_slots(m);
    }
    snapshot_overlay_query(m->bs, &stats);
    if (ret == 0 && !m->nr_slots) {
        g_assert_cmpuint(stats.clusters, ==, 0);
        g_assert_cmpuint(stats.zeroed_areas, ==, 0);
        g_assert_cmpuint(stats.memory_bytes, ==, 0);
        g_assert_cmpuint(stats.spilled_bytes, ==, 0);
    }
    compare(m, 0, m->size);
}

/* ---- Exports ---- */

struct Export {
    SnapshotOverlayExport *x;
    uint8_t *content;           /* that the image has to have */
    int64_t size;
    char *filename;
    uint64_t bytes;             /* to be written */
    int64_t ret;                /* of the last piece */
    Error *err;
    bool busy;
};

static Export *export_new(SnapshotOverlaySlot *slot, const uint8_t *content,
                          int64_t size, Job *job)
{
    Export *e = g_new0(Export, 1);

    e->filename = g_build_filename(dir, "export", NULL);
    e->content = g_memdup2(content, size);
    e->size = size;
    e->x = snapshot_overlay_export_begin(slot, e->filename, job, &error_abort);
    e->bytes = snapshot_overlay_export_bytes(e->x);
    return e;
}

static void coroutine_fn export_entry(void *opaque)
{
    Export *e = opaque;

    e->ret = snapshot_overlay_co_export(e->x, &e->err);
    e->busy = false;
    aio_wait_kick();
}

/* Begins to write a piece, but does not wait for it. */
static void export_piece(Export *e)
{
    g_assert_false(e->busy);
    e->busy = true;
    qemu_coroutine_enter(qemu_coroutine_create(export_entry, e));
}

/* Returns what snapshot_overlay_co_export() has returned */
static int64_t export_wait(Export *e)
{
    AIO_WAIT_WHILE_UNLOCKED(NULL, e->busy);
    g_assert_cmpint(e->ret < 0, ==, e->err != NULL);
    g_assert_cmpint(e->ret, <=, (int64_t)e->bytes);
    e->bytes -= MAX(e->ret, 0);
    return e->ret;
}

static int64_t export_all(Export *e)
{
    do {
        export_piece(e);
    } while (export_wait(e) > 0);
    return e->ret;
}

/* What stock QEMU finds in an image and what is below it */
static void check_content(const char *filename, const uint8_t *content,
                          int64_t size)
{
    BdrvCheckResult result = {};
    QDict *options = qdict_new();
    uint8_t *buf = qemu_memalign(CLUSTER, size);
    BlockBackend *blk;

    qdict_put_str(options, "driver", "qcow2");
    blk = blk_new_open(filename, NULL, options, 0, &error_abort);
    g_assert_cmpint(blk_getlength(blk), ==, size);
    memset(buf, 0x55, size);
    g_assert_cmpint(blk_pread(blk, 0, size, buf, 0), ==, 0);
    for (int64_t i = 0; i < size; i += SECTOR) {
        if (memcmp(buf + i, content + i, SECTOR)) {
            g_test_message("sector %" PRIi64 " differs", i / SECTOR);
            g_assert_cmpmem(buf + i, SECTOR, content + i, SECTOR);
        }
    }
    bdrv_graph_rdlock_main_loop();
    g_assert_cmpint(bdrv_check(blk_bs(blk), &result, 0), ==, 0);
    bdrv_graph_rdunlock_main_loop();
    g_assert_cmpint(result.corruptions, ==, 0);
    g_assert_cmpint(result.leaks, ==, 0);
    g_assert_cmpint(result.check_errors, ==, 0);
    blk_unref(blk);
    qemu_vfree(buf);
}

/* Ends an export, complete or not, and deletes the image */
static void export_free(Export *e)
{
    uint64_t bytes = snapshot_overlay_export_bytes(e->x);
    bool complete = e->ret == 0;
    struct stat st;

    snapshot_overlay_export_end(e->x);
    if (complete) {
        g_assert_cmpuint(e->bytes, ==, 0);
        check_content(e->filename, e->content, e->size);
        /* What is as below is not in it, but for tables and the header. */
        g_assert_cmpint(stat(e->filename, &st), ==, 0);
        g_assert_cmpuint(st.st_size, <=, bytes + 64 * KiB +
                         DIV_ROUND_UP(e->size, AREA) * CLUSTER);
    }
    g_assert_cmpint(g_unlink(e->filename), ==, 0);
    error_free(e->err);
    g_free(e->filename);
    g_free(e->content);
    g_free(e);
}

/*
 * All else is done between pieces, and while one is written: the slot changes
 * its place among others, and may be discarded.
 */
static void do_export(Model *m)
{
    Saved *s;

    if (m->export) {
        Export *e = m->export;

        m->pieces++;
        if (export_wait(e) == 0 || below(m, 40) == 0) {
            m->exported += e->ret == 0;
            export_free(e);
            m->export = NULL;
        } else {
            g_assert_cmpint(e->ret, >, 0);
            export_piece(e);
        }
    } else if (m->nr_slots) {
        s = &m->slots[below(m, m->nr_slots)];
        m->export = export_new(s->slot, s->content, m->size, NULL);
        export_piece(m->export);
    }
}

static void step(Model *m)
{
    BlockStatsSpecificSnapshotOverlay stats;
    unsigned what = below(m, 100);

    if (m->exports && below(m, 15) == 0) {
        do_export(m);
    } else if (m->commits && below(m, 50) == 0) {
        do_commit(m);
    } else if (what < 28) {
        do_write(m);
    } else if (what < 35) {
        do_zero(m);
    } else if (what < 39) {
        do_discard(m);
    } else if (what < 70) {
        do_read(m);
    } else if (what < 72) {
        do_flush_and_resize(m);
    } else if (what < 77) {
        do_status(m);
    } else if (what < 83) {
        do_many(m);
    } else if (what < 86) {
        do_save(m);
    } else if (what < 97) {
        do_restore(m);
    } else {
        do_discard_slot(m);
    }
    snapshot_overlay_query(m->bs, &stats);
    g_assert_cmpuint(stats.slots, ==, m->nr_slots);
}

/*
 * When nothing is left that has content, nothing is left of memory and file.
 * Catches versions of clusters that are lost, or freed though in use.
 */
static void model_free(Model *m)
{
    BlockStatsSpecificSnapshotOverlay stats;

    while (m->export) {
        do_export(m);
    }
    compare(m, 0, m->size);
    for (unsigned i = 0; i < m->nr_slots; i++) {
        snapshot_overlay_restore(m->slots[i].slot);
        memcpy(m->present, m->slots[i].content, m->size);
        compare(m, 0, m->size);
    }
    while (m->nr_slots) {
        do_discard_slot(m);
    }
    compare(m, 0, m->size);
    if (m->commits && !m->may_fail) {
        uint64_t committed = m->committed;

        while (m->committed == committed) {
            do_commit(m);
        }
    }
    g_assert_cmpint(blk_pwrite_zeroes(m->blk, 0, m->size, 0), ==, 0);
    snapshot_overlay_query(m->bs, &stats);
    g_assert_cmpuint(stats.clusters, ==, 0);
    g_assert_cmpuint(stats.zeroed_areas, ==, DIV_ROUND_UP(m->size, AREA));
    if (!m->may_fail) {
        g_assert_cmpuint(stats.memory_bytes, ==, 0);
        g_assert_cmpuint(stats.spilled_bytes, ==, 0);
    }

    blk_unref(m->blk);
    if (m->commits) {
        write_image();
    }
    g_rand_free(m->rand);
    g_free(m->present);
    g_free(m->below);
    qemu_vfree(m->buf);
    g_free(m);
    check_image();
}

typedef struct Case {
    const char *name;
    unsigned steps;
    uint64_t memory;
    bool align;
    bool backing;
    bool commits;
    bool errors;                /* when some sector is written below */
    bool exports;
} Case;

static const Case cases[] = {
    { "/snapshot-overlay/model/memory", 100000, 64 * MiB },
    { "/snapshot-overlay/model/file", 40000, 0 },
    { "/snapshot-overlay/model/both", 50000, 300 * CLUSTER },
    /* A node below that takes requests of whole clusters only */
    { "/snapshot-overlay/model/align", 30000, 100 * CLUSTER, .align = true },
    /* One that has a backing file, where most is */
    { "/snapshot-overlay/model/backing", 20000, 64 * MiB, .backing = true },

    { "/snapshot-overlay/commit/memory", 15000, 64 * MiB, .commits = true },
    { "/snapshot-overlay/commit/file", 8000, 0, .commits = true },
    { "/snapshot-overlay/commit/both", 8000, 300 * CLUSTER, .commits = true },
    { "/snapshot-overlay/commit/align", 6000, 100 * CLUSTER,
      .commits = true, .align = true },
    { "/snapshot-overlay/commit/backing", 6000, 64 * MiB,
      .commits = true, .backing = true },
    { "/snapshot-overlay/commit/errors", 8000, 300 * CLUSTER,
      .commits = true, .errors = true },

    { "/snapshot-overlay/export/memory", 5000, 64 * MiB, .exports = true },
    { "/snapshot-overlay/export/file", 3000, 0, .exports = true },
    { "/snapshot-overlay/export/both", 4000, 2000 * CLUSTER, .exports = true },
    { "/snapshot-overlay/export/align", 3000, 2000 * CLUSTER,
      .exports = true, .align = true },
    { "/snapshot-overlay/export/backing", 3000, 64 * MiB,
      .exports = true, .backing = true },
    { "/snapshot-overlay/export/commits", 4000, 2000 * CLUSTER,
      .exports = true, .commits = true },
};

/* So large that its export is of several pieces */
#define EXPORT_AREAS    9

static void test_model(gconstpointer opaque)
{
    const Case *c = opaque;
    g_autofree char *qcow2 = g_build_filename(dir, "qcow2", NULL);
    QDict *options = overlay_options(c->memory);
    Model *m;

    if (c->exports) {
        create_image(EXPORT_AREAS);
    }
    if (c->align) {
        qdict_put_str(options, "file.driver", "blkdebug");
        qdict_put_str(options, "file.align", "4096");
        qdict_del(options, "file.file.driver");
        qdict_del(options, "file.file.filename");
        qdict_put_str(options, "file.image.driver", "raw");
        qdict_put_int(options, "file.image.size", EVEN_SIZE);
        qdict_put_str(options, "file.image.file.driver", "file");
        qdict_put_str(options, "file.image.file.filename", image);
    }
    if (c->backing) {
        BlockBackend *blk;

        bdrv_img_create(qcow2, "qcow2", image, "raw", NULL, DISK_SIZE, 0, true,
                        &error_abort);
        blk = blk_new_open(qcow2, NULL, NULL, BDRV_O_RDWR, &error_abort);
        g_assert_cmpint(blk_pwrite(blk, 64 * KiB, 64 * KiB,
                                   image_content + 64 * KiB, 0), ==, 0);
        blk_unref(blk);
        qdict_put_str(options, "file.driver", "qcow2");
        qdict_put_str(options, "file.file.filename", qcow2);
    }
    if (c->errors) {
        qdict_put_str(options, "file.driver", "blkdebug");
        qdict_del(options, "file.file.driver");
        qdict_del(options, "file.file.filename");
        qdict_put_str(options, "file.image.driver", "raw");
        qdict_put_str(options, "file.image.file.driver", "file");
        qdict_put_str(options, "file.image.file.filename", image);
        qdict_put_str(options, "file.inject-error.0.event", "none");
        qdict_put_str(options, "file.inject-error.0.iotype", "write");
        qdict_put_int(options, "file.inject-error.0.sector", 503);
        qdict_put_int(options, "file.inject-error.0.errno", ENOSPC);
        qdict_put_str(options, "file.inject-error.1.event", "none");
        qdict_put_str(options, "file.inject-error.1.iotype", "write-zeroes");
        qdict_put_int(options, "file.inject-error.1.sector", 1001);
        qdict_put_int(options, "file.inject-error.1.errno", EIO);
    }
    m = model_new(options, c->align ? EVEN_SIZE : DISK_SIZE, 2);
    m->backing = c->backing;
    m->commits = c->commits;
    m->may_fail = c->errors;
    m->exports = c->exports;
    for (unsigned i = 0; i < c->steps; i++) {
        step(m);
    }
    g_assert_cmpuint(m->restored, >, c->steps / 20);
    g_test_message("%" PRIu64 " commits, %" PRIu64 " not to the end",
                   m->committed, m->not_committed);
    if (c->exports) {
        g_test_message("%" PRIu64 " exports, %" PRIu64 " pieces", m->exported,
                       m->pieces);
        g_assert_cmpuint(m->exported, >, c->steps / 200);
        g_assert_cmpuint(m->pieces, >, 2 * m->exported);
    }
    model_free(m);
    g_unlink(qcow2);
    if (c->exports) {
        create_image(1);
    }
}

/* ---- What is not in the model ---- */

static void limit_files(rlim_t size)
{
    struct rlimit limit;

    g_assert_cmpint(getrlimit(RLIMIT_FSIZE, &limit), ==, 0);
    limit.rlim_cur = MIN(size, limit.rlim_max);
    g_assert_cmpint(setrlimit(RLIMIT_FSIZE, &limit), ==, 0);
}

/*
 * The file cannot become longer, and sometimes not all of it be written to:
 * requests that need that fail with ENOSPC, all others do not, and slots are as
 * they were. Catches what is lost, and space that is lost, on the way out.
 */
static void test_no_space(void)
{
    Model *m = model_new(overlay_options(100 * CLUSTER), DISK_SIZE, 3);
    g_autofree uint8_t *data = g_malloc0(DISK_SIZE);
    int ret;

    signal(SIGXFSZ, SIG_IGN);
    m->may_fail = true;
    for (unsigned i = 0; i < 30000; i++) {
        if (i % 100 == 0) {
            limit_files(below(m, 3) ? 1 * MiB :
                        below(m, 1 * MiB / SECTOR) * SECTOR);
        }
        step(m);
        if (i % 5000 == 4999) {
            /* What has its place can be written again though all is full. */
            limit_files(1 * MiB);
            while (m->nr_slots) {
                do_discard_slot(m);
            }
            g_assert_cmpint(blk_pwrite_zeroes(m->blk, 0, DISK_SIZE, 0), ==, 0);
            memset(m->present, 0, DISK_SIZE);
            for (int j = 0; j < 3; j++) {
                fill(m, data, DISK_SIZE);
                g_assert_cmpint(blk_pwrite(m->blk, 0, 200 * CLUSTER, data, 0),
                                ==, 0);
                memcpy(m->present, data, 200 * CLUSTER);
                fill(m, data, DISK_SIZE);
                ret = blk_pwrite(m->blk, 0, DISK_SIZE, data, 0);
                g_assert_cmpint(ret, ==, -ENOSPC);
                take_over(m, 0, DISK_SIZE, data);
            }
            compare(m, 0, m->size);
            /* And what is freed can be used. */
            g_assert_cmpint(blk_pwrite_zeroes(m->blk, 0, AREA, 0), ==, 0);
            memset(m->present, 0, AREA);
        }
    }
    g_assert_cmpuint(m->failed, >, 100);

    limit_files(RLIM_INFINITY);
    m->may_fail = false;
    for (unsigned i = 0; i < 1000; i++) {
        step(m);
    }
    model_free(m);
}

/*
 * The same for commits: there is no room to keep what was below, or none below.
 * Once there is, they can be tried again. Catches a cluster that is written
 * though it could not be kept.
 */
static void test_commit_no_space(void)
{
    Model *m = model_new(overlay_options(100 * CLUSTER), DISK_SIZE, 5);

    signal(SIGXFSZ, SIG_IGN);
    m->commits = true;
    m->may_fail = true;
    for (unsigned i = 0; i < 8000; i++) {
        if (i % 100 == 0) {
            limit_files(below(m, 3) ? below(m, 3 * MiB / SECTOR) * SECTOR :
                        RLIM_INFINITY);
        }
        step(m);
    }
    limit_files(RLIM_INFINITY);
    g_test_message("%" PRIu64 " commits, %" PRIu64 " not to the end",
                   m->committed, m->not_committed);
    g_assert_cmpuint(m->committed, >, 20);
    g_assert_cmpuint(m->not_committed, >, 20);
    m->may_fail = false;
    for (unsigned i = 0; i < 500; i++) {
        step(m);
    }
    model_free(m);
}

/* A commit of a node with nothing else, with or without a slot */
static int64_t commit(BlockDriverState *bs)
{
    SnapshotOverlayCommit *c;
    int64_t ret;

    c = snapshot_overlay_commit_begin(bs, NULL, &error_abort);
    ret = run_commit(c, bs, UINT_MAX);
    snapshot_overlay_commit_end(c);
    return ret;
}

/*
 * Kept is what a slot may need, once; and nothing is when there are no slots.
 * Catches clusters kept again and again, or not freed; an area that is as below
 * but for what was kept.
 */
static void test_commit_kept(void)
{
    BlockBackend *blk = open_blk(overlay_options(64 * MiB));
    BlockDriverState *bs = blk_bs(blk);
    BlockStatsSpecificSnapshotOverlay stats;
    SnapshotOverlaySlot *slot = snapshot_overlay_save(bs);
    uint8_t data[2 * CLUSTER];

    memset(data, 1, sizeof(data));
    for (int i = 0; i < 3; i++) {
        /* Parts of two clusters, and of the last, which is not whole */
        data[0] = i;
        g_assert_cmpint(blk_pwrite(blk, 2 * SECTOR, CLUSTER, data, 0), ==, 0);
        g_assert_cmpint(blk_pwrite(blk, DISK_SIZE - SECTOR, SECTOR, data, 0),
                        ==, 0);
        g_assert_cmpint(commit(bs), ==, 0);
        snapshot_overlay_query(bs, &stats);
        g_assert_cmpuint(stats.clusters, ==, 3);
        g_assert_cmpuint(stats.memory_bytes, ==, 6 * CLUSTER);
        g_assert_true(bdrv_is_read_only(bs->file->bs));
    }
    bdrv_drained_begin(bs);
    snapshot_overlay_restore(slot);
    bdrv_drained_end(bs);
    g_assert_cmpint(blk_pread(blk, 0, sizeof(data), data, 0), ==, 0);
    g_assert_cmpmem(data, sizeof(data), image_content, sizeof(data));
    snapshot_overlay_query(bs, &stats);
    g_assert_cmpuint(stats.clusters, ==, 0);
    g_assert_cmpuint(stats.memory_bytes, ==, 3 * CLUSTER);

    /* It is not as below: it cannot be left to another process. */
    g_assert_cmpint(bdrv_inactivate(bs, NULL), ==, -ENOTSUP);

    /* The slot's content goes back to the image, and with it what was kept. */
    snapshot_overlay_discard(slot);
    g_assert_cmpint(commit(bs), ==, 0);
    snapshot_overlay_query(bs, &stats);
    g_assert_cmpuint(stats.memory_bytes, ==, 0);
    blk_unref(blk);
    write_image();
}

static void check_stats(BlockDriverState *bs, uint64_t clusters,
                        uint64_t zeroed_areas, uint64_t in_memory)
{
    BlockStatsSpecificSnapshotOverlay stats;

    snapshot_overlay_query(bs, &stats);
    g_assert_cmpuint(stats.clusters, ==, clusters);
    g_assert_cmpuint(stats.zeroed_areas, ==, zeroed_areas);
    g_assert_cmpuint(stats.memory_bytes, ==, in_memory * CLUSTER);
}

static void write_byte(BlockBackend *blk, uint8_t *content, int64_t offset,
                       int64_t bytes, uint8_t byte)
{
    memset(content + offset, byte, bytes);
    g_assert_cmpint(blk_pwrite(blk, offset, bytes, content + offset, 0), ==, 0);
}

static void check_disk(BlockBackend *blk, const uint8_t *content)
{
    g_autofree uint8_t *buf = g_malloc(DISK_SIZE);

    g_assert_cmpint(blk_pread(blk, 0, DISK_SIZE, buf, 0), ==, 0);
    g_assert_cmpmem(buf, DISK_SIZE, content, DISK_SIZE);
}

/*
 * When the last slot goes after a commit, only what changed since is left.
 * Catches: what was committed or kept left in memory; what changed since lost,
 * or the rest of its cluster or area.
 */
static void test_commit_discarded(void)
{
    BlockBackend *blk = open_blk(overlay_options(64 * MiB));
    BlockDriverState *bs = blk_bs(blk);
    g_autofree uint8_t *content = g_memdup2(image_content, DISK_SIZE);
    SnapshotOverlaySlot *slot = snapshot_overlay_save(bs);

    /* Parts of two clusters, of which one changes again */
    write_byte(blk, content, 2 * SECTOR, CLUSTER, 1);
    g_assert_cmpint(commit(bs), ==, 0);
    write_byte(blk, content, CLUSTER, SECTOR, 2);
    check_stats(bs, 2, 0, 4);
    snapshot_overlay_discard(slot);
    check_stats(bs, 1, 0, 2);
    check_disk(blk, content);

    /* All is committed, and an area that is zeroed. */
    slot = snapshot_overlay_save(bs);
    memset(content + AREA, 0, DISK_SIZE - AREA);
    g_assert_cmpint(blk_pwrite_zeroes(blk, AREA, DISK_SIZE - AREA, 0), ==, 0);
    g_assert_cmpint(commit(bs), ==, 0);
    snapshot_overlay_discard(slot);
    g_assert_true(snapshot_overlay_is_empty(bs));
    check_stats(bs, 0, 0, 0);
    check_disk(blk, content);

    /* What changes in a zeroed area: it stays as a whole. */
    slot = snapshot_overlay_save(bs);
    write_byte(blk, content, AREA, DISK_SIZE - AREA, 3);
    memset(content + AREA, 0, DISK_SIZE - AREA);
    g_assert_cmpint(blk_pwrite_zeroes(blk, AREA, DISK_SIZE - AREA, 0), ==, 0);
    g_assert_cmpint(commit(bs), ==, 0);
    write_byte(blk, content, AREA, SECTOR, 4);
    snapshot_overlay_discard(slot);
    check_stats(bs, 1, 1, 1);
    check_disk(blk, content);

    g_assert_cmpint(commit(bs), ==, 0);
    g_assert_true(snapshot_overlay_is_empty(bs));
    check_disk(blk, content);
    blk_unref(blk);
    write_image();
}

/*
 * Somebody else uses the image, or it cannot be written to: that is said, and
 * all is as it was.
 */
static void test_commit_refused(void)
{
    BlockBackend *a = open_blk(overlay_options(64 * MiB)), *b;
    QDict *options = qdict_new();
    uint8_t data[CLUSTER] = { 1 };
    Error *err = NULL;

    g_assert_cmpint(blk_pwrite(a, 0, CLUSTER, data, 0), ==, 0);
    if (qemu_has_ofd_lock()) {
        b = open_blk(overlay_options(64 * MiB));
        g_assert_null(snapshot_overlay_commit_begin(blk_bs(a), NULL, &err));
        g_assert_nonnull(strstr(error_get_pretty(err),
                                bdrv_get_node_name(blk_bs(a)->file->bs)));
        error_free_or_abort(&err);
        g_assert_true(bdrv_is_read_only(blk_bs(a)->file->bs));
        blk_unref(b);
    }
    g_assert_cmpint(commit(blk_bs(a)), ==, 0);
    blk_unref(a);
    write_image();

    /* The format's node could be writable, but not the one of the file. */
    qdict_put_str(options, "driver", "file");
    qdict_put_str(options, "node-name", "file");
    qdict_put_str(options, "filename", image);
    b = blk_new_open(NULL, NULL, options, 0, &error_abort);
    options = overlay_options(64 * MiB);
    qdict_del(options, "file.file.driver");
    qdict_del(options, "file.file.filename");
    qdict_put_str(options, "file.file", "file");
    qdict_put_str(options, "file.node-name", "raw");
    a = open_blk(options);
    g_assert_cmpint(blk_pwrite(a, 0, CLUSTER, data, 0), ==, 0);
    g_assert_null(snapshot_overlay_commit_begin(blk_bs(a), NULL, &err));
    g_assert_nonnull(strstr(error_get_pretty(err), "'raw'"));
    error_free_or_abort(&err);
    g_assert_true(bdrv_is_read_only(blk_bs(a)->file->bs));
    g_assert_cmpint(blk_pread(a, 0, CLUSTER, data, 0), ==, 0);
    g_assert_cmpint(data[0], ==, 1);
    blk_unref(a);
    blk_unref(b);
    check_image();
}

/*
 * Write, restore, as often as you like: memory stays what it is, and what was
 * written is put back, not more. Catches a log that grows, and leaks.
 */
static void test_flat(void)
{
    BlockBackend *blk = open_blk(overlay_options(64 * MiB));
    BlockDriverState *bs = blk_bs(blk);
    BlockStatsSpecificSnapshotOverlay stats, first = {};
    SnapshotOverlaySlot *root, *slot = NULL;
    uint8_t data[CLUSTER] = { 1 };

    root = snapshot_overlay_save(bs);
    for (int i = 0; i < 1000; i++) {
        if (i % 10 == 0) {
            /* A nested slot, made anew */
            if (slot) {
                snapshot_overlay_discard(slot);
            }
            snapshot_overlay_restore(root);
            data[0]++;
            for (int j = 0; j < 20; j++) {
                blk_pwrite(blk, j * CLUSTER, CLUSTER, data, 0);
            }
            slot = snapshot_overlay_save(bs);
        }
        for (int j = 0; j < 100; j++) {
            blk_pwrite(blk, (j % 50) * 3 * CLUSTER, CLUSTER, data, 0);
        }
        g_assert_cmpuint(snapshot_overlay_restore(slot), ==, 50);
        g_assert_cmpuint(snapshot_overlay_restore(slot), ==, 0);
        snapshot_overlay_query(bs, &stats);
        if (i == 0) {
            first = stats;
        }
        g_assert_cmpuint(stats.clusters, ==, 20);
        g_assert_cmpuint(stats.memory_bytes, ==, first.memory_bytes);
    }
    g_assert_cmpuint(stats.memory_bytes, ==, 20 * CLUSTER);
    g_assert_cmpuint(stats.slots, ==, 2);
    snapshot_overlay_discard(root);
    snapshot_overlay_discard(slot);
    blk_unref(blk);
    check_image();
}

/* Bytes of memory that the process has; 0: the host does not tell */
static size_t resident(void)
{
    g_autofree char *text = NULL;
    unsigned long pages;

    if (!g_file_get_contents("/proc/self/statm", &text, NULL, NULL)) {
        return 0;
    }
    g_assert_cmpint(sscanf(text, "%*u %lu", &pages), ==, 1);
    return pages * qemu_real_host_page_size();
}

/*
 * The host has the memory back of what the last slot alone needed, and that of
 * what stays is left alone, cluster by cluster. Catches memory that is only
 * given back when the node is closed, and too much of it.
 */
static void test_given_back(void)
{
    const size_t size = 32 * MiB;
    size_t before = resident();
    QDict *options;
    g_autofree uint8_t *data = g_malloc(size);
    g_autofree uint8_t *expected = g_malloc0(size);
    BlockStatsSpecificSnapshotOverlay stats;
    SnapshotOverlaySlot *slot;
    BlockBackend *blk;

#ifdef CONFIG_TSAN
    before = 0;         /* What it keeps of memory is not given back. */
#endif
    if (!before) {
        g_test_skip("memory that is given back is not seen");
        return;
    }
    options = qdict_new();
    qdict_put_str(options, "driver", "snapshot-overlay");
    qdict_put_str(options, "overlay-dir", dir);
    qdict_put_str(options, "file.driver", "null-co");
    qdict_put_int(options, "file.size", size);
    qdict_put_str(options, "file.read-zeroes", "on");
    blk = open_blk(options);

    memset(data, 1, size);
    before = resident();
    g_assert_cmpint(blk_pwrite(blk, 0, size, data, 0), ==, 0);
    slot = snapshot_overlay_save(blk_bs(blk));
    for (size_t i = 0; i < size / 4; i += 2 * CLUSTER) {
        memset(expected + i, 1, CLUSTER);
        g_assert_cmpint(blk_pwrite_zeroes(blk, i + CLUSTER, CLUSTER, 0), ==, 0);
    }
    g_assert_cmpint(blk_pwrite_zeroes(blk, size / 4, size / 4 * 3, 0), ==, 0);
    g_assert_cmpuint(resident() - before, >=, size);

    snapshot_overlay_discard(slot);
    g_assert_cmpuint(resident() - before, <, size / 4 * 3);
    snapshot_overlay_query(blk_bs(blk), &stats);
    g_assert_cmpuint(stats.memory_bytes, ==, size / 8);
    g_assert_cmpint(blk_pread(blk, 0, size, data, 0), ==, 0);
    g_assert_cmpmem(data, size, expected, size);

    /* What was given back can be written to again. */
    memset(data, 3, size);
    g_assert_cmpint(blk_pwrite(blk, 0, size, data, 0), ==, 0);
    memset(expected, 0, size);
    g_assert_cmpint(blk_pread(blk, 0, size, expected, 0), ==, 0);
    g_assert_cmpmem(data, size, expected, size);
    blk_unref(blk);
}

/* Zeroing a disk takes as much as its areas, and so does putting it back. */
static void test_large(void)
{
    QDict *options = qdict_new();
    BlockStatsSpecificSnapshotOverlay stats;
    SnapshotOverlaySlot *slot;
    BlockDriverState *bs;
    BlockBackend *blk;
    uint8_t data[CLUSTER] = { 1 };

    qdict_put_str(options, "driver", "snapshot-overlay");
    qdict_put_str(options, "overlay-dir", dir);
    qdict_put_str(options, "discard", "unmap");
    qdict_put_str(options, "file.driver", "null-co");
    qdict_put_int(options, "file.size", 4 * TiB);
    blk = open_blk(options);
    bs = blk_bs(blk);

    g_assert_cmpint(blk_pwrite(blk, 3 * TiB + SECTOR, SECTOR, data, 0), ==, 0);
    slot = snapshot_overlay_save(bs);
    g_assert_cmpint(blk_pdiscard(blk, SECTOR, 4 * TiB - SECTOR, 0), ==, 0);
    snapshot_overlay_query(bs, &stats);
    g_assert_cmpuint(stats.clusters, ==, AREA / CLUSTER);
    g_assert_cmpuint(stats.zeroed_areas, ==, 4 * TiB / AREA - 1);
    g_assert_cmpint(blk_pread(blk, 3 * TiB, CLUSTER, data, 0), ==, 0);
    g_assert_true(buffer_is_zero(data, CLUSTER));
    g_assert_cmpuint(snapshot_overlay_restore(slot), ==,
                     AREA / CLUSTER + 4 * TiB / AREA);
    g_assert_cmpint(blk_pread(blk, 3 * TiB + SECTOR, SECTOR, data, 0), ==, 0);
    g_assert_cmpint(data[0], ==, 1);
    snapshot_overlay_query(bs, &stats);
    g_assert_cmpuint(stats.clusters, ==, 1);
    g_assert_cmpuint(stats.zeroed_areas, ==, 0);
    snapshot_overlay_discard(slot);
    blk_unref(blk);
}

/* A slot does not keep the node, and can be discarded when that is gone. */
static void test_closed(void)
{
    BlockBackend *blk = open_blk(overlay_options(64 * MiB));
    SnapshotOverlaySlot *slots[3];
    uint8_t data[CLUSTER] = { 1 };

    for (int i = 0; i < 3; i++) {
        slots[i] = snapshot_overlay_save(blk_bs(blk));
        g_assert_cmpint(blk_pwrite(blk, i * SECTOR, SECTOR, data, 0), ==, 0);
    }
    snapshot_overlay_restore(slots[1]);
    snapshot_overlay_restore(slots[2]);
    snapshot_overlay_restore(slots[1]);
    snapshot_overlay_discard(slots[1]);
    blk_unref(blk);
    g_assert_null(snapshot_overlay_slot_bs(slots[0]));
    snapshot_overlay_discard(slots[0]);
    snapshot_overlay_discard(slots[2]);
}

/* Dirty bitmaps see what a restore changes. */
static void test_bitmap(void)
{
    BlockBackend *blk = open_blk(overlay_options(64 * MiB));
    BlockDriverState *bs = blk_bs(blk);
    SnapshotOverlaySlot *slot = snapshot_overlay_save(bs);
    BdrvDirtyBitmap *bitmap;
    uint8_t data[CLUSTER] = { 1 };

    g_assert_cmpint(blk_pwrite(blk, 5 * CLUSTER, CLUSTER, data, 0), ==, 0);
    g_assert_cmpint(blk_pwrite_zeroes(blk, AREA, DISK_SIZE - AREA, 0),
                    ==, 0);
    bitmap = bdrv_create_dirty_bitmap(bs, CLUSTER, NULL, &error_abort);
    snapshot_overlay_restore(slot);
    g_assert_cmpint(bdrv_get_dirty_count(bitmap), ==,
                    CLUSTER + ROUND_UP(DISK_SIZE - AREA, CLUSTER));
    bdrv_release_dirty_bitmap(bitmap);
    snapshot_overlay_discard(slot);
    blk_unref(blk);
}

/* ---- The node among others ---- */

static BlockBackend *open_image(Error **errp)
{
    QDict *options = qdict_new();

    qdict_put_str(options, "driver", "raw");
    qdict_put_str(options, "node-name", "image");
    qdict_put_str(options, "discard", "unmap");
    qdict_put_str(options, "file.driver", "file");
    qdict_put_str(options, "file.filename", image);
    return blk_new_open(NULL, NULL, options, BDRV_O_RDWR, errp);
}

/*
 * Any number of overlays, each opening the image by itself as another process
 * does, and nobody who writes to it. Catches permissions and locks that are
 * more than reading needs.
 */
static void test_share(void)
{
    BlockBackend *a = open_blk(overlay_options(64 * MiB));
    BlockBackend *b = open_blk(overlay_options(64 * MiB));
    uint8_t data[CLUSTER] = { 1 };

    g_assert_true(bdrv_is_read_only(blk_bs(a)->file->bs));
    g_assert_false(bdrv_is_read_only(blk_bs(a)));
    g_assert_cmpint(blk_pwrite(a, 0, CLUSTER, data, 0), ==, 0);
    g_assert_cmpint(blk_pread(b, 0, CLUSTER, data, 0), ==, 0);
    g_assert_cmpmem(data, CLUSTER, image_content, CLUSTER);
    if (qemu_has_ofd_lock()) {
        Error *err = NULL;

        g_assert_null(open_image(&err));
        error_free_or_abort(&err);
    }
    blk_unref(a);
    blk_unref(b);
    g_chmod(image, 0400);
    a = open_blk(overlay_options(64 * MiB));
    blk_unref(a);
    g_chmod(image, 0600);
    check_image();
}

/* ---- Exports that are not in the model ---- */

static void check_refused(SnapshotOverlaySlot *slot, const char *filename,
                          const char *why)
{
    Error *err = NULL;

    g_assert_null(snapshot_overlay_export_begin(slot, filename, NULL, &err));
    if (!strstr(error_get_pretty(err), why)) {
        g_test_message("'%s' does not say '%s'", error_get_pretty(err), why);
        g_test_fail();
    }
    error_free(err);
}

/*
 * A file that is there stays what it is, and none is left of what is refused;
 * an image that nobody could open is not written in the first place.
 */
static void test_export_refused(void)
{
    g_autofree char *filename = g_build_filename(dir, "export", NULL);
    g_autofree char *nowhere = g_build_filename(dir, "nowhere/export", NULL);
    g_autofree char *link = g_build_filename(dir, "link", NULL);
    g_autofree char *content = NULL;
    g_autofree char *name = NULL;
    g_autofree char *cwd = g_get_current_dir();
    char slashes[1024] = { };
    BlockBackend *blk = open_blk(overlay_options(64 * MiB));
    SnapshotOverlaySlot *slot = snapshot_overlay_save(blk_bs(blk));
    SnapshotOverlayCommit *c;
    QDict *options;

    check_refused(slot, nowhere, nowhere);
    g_assert_true(g_file_set_contents(filename, "precious", -1, NULL));
    check_refused(slot, filename, filename);
    g_assert_cmpint(symlink(filename, link), ==, 0);
    check_refused(slot, link, link);
    g_assert_true(g_file_get_contents(filename, &content, NULL, NULL));
    g_assert_cmpstr(content, ==, "precious");
    g_unlink(filename);
    check_refused(slot, link, link);
    g_assert_false(g_file_test(filename, G_FILE_TEST_EXISTS));
    g_unlink(link);

    c = snapshot_overlay_commit_begin(blk_bs(blk), NULL, &error_abort);
    check_refused(slot, filename, bdrv_get_node_name(blk_bs(blk)));
    snapshot_overlay_commit_end(c);
    /* Nor does anything stay blocked. */
    g_assert_cmpint(commit(blk_bs(blk)), ==, 0);
    blk_unref(blk);
    check_refused(slot, filename, "gone");
    snapshot_overlay_discard(slot);

    /* An overlay, at any depth */
    options = qdict_new();
    qdict_put_str(options, "driver", "snapshot-overlay");
    qdict_put_str(options, "overlay-dir", dir);
    qdict_put_str(options, "file.driver", "raw");
    qdict_put_str(options, "file.file.driver", "snapshot-overlay");
    qdict_put_str(options, "file.file.overlay-dir", dir);
    qdict_put_str(options, "file.file.node-name", "inner");
    qdict_put_str(options, "file.file.file.driver", "file");
    qdict_put_str(options, "file.file.file.filename", image);
    blk = open_blk(options);
    slot = snapshot_overlay_save(blk_bs(blk));
    check_refused(slot, filename, "'inner'");
    snapshot_overlay_discard(slot);
    blk_unref(blk);

    /* -snapshot */
    options = qdict_new();
    qdict_put_str(options, "driver", "raw");
    blk = blk_new_open(image, NULL, options, BDRV_O_RDWR | BDRV_O_SNAPSHOT,
                       &error_abort);
    blk_unref(blk_new_with_bs(snapshot_overlay_insert(blk_bs(blk), NULL,
                                                      &error_abort),
                              0, BLK_PERM_ALL, &error_abort));
    slot = snapshot_overlay_save(blk_bs(blk));
    check_refused(slot, filename, "-snapshot");
    snapshot_overlay_discard(slot);
    bdrv_unref(blk_bs(blk));
    blk_unref(blk);

    /* A name that is too long for the header; the options have it in them. */
    options = qdict_new();
    qdict_put_str(options, "driver", "snapshot-overlay");
    qdict_put_str(options, "overlay-dir", dir);
    qdict_put_str(options, "file.driver", "raw");
    qdict_put_int(options, "file.size", AREA);
    qdict_put_str(options, "file.file.driver", "file");
    memset(slashes, '/', 1023);
    name = g_strconcat(slashes, image, NULL);
    qdict_put_str(options, "file.file.filename", name);
    blk = open_blk(options);
    slot = snapshot_overlay_save(blk_bs(blk));
    check_refused(slot, filename, "1023 bytes");
    snapshot_overlay_discard(slot);
    blk_unref(blk);
    /* Options with a name that is another file in another directory */
    g_assert_cmpint(g_chdir(dir), ==, 0);
    options = overlay_options(64 * MiB);
    qdict_put_int(options, "file.offset", SECTOR);
    qdict_put_str(options, "file.file.filename", strrchr(image, '/') + 1);
    blk = open_blk(options);
    slot = snapshot_overlay_save(blk_bs(blk));
    check_refused(slot, filename, "another directory");
    snapshot_overlay_discard(slot);
    blk_unref(blk);
    g_assert_cmpint(g_chdir(cwd), ==, 0);

    g_assert_false(g_file_test(filename, G_FILE_TEST_EXISTS));
    check_image();
}

/* Writes some to a node, and exports what it has then. */
static void check_export(BlockBackend *blk)
{
    int64_t size = blk_getlength(blk);
    g_autofree uint8_t *content = g_malloc(size);
    g_autofree char *copy = g_build_filename(dir, "copy", NULL);
    g_autofree char *file = NULL;
    SnapshotOverlaySlot *slot;
    gsize length;
    Export *e;

    g_assert_cmpint(blk_pwrite(blk, 5 * SECTOR, SECTOR, image_content, 0),
                    ==, 0);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 64 * KiB, 300 * KiB, 0), ==, 0);
    g_assert_cmpint(blk_pread(blk, 0, size, content, 0), ==, 0);
    slot = snapshot_overlay_save(blk_bs(blk));
    e = export_new(slot, content, size, NULL);
    g_assert_cmpint(export_all(e), ==, 0);
    /* All is in the file, not in a cache of ours. */
    g_assert_true(g_file_get_contents(e->filename, &file, &length, NULL));
    g_assert_true(g_file_set_contents(copy, file, length, NULL));
    check_content(copy, content, size);
    g_unlink(copy);
    export_free(e);
    snapshot_overlay_discard(slot);
}

/*
 * The image has to be found from any directory, whatever it is called, and be
 * opened as it was. Catches a relative name, one that is taken for a protocol,
 * options that are lost, and an image that is locked though it is only read.
 */
static void test_export_names(void)
{
    g_autofree char *odd = g_build_filename(dir, "nbd:a,b %20\"", NULL);
    g_autofree char *cwd = g_get_current_dir();
    g_autofree char *qcow2 = g_build_filename(dir, "qcow2", NULL);
    BlockBackend *a, *b;
    QDict *options;

    /* Two that have the same image below */
    a = open_blk(overlay_options(64 * MiB));
    b = open_blk(overlay_options(0));
    check_export(a);
    check_export(b);
    blk_unref(a);
    blk_unref(b);

    /* A file without a format, a relative name that looks like a protocol */
    g_assert_cmpint(g_rename(image, odd), ==, 0);
    g_assert_cmpint(g_chdir(dir), ==, 0);
    options = qdict_new();
    qdict_put_str(options, "driver", "snapshot-overlay");
    qdict_put_str(options, "overlay-dir", dir);
    qdict_put_str(options, "file.driver", "file");
    qdict_put_str(options, "file.filename", strrchr(odd, '/') + 1);
    a = open_blk(options);
    check_export(a);
    g_assert_cmpint(g_chdir(cwd), ==, 0);
    blk_unref(a);
    g_assert_cmpint(g_rename(odd, image), ==, 0);

    /* Part of a file */
    options = overlay_options(64 * MiB);
    qdict_put_int(options, "file.offset", 7 * SECTOR);
    qdict_put_int(options, "file.size", 100 * CLUSTER + SECTOR);
    a = open_blk(options);
    check_export(a);
    blk_unref(a);

    /* A backing file that is not the one that its header says */
    bdrv_img_create(qcow2, "qcow2", NULL, NULL, NULL, DISK_SIZE, 0, true,
                    &error_abort);
    options = overlay_options(64 * MiB);
    qdict_put_str(options, "file.driver", "qcow2");
    qdict_put_str(options, "file.file.filename", qcow2);
    qdict_put_str(options, "file.backing.driver", "raw");
    qdict_put_str(options, "file.backing.file.driver", "file");
    qdict_put_str(options, "file.backing.file.filename", image);
    a = open_blk(options);
    check_export(a);
    blk_unref(a);
    g_unlink(qcow2);
    check_image();
}

/*
 * The image cannot become longer than that: it is said, wherever it happens,
 * and the slot is there to be exported again.
 */
static void test_export_no_space(void)
{
    BlockBackend *blk = open_blk(overlay_options(64 * MiB));
    g_autofree uint8_t *data = g_malloc(1 * MiB);
    SnapshotOverlaySlot *slot;
    g_autofree char *filename = g_build_filename(dir, "export", NULL);
    unsigned begun = 0;

    signal(SIGXFSZ, SIG_IGN);
    for (int i = 0; i < 500; i++) {
        memset(data, i + 1, CLUSTER);
        g_assert_cmpint(blk_pwrite(blk, (i * 1277) % 540 * CLUSTER, CLUSTER,
                                   data, 0), ==, 0);
    }
    g_assert_cmpint(blk_pread(blk, 0, 1 * MiB, data, 0), ==, 0);
    slot = snapshot_overlay_save(blk_bs(blk));
    for (int i = 0; i < 100; i++) {
        SnapshotOverlayExport *x;
        Export e = { };
        Error *err = NULL;

        limit_files(i * 16 * KiB);
        x = snapshot_overlay_export_begin(slot, filename, NULL, &err);
        if (x) {
            e.x = x;
            e.bytes = snapshot_overlay_export_bytes(x);
            g_assert_cmpint(export_all(&e), ==, -EFBIG);
            g_assert_nonnull(strstr(error_get_pretty(e.err), filename));
            error_free(e.err);
            snapshot_overlay_export_end(x);
            g_assert_cmpint(g_unlink(filename), ==, 0);
            begun++;
        } else {
            error_free_or_abort(&err);
        }
        g_assert_false(g_file_test(filename, G_FILE_TEST_EXISTS));
    }
    g_assert_cmpuint(begun, >, 50);
    g_assert_cmpuint(begun, <, 100);
    limit_files(RLIM_INFINITY);
    snapshot_overlay_discard(slot);
    check_export(blk);
    blk_unref(blk);
    check_image();
}

/* As a caller may do at any time */
static void rename_export(Export *e)
{
    char *name = g_build_filename(dir, "renamed", NULL);

    g_assert_cmpint(g_rename(e->filename, name), ==, 0);
    g_free(e->filename);
    e->filename = name;
}

/*
 * A slot that was discarded is held while it is exported, and not longer; so is
 * the node that it is of.
 */
static void test_export_discarded(void)
{
    for (int in_file = 0; in_file < 2; in_file++) {
        BlockBackend *blk = open_blk(overlay_options(in_file ? 0 : 64 * MiB));
        BlockDriverState *bs = blk_bs(blk);
        g_autofree uint8_t *content = g_memdup2(image_content, DISK_SIZE);
        g_autofree uint8_t *data = g_malloc(1 * MiB);
        BlockStatsSpecificSnapshotOverlay stats;
        SnapshotOverlaySlot *slot;
        Export *a, *b;

        memset(data, 1, 1 * MiB);
        memset(content, 1, 1 * MiB);
        g_assert_cmpint(blk_pwrite(blk, 0, 1 * MiB, data, 0), ==, 0);
        slot = snapshot_overlay_save(bs);
        a = export_new(slot, content, DISK_SIZE, NULL);
        rename_export(a);
        b = export_new(slot, content, DISK_SIZE, NULL);
        snapshot_overlay_discard(slot);
        snapshot_overlay_query(bs, &stats);
        g_assert_cmpuint(stats.slots, ==, 0);

        memset(data, 2, 1 * MiB);
        g_assert_cmpint(blk_pwrite(blk, 0, 1 * MiB, data, 0), ==, 0);
        g_assert_cmpint(export_all(a), ==, 0);
        export_free(a);
        snapshot_overlay_query(bs, &stats);
        g_assert_cmpuint(stats.memory_bytes + stats.spilled_bytes, ==,
                         2 * MiB);
        if (in_file) {
            blk_unref(blk);
            g_assert_cmpint(export_all(b), ==, 0);
            export_free(b);
        } else {
            g_assert_cmpint(export_all(b), ==, 0);
            export_free(b);
            snapshot_overlay_query(bs, &stats);
            g_assert_cmpuint(stats.memory_bytes, ==, 1 * MiB);
            blk_unref(blk);
        }
        g_assert_null(bdrv_next_node(NULL));
    }
    check_image();
}

/* An export, or a commit */
typedef struct StepsJob {
    Job common;
    Export *e;
    SnapshotOverlayCommit *c;
} StepsJob;

static int coroutine_fn steps_job_run(Job *common, Error **errp)
{
    StepsJob *job = container_of(common, StepsJob, common);
    int64_t n;

    do {
        job_sleep_ns(common, 0);
        n = job->e ? snapshot_overlay_co_export(job->e->x, &error_abort) :
            snapshot_overlay_co_commit(job->c, &error_abort);
        job_progress_update(common, n);
    } while (n);
    return 0;
}

static void steps_job_clean(Job *common)
{
    StepsJob *job = container_of(common, StepsJob, common);

    /* This may be in a drained section, too. */
    if (job->e) {
        snapshot_overlay_export_end(job->e->x);
    }
}

static const JobDriver steps_job_driver = {
    .instance_size = sizeof(StepsJob),
    .job_type = JOB_TYPE_CREATE,
    .run = steps_job_run,
    .clean = steps_job_clean,
};

static StepsJob *steps_job_create(void)
{
    return job_create("steps", &steps_job_driver, NULL, qemu_get_aio_context(),
                      JOB_MANUAL_DISMISS, NULL, NULL, &error_abort);
}

static bool is_completed(Job *job)
{
    JOB_LOCK_GUARD();
    return job_is_completed_locked(job);
}

/*
 * The engine drains all, for a restore that is not the short one: a job comes
 * to rest then, and goes on afterwards. Catches one that waits for the end of
 * the section, while that waits for the job; and one that goes on.
 */
static void steps_job_drained(StepsJob *job, BlockBackend *blk,
                              SnapshotOverlaySlot *slot)
{
    const uint8_t data = 0;
    unsigned drained = 0;

    job_start(&job->common);
    while (!is_completed(&job->common)) {
        uint64_t current;

        bdrv_drain_all_begin();
        if (slot) {
            snapshot_overlay_restore(slot);
        }
        current = qatomic_read(&job->common.progress.current);
        for (int i = 0; i < 20; i++) {
            g_usleep(100);
            aio_poll(qemu_get_aio_context(), false);
        }
        g_assert_cmpint(qatomic_read(&job->common.progress.current), ==,
                         current);
        bdrv_drain_all_end();
        drained += current && current < DISK_SIZE;
        if (slot) {
            g_assert_cmpint(blk_pwrite(blk, 0, 1, &data, 0), ==, 0);
        }
        aio_poll(qemu_get_aio_context(), false);
    }
    g_assert_cmpuint(drained, >, 1);
}

static void steps_job_dismiss(StepsJob *job)
{
    Job *common = &job->common;

    JOB_LOCK_GUARD();
    g_assert_cmpint(common->ret, ==, 0);
    job_dismiss_locked(&common, &error_abort);
}

static void test_export_job(void)
{
    BlockBackend *blk;
    g_autofree uint8_t *content = NULL;
    SnapshotOverlaySlot *slot;
    StepsJob *job;
    Export *e;

    create_image(EXPORT_AREAS);
    content = g_malloc(DISK_SIZE);
    blk = open_blk(overlay_options(64 * MiB));
    for (int64_t i = 0; i < DISK_SIZE; i++) {
        content[i] = image_content[i] ^ 1;
    }
    g_assert_cmpint(blk_pwrite(blk, 0, DISK_SIZE, content, 0), ==, 0);
    slot = snapshot_overlay_save(blk_bs(blk));
    g_assert_cmpint(blk_pwrite_zeroes(blk, 0, DISK_SIZE, 0), ==, 0);

    job = steps_job_create();
    e = job->e = export_new(slot, content, DISK_SIZE, &job->common);
    job_progress_set_remaining(&job->common, e->bytes);
    steps_job_drained(job, blk, slot);
    steps_job_dismiss(job);
    check_content(e->filename, content, DISK_SIZE);
    g_assert_cmpint(g_unlink(e->filename), ==, 0);
    g_free(e->filename);
    g_free(e->content);
    g_free(e);
    snapshot_overlay_discard(slot);
    blk_unref(blk);
    create_image(1);
}

/* What is in memory, and copied by the thread pool for it */
static void test_commit_job(void)
{
    BlockBackend *blk;
    g_autofree uint8_t *content = NULL;
    g_autofree char *found = NULL;
    StepsJob *job;
    gsize length;

    create_image(EXPORT_AREAS);
    content = g_malloc(DISK_SIZE);
    memset(content, 3, DISK_SIZE);
    blk = open_blk(overlay_options(64 * MiB));
    g_assert_cmpint(blk_pwrite(blk, 0, DISK_SIZE, content, 0), ==, 0);

    job = steps_job_create();
    job->c = snapshot_overlay_commit_begin(blk_bs(blk), &job->common,
                                           &error_abort);
    job_progress_set_remaining(&job->common,
                               snapshot_overlay_commit_bytes(job->c));
    steps_job_drained(job, blk, NULL);
    snapshot_overlay_commit_end(job->c);
    steps_job_dismiss(job);
    blk_unref(blk);
    g_assert_true(g_file_get_contents(image, &found, &length, NULL));
    g_assert_cmpmem(found, length, content, DISK_SIZE);
    create_image(1);
}

/* A disk of more than clusters of 4 KiB can be addressed of */
static void test_export_large(void)
{
    QDict *options = qdict_new();
    g_autofree char *sparse = g_build_filename(dir, "sparse", NULL);
    uint8_t data[2 * CLUSTER];
    BlockBackend *blk;
    SnapshotOverlaySlot *slot;
    BlockDriverInfo bdi;
    int64_t size = 9 * TiB;
    Export *e;

    bdrv_img_create(sparse, "qcow2", NULL, NULL, NULL, size, 0, true,
                    &error_abort);
    qdict_put_str(options, "driver", "snapshot-overlay");
    qdict_put_str(options, "overlay-dir", dir);
    qdict_put_str(options, "file.driver", "qcow2");
    qdict_put_str(options, "file.file.filename", sparse);
    blk = open_blk(options);
    memset(data, 1, sizeof(data));
    /* Half of a cluster of the image, and nearly all of the disk zeroed */
    g_assert_cmpint(blk_pwrite(blk, size - CLUSTER, CLUSTER, data, 0), ==, 0);
    g_assert_cmpint(blk_pwrite(blk, 3 * CLUSTER, 2 * CLUSTER, data, 0), ==, 0);
    g_assert_cmpint(blk_pwrite_zeroes(blk, 5 * CLUSTER, size - 6 * CLUSTER,
                                      0), ==, 0);
    slot = snapshot_overlay_save(blk_bs(blk));
    e = export_new(slot, image_content, 0, NULL);
    g_assert_cmpint(export_all(e), ==, 0);
    snapshot_overlay_export_end(e->x);
    snapshot_overlay_discard(slot);
    blk_unref(blk);

    blk = blk_new_open(e->filename, NULL, NULL, 0, &error_abort);
    g_assert_cmpint(blk_getlength(blk), ==, size);
    bdrv_graph_rdlock_main_loop();
    g_assert_cmpint(bdrv_get_info(blk_bs(blk), &bdi), ==, 0);
    bdrv_graph_rdunlock_main_loop();
    g_assert_cmpint(bdi.cluster_size, ==, 2 * CLUSTER);
    for (int i = 0; i < 8; i++) {
        int64_t offset = i < 6 ? i * CLUSTER : size - (8 - i) * CLUSTER;

        g_assert_cmpint(blk_pread(blk, offset, CLUSTER, data, 0), ==, 0);
        g_assert_cmpint(data[0], ==, i == 3 || i == 4 || i == 7);
        g_assert_true(!memcmp(data, data + 1, CLUSTER - 1));
    }
    blk_unref(blk);
    g_assert_cmpint(g_unlink(e->filename), ==, 0);
    g_unlink(sparse);
    g_free(e->filename);
    g_free(e->content);
    g_free(e);
}
/* What opens the image must not be taken for what opens the overlay. */
static void test_filename(void)
{
    g_autofree char *name = g_strdup_printf("snapshot-overlay:%s", image);
    QDict *options = qdict_new();
    BlockBackend *blk;
    BlockDriverState *bs;

    qdict_put_str(options, "driver", "snapshot-overlay");
    qdict_put_str(options, "file.driver", "file");
    qdict_put_str(options, "file.filename", image);
    blk = blk_new_open(NULL, NULL, options, BDRV_O_RDWR, &error_abort);
    bdrv_graph_rdlock_main_loop();
    bdrv_refresh_filename(blk_bs(blk));
    bdrv_graph_rdunlock_main_loop();
    g_assert_true(g_str_has_prefix(blk_bs(blk)->filename, "json:"));
    g_assert_null(strstr(blk_bs(blk)->filename, "spill"));
    g_assert_nonnull(strstr(blk_bs(blk)->filename, "snapshot-overlay"));
    blk_unref(blk);

    options = qdict_new();
    qdict_put_str(options, "driver", "raw");
    blk = blk_new_open(name, NULL, options, BDRV_O_RDWR, &error_abort);
    bs = blk_bs(blk)->file->bs;
    g_assert_true(bdrv_is_snapshot_overlay(bs));
    g_assert_true(bdrv_is_read_only(bs->file->bs));
    blk_unref(blk);
}

/*
 * The content is not in any file: it cannot be handed to another process, nor
 * do internal snapshots of a node below have it, which is not written to for a
 * machine's state either.
 */
static void test_migrate(void)
{
    QDict *options = overlay_options(64 * MiB);
    BlockDriverState *bs;
    BlockBackend *blk, *below;
    uint8_t data[CLUSTER] = { 1 };
    g_autofree char *qcow2 = g_build_filename(dir, "qcow2", NULL);
    Error *err = NULL;

    bs = bdrv_open(NULL, NULL, options, BDRV_O_RDWR, &error_abort);
    g_assert_cmpint(bdrv_inactivate(bs, &error_abort), ==, 0);
    bdrv_graph_rdlock_main_loop();
    bdrv_activate(bs, &error_abort);
    bdrv_graph_rdunlock_main_loop();
    blk = blk_new_with_bs(bs, BLK_PERM_WRITE, BLK_PERM_ALL, &error_abort);
    g_assert_cmpint(blk_pwrite(blk, 0, CLUSTER, data, 0), ==, 0);
    blk_unref(blk);
    g_assert_cmpint(bdrv_inactivate(bs, &err), ==, -ENOTSUP);
    error_free_or_abort(&err);
    bdrv_unref(bs);

    bdrv_img_create(qcow2, "qcow2", NULL, NULL, NULL, 1 * MiB, 0, true,
                    &error_abort);
    options = qdict_new();
    qdict_put_str(options, "node-name", "below");
    qdict_put_str(options, "driver", "qcow2");
    below = blk_new_open(qcow2, NULL, options, BDRV_O_RDWR, &error_abort);
    options = qdict_new();
    qdict_put_str(options, "driver", "snapshot-overlay");
    qdict_put_str(options, "file", "below");
    blk_set_perm(below, 0, BLK_PERM_ALL, &error_abort);
    blk = open_blk(options);
    bdrv_graph_rdlock_main_loop();
    g_assert_true(bdrv_can_snapshot(blk_bs(below)));
    g_assert_false(bdrv_can_snapshot(blk_bs(blk)));
    bdrv_graph_rdunlock_main_loop();
    g_assert_cmpint(blk_save_vmstate(blk, data, 0, CLUSTER), ==, -ENOTSUP);
    blk_unref(blk);
    blk_unref(below);
    g_unlink(qcow2);
}

/*
 * Put an overlay under what uses a node already, in the main loop's context or
 * in an iothread's.
 */
static void test_insert(void)
{
    IOThread *iothread = iothread_new();
    uint8_t data[CLUSTER] = { 1 };
    Error *err = NULL;

    for (int in_iothread = 0; in_iothread < 2; in_iothread++) {
        BlockBackend *blk = open_image(&error_abort);
        BlockDriverState *below = blk_bs(blk), *bs;
        SnapshotOverlaySlot *slot;
        QDict *options = qdict_new();

        if (in_iothread) {
            blk_set_aio_context(blk, iothread_get_aio_context(iothread),
                                &error_abort);
        }

        /* One that cannot be made read-only stays what it is. */
        bdrv_enable_copy_on_read(below);
        g_assert_null(snapshot_overlay_insert(below, NULL, &err));
        error_free_or_abort(&err);
        bdrv_disable_copy_on_read(below);
        g_assert_true(blk_bs(blk) == below && !bdrv_is_read_only(below));
        g_assert_cmpint(blk_pwrite(blk, 0, CLUSTER, image_content, 0), ==, 0);

        below->detect_zeroes = BLOCKDEV_DETECT_ZEROES_OPTIONS_ON;
        qdict_put_str(options, "overlay-dir", dir);
        bs = snapshot_overlay_insert(below, options, &error_abort);
        g_assert_true(blk_bs(blk) == bs && bdrv_is_snapshot_overlay(bs));
        g_assert_false(bdrv_is_snapshot_overlay(below));
        g_assert_true(bdrv_is_read_only(below));
        g_assert_true(bdrv_get_aio_context(bs) == bdrv_get_aio_context(below));
        g_assert_cmpint(bs->detect_zeroes, ==,
                        BLOCKDEV_DETECT_ZEROES_OPTIONS_ON);
        g_assert_true(bs->open_flags & BDRV_O_UNMAP);
        bdrv_unref(bs);

        g_assert_cmpint(blk_pwrite(blk, 100, CLUSTER, data, 0), ==, 0);
        bdrv_drained_begin(bs);
        slot = snapshot_overlay_save(bs);
        bdrv_drained_end(bs);
        g_assert_cmpint(blk_pwrite(blk, 200, CLUSTER, data, 0), ==, 0);
        bdrv_drained_begin(bs);
        g_assert_cmpuint(snapshot_overlay_restore(slot), ==, 2);
        snapshot_overlay_discard(slot);
        bdrv_drained_end(bs);
        g_assert_cmpint(blk_pread(blk, 100, 1, data + 1, 0), ==, 0);
        g_assert_cmpint(data[1], ==, 1);
        data[1] = 0;
        if (in_iothread) {
            blk_set_aio_context(blk, qemu_get_aio_context(), &error_abort);
        }
        blk_unref(blk);
        check_image();
    }
    iothread_join(iothread);
}

/* What options cannot be is said, and nothing is left. */
static void test_options(void)
{
    static const struct {
        const char *option;
        const char *value;
    } wrong[] = {
        { "overlay-dir", "/nowhere/at/all" },
        { "overlay-size", "much" },
        { "file.file.filename", "/nowhere/at/all" },
        { "unknown", "1" },
    };

    for (int i = 0; i < ARRAY_SIZE(wrong); i++) {
        QDict *options = overlay_options(0);
        Error *err = NULL;

        qdict_put_str(options, wrong[i].option, wrong[i].value);
        g_assert_null(blk_new_open(NULL, NULL, options, BDRV_O_RDWR, &err));
        error_free_or_abort(&err);
    }
    g_assert_null(bdrv_next_node(NULL));
}

/* ---- Several threads ---- */

typedef struct Worker {
    BlockBackend *blk;
    uint32_t nr;                /* it has every second sector */
    uint8_t *content;
    bool done;
} Worker;

#define WORKER_SIZE     (64 * CLUSTER)
#define LONG_SIZE       (512 * KiB)     /* behind that */

/* Writes, zeroes and reads sectors, of clusters that another one uses too */
static void coroutine_fn worker(void *opaque)
{
    Worker *w = opaque;
    g_autoptr(GRand) rand = g_rand_new_with_seed(w->nr);
    uint8_t data[SECTOR];

    for (int i = 0; i < 20000; i++) {
        int64_t offset = g_rand_int_range(rand, 0, WORKER_SIZE / SECTOR / 2);

        offset = (2 * offset + w->nr) * SECTOR;
        switch (g_rand_int_range(rand, 0, 3)) {
        case 0:
            memset(w->content + offset, i, SECTOR);
            g_assert_cmpint(blk_co_pwrite(w->blk, offset, SECTOR,
                                          w->content + offset, 0), ==, 0);
            break;
        case 1:
            memset(w->content + offset, 0, SECTOR);
            g_assert_cmpint(blk_co_pwrite_zeroes(w->blk, offset, SECTOR, 0),
                            ==, 0);
            break;
        default:
            g_assert_cmpint(blk_co_pread(w->blk, offset, SECTOR, data, 0),
                            ==, 0);
            g_assert_cmpmem(data, SECTOR, w->content + offset, SECTOR);
            break;
        }
    }
    qatomic_set(&w->done, true);
    aio_wait_kick();
}

/*
 * Writes and reads what the thread pool copies, as another one does in the same
 * place: each sector is of one write.
 */
static void coroutine_fn long_worker(void *opaque)
{
    Worker *w = opaque;
    g_autoptr(GRand) rand = g_rand_new_with_seed(w->nr);
    g_autofree uint8_t *data = g_malloc(LONG_SIZE);

    for (int i = 0; i < 2000; i++) {
        bool is_short = g_rand_int_range(rand, 0, 4) == 0;
        int64_t offset = g_rand_int_range(rand, 0, LONG_SIZE / CLUSTER / 2) *
            CLUSTER;
        int64_t bytes = is_short ? CLUSTER : g_rand_int_range(
            rand, LONG_SIZE / CLUSTER / 2, (LONG_SIZE - offset) / CLUSTER + 1) *
            CLUSTER;

        if (g_rand_boolean(rand)) {
            memset(data, i, bytes);
            g_assert_cmpint(blk_co_pwrite(w->blk, WORKER_SIZE + offset, bytes,
                                          data, 0), ==, 0);
        } else {
            g_assert_cmpint(blk_co_pread(w->blk, WORKER_SIZE + offset, bytes,
                                         data, 0), ==, 0);
            for (int64_t j = 0; j < bytes; j += SECTOR) {
                g_assert_true(!memcmp(data + j, data + j + 1, SECTOR - 1));
            }
        }
    }
    qatomic_set(&w->done, true);
    aio_wait_kick();
}

/*
 * As iothread-vq-mapping has it, and a slot is exported meanwhile. Catches what
 * is not protected by the lock, or lets go of it while it is needed, and data
 * of a slot that is changed.
 */
static void test_threads(void)
{
    for (int in_file = 0; in_file < 2; in_file++) {
        BlockBackend *blk = open_blk(overlay_options(in_file ? 0 : 1 * GiB));
        IOThread *threads[4];
        Worker workers[4];
        g_autofree uint8_t *saved = g_memdup2(image_content, DISK_SIZE);
        SnapshotOverlaySlot *slot;
        unsigned exported = 0;
        bool done;

        /* What the workers write to all the time */
        memset(saved + SECTOR, 7, WORKER_SIZE + LONG_SIZE - SECTOR);
        g_assert_cmpint(blk_pwrite(blk, SECTOR, WORKER_SIZE + LONG_SIZE -
                                   SECTOR, saved + SECTOR, 0), ==, 0);
        slot = snapshot_overlay_save(blk_bs(blk));
        for (int i = 0; i < ARRAY_SIZE(workers); i++) {
            threads[i] = iothread_new();
            workers[i] = (Worker) {
                .blk = blk,
                .nr = i,
                .content = g_memdup2(saved, WORKER_SIZE),
            };
            aio_co_enter(iothread_get_aio_context(threads[i]),
                         qemu_coroutine_create(i < 2 ? worker : long_worker,
                                               &workers[i]));
        }
        do {
            Export *e = export_new(slot, saved, DISK_SIZE, NULL);

            g_assert_cmpint(export_all(e), ==, 0);
            export_free(e);
            exported++;
            done = true;
            for (int i = 0; i < ARRAY_SIZE(workers); i++) {
                done = done && qatomic_read(&workers[i].done);
            }
        } while (!done);
        g_assert_cmpuint(exported, >, 0);
        for (int i = 0; i < ARRAY_SIZE(workers); i++) {
            iothread_join(threads[i]);
            g_free(workers[i].content);
        }
        blk_drain(blk);
        snapshot_overlay_restore(slot);
        snapshot_overlay_discard(slot);
        blk_unref(blk);
    }
    check_image();
}

/* ---- How long it takes ("-m perf") ---- */

static int compare_times(const void *a, const void *b)
{
    return *(int64_t *)a < *(int64_t *)b ? -1 : *(int64_t *)a > *(int64_t *)b;
}

static void perf_done(void *opaque, int ret)
{
    *(int *)opaque = ret;
}

/* Medians, for a machine that has other things to do */
#define ROUNDS 51

static void test_perf(void)
{
    static const int counts[] = { 1, 10, 100, 1000, 10000 };
    g_autoptr(GRand) rand = g_rand_new_with_seed(4);
    uint8_t *data = qemu_memalign(CLUSTER, 1 * MiB);
    QDict *options = qdict_new();
    SnapshotOverlaySlot *slot, *other;
    QEMUIOVector qiov;
    BlockBackend *blk;
    int64_t t, clusters = 4 * GiB / CLUSTER;

    memset(data, 1, 1 * MiB);
    qdict_put_str(options, "driver", "snapshot-overlay");
    qdict_put_str(options, "overlay-dir", dir);
    qdict_put_str(options, "file.driver", "null-co");
    qdict_put_int(options, "file.size", clusters * CLUSTER);
    blk = open_blk(options);
    /* Content of the slot's own, so that restores give back clusters */
    for (int i = 0; i < 128; i++) {
        blk_pwrite(blk, i * 4 * MiB, 1 * MiB, data, 0);
    }
    slot = snapshot_overlay_save(blk_bs(blk));

    for (int scattered = 0; scattered < 2; scattered++) {
        for (int i = 0; i < ARRAY_SIZE(counts); i++) {
            int64_t write[ROUNDS], restore[ROUNDS];

            for (int j = 0; j < ROUNDS; j++) {
                int64_t start = g_rand_int(rand) % clusters;

                t = get_clock();
                for (int k = 0; k < counts[i]; k++) {
                    int64_t c = scattered ? g_rand_int(rand) : start + k;

                    blk_pwrite(blk, c % clusters * CLUSTER, CLUSTER, data, 0);
                }
                write[j] = get_clock() - t;
                t = get_clock();
                snapshot_overlay_restore(slot);
                restore[j] = get_clock() - t;
            }
            qsort(write, ROUNDS, sizeof(*write), compare_times);
            qsort(restore, ROUNDS, sizeof(*restore), compare_times);
            g_test_message("%5d clusters %s: write %" PRIi64 " ns each, "
                           "restore %" PRIi64 " ns in all, %.1f ns each",
                           counts[i], scattered ? "scattered" : "in a row",
                           write[ROUNDS / 2] / counts[i], restore[ROUNDS / 2],
                           (double)restore[ROUNDS / 2] / counts[i]);
        }
    }

    t = get_clock();
    for (int i = 0; i < 1000000; i++) {
        snapshot_overlay_restore(slot);
    }
    g_test_message("nothing written: restore %.1f ns",
                   (get_clock() - t) / 1e6);

    for (int i = 0; i < 10000; i++) {
        blk_pwrite(blk, (int64_t)i * 5 * CLUSTER, CLUSTER, data, 0);
    }
    t = get_clock();
    other = snapshot_overlay_save(blk_bs(blk));
    g_test_message("10000 clusters: save %.1f ns each",
                   (get_clock() - t) / 1e4);
    t = get_clock();
    for (int i = 0; i < 100; i++) {
        snapshot_overlay_restore(i % 2 ? other : slot);
    }
    g_test_message("10000 clusters differ: from slot to slot %.1f ns each",
                   (get_clock() - t) / 1e6);
    snapshot_overlay_discard(slot);
    snapshot_overlay_discard(other);

    for (int mode = 0; mode < 3; mode++) {
        t = get_clock();
        for (int i = 0; i < 1024; i++) {
            if (mode == 2) {
                blk_pread(blk, i * MiB, 1 * MiB, data, 0);
            } else {
                blk_pwrite(blk, i % 512 * MiB, 1 * MiB, data, 0);
            }
        }
        g_test_message("1 MiB %s: %.2f GB/s", mode == 2 ? "reads" :
                       mode == 1 ? "writes again" : "writes",
                       1024.0 * MiB / (get_clock() - t));
    }
    /* As a guest has it that has no pages in a row */
    qemu_iovec_init(&qiov, 256);
    for (int i = 0; i < 256; i++) {
        qemu_iovec_add(&qiov, data + i * CLUSTER, CLUSTER);
    }
    for (int mode = 0; mode < 2; mode++) {
        t = get_clock();
        for (int i = 0; i < 1024; i++) {
            int ret = -EINPROGRESS;

            if (mode == 0) {
                blk_aio_preadv(blk, i % 512 * MiB, &qiov, 0, perf_done, &ret);
            } else {
                blk_aio_pwritev(blk, i % 512 * MiB, &qiov, 0, perf_done, &ret);
            }
            BDRV_POLL_WHILE(blk_bs(blk), ret == -EINPROGRESS);
        }
        g_test_message("1 MiB %s, of 256 pieces: %.2f GB/s",
                       mode ? "writes" : "reads",
                       1024.0 * MiB / (get_clock() - t));
    }
    qemu_iovec_destroy(&qiov);

    blk_unref(blk);
    qemu_vfree(data);
}

/* Into $TMPDIR; compare with dd of as many bytes, oflag=direct */
static void test_perf_export(void)
{
    static const int rows[] = { 1, 4, 16, 64, 256 };
    const int64_t size = 8 * GiB, clusters = 256 * MiB / CLUSTER;
    g_autofree char *sparse = g_build_filename(dir, "sparse", NULL);
    g_autoptr(GRand) rand = g_rand_new_with_seed(4);
    g_autofree uint8_t *data = g_malloc(CLUSTER);

    bdrv_img_create(sparse, "raw", NULL, NULL, NULL, size, 0, true,
                    &error_abort);
    for (int i = 0; i < ARRAY_SIZE(rows); i++) {
        QDict *options = overlay_options(1 * GiB);
        int64_t t[4], bytes, c = 0;
        SnapshotOverlaySlot *slot;
        BlockBackend *blk;
        struct stat st;
        Export *e;

        qdict_put_str(options, "file.file.filename", sparse);
        blk = open_blk(options);
        for (int64_t j = 0; j < clusters; j++) {
            c = j % rows[i] ? c + 1 :
                g_rand_int(rand) % (size / CLUSTER / rows[i]) * rows[i];
            for (int k = 0; k < CLUSTER; k += 4) {
                stl_he_p(data + k, g_rand_int(rand));
            }
            g_assert_cmpint(blk_pwrite(blk, c * CLUSTER, CLUSTER, data, 0),
                            ==, 0);
        }
        slot = snapshot_overlay_save(blk_bs(blk));
        t[0] = get_clock();
        e = export_new(slot, data, 0, NULL);
        bytes = e->bytes;
        t[1] = get_clock();
        g_assert_cmpint(export_all(e), ==, 0);
        t[2] = get_clock();
        snapshot_overlay_export_end(e->x);
        t[3] = get_clock();
        g_assert_cmpint(stat(e->filename, &st), ==, 0);
        g_test_message("export of %" PRIi64 " MiB, %d clusters in a row: begin "
                       "%.1f ms, %.0f MB/s, end %.1f ms; the file has %" PRIi64
                       " MiB", bytes / MiB, rows[i], (t[1] - t[0]) / 1e6,
                       bytes * 1e3 / (t[2] - t[1]), (t[3] - t[2]) / 1e6,
                       (int64_t)st.st_size / MiB);
        snapshot_overlay_discard(slot);
        blk_unref(blk);
        g_assert_cmpint(g_unlink(e->filename), ==, 0);
        g_free(e->filename);
        g_free(e->content);
        g_free(e);
    }
    g_unlink(sparse);
}

int main(int argc, char **argv)
{
    int ret;

    bdrv_init();
    qemu_init_main_loop(&error_abort);
    g_test_init(&argc, &argv, NULL);

    dir = g_dir_make_tmp("test-snapshot-overlay-XXXXXX", NULL);
    g_assert_nonnull(dir);
    image = g_build_filename(dir, "image", NULL);
    create_image(1);

    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        g_test_add_data_func(cases[i].name, &cases[i], test_model);
    }
    g_test_add_func("/snapshot-overlay/no-space", test_no_space);
    g_test_add_func("/snapshot-overlay/commit/no-space", test_commit_no_space);
    g_test_add_func("/snapshot-overlay/commit/job", test_commit_job);
    g_test_add_func("/snapshot-overlay/commit/kept", test_commit_kept);
    g_test_add_func("/snapshot-overlay/commit/discarded",
                    test_commit_discarded);
    g_test_add_func("/snapshot-overlay/commit/refused", test_commit_refused);
    g_test_add_func("/snapshot-overlay/export/refused", test_export_refused);
    g_test_add_func("/snapshot-overlay/export/names", test_export_names);
    g_test_add_func("/snapshot-overlay/export/no-space", test_export_no_space);
    g_test_add_func("/snapshot-overlay/export/discarded",
                    test_export_discarded);
    g_test_add_func("/snapshot-overlay/export/job", test_export_job);
    g_test_add_func("/snapshot-overlay/export/large", test_export_large);
    g_test_add_func("/snapshot-overlay/flat", test_flat);
    g_test_add_func("/snapshot-overlay/given-back", test_given_back);
    g_test_add_func("/snapshot-overlay/large", test_large);
    g_test_add_func("/snapshot-overlay/closed", test_closed);
    g_test_add_func("/snapshot-overlay/bitmap", test_bitmap);
    g_test_add_func("/snapshot-overlay/share", test_share);
    g_test_add_func("/snapshot-overlay/filename", test_filename);
    g_test_add_func("/snapshot-overlay/migrate", test_migrate);
    g_test_add_func("/snapshot-overlay/insert", test_insert);
    g_test_add_func("/snapshot-overlay/options", test_options);
    g_test_add_func("/snapshot-overlay/threads", test_threads);
    if (g_test_perf()) {
        g_test_add_func("/snapshot-overlay/perf", test_perf);
        g_test_add_func("/snapshot-overlay/perf-export", test_perf_export);
    }

    ret = g_test_run();
    g_unlink(image);
    g_assert_cmpint(g_rmdir(dir), ==, 0);
    g_free(dir);
    g_free(image);
    g_free(image_content);
    return ret;
}
