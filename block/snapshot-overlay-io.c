/*
 * snapshot-overlay: requests, and the file for what finds no room in memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/host-utils.h"
#include "qemu/iov.h"
#include "qemu/units.h"
#include "block/block-io.h"
#include "block/thread-pool.h"
#include "snapshot-overlay-int.h"

/* What is written between less than this is read from below, not skipped */
#define GAP_SECTORS     (64 * KiB / BDRV_SECTOR_SIZE)

/*
 * So much is copied by the thread pool, as it would read or write the image: in
 * the main loop, vCPUs would wait for the BQL.  With that, reads of 1 MiB had
 * 0.78 of the image's throughput, now 0.9 (scripts/bench --only throughput).
 */
#define POOL_BYTES      (128 * KiB)

/* No more are copied in one go, so that a request needs no memory for that. */
#define COPY_CLUSTERS   (1 * MiB / CLUSTER_SIZE)

/* The file becomes longer by this. */
#define SPILL_CLUSTERS  (1 * MiB / CLUSTER_SIZE)

/*
 * How far a request has come in its vector, so that what is copied by clusters
 * is not looked for from the beginning each time.
 */
typedef struct Cursor {
    QEMUIOVector *qiov;
    size_t offset;              /* in @qiov */
    struct iovec *iov;          /* the element that this is in, */
    unsigned niov;              /* how many there are from it on, */
    size_t skip;                /* and the offset in it */
} Cursor;

static void cursor_advance(Cursor *cursor, size_t bytes)
{
    cursor->offset += bytes;
    cursor->skip += bytes;
    while (cursor->niov && cursor->skip >= cursor->iov->iov_len) {
        cursor->skip -= cursor->iov->iov_len;
        cursor->iov++;
        cursor->niov--;
    }
}

static void cursor_init(Cursor *cursor, QEMUIOVector *qiov, size_t offset)
{
    *cursor = (Cursor) {
        .qiov = qiov,
        .iov = qiov->iov,
        .niov = qiov->niov,
    };
    cursor_advance(cursor, offset);
}

static void cursor_read(const Cursor *cursor, void *buf, size_t bytes)
{
    iov_to_buf(cursor->iov, cursor->niov, cursor->skip, buf, bytes);
}

static void cursor_write(const Cursor *cursor, const void *buf, size_t bytes)
{
    iov_from_buf(cursor->iov, cursor->niov, cursor->skip, buf, bytes);
}

/*
 * ---- Clusters that are busy ----
 *
 * Nobody else changes them: their data is not freed, and used for others, while
 * it is read or written without s->lock.
 */

static void set_busy(BDRVSnapshotOverlayState *s, uint64_t cluster, uint64_t n)
{
    for (uint64_t i = cluster; i < cluster + n; i++) {
        find(s->areas, cluster_key(i))->busy = true;
    }
}

static void coroutine_fn set_idle(BDRVSnapshotOverlayState *s,
                                  uint64_t cluster, uint64_t n)
{
    for (uint64_t i = cluster; i < cluster + n; i++) {
        find(s->areas, cluster_key(i))->busy = false;
    }
    qemu_co_queue_restart_all(&s->waiting);
}

/* ---- The file ---- */

/* That the file cannot grow is no space for the guest, whatever limits it. */
static int file_error(int ret)
{
    return ret == -EFBIG || ret == -EDQUOT ? -ENOSPC : ret;
}

/*
 * Space is allocated before it is written to, for file systems that find out
 * late that there is none.
 */
static int coroutine_fn GRAPH_RDLOCK grow_file(BDRVSnapshotOverlayState *s)
{
    uint64_t old = s->file_clusters;
    uint64_t new = old + SPILL_CLUSTERS;
    int ret = 0;

    qemu_mutex_unlock(&s->lock);
    qemu_co_mutex_lock(&s->growing);
    /* Only changes with @growing held */
    if (s->file_clusters == old) {
        ret = bdrv_co_truncate(s->spill, new * CLUSTER_SIZE, true,
                               PREALLOC_MODE_FALLOC, 0, NULL);
        if (ret == 0) {
            qemu_mutex_lock(&s->lock);
            s->in_use = bitmap_zero_extend(s->in_use, old, new);
            s->file_clusters = new;
            s->hint = old;
            qemu_mutex_unlock(&s->lock);
        }
    }
    qemu_co_mutex_unlock(&s->growing);
    qemu_mutex_lock(&s->lock);
    return file_error(ret);
}

