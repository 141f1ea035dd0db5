/*
 * snapshot-overlay: what its files have in common
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_SNAPSHOT_OVERLAY_INT_H
#define BLOCK_SNAPSHOT_OVERLAY_INT_H

#include "block/block_int.h"
#include "block/snapshot-overlay.h"
#include "system/block-backend-global-state.h"

#define CLUSTER_SIZE    4096
#define CLUSTER_SECTORS (CLUSTER_SIZE / BDRV_SECTOR_SIZE)
#define ALL_SECTORS     0xff
#define AREA_CLUSTERS   512
#define AREA_SECTORS    (AREA_CLUSTERS * CLUSTER_SECTORS)

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
    bool kept;                  /* what was below, see Area */
    /* Only of the present content: */
    bool logged;                /* the base's log has what this was */
    bool busy;                  /* its data is read or written with no lock */
    bool marked;                /* by merge_logs(); if kept: by this commit */
    bool changed;               /* since a commit: it may differ from below */
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

    /*
     * What the node below had before a commit changed it, whole clusters: this
     * is what "as below" means in all versions, where it is known.
     */
    Cluster *kept;              /* AREA_CLUSTERS, or NULL: nothing is known */
} Area;

typedef struct Change {
    uint64_t key;               /* see cluster_key(), area_key() */
    Cluster was;
} Change;

struct SnapshotOverlaySlot {
    BlockDriverState *bs;       /* NULL once the node was closed */
    bool discarded;             /* but needed: several hang on to it, or held */
    unsigned held;              /* by exports */
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
    bool committing;            /* somebody may write to the node below */
    bool committed;             /* what is not Cluster.changed is below, too */

