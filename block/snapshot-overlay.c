/*
 * snapshot-overlay: what is written stays in memory, and can be put back
 *
 * The node below is only read.  What is written is kept by clusters of 4 KiB,
 * of which each sector is known to be here, to be zeroes, or to be as below, so
 * that a write never has to read.  Clusters that find no room in memory are in
 * a file that has no name.
 *
 * A slot is the content at the time of a save.  Only the present content is
 * kept as a whole.  Next to it is the slot that was saved or restored last,
 * the base, whose log has each cluster that changed since, as it was then.  All
 * other slots hang on to the base, as a tree: the log of each has what differs
 * from its parent.  To restore a slot, the logs on the way to it are exchanged
 * with the present content, one after another; what they hold then leads back
 * to the parents, so that these edges of the tree turn round.  Each version of
 * a cluster is in one place only, the present content or one log, so nothing
 * has to be counted.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/host-utils.h"
#include "qemu/iov.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "block/block-io.h"
#include "block/block_int.h"
#include "block/qdict.h"
#include "block/snapshot-overlay.h"

#define OPT_SIZE "overlay-size"
#define OPT_DIR  "overlay-dir"
/* As blkdebug has it: the image of a filename with our prefix */
#define OPT_IMAGE "x-image"

#define CLUSTER_SIZE    4096
#define CLUSTER_SECTORS (CLUSTER_SIZE / BDRV_SECTOR_SIZE)
#define ALL_SECTORS     0xff
#define AREA_CLUSTERS   512
#define AREA_SECTORS    (AREA_CLUSTERS * CLUSTER_SECTORS)

/* What is written between less than this is read from below, not skipped */
#define GAP_SECTORS     (64 * KiB / BDRV_SECTOR_SIZE)

/* The file becomes longer by this. */
#define SPILL_CLUSTERS  (1 * MiB / CLUSTER_SIZE)

/*
 * What is known of a cluster, or by default of all in an area.  All zeroes: it
 * is as below.  A sector is never both valid and zero.
 */
typedef struct Cluster {
    union {
        uint8_t *data;          /* if some sector is valid and !in_file */
        int64_t offset;         /* in the file, if some is valid and in_file */
    };
    uint8_t valid;              /* bit n: sector n is here */
    uint8_t zero;               /* bit n: sector n is zeroes */
    bool in_file;
    /* Only of the present content: */
    bool logged;                /* the base's log has what this was */
    bool busy;                  /* its data in the file is read or written */
    bool marked;                /* by merge_logs() */
} Cluster;

QEMU_BUILD_BUG_ON(CLUSTER_SECTORS != 8);
QEMU_BUILD_BUG_ON(sizeof(Cluster) != 16);

/*
 * A sector that its cluster says nothing of is as @whole has it: then ranges
 * of any length can be zeroed without a Cluster for each of theirs.
 */
typedef struct Area {
    Cluster whole;              /* no sector is valid; zero: all or none */
    Cluster *clusters;          /* AREA_CLUSTERS, or NULL: nothing is known */
} Area;

typedef struct Change {
    uint64_t key;               /* see cluster_key(), area_key() */
    Cluster was;
} Change;

struct SnapshotOverlaySlot {
    BlockDriverState *bs;       /* NULL once the node was closed */
    bool discarded;             /* but needed, as several hang on to it */
    GArray *log;                /* of Change: what differs from @parent */
    SnapshotOverlaySlot *parent;    /* NULL: this is the base */
    QLIST_HEAD(, SnapshotOverlaySlot) children;
    QLIST_ENTRY(SnapshotOverlaySlot) sibling;
    QLIST_ENTRY(SnapshotOverlaySlot) next;
};