/*
 * Find room for up to @want clusters, in one piece.  s->lock is held, but not
 * all the time.  Returns how many, or a negative error.
 */
static int64_t coroutine_fn GRAPH_RDLOCK
alloc_in_file(BDRVSnapshotOverlayState *s, uint64_t want,
                      int64_t *offset)
{
    uint64_t start, end;

    while (s->spilled == s->file_clusters) {
        int ret = grow_file(s);

        if (ret < 0) {
            return ret;
        }
    }
    start = find_next_zero_bit(s->in_use, s->file_clusters, s->hint);
    if (start == s->file_clusters) {
        start = find_first_zero_bit(s->in_use, s->file_clusters);
    }
    end = find_next_bit(s->in_use, MIN(start + want, s->file_clusters), start);
    bitmap_set(s->in_use, start, end - start);
    s->spilled += end - start;
    s->hint = end;
    *offset = start * CLUSTER_SIZE;
    return end - start;
}

/*
 * Read at @sector, which is in the file as @c says, and what follows it there,
 * up to @end.  Returns how many sectors; 0: look again; or a negative error.
 */
static int64_t coroutine_fn GRAPH_RDLOCK
read_file(BDRVSnapshotOverlayState *s, uint64_t sector, uint64_t end,
          Cluster *c, const Cursor *to)
{
    uint64_t first = sector / CLUSTER_SECTORS;
    bool kept = c->kept;
    int64_t offset = c->offset;
    uint64_t done, clusters = 0;
    Cluster *next;
    Where where;
    int ret;

    if (c->busy) {
        qemu_co_queue_wait(&s->waiting, &s->lock);
        return 0;
    }

    done = overlay_next_run(s->areas, sector, end, &where, &next);
    for (;;) {
        clusters++;
        if (sector + done == end || (sector + done) % CLUSTER_SECTORS) {
            break;
        }
        uint64_t n = overlay_next_run(s->areas, sector + done, end, &where,
                                      &next);

        if (where != HERE || !next->in_file || next->busy ||
            next->kept != kept ||
            next->offset != offset + clusters * CLUSTER_SIZE) {
            break;
        }
        done += n;
    }

    /* What is kept stays where it is while there are requests. */
    if (!kept) {
        set_busy(s, first, clusters);
    }
    qemu_mutex_unlock(&s->lock);
    ret = bdrv_co_preadv_part(s->spill, offset +
                              sector % CLUSTER_SECTORS * BDRV_SECTOR_SIZE,
                              done * BDRV_SECTOR_SIZE, to->qiov, to->offset,
                              0);
    qemu_mutex_lock(&s->lock);
    if (!kept) {
        set_idle(s, first, clusters);
    }
    return ret < 0 ? ret : done;
}

/*
 * Write whole clusters, for which there is no room in memory.  @cluster is not
 * busy; it and those behind it, @max at most, go to one place in the file,
 * where it may be already.  Returns how many, or a negative error.
 */
static int64_t coroutine_fn GRAPH_RDLOCK
write_file(BDRVSnapshotOverlayState *s, uint64_t cluster, uint64_t max,
           const Cursor *from)
{
    Cluster *c = find(s->areas, cluster_key(cluster));
    bool in_place = c->valid && !is_shared(s, c);
    int64_t offset = c->offset;
    uint64_t n;
    int64_t ret;

    assert(!in_place || c->in_file);
    for (n = 1; n < max; n++) {
        c = overlay_find_or_create(
            &s->areas[(cluster + n) / AREA_CLUSTERS].clusters, cluster + n);
        if (!c || c->busy) {
            break;
        }
        if (c->valid && !is_shared(s, c)) {
            if (!in_place || !c->in_file ||
                c->offset != offset + n * CLUSTER_SIZE) {
                break;
            }
        } else if (in_place) {
            break;
        }
    }

    set_busy(s, cluster, n);
    ret = n;
    if (!in_place) {
        ret = alloc_in_file(s, n, &offset);
    }
    if (ret > 0) {
        uint64_t clusters = ret;

        qemu_mutex_unlock(&s->lock);
        ret = bdrv_co_pwritev_part(s->spill, offset, clusters * CLUSTER_SIZE,
                                   from->qiov, from->offset, 0);
        qemu_mutex_lock(&s->lock);
        for (uint64_t i = 0; i < clusters; i++) {
            Cluster new = {
                .offset = offset + i * CLUSTER_SIZE,
                .valid = ALL_SECTORS,
                .in_file = true,
            };
            uint64_t key = cluster_key(cluster + i);

            if (ret == 0) {
                overlay_change(s, key, find(s->areas, key), &new);
            } else if (!in_place) {
                overlay_free_in_file(s, new.offset);
            }
        }
        ret = ret < 0 ? file_error(ret) : clusters;
    }
    set_idle(s, cluster, n);
    return ret;
}