    /*
     * Requests run in any number of threads.  This protects all that follows,
     * but for data of clusters that are busy.  It is not held while a coroutine
     * waits.
     */
    QemuMutex lock;
    Area *areas;
    GPtrArray *chunks;          /* of memory, which data is in */
    GPtrArray *spare;           /* data that is not in use */
    guint emptied;              /* the first so many: the host has them back */
    uint64_t data;              /* clusters in memory, with those in @spare */
    uint64_t clusters;          /* of the present content: not as below */
    uint64_t zeroed;            /* the same, of areas */
    uint64_t kept;              /* clusters that a commit has changed below */
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

static inline uint64_t cluster_key(uint64_t cluster)
{
    return cluster << 1;
}

static inline uint64_t area_key(uint64_t area)
{
    return area << 1 | 1;
}

/* Only for keys of what has been changed once, so that there is a Cluster. */
static inline Cluster *find(Area *areas, uint64_t key)
{
    uint64_t n = key >> 1;

    if (key & 1) {
        return &areas[n].whole;
    }
    return &areas[n / AREA_CLUSTERS].clusters[n % AREA_CLUSTERS];
}

static inline bool is_below(const Cluster *c)
{
    return !c->valid && !c->zero;
}

/* Whether a slot needs @c as it is, since it has not changed since the save. */
static inline bool is_shared(BDRVSnapshotOverlayState *s, const Cluster *c)
{
    return s->base && !c->logged;
}

typedef enum { BELOW, ZERO, HERE } Where;

/*
 * snapshot-overlay-slots.c: all with s->lock held, unless they say otherwise or
 * are given areas that are not those of the state
 */

/**
 * overlay_find_or_create: what one of an area's tables has of a cluster
 * @clusters: the table, which is made if there is none
 *
 * Returns: %NULL if there is no memory
 */
Cluster *overlay_find_or_create(Cluster **clusters, uint64_t cluster);

/** overlay_alloc_data: returns %NULL if there is no room in memory */
uint8_t *overlay_alloc_data(BDRVSnapshotOverlayState *s);

void overlay_free_in_file(BDRVSnapshotOverlayState *s, int64_t offset);

/** overlay_free_version: free the data of a cluster, wherever it is */
void overlay_free_version(BDRVSnapshotOverlayState *s, const Cluster *c);

/**
 * overlay_change: change the present content
 *
 * What slots need of @c as it is stays for them.
 */
void overlay_change(BDRVSnapshotOverlayState *s, uint64_t key, Cluster *c,
                    const Cluster *version);

/**
 * overlay_next_run: what a sector is, and how many from it on are the same
 * @areas: those of the present content, or of a slot's
 * @where: set to what they are
 * @cluster: set to what is known of the cluster, %NULL: nothing
 *
 * Returns: how many, as far as that can be told at a glance: up to the end of
 * the cluster, or if it is BELOW of the area, or @end
 */
uint64_t overlay_next_run(const Area *areas, uint64_t sector, uint64_t end,
                          Where *where, Cluster **cluster);

/**
 * overlay_forget: let all be as below, and give all memory back
 *
 * There are no slots, or they are closed, and no requests.
 */
void overlay_forget(BDRVSnapshotOverlayState *s);

/**
 * overlay_hold_slot: keep what a slot has, though it be discarded
 *
 * Takes s->lock, and time for all that is in memory.  There may be requests.
 * The node must not be closed, nor committed, until overlay_release_slot().
 *
 * Returns: what the slot has, as the state's areas have the present content;
 * for overlay_free_areas().  Data stays where this says that it is, and does
 * not change, so that it can be read without s->lock.  %NULL if there is no
 * memory, and the slot is not held.
 */
Area *overlay_hold_slot(SnapshotOverlaySlot *slot);

/**
 * overlay_release_slot: undo overlay_hold_slot()
 *
 * Takes s->lock.  If the slot was discarded, this is what frees it, and there
 * must be no requests.
 */
void overlay_release_slot(SnapshotOverlaySlot *slot);

/** overlay_free_areas: free what overlay_hold_slot() returned */
void overlay_free_areas(BDRVSnapshotOverlayState *s, Area *areas);

/**
 * overlay_set_committed: the node below has the present content now
 *
 * When the last slot goes, so does what did not change since.
 */
void overlay_set_committed(BDRVSnapshotOverlayState *s);

/** overlay_close_slots: the node is closed; slots stay until discarded */
void overlay_close_slots(BDRVSnapshotOverlayState *s);

/* snapshot-overlay-io.c: the file, and callbacks of the driver */

/**
 * overlay_store: put a whole cluster in memory, or in the file if there is no
 * room
 * @c: of which the place is set
 *
 * s->lock is held, but not all the time.
 *
 * Returns: 0, or a negative error
 */
int coroutine_fn GRAPH_RDLOCK
overlay_store(BDRVSnapshotOverlayState *s, Cluster *c, const uint8_t *data);

int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_preadv_part(BlockDriverState *bs, int64_t offset,
                                int64_t bytes, QEMUIOVector *qiov,
                                size_t qiov_offset, BdrvRequestFlags flags);
int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_pwritev_part(BlockDriverState *bs, int64_t offset,
                                 int64_t bytes, QEMUIOVector *qiov,
                                 size_t qiov_offset, BdrvRequestFlags flags);
int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset,
                                  int64_t bytes, BdrvRequestFlags flags);
int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_pdiscard(BlockDriverState *bs, int64_t offset,
                             int64_t bytes);
int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_flush(BlockDriverState *bs);
int coroutine_fn GRAPH_RDLOCK
snapshot_overlay_co_block_status(BlockDriverState *bs, bool want_zero,
                                 int64_t offset, int64_t bytes, int64_t *pnum,
                                 int64_t *map, BlockDriverState **file);

/*
 * snapshot-overlay-commit.c: for the BlockBackend of a job, the opaque.  Its
 * requests do not wait for the end of a drained section, which may wait for
 * the job itself, at exit.  The job does not begin one in it instead.
 */
extern const BlockDevOps overlay_job_dev_ops;

#endif