typedef struct BDRVSnapshotOverlayState {
    BdrvChild *spill;           /* the file */
    uint64_t sectors;           /* length of the node */
    uint64_t max_data;          /* clusters in memory, at most */

    /*
     * Requests run in any number of threads.  This protects all that follows.
     * It is not held while a coroutine waits.
     */
    QemuMutex lock;
    Area *areas;
    GPtrArray *spare;           /* data that is not in use */
    uint64_t data;              /* clusters in memory, with those in @spare */
    uint64_t clusters;          /* of the present content: not as below */
    uint64_t zeroed;            /* the same, of areas */
    CoQueue waiting;            /* for a cluster that is busy */

    CoMutex growing;            /* held while the file becomes longer */
    unsigned long *in_use;      /* of the file, by clusters */
    uint64_t file_clusters;
    uint64_t spilled;           /* bits set in @in_use */
    uint64_t hint;              /* where to look for one that is not */

    SnapshotOverlaySlot *base;
    QLIST_HEAD(, SnapshotOverlaySlot) slots;
    uint64_t nr_slots;          /* without those discarded */
} BDRVSnapshotOverlayState;

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

static void cursor_read(Cursor *cursor, void *buf, size_t bytes)
{
    iov_to_buf(cursor->iov, cursor->niov, cursor->skip, buf, bytes);
}

/* ---- Clusters and their versions; all with s->lock held ---- */

static uint64_t cluster_key(uint64_t cluster)
{
    return cluster << 1;
}

static uint64_t area_key(uint64_t area)
{
    return area << 1 | 1;
}

/* Only for keys of what has been changed once, so that there is a Cluster. */
static Cluster *find(BDRVSnapshotOverlayState *s, uint64_t key)
{
    uint64_t n = key >> 1;

    if (key & 1) {
        return &s->areas[n].whole;
    }
    return &s->areas[n / AREA_CLUSTERS].clusters[n % AREA_CLUSTERS];
}

/* Returns NULL if there is no memory. */
static Cluster *find_or_create(BDRVSnapshotOverlayState *s, uint64_t cluster)
{
    Area *area = &s->areas[cluster / AREA_CLUSTERS];

    if (!area->clusters) {
        area->clusters = g_try_new0(Cluster, AREA_CLUSTERS);
        if (!area->clusters) {
            return NULL;
        }
    }
    return &area->clusters[cluster % AREA_CLUSTERS];
}

static bool is_below(const Cluster *c)
{
    return !c->valid && !c->zero;
}

/* Whether a slot needs @c as it is, since it has not changed since the save. */
static bool is_shared(BDRVSnapshotOverlayState *s, const Cluster *c)
{
    return s->base && !c->logged;
}

/* Returns NULL if there is no room. */
static uint8_t *alloc_data(BDRVSnapshotOverlayState *s)
{
    uint8_t *data;

    if (s->spare->len) {
        return g_ptr_array_remove_index_fast(s->spare, s->spare->len - 1);
    }
    if (s->data >= s->max_data) {
        return NULL;
    }
    data = g_try_malloc(CLUSTER_SIZE);
    if (data) {
        s->data++;
    }
    return data;
}

static void free_in_file(BDRVSnapshotOverlayState *s, int64_t offset)
{
    clear_bit(offset / CLUSTER_SIZE, s->in_use);
    s->spilled--;
}

static void free_version(BDRVSnapshotOverlayState *s, const Cluster *c)
{
    if (!c->valid) {
        return;
    }
    if (c->in_file) {
        free_in_file(s, c->offset);
    } else {
        g_ptr_array_add(s->spare, c->data);
    }
}

static bool is_same_place(const Cluster *a, const Cluster *b)
{
    return a->valid && b->valid && a->in_file == b->in_file &&
        (a->in_file ? a->offset == b->offset : a->data == b->data);
}

static void set_version(BDRVSnapshotOverlayState *s, uint64_t key, Cluster *c,
                        const Cluster *version)
{
    uint64_t *count = key & 1 ? &s->zeroed : &s->clusters;
    Cluster old = *c;

    *count += is_below(&old) - is_below(version);
    *c = *version;
    c->logged = old.logged;
    c->busy = old.busy;
    c->marked = old.marked;
}