int coroutine_fn GRAPH_RDLOCK
overlay_store(BDRVSnapshotOverlayState *s, Cluster *c, const uint8_t *data)
{
    int64_t ret;

    c->data = overlay_alloc_data(s);
    c->in_file = !c->data;
    if (c->data) {
        memcpy(c->data, data, CLUSTER_SIZE);
        return 0;
    }
    ret = alloc_in_file(s, 1, &c->offset);
    if (ret < 0) {
        return ret;
    }
    qemu_mutex_unlock(&s->lock);
    ret = bdrv_co_pwrite(s->spill, c->offset, CLUSTER_SIZE, data, 0);
    qemu_mutex_lock(&s->lock);
    if (ret < 0) {
        overlay_free_in_file(s, c->offset);
    }
    return file_error(ret);
}

/*
 * Change part of a cluster, to @new but for the place, which is to be found.
 * What it has of valid sectors that stay is here already, or in the file; those
 * in @mask are @bytes of @from, if that is not NULL.
 */
static int coroutine_fn GRAPH_RDLOCK
merge_file(BDRVSnapshotOverlayState *s, uint64_t cluster, uint8_t mask,
           Cluster new, Cursor *from, size_t bytes)
{
    uint64_t key = cluster_key(cluster);
    Cluster *c = find(s->areas, key);
    uint8_t first = ctz32(mask);
    g_autofree uint8_t *buf = NULL;
    int64_t ret = 0;

    set_busy(s, cluster, 1);

    if (c->valid && c->in_file && !is_shared(s, c)) {
        new.in_file = true;
        new.offset = c->offset;
        qemu_mutex_unlock(&s->lock);
        ret = bdrv_co_pwritev_part(s->spill,
                                   new.offset + first * BDRV_SECTOR_SIZE,
                                   bytes, from->qiov, from->offset, 0);
        qemu_mutex_lock(&s->lock);
        goto out;
    }

    buf = g_malloc0(CLUSTER_SIZE);
    if (new.valid & ~mask) {
        if (c->in_file) {
            qemu_mutex_unlock(&s->lock);
            ret = bdrv_co_pread(s->spill, c->offset, CLUSTER_SIZE, buf, 0);
            qemu_mutex_lock(&s->lock);
            if (ret < 0) {
                goto out;
            }
        } else {
            memcpy(buf, c->data, CLUSTER_SIZE);
        }
    }
    if (from) {
        cursor_read(from, buf + first * BDRV_SECTOR_SIZE, bytes);
    }

    ret = overlay_store(s, &new, buf);
out:
    if (ret >= 0) {
        overlay_change(s, key, c, &new);
    }
    set_idle(s, cluster, 1);
    return ret < 0 ? file_error(ret) : 0;
}

/* ---- Memory ---- */

/* What is copied between a request and clusters that follow one another */
typedef struct Copy {
    Cursor cursor;
    size_t bytes;
    size_t skip;                /* of the first cluster */
    bool is_write;
    uint8_t *data[COPY_CLUSTERS];
} Copy;

static int copy_data(void *opaque)
{
    Copy *copy = opaque;
    size_t skip = copy->skip, done, n;
    uint8_t **data = copy->data;

    for (done = 0; done < copy->bytes; done += n, skip = 0, data++) {
        n = MIN(CLUSTER_SIZE - skip, copy->bytes - done);
        if (copy->is_write) {
            cursor_read(&copy->cursor, *data + skip, n);
        } else {
            cursor_write(&copy->cursor, *data + skip, n);
        }
        cursor_advance(&copy->cursor, n);
    }
    return 0;
}

/*
 * Copy to or from the @n clusters at @cluster, which are not busy.  s->lock is
 * held, but not all the time.
 */
static void coroutine_fn copy_clusters(BDRVSnapshotOverlayState *s, Copy *copy,
                                       uint64_t cluster, uint64_t n)
{
    if (copy->bytes < POOL_BYTES) {
        copy_data(copy);
        return;
    }
    set_busy(s, cluster, n);
    qemu_mutex_unlock(&s->lock);
    thread_pool_submit_co(copy_data, copy);
    qemu_mutex_lock(&s->lock);
    set_idle(s, cluster, n);
}

