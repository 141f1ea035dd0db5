/*
 * snapshot-overlay: versions of clusters, and slots, which are made of them
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
#include <zlib.h>
#include "qemu/bitmap.h"
#include "qemu/host-utils.h"
#include "qemu/madvise.h"
#include "qemu/memalign.h"
#include "qemu/units.h"
#include "block/dirty-bitmap.h"
#include "snapshot-overlay-int.h"

/*
 * Memory is allocated by huge pages, so that it needs few faults and few
 * entries of a TLB; and many at once, as each piece is a mapping or two.  But
 * many a machine writes little, and there may be hundreds of them.
 */
#define HUGE_PAGE       (2 * MiB)
#define FIRST_CLUSTERS  (HUGE_PAGE / CLUSTER_SIZE)
#define CHUNK_CLUSTERS  (32 * MiB / CLUSTER_SIZE)

/* ---- Clusters and their versions; all with s->lock held ---- */

Cluster *overlay_find_or_create(Cluster **clusters, uint64_t cluster)
{
    if (!*clusters) {
        *clusters = g_try_new0(Cluster, AREA_CLUSTERS);
    }
    return *clusters ? &(*clusters)[cluster % AREA_CLUSTERS] : NULL;
}

static bool add_chunk(BDRVSnapshotOverlayState *s)
{
    bool first = !s->chunks->len;
    uint64_t n = MIN(s->max_data - s->data,
                     first ? FIRST_CLUSTERS : CHUNK_CLUSTERS);
    uint8_t *chunk = n ? qemu_try_memalign(HUGE_PAGE, n * CLUSTER_SIZE) : NULL;

    if (!chunk) {
        return false;
    }
    qemu_madvise(chunk, n * CLUSTER_SIZE,
                 first ? QEMU_MADV_NOHUGEPAGE : QEMU_MADV_HUGEPAGE);
    g_ptr_array_add(s->chunks, chunk);
    s->data += n;
    while (n--) {
        g_ptr_array_add(s->spare, chunk + n * CLUSTER_SIZE);
    }
    return true;
}

uint8_t *overlay_alloc_data(BDRVSnapshotOverlayState *s)
{
    uint8_t *data;

    if (!s->spare->len && !add_chunk(s)) {
        return NULL;
    }
    data = g_ptr_array_remove_index_fast(s->spare, s->spare->len - 1);
    s->emptied = MIN(s->emptied, s->spare->len);
    return data;
}

void overlay_free_in_file(BDRVSnapshotOverlayState *s, int64_t offset)
{
    clear_bit(offset / CLUSTER_SIZE, s->in_use);
    s->spilled--;
}

void overlay_free_version(BDRVSnapshotOverlayState *s, const Cluster *c)
{
    if (!c->valid) {
        return;
    }
    if (c->in_file) {
        overlay_free_in_file(s, c->offset);
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
    c->changed = true;
}

void overlay_change(BDRVSnapshotOverlayState *s, uint64_t key, Cluster *c,
                    const Cluster *version)
{
    if (is_shared(s, c)) {
        Change entry = { .key = key, .was = *c };

        g_array_append_val(s->base->log, entry);
        c->logged = true;
    } else if (!is_same_place(c, version)) {
        overlay_free_version(s, c);
    }
    set_version(s, key, c, version);
}

uint64_t overlay_next_run(const Area *areas, uint64_t sector, uint64_t end,
                          Where *where, Cluster **cluster)
{
    const Area *area = &areas[sector / AREA_SECTORS];
    unsigned first = sector % CLUSTER_SECTORS;
    uint64_t n;
    Cluster *c;

    *where = area->whole.zero ? ZERO : BELOW;
    *cluster = NULL;
    if (!area->clusters && !area->kept) {
        n = AREA_SECTORS - sector % AREA_SECTORS;
        return MIN(n, end - sector);
    }

    n = CLUSTER_SECTORS - first;
    if (area->clusters) {
        c = &area->clusters[sector / CLUSTER_SECTORS % AREA_CLUSTERS];
        *cluster = c;
        if (c->valid >> first & 1) {
            *where = HERE;
            n = cto32(c->valid >> first);
        } else if (c->zero >> first & 1) {
            *where = ZERO;
            n = cto32(c->zero >> first);
        } else {
            n = MIN(ctz32((c->valid | c->zero) >> first), n);
        }
    }
    if (*where == BELOW && area->kept) {
        c = &area->kept[sector / CLUSTER_SECTORS % AREA_CLUSTERS];
        if (!is_below(c)) {
            *where = c->valid ? HERE : ZERO;
            *cluster = c;
        }
    }
    if (*where == BELOW && !area->kept && n + first == CLUSTER_SECTORS) {
        for (c++; sector + n < end && (sector + n) % AREA_SECTORS &&
             is_below(c); c++) {
            n += CLUSTER_SECTORS;
        }
    }
    return MIN(n, end - sector);
}

/* ---- Slots ---- */

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
        overlay_free_version(s, &log_entry(slot, i)->was);
    }
    g_array_set_size(slot->log, 0);
}