/* Change the present content, whatever slots need of it being kept. */
static void change(BDRVSnapshotOverlayState *s, uint64_t key, Cluster *c,
                   const Cluster *version)
{
    if (is_shared(s, c)) {
        Change entry = { .key = key, .was = *c };

        g_array_append_val(s->base->log, entry);
        c->logged = true;
    } else if (!is_same_place(c, version)) {
        free_version(s, c);
    }
    set_version(s, key, c, version);
}

typedef enum { BELOW, ZERO, HERE } Where;

/*
 * How many sectors from @sector on are of the same kind, as far as that can be
 * told at a glance, and which: up to the end of the cluster, or of the area.
 */
static uint64_t next_run(BDRVSnapshotOverlayState *s, uint64_t sector,
                         uint64_t end, Where *where, Cluster **cluster)
{
    Area *area = &s->areas[sector / AREA_SECTORS];
    unsigned first = sector % CLUSTER_SECTORS;
    uint64_t n;
    Cluster *c;

    *where = area->whole.zero ? ZERO : BELOW;
    *cluster = NULL;
    if (!area->clusters) {
        n = AREA_SECTORS - sector % AREA_SECTORS;
    } else {
        c = &area->clusters[sector / CLUSTER_SECTORS % AREA_CLUSTERS];
        *cluster = c;
        if (c->valid >> first & 1) {
            *where = HERE;
            n = cto32(c->valid >> first);
        } else if (c->zero >> first & 1) {
            *where = ZERO;
            n = cto32(c->zero >> first);
        } else {
            n = MIN(ctz32((c->valid | c->zero) >> first),
                    CLUSTER_SECTORS - first);
        }
    }
    return MIN(n, end - sector);
}

/* ---- The file ---- */

/*
 * Nobody else touches clusters that are busy: their data in the file is not
 * freed, and used for others, while it is read or written.
 */
static void set_busy(BDRVSnapshotOverlayState *s, uint64_t cluster, uint64_t n)
{
    for (uint64_t i = cluster; i < cluster + n; i++) {
        find(s, cluster_key(i))->busy = true;
    }
}

static void coroutine_fn set_idle(BDRVSnapshotOverlayState *s,
                                  uint64_t cluster, uint64_t n)
{
    for (uint64_t i = cluster; i < cluster + n; i++) {
        find(s, cluster_key(i))->busy = false;
    }
    qemu_co_queue_restart_all(&s->waiting);
}

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
alloc_in_file(BDRVSnapshotOverlayState *s, uint64_t want, int64_t *offset)
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
 * Read at @sector, which is in the file, and what follows it there, up to @end.
 * Returns how many sectors; 0: look again; or a negative error.
 */