/*
 * Read at @sector, which is in memory and not busy, and what follows it there,
 * up to @end.  Returns how many sectors.
 */
static uint64_t coroutine_fn
read_memory(BDRVSnapshotOverlayState *s, uint64_t sector, uint64_t end,
            const Cursor *to)
{
    uint64_t first = sector / CLUSTER_SECTORS, n = 0, done = 0;
    Copy copy = {
        .cursor = *to,
        .skip = sector % CLUSTER_SECTORS * BDRV_SECTOR_SIZE,
    };

    do {
        Cluster *c;
        Where where;
        uint64_t more = overlay_next_run(s->areas, sector + done, end, &where,
                                         &c);

        /* Kept ones are never busy: they are read one by one. */
        if (where != HERE || c->in_file || c->busy || (n && c->kept)) {
            break;
        }
        copy.data[n++] = c->data;
        done += more;
        if (c->kept) {
            break;
        }
    } while (n < COPY_CLUSTERS && sector + done < end &&
             (sector + done) % CLUSTER_SECTORS == 0);

    copy.bytes = done * BDRV_SECTOR_SIZE;
    copy_clusters(s, &copy, first, n);
    return done;
}

/*
 * Write whole clusters at @sector, if there are enough for the thread pool, as
 * long as there is room in memory.  Returns how many sectors, or 0.
 */
static uint64_t coroutine_fn
write_memory(BDRVSnapshotOverlayState *s, uint64_t sector, uint64_t end,
             const Cursor *from)
{
    uint64_t first = sector / CLUSTER_SECTORS, n;
    uint64_t max = MIN((end - sector) / CLUSTER_SECTORS, COPY_CLUSTERS);
    Copy copy = { .cursor = *from, .is_write = true };

    if (sector % CLUSTER_SECTORS || max * CLUSTER_SIZE < POOL_BYTES) {
        return 0;
    }
    for (n = 0; n < max; n++) {
        Cluster *c = overlay_find_or_create(
            &s->areas[(first + n) / AREA_CLUSTERS].clusters, first + n);

        if (!c || c->busy) {
            break;
        }
        copy.data[n] = c->valid && !c->in_file && !is_shared(s, c) ? c->data :
            overlay_alloc_data(s);
        if (!copy.data[n]) {
            break;
        }
    }
    copy.bytes = n * CLUSTER_SIZE;
    copy_clusters(s, &copy, first, n);
    for (uint64_t i = 0; i < n; i++) {
        const Cluster new = { .data = copy.data[i], .valid = ALL_SECTORS };
        uint64_t key = cluster_key(first + i);

        overlay_change(s, key, find(s->areas, key), &new);
    }
    return n * CLUSTER_SECTORS;
}

/* ---- Requests ---- */

/*
 * What of [@sector, @end) has to be read from below next.  Short pieces that
 * need not are part of it, and to be overwritten.
 */
static bool next_below(BDRVSnapshotOverlayState *s, uint64_t sector,
                       uint64_t end, uint64_t *start, uint64_t *stop)
{
    bool found = false;
    Cluster *c;
    Where where;
    uint64_t n;

    QEMU_LOCK_GUARD(&s->lock);
    for (; sector < end; sector += n) {
        n = overlay_next_run(s->areas, sector, end, &where, &c);
        if (where == BELOW) {
            if (!found) {
                *start = sector;
                found = true;
            }
            *stop = sector + n;
        } else if (found && sector + n - *stop > GAP_SECTORS) {
            break;
        }
    }
    return found;
}