/* Those of the base's log: the present content has them changed since. */
static void set_logged(BDRVSnapshotOverlayState *s, SnapshotOverlaySlot *slot,
                       bool logged)
{
    for (guint i = 0; i < slot->log->len; i++) {
        find(s->areas, log_entry(slot, i)->key)->logged = logged;
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
        find(s->areas, log_entry(child, i)->key)->marked = true;
    }
    for (guint i = 0; i < slot->log->len; i++) {
        Change *entry = log_entry(slot, i);

        if (find(s->areas, entry->key)->marked) {
            overlay_free_version(s, &entry->was);
        } else {
            g_array_append_val(child->log, *entry);
        }
    }
    for (guint i = 0; i < own; i++) {
        find(s->areas, log_entry(child, i)->key)->marked = false;
    }
    g_array_set_size(slot->log, 0);
}

/* One that was discarded goes when not held, and at most one hangs on to it. */
static void remove_if_unused(BDRVSnapshotOverlayState *s,
                             SnapshotOverlaySlot *slot)
{
    while (slot && slot->discarded && !slot->held) {
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
        Cluster *c = find(s->areas, entry->key);

        overlay_free_version(s, c);
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
        Cluster *c = find(s->areas, entry->key);
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

/* The last first, as overlay_alloc_data() takes them from the end */
static int compare_addresses(const void *a, const void *b)
{
    uintptr_t x = *(const uintptr_t *)a, y = *(const uintptr_t *)b;

    return (x < y) - (x > y);
}

/*
 * Give memory that is not in use back to the host, but keep its addresses.
 * Where the host's pages are larger than clusters, what is in use of a page
 * keeps it.
 */
static void empty_spare(BDRVSnapshotOverlayState *s)
{
    const size_t page = qemu_real_host_page_size();
    uint8_t **data, **stop;

    if (s->emptied == s->spare->len) {
        return;
    }
    data = (uint8_t **)s->spare->pdata + s->emptied;
    stop = (uint8_t **)s->spare->pdata + s->spare->len;
    qsort(data, stop - data, sizeof(*data), compare_addresses);
    while (data < stop) {
        uint8_t *start = *data, *end = start + CLUSTER_SIZE;

        while (++data < stop && *data == start - CLUSTER_SIZE) {
            start = *data;
        }
        start = QEMU_ALIGN_PTR_UP(start, page);
        end = QEMU_ALIGN_PTR_DOWN(end, page);
        if (start < end) {
            qemu_madvise(start, end - start, QEMU_MADV_DONTNEED);
        }
    }
    s->emptied = s->spare->len;
}

void overlay_set_committed(BDRVSnapshotOverlayState *s)
{
    for (uint64_t i = 0; i < DIV_ROUND_UP(s->sectors, AREA_SECTORS); i++) {
        Area *area = &s->areas[i];

        area->whole.changed = false;
        for (int j = 0; area->clusters && j < AREA_CLUSTERS; j++) {
            area->clusters[j].changed = false;
        }
    }
    s->committed = true;
}

static void forget_cluster(BDRVSnapshotOverlayState *s, uint64_t *count,
                           Cluster *c)
{
    *count -= !is_below(c);
    overlay_free_version(s, c);
    *c = (Cluster) { };
}

static void forget_tables(Area *area)
{
    g_free(area->clusters);
    g_free(area->kept);
    area->clusters = NULL;
    area->kept = NULL;
}

static bool has_changed_clusters(const Area *area)
{
    for (int i = 0; area->clusters && i < AREA_CLUSTERS; i++) {
        if (area->clusters[i].changed) {
            return true;
        }
    }
    return false;
}

static void forget_committed_area(BDRVSnapshotOverlayState *s, Area *area)
{
    bool changed = has_changed_clusters(area);

    /* What clusters say nothing of is as @whole has it, or all is forgotten. */
    if (area->whole.changed || (changed && !is_below(&area->whole))) {
        return;
    }
    forget_cluster(s, &s->zeroed, &area->whole);
    for (int i = 0; i < AREA_CLUSTERS; i++) {
        if (area->clusters && area->clusters[i].changed) {
            continue;
        }
        if (area->clusters) {
            forget_cluster(s, &s->clusters, &area->clusters[i]);
        }
        if (area->kept) {
            forget_cluster(s, &s->kept, &area->kept[i]);
        }
    }
    if (!changed) {
        forget_tables(area);
    }
}

/* There are no slots: what the node below has need not be here as well. */
static void forget_committed(BDRVSnapshotOverlayState *s)
{
    for (uint64_t i = 0; i < DIV_ROUND_UP(s->sectors, AREA_SECTORS); i++) {
        forget_committed_area(s, &s->areas[i]);
    }
    s->committed = false;
}

static void remove_and_free(BDRVSnapshotOverlayState *s,
                            SnapshotOverlaySlot *slot)
{
    remove_if_unused(s, slot);
    if (!s->base) {
        if (s->committed) {
            forget_committed(s);
        }
        empty_spare(s);
    }
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
    remove_and_free(s, slot);
}

static bool copy_area(Area *to, const Area *from)
{
    if (!from->clusters && !from->kept && is_below(&from->whole)) {
        return true;
    }
    *to = *from;
    if (from->clusters) {
        to->clusters = g_try_new(Cluster, AREA_CLUSTERS);
        if (!to->clusters) {
            return false;
        }
        memcpy(to->clusters, from->clusters, AREA_CLUSTERS * sizeof(Cluster));
    }
    return true;
}

/* Of the present content, as snapshot_overlay_restore() goes on from there */
static void apply_logs(Area *areas, SnapshotOverlaySlot *slot)
{
    g_autoptr(GPtrArray) way = g_ptr_array_new();

    for (; slot; slot = slot->parent) {
        g_ptr_array_add(way, slot);
    }
    while (way->len) {
        slot = g_ptr_array_steal_index(way, way->len - 1);
        for (guint i = 0; i < slot->log->len; i++) {
            Change *entry = log_entry(slot, i);

            *find(areas, entry->key) = entry->was;
        }
    }
}

Area *overlay_hold_slot(SnapshotOverlaySlot *slot)
{
    BDRVSnapshotOverlayState *s = slot->bs->opaque;
    uint64_t n = DIV_ROUND_UP(s->sectors, AREA_SECTORS);
    Area *areas = g_try_new0(Area, MAX(n, 1));

    GLOBAL_STATE_CODE();
    if (!areas) {
        return NULL;
    }
    QEMU_LOCK_GUARD(&s->lock);
    for (uint64_t i = 0; i < n; i++) {
        if (!copy_area(&areas[i], &s->areas[i])) {
            overlay_free_areas(s, areas);
            return NULL;
        }
    }
    apply_logs(areas, slot);
    slot->held++;
    return areas;
}

void overlay_release_slot(SnapshotOverlaySlot *slot)
{
    BDRVSnapshotOverlayState *s = slot->discarded ? idle_state(slot->bs) :
                                                    slot->bs->opaque;

    QEMU_LOCK_GUARD(&s->lock);
    slot->held--;
    remove_and_free(s, slot);
}

/* What was kept is not a copy. */
void overlay_free_areas(BDRVSnapshotOverlayState *s, Area *areas)
{
    for (uint64_t i = 0; i < DIV_ROUND_UP(s->sectors, AREA_SECTORS); i++) {
        g_free(areas[i].clusters);
    }
    g_free(areas);
}

void overlay_forget(BDRVSnapshotOverlayState *s)
{
    uint64_t areas = DIV_ROUND_UP(s->sectors, AREA_SECTORS);

    for (uint64_t i = 0; s->areas && i < areas; i++) {
        Area *area = &s->areas[i];

        for (int j = 0; j < AREA_CLUSTERS; j++) {
            if (area->clusters) {
                overlay_free_version(s, &area->clusters[j]);
            }
            if (area->kept) {
                overlay_free_version(s, &area->kept[j]);
            }
        }
        forget_tables(area);
        area->whole = (Cluster) { };
    }
    s->committed = false;
    s->clusters = 0;
    s->zeroed = 0;
    s->kept = 0;
    assert(s->spare->len == s->data);
    g_ptr_array_set_size(s->spare, 0);
    g_ptr_array_set_size(s->chunks, 0);
    s->emptied = 0;
    s->data = 0;
}

void overlay_close_slots(BDRVSnapshotOverlayState *s)
{
    SnapshotOverlaySlot *slot, *next;

    QLIST_FOREACH_SAFE(slot, &s->slots, next, next) {
        free_log(s, slot);
        g_array_unref(slot->log);
        slot->bs = NULL;
        if (slot->discarded) {
            g_free(slot);
        }
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

/* Of what is in the file, only where it is: this does no I/O. */
static uint32_t version_digest(uint32_t digest, uint64_t key, const Cluster *c)
{
    bool in_file = c->valid && c->in_file;
    uint64_t head[] = {
        key, c->valid << 8 | c->zero, in_file ? c->offset : -1
    };

    digest = crc32(digest, (const uint8_t *)head, sizeof(head));
    for (int i = 0; i < CLUSTER_SECTORS && !in_file; i++) {
        if (c->valid >> i & 1) {
            digest = crc32(digest, c->data + i * BDRV_SECTOR_SIZE,
                           BDRV_SECTOR_SIZE);
        }
    }
    return digest;
}

uint32_t snapshot_overlay_digest(BlockDriverState *bs)
{
    BDRVSnapshotOverlayState *s = idle_state(bs);
    uint32_t digest = crc32(0, NULL, 0);

    QEMU_LOCK_GUARD(&s->lock);
    for (uint64_t n = 0; n < DIV_ROUND_UP(s->sectors, AREA_SECTORS); n++) {
        const Area *area = &s->areas[n];

        if (!is_below(&area->whole)) {
            digest = version_digest(digest, area_key(n), &area->whole);
        }
        for (int i = 0; area->clusters && i < AREA_CLUSTERS; i++) {
            const Cluster *c = &area->clusters[i];

            if (!is_below(c)) {
                digest = version_digest(digest,
                                        cluster_key(n * AREA_CLUSTERS + i), c);
            }
        }
    }
    return digest;
}