static int64_t coroutine_fn GRAPH_RDLOCK
read_file(BDRVSnapshotOverlayState *s, uint64_t sector, uint64_t end,
          const Cursor *to)
{
    uint64_t first = sector / CLUSTER_SECTORS;
    Cluster *c = find(s, cluster_key(first));
    int64_t offset = c->offset;
    uint64_t done, clusters = 0;
    Cluster *next = c;
    Where where;
    int ret;

    if (c->busy) {
        qemu_co_queue_wait(&s->waiting, &s->lock);
        return 0;
    }

    done = next_run(s, sector, end, &where, &next);
    for (;;) {
        clusters++;
        if (sector + done == end || (sector + done) % CLUSTER_SECTORS) {
            break;
        }
        uint64_t n = next_run(s, sector + done, end, &where, &next);

        if (where != HERE || !next->in_file || next->busy ||
            next->offset != offset + clusters * CLUSTER_SIZE) {
            break;
        }
        done += n;
    }

    set_busy(s, first, clusters);
    qemu_mutex_unlock(&s->lock);
    ret = bdrv_co_preadv_part(s->spill, offset +
                              sector % CLUSTER_SECTORS * BDRV_SECTOR_SIZE,
                              done * BDRV_SECTOR_SIZE, to->qiov, to->offset,
                              0);
    qemu_mutex_lock(&s->lock);
    set_idle(s, first, clusters);
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
    Cluster *c = find(s, cluster_key(cluster));
    bool in_place = c->valid && !is_shared(s, c);
    int64_t offset = c->offset;
    uint64_t n;
    int64_t ret;

    assert(!in_place || c->in_file);
    for (n = 1; n < max; n++) {
        c = find_or_create(s, cluster + n);
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
                change(s, key, find(s, key), &new);
            } else if (!in_place) {
                free_in_file(s, new.offset);
            }
        }
        ret = ret < 0 ? file_error(ret) : clusters;
    }
    set_idle(s, cluster, n);
    return ret;
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
    Cluster *c = find(s, key);
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

    new.data = alloc_data(s);
    new.in_file = !new.data;
    if (new.data) {
        memcpy(new.data, buf, CLUSTER_SIZE);
        goto out;
    }
    ret = alloc_in_file(s, 1, &new.offset);
    if (ret < 0) {
        goto out;
    }
    qemu_mutex_unlock(&s->lock);
    ret = bdrv_co_pwrite(s->spill, new.offset, CLUSTER_SIZE, buf, 0);
    qemu_mutex_lock(&s->lock);
    if (ret < 0) {
        free_in_file(s, new.offset);
    }

out:
    if (ret >= 0) {
        change(s, key, c, &new);
    }
    set_idle(s, cluster, 1);
    return ret < 0 ? file_error(ret) : 0;
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
        n = next_run(s, sector, end, &where, &c);
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

static int coroutine_fn GRAPH_RDLOCK
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

        ret = next_run(s, sector, end, &where, &c);
        if (where == ZERO) {
            iov_memset(to.iov, to.niov, to.skip, 0, ret * BDRV_SECTOR_SIZE);
        } else if (where == HERE && c->in_file) {
            ret = read_file(s, sector, end, &to);
            if (ret < 0) {
                break;
            }
        } else if (where == HERE) {
            iov_from_buf(to.iov, to.niov, to.skip, c->data +
                         sector % CLUSTER_SECTORS * BDRV_SECTOR_SIZE,
                         ret * BDRV_SECTOR_SIZE);
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
        change(s, area_key(n), &area->whole, &zeroed);
    }
    for (int i = 0; area->clusters && i < AREA_CLUSTERS; i++) {
        Cluster *c = &area->clusters[i];

        while (c->busy) {
            qemu_co_queue_wait(&s->waiting, &s->lock);
        }
        if (!is_below(c)) {
            change(s, cluster_key(n * AREA_CLUSTERS + i), c, &nothing);
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
    Cluster new, *c = find_or_create(s, cluster);
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

    new.data = alloc_data(s);
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
    change(s, cluster_key(cluster), c, &new);
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
            n = write_cluster(s, sector, end, from);
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

static int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_pwritev_part(BlockDriverState *bs, int64_t offset,
                                 int64_t bytes, QEMUIOVector *qiov,
                                 size_t qiov_offset, BdrvRequestFlags flags)
{
    Cursor from;

    cursor_init(&from, qiov, qiov_offset);
    return write_or_zero(bs, offset, bytes, &from);
}

static int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset,
                                  int64_t bytes, BdrvRequestFlags flags)
{
    return write_or_zero(bs, offset, bytes, NULL);
}

/* What was discarded reads as zeroes: the same each time, and it needs least */
static int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_pdiscard(BlockDriverState *bs, int64_t offset,
                             int64_t bytes)
{
    if (!QEMU_IS_ALIGNED(offset | bytes, BDRV_SECTOR_SIZE)) {
        return -ENOTSUP;
    }
    return write_or_zero(bs, offset, bytes, NULL);
}

/* What is lost with the process need not be on the disk. */
static int coroutine_fn GRAPH_RDLOCK
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

static int coroutine_fn GRAPH_RDLOCK
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
        n = next_run(s, sector, end, &where, &c);
        do {
            sector += n;
            if (sector == end) {
                break;
            }
            n = next_run(s, sector, end, &next, &c);
        } while (next == where);
    }

    *pnum = (sector - first) * BDRV_SECTOR_SIZE;
    if (where == BELOW) {
        return status_below(bs, offset, *pnum, pnum, map, file);
    }
    return where == ZERO ? BDRV_BLOCK_ZERO : BDRV_BLOCK_DATA;
}