int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_preadv_part(BlockDriverState *bs, int64_t offset,
                                int64_t bytes, QEMUIOVector *qiov,
                                size_t qiov_offset, BdrvRequestFlags flags)
{
    BDRVSnapshotOverlayState *s = bs->opaque;
    uint64_t first = offset / BDRV_SECTOR_SIZE;
    uint64_t end = first + bytes / BDRV_SECTOR_SIZE;
    uint64_t sector, start, stop;
    Cursor to;
    int64_t ret = 0;

    for (sector = first; next_below(s, sector, end, &start, &stop);
         sector = stop) {
        ret = bdrv_co_preadv_part(bs->file, start * BDRV_SECTOR_SIZE,
                                  (stop - start) * BDRV_SECTOR_SIZE, qiov,
                                  qiov_offset +
                                  (start - first) * BDRV_SECTOR_SIZE, flags);
        if (ret < 0) {
            return ret;
        }
    }

    cursor_init(&to, qiov, qiov_offset);
    qemu_mutex_lock(&s->lock);
    for (sector = first; sector < end; sector += ret) {
        Cluster *c;
        Where where;

        ret = overlay_next_run(s->areas, sector, end, &where, &c);
        if (where == ZERO) {
            iov_memset(to.iov, to.niov, to.skip, 0, ret * BDRV_SECTOR_SIZE);
        } else if (where == HERE && c->in_file) {
            ret = read_file(s, sector, end, c, &to);
            if (ret < 0) {
                break;
            }
        } else if (where == HERE && c->busy) {
            qemu_co_queue_wait(&s->waiting, &s->lock);
            ret = 0;
        } else if (where == HERE) {
            ret = read_memory(s, sector, end, &to);
        }
        cursor_advance(&to, ret * BDRV_SECTOR_SIZE);
    }
    qemu_mutex_unlock(&s->lock);
    return ret < 0 ? ret : 0;
}

static void coroutine_fn zero_area(BDRVSnapshotOverlayState *s, uint64_t n)
{
    static const Cluster zeroed = { .zero = ALL_SECTORS };
    static const Cluster nothing;
    Area *area = &s->areas[n];

    /* First, so that nothing reads as below meanwhile */
    if (!area->whole.zero) {
        overlay_change(s, area_key(n), &area->whole, &zeroed);
    }
    for (int i = 0; area->clusters && i < AREA_CLUSTERS; i++) {
        Cluster *c = &area->clusters[i];

        while (c->busy) {
            qemu_co_queue_wait(&s->waiting, &s->lock);
        }
        if (!is_below(c)) {
            overlay_change(s, cluster_key(n * AREA_CLUSTERS + i), c, &nothing);
        }
    }
}

/*
 * Write to the cluster that @sector is in, or zero there if @from is NULL, up
 * to @end at most, and to clusters behind it if that can be done in one piece.
 * Returns how many sectors; 0: try again; or a negative error.
 */
static int64_t coroutine_fn GRAPH_RDLOCK
write_cluster(BDRVSnapshotOverlayState *s, uint64_t sector, uint64_t end,
              Cursor *from)
{
    uint64_t cluster = sector / CLUSTER_SECTORS;
    unsigned first = sector % CLUSTER_SECTORS;
    unsigned n = MIN(CLUSTER_SECTORS - first, end - sector);
    uint8_t mask = ((1 << n) - 1) << first;
    size_t bytes = n * BDRV_SECTOR_SIZE;
    Cluster **clusters = &s->areas[cluster / AREA_CLUSTERS].clusters;
    Cluster new, *c = overlay_find_or_create(clusters, cluster);
    uint8_t stays;
    int64_t ret;

    if (!c) {
        return -ENOMEM;
    }
    if (c->busy) {
        qemu_co_queue_wait(&s->waiting, &s->lock);
        return 0;
    }

    if (sector + n == s->sectors) {
        /* What is behind the end need not stay. */
        mask |= ALL_SECTORS << first;
    }
    stays = c->valid & ~mask;
    new = *c;
    new.valid = stays;
    new.zero = c->zero & ~mask;
    if (from) {
        new.valid |= mask;
    } else if (!s->areas[cluster / AREA_CLUSTERS].whole.zero) {
        new.zero |= mask;
    }

    if (!new.valid) {
        goto done;
    }

    if (c->valid && !is_shared(s, c)) {
        if (!from) {
            goto done;
        }
        if (!c->in_file) {
            goto copy;
        }
        if (stays) {
            goto file;
        }
    } else if (stays && c->in_file) {
        goto file;
    }

    new.data = overlay_alloc_data(s);
    if (!new.data) {
        if (from && n == CLUSTER_SECTORS) {
            ret = write_file(s, cluster, (end - sector) / CLUSTER_SECTORS,
                             from);
            return ret < 0 ? ret : ret * CLUSTER_SECTORS;
        }
        goto file;
    }
    new.in_file = false;
    if (stays) {
        memcpy(new.data, c->data, CLUSTER_SIZE);
    }

copy:
    if (from) {
        cursor_read(from, new.data + first * BDRV_SECTOR_SIZE, bytes);
    }
done:
    overlay_change(s, cluster_key(cluster), c, &new);
    return n;

file:
    ret = merge_file(s, cluster, mask, new, from, bytes);
    return ret < 0 ? ret : n;
}