static int64_t coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_getlength(BlockDriverState *bs)
{
    BDRVSnapshotOverlayState *s = bs->opaque;

    return s->sectors * BDRV_SECTOR_SIZE;
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

/* ---- Slots ---- */

static BlockDriver bdrv_snapshot_overlay;

bool bdrv_is_snapshot_overlay(BlockDriverState *bs)
{
    return bs->drv == &bdrv_snapshot_overlay;
}

/* With nothing in flight, s->lock only orders this with what was. */
static BDRVSnapshotOverlayState *idle_state(BlockDriverState *bs)
{
    GLOBAL_STATE_CODE();
    assert(bdrv_is_snapshot_overlay(bs));
    assert(!qatomic_read(&bs->in_flight));
    return bs->opaque;
}

static void attach_slot(SnapshotOverlaySlot *slot, SnapshotOverlaySlot *parent)
{
    slot->parent = parent;
    if (parent) {
        QLIST_INSERT_HEAD(&parent->children, slot, sibling);
    }
}

static void detach_slot(SnapshotOverlaySlot *slot)
{
    if (slot->parent) {
        QLIST_REMOVE(slot, sibling);
        slot->parent = NULL;
    }
}

static Change *log_entry(SnapshotOverlaySlot *slot, guint i)
{
    return &g_array_index(slot->log, Change, i);
}

static void free_log(BDRVSnapshotOverlayState *s, SnapshotOverlaySlot *slot)
{
    for (guint i = 0; i < slot->log->len; i++) {
        free_version(s, &log_entry(slot, i)->was);
    }
    g_array_set_size(slot->log, 0);
}

/* Those of the base's log: the present content has them changed since. */
static void set_logged(BDRVSnapshotOverlayState *s, SnapshotOverlaySlot *slot,
                       bool logged)
{
    for (guint i = 0; i < slot->log->len; i++) {
        find(s, log_entry(slot, i)->key)->logged = logged;
    }
}

static void free_slot(BDRVSnapshotOverlayState *s, SnapshotOverlaySlot *slot)
{
    QLIST_REMOVE(slot, next);
    g_array_unref(slot->log);
    g_free(slot);
}

/*
 * Let @child's log, which has what differs from @slot, have what differs from
 * the parent of @slot.  The log of @slot is empty then.
 */
static void merge_logs(BDRVSnapshotOverlayState *s, SnapshotOverlaySlot *child,
                       SnapshotOverlaySlot *slot)
{
    guint own = child->log->len;

    for (guint i = 0; i < own; i++) {
        find(s, log_entry(child, i)->key)->marked = true;
    }
    for (guint i = 0; i < slot->log->len; i++) {
        Change *entry = log_entry(slot, i);

        if (find(s, entry->key)->marked) {
            free_version(s, &entry->was);
        } else {
            g_array_append_val(child->log, *entry);
        }
    }
    for (guint i = 0; i < own; i++) {
        find(s, log_entry(child, i)->key)->marked = false;
    }
    g_array_set_size(slot->log, 0);
}

/* A slot that was discarded goes when at most one hangs on to it. */
static void remove_if_unused(BDRVSnapshotOverlayState *s,
                             SnapshotOverlaySlot *slot)
{
    while (slot && slot->discarded) {
        SnapshotOverlaySlot *child = QLIST_FIRST(&slot->children);
        SnapshotOverlaySlot *parent = slot->parent;

        if (child && QLIST_NEXT(child, sibling)) {
            return;
        }
        if (child) {
            merge_logs(s, child, slot);
            detach_slot(child);
            attach_slot(child, parent);
        } else if (!parent) {
            set_logged(s, slot, false);
        }
        if (!parent) {
            s->base = child;
            if (child) {
                set_logged(s, child, true);
            }
        }
        free_log(s, slot);
        detach_slot(slot);
        free_slot(s, slot);
        /* It may have lost its last but one. */
        slot = child ? NULL : parent;
    }
}

/* No slot needs what is here now: make it that of the base again. */
static void undo_changes(BlockDriverState *bs)
{
    BDRVSnapshotOverlayState *s = bs->opaque;
    GArray *log = s->base->log;

    for (guint i = 0; i < log->len; i++) {
        Change *entry = log_entry(s->base, i);
        Cluster *c = find(s, entry->key);

        free_version(s, c);
        set_version(s, entry->key, c, &entry->was);
        c->logged = false;
    }
    g_array_set_size(log, 0);
}

/* Go from the base to a slot that hangs on to it. */
static void move_base(BDRVSnapshotOverlayState *s, SnapshotOverlaySlot *slot)
{
    SnapshotOverlaySlot *base = s->base;
    GArray *log = base->log;

    assert(slot->parent == base && !log->len);
    for (guint i = 0; i < slot->log->len; i++) {
        Change *entry = log_entry(slot, i);
        Cluster *c = find(s, entry->key);
        Cluster version = entry->was;

        entry->was = *c;
        set_version(s, entry->key, c, &version);
    }
    base->log = slot->log;
    slot->log = log;
    detach_slot(slot);
    attach_slot(base, slot);
    s->base = slot;
}

static void set_dirty(BlockDriverState *bs, SnapshotOverlaySlot *slot)
{
    if (QLIST_EMPTY(&bs->dirty_bitmaps)) {
        return;
    }
    for (guint i = 0; i < slot->log->len; i++) {
        uint64_t key = log_entry(slot, i)->key;
        int64_t size = key & 1 ? AREA_CLUSTERS * CLUSTER_SIZE : CLUSTER_SIZE;
        int64_t offset = (key >> 1) * size;

        bdrv_set_dirty(bs, offset, MIN(size, bs->total_sectors *
                                       BDRV_SECTOR_SIZE - offset));
    }
}

SnapshotOverlaySlot *snapshot_overlay_save(BlockDriverState *bs)
{
    BDRVSnapshotOverlayState *s = idle_state(bs);
    SnapshotOverlaySlot *slot = g_new0(SnapshotOverlaySlot, 1);

    QEMU_LOCK_GUARD(&s->lock);
    slot->bs = bs;
    slot->log = g_array_new(false, false, sizeof(Change));
    QLIST_INSERT_HEAD(&s->slots, slot, next);
    s->nr_slots++;
    if (s->base) {
        set_logged(s, s->base, false);
        attach_slot(s->base, slot);
    }
    s->base = slot;
    return slot;
}

BlockDriverState *snapshot_overlay_slot_bs(SnapshotOverlaySlot *slot)
{
    GLOBAL_STATE_CODE();
    return slot->bs;
}

uint64_t snapshot_overlay_restore(SnapshotOverlaySlot *slot)
{
    BlockDriverState *bs = slot->bs;
    BDRVSnapshotOverlayState *s = idle_state(bs);
    SnapshotOverlaySlot *old = s->base;
    uint64_t n;

    QEMU_LOCK_GUARD(&s->lock);
    n = s->base->log->len;
    set_dirty(bs, s->base);
    undo_changes(bs);
    while (s->base != slot) {
        SnapshotOverlaySlot *next = slot;

        while (next->parent != s->base) {
            next = next->parent;
        }
        n += next->log->len;
        set_dirty(bs, next);
        move_base(s, next);
    }
    /* On the way to the old base are those that less hang on to now. */
    while (old && old != slot) {
        SnapshotOverlaySlot *next = old->parent;

        remove_if_unused(s, old);
        old = next;
    }
    return n;
}

static void free_spare(BDRVSnapshotOverlayState *s)
{
    s->data -= s->spare->len;
    for (guint i = 0; i < s->spare->len; i++) {
        g_free(g_ptr_array_index(s->spare, i));
    }
    g_ptr_array_set_size(s->spare, 0);
}

void snapshot_overlay_discard(SnapshotOverlaySlot *slot)
{
    BDRVSnapshotOverlayState *s;

    GLOBAL_STATE_CODE();
    if (!slot->bs) {
        g_free(slot);
        return;
    }

    s = idle_state(slot->bs);
    QEMU_LOCK_GUARD(&s->lock);
    slot->discarded = true;
    s->nr_slots--;
    remove_if_unused(s, slot);
    if (!s->base) {
        free_spare(s);
    }
}

void snapshot_overlay_query(BlockDriverState *bs,
                            BlockStatsSpecificSnapshotOverlay *stats)
{
    BDRVSnapshotOverlayState *s = bs->opaque;

    assert(bdrv_is_snapshot_overlay(bs));
    QEMU_LOCK_GUARD(&s->lock);
    *stats = (BlockStatsSpecificSnapshotOverlay) {
        .clusters = s->clusters,
        .zeroed_areas = s->zeroed,
        .slots = s->nr_slots,
        .memory_bytes = (s->data - s->spare->len) * CLUSTER_SIZE,
        .spilled_bytes = s->spilled * CLUSTER_SIZE,
    };
}

static BlockStatsSpecific *
snapshot_overlay_get_specific_stats(BlockDriverState *bs)
{
    BlockStatsSpecific *stats = g_new0(BlockStatsSpecific, 1);

    stats->driver = BLOCKDEV_DRIVER_SNAPSHOT_OVERLAY;
    snapshot_overlay_query(bs, &stats->u.snapshot_overlay);
    return stats;
}

/* ---- The node ---- */

static bool has_content(BDRVSnapshotOverlayState *s)
{
    QEMU_LOCK_GUARD(&s->lock);
    return s->clusters || s->zeroed;
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
    uint64_t areas = DIV_ROUND_UP(s->sectors, AREA_SECTORS);
    SnapshotOverlaySlot *slot, *next;

    GLOBAL_STATE_CODE();
    QLIST_FOREACH_SAFE(slot, &s->slots, next, next) {
        free_log(s, slot);
        g_array_unref(slot->log);
        slot->bs = NULL;
        if (slot->discarded) {
            g_free(slot);
        }
    }
    for (uint64_t i = 0; s->areas && i < areas; i++) {
        Area *area = &s->areas[i];

        for (int j = 0; area->clusters && j < AREA_CLUSTERS; j++) {
            free_version(s, &area->clusters[j]);
        }
        g_free(area->clusters);
    }
    free_spare(s);
    g_ptr_array_unref(s->spare);
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

BlockDriverState *snapshot_overlay_insert(BlockDriverState *bs, QDict *options,
                                          Error **errp)
{
    BlockDriverState *overlay;
    bool was_read_only = bdrv_is_read_only(bs);
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

    ret = was_read_only ? 0 : bdrv_reopen_set_read_only(bs, true, errp);
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
};

static void bdrv_snapshot_overlay_init(void)
{
    bdrv_register(&bdrv_snapshot_overlay);
}

block_init(bdrv_snapshot_overlay_init);