static int coroutine_fn GRAPH_RDLOCK
write_or_zero(BlockDriverState *bs, int64_t offset, int64_t bytes,
              Cursor *from)
{
    BDRVSnapshotOverlayState *s = bs->opaque;
    uint64_t first = offset / BDRV_SECTOR_SIZE;
    uint64_t end = first + bytes / BDRV_SECTOR_SIZE;
    uint64_t sector;
    int64_t n = 0;

    qemu_mutex_lock(&s->lock);
    for (sector = first; sector < end; sector += n) {
        uint64_t area_end = MIN(sector + AREA_SECTORS, s->sectors);

        if (!from && sector % AREA_SECTORS == 0 && end >= area_end) {
            zero_area(s, sector / AREA_SECTORS);
            n = area_end - sector;
        } else {
            n = from ? write_memory(s, sector, end, from) : 0;
            if (!n) {
                n = write_cluster(s, sector, end, from);
            }
            if (n < 0) {
                break;
            }
        }
        if (from) {
            cursor_advance(from, n * BDRV_SECTOR_SIZE);
        }
    }
    qemu_mutex_unlock(&s->lock);
    return n < 0 ? n : 0;
}

int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_pwritev_part(BlockDriverState *bs, int64_t offset,
                                 int64_t bytes, QEMUIOVector *qiov,
                                 size_t qiov_offset, BdrvRequestFlags flags)
{
    Cursor from;

    cursor_init(&from, qiov, qiov_offset);
    return write_or_zero(bs, offset, bytes, &from);
}

int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset,
                                  int64_t bytes, BdrvRequestFlags flags)
{
    return write_or_zero(bs, offset, bytes, NULL);
}

/* What was discarded reads as zeroes: the same each time, and it needs least */
int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_pdiscard(BlockDriverState *bs, int64_t offset,
                             int64_t bytes)
{
    if (!QEMU_IS_ALIGNED(offset | bytes, BDRV_SECTOR_SIZE)) {
        return -ENOTSUP;
    }
    return write_or_zero(bs, offset, bytes, NULL);
}

/* What is lost with the process need not be on the disk. */
int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_flush(BlockDriverState *bs)
{
    return 0;
}

/*
 * The node below may have a backing file. That it has not allocated something
 * itself would be taken for an answer, as this one has no backing file to ask.
 */
static int coroutine_fn GRAPH_RDLOCK
status_below(BlockDriverState *bs, int64_t offset, int64_t bytes,
             int64_t *pnum, int64_t *map, BlockDriverState **file)
{
    int ret = bdrv_co_block_status_above(bs->file->bs, NULL, offset, bytes,
                                         pnum, map, file);

    if (ret < 0) {
        return ret;
    }
    ret &= BDRV_BLOCK_DATA | BDRV_BLOCK_ZERO | BDRV_BLOCK_OFFSET_VALID;
    if (*pnum < BDRV_SECTOR_SIZE) {
        /* Not the same in all of the sector: a file may end there */
        *pnum = BDRV_SECTOR_SIZE;
        return BDRV_BLOCK_DATA;
    }
    *pnum = QEMU_ALIGN_DOWN(*pnum, BDRV_SECTOR_SIZE);
    return ret & (BDRV_BLOCK_DATA | BDRV_BLOCK_ZERO) ? ret :
        ret | BDRV_BLOCK_DATA;
}

int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_block_status(BlockDriverState *bs, bool want_zero,
                                 int64_t offset, int64_t bytes, int64_t *pnum,
                                 int64_t *map, BlockDriverState **file)
{
    BDRVSnapshotOverlayState *s = bs->opaque;
    uint64_t first = offset / BDRV_SECTOR_SIZE;
    uint64_t end = first + bytes / BDRV_SECTOR_SIZE;
    uint64_t sector = first, n;
    Where where, next;
    Cluster *c;

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        n = overlay_next_run(s->areas, sector, end, &where, &c);
        do {
            sector += n;
            if (sector == end) {
                break;
            }
            n = overlay_next_run(s->areas, sector, end, &next, &c);
        } while (next == where);
    }

    *pnum = (sector - first) * BDRV_SECTOR_SIZE;
    if (where == BELOW) {
        return status_below(bs, offset, *pnum, pnum, map, file);
    }
    return where == ZERO ? BDRV_BLOCK_ZERO : BDRV_BLOCK_DATA;
}
