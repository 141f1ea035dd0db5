/*
 * The snapshot engine: disks
 *
 * What the guest writes to a disk is kept in memory, by a block node over the
 * one that was there (block/snapshot-overlay*), and goes back from there.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/error-report.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "block/block_int.h"
#include "block/dirty-bitmap.h"
#include "block/snapshot-overlay.h"
#include "hw/qdev-core.h"
#include "migration/blocker.h"
#include "system/block-backend.h"
#include "system/system.h"
#include "trace.h"
#include "vm-snapshot-int.h"

typedef struct Disk {
    const BlockBackend *blk;    /* to compare with; it may be gone */
    char *device;
    SnapshotOverlaySlot *slot;
    bool shared;                /* @slot is of a disk before this one */
    uint32_t digest;            /* of the content; only with verify= */
} Disk;

struct VMSnapshotDisks {
    unsigned n;
    bool has_digests;
    Disk disks[];               /* in the order of next_disk() */
};

/* A CD-ROM drive does not write, though its medium may be writable. */
static bool is_written(BlockBackend *blk)
{
    uint64_t perm, shared;

    blk_get_perm(blk, &perm, &shared);
    return perm & BLK_PERM_WRITE && blk_supports_write_perm(blk);
}

/* Disks that a device uses and that it can write to; NULL: the first */
static BlockBackend *next_disk(BlockBackend *blk)
{
    do {
        blk = blk_all_next(blk);
    } while (blk && !(blk_get_attached_dev(blk) && blk_bs(blk) &&
                      is_written(blk)));
    return blk;
}

char *vm_snapshot_disk_name(BlockBackend *blk)
{
    DeviceState *dev = blk_get_attached_dev(blk), *outer;

    /* What the user named is virtio-blk-pci, not the virtio device in it. */
    outer = dev && !dev->id ?
        (DeviceState *)object_dynamic_cast(OBJECT(dev)->parent, TYPE_DEVICE) :
        NULL;
    return outer && outer->id ? g_strdup(outer->id)
                              : blk_get_attached_dev_id(blk);
}

/* Does somebody else write to a node, or to what it is only a filter of? */
static bool is_written_otherwise(BlockDriverState *bs, Error **errp)
{
    BlockBackend *blk;
    uint64_t perm, shared;

    if (bdrv_op_is_blocked(bs, BLOCK_OP_TYPE_BACKUP_SOURCE, errp)) {
        return true;
    }
    for (blk = blk_all_next(NULL); blk; blk = blk_all_next(blk)) {
        if (blk_bs(blk) != bs || blk_get_attached_dev(blk)) {
            continue;
        }
        blk_get_perm(blk, &perm, &shared);
        if (perm & BLK_PERM_WRITE) {
            error_setg(errp, "Node '%s' is exported, and can be written to",
                       bdrv_get_node_name(bs));
            return true;
        }
    }
    return false;
}

static bool has_bitmap(BlockDriverState *bs, Error **errp)
{
    BdrvDirtyBitmap *bitmap;

    FOR_EACH_DIRTY_BITMAP(bs, bitmap) {
        if (bdrv_dirty_bitmap_name(bitmap)) {
            error_setg(errp, "Node '%s' has the dirty bitmap '%s', which would "
                       "not tell of what is written from now on",
                       bdrv_get_node_name(bs), bdrv_dirty_bitmap_name(bitmap));
            return true;
        }
    }
    return false;
}

/* Is there something that an overlay could not put back? */
static bool cannot_be_put_back(BlockBackend *blk, Error **errp)
{
    BlockDriverState *bs = blk_bs(blk);
    bool overlay = bdrv_is_snapshot_overlay(bs);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    /* Its commands go to the host's device, but for some that read or write. */
    if (bdrv_is_sg(bs) ||
        object_dynamic_cast(OBJECT(blk_get_attached_dev(blk)), "scsi-block")) {
        error_setg(errp, "The guest's commands go to a device of the host's");
        return true;
    }
    for (; bs; bs = bdrv_filter_bs(bs)) {
        if (is_written_otherwise(bs, errp) ||
            (!overlay && has_bitmap(bs, errp))) {
            return true;
        }
    }
    return false;
}

static bool is_disk_refused(BlockBackend *blk, Error **errp)
{
    g_autofree char *device = vm_snapshot_disk_name(blk);
    ERRP_GUARD();

    if (cannot_be_put_back(blk, errp)) {
        error_prepend(errp, "Disk of '%s' could not be put back: ", device);
        error_append_hint(errp, "End what is named, make the disk read-only, "
                          "or accept that it stays as it is with disks=keep.\n");
        return true;
    }
    return false;
}

/* What is in memory only would be lost. */
static bool block_migration(VMSnapshot *s, Error **errp)
{
    if (s->migration_blocker) {
        return true;
    }
    error_setg(&s->migration_blocker, "A snapshot was saved: what the guest "
               "writes to its disks is in this QEMU's memory only");
    error_append_hint(&s->migration_blocker, "Discard all slots and commit "
                      "the disks first, or start QEMU with -device "
                      "snapshot,disks=keep.\n");
    return migrate_add_blocker(&s->migration_blocker, errp) == 0;
}

void vm_snapshot_disks_unblock(VMSnapshot *s)
{
    BlockDriverState *bs;

    for (bs = bdrv_next_node(NULL); bs; bs = bdrv_next_node(bs)) {
        if (bdrv_is_snapshot_overlay(bs) && !snapshot_overlay_is_empty(bs)) {
            return;
        }
    }
    migrate_del_blocker(&s->migration_blocker);
}

static bool insert_overlay(const VMSnapshot *s, BlockBackend *blk,
                           Error **errp)
{
    QDict *options = qdict_new();
    BlockDriverState *bs;
    ERRP_GUARD();

    if (s->config.overlay_size) {
        g_autofree char *size = g_strdup_printf("%" PRIu64,
                                                s->config.overlay_size);

        qdict_put_str(options, "overlay-size", size);
    }
    if (s->overlay_dir) {
        qdict_put_str(options, "overlay-dir", s->overlay_dir);
    }

    bs = snapshot_overlay_insert(blk_bs(blk), options, errp);
    if (!bs) {
        g_autofree char *device = vm_snapshot_disk_name(blk);

        error_prepend(errp, "Disk of '%s' could not be put back, as what is "
                      "written to it cannot be kept in memory: ", device);
        return false;
    }
    /* The device uses it now. */
    bdrv_unref(bs);
    return true;
}

/* Once; but what is written to a temporary file (-snapshot) is lost anyway. */
static void tell_of_disks(VMSnapshot *s)
{
    BlockBackend *blk = next_disk(NULL);

    while (blk && blk_bs(blk)->open_flags & BDRV_O_TEMPORARY) {
        blk = next_disk(blk);
    }
    if (blk && !s->told_of_disks &&
        s->config.disks == SNAPSHOT_DEVICE_DISKS_RESTORE) {
        warn_report("snapshot: once a snapshot was saved, what the guest "
                    "writes to its disks is in memory only, and lost when QEMU "
                    "ends, unless it is committed");
        s->told_of_disks = true;
    }
}

static void machine_done(Notifier *notifier, void *data)
{
    tell_of_disks(container_of(notifier, VMSnapshot, machine_done));
}

void vm_snapshot_disks_init(VMSnapshot *s)
{
    s->machine_done.notify = machine_done;
    qemu_add_machine_init_done_notifier(&s->machine_done);
}

void vm_snapshot_disks_finalize(VMSnapshot *s)
{
    if (s->machine_done.notify) {
        qemu_remove_machine_init_done_notifier(&s->machine_done);
    }
    migrate_del_blocker(&s->migration_blocker);
    g_free(s->overlay_dir);
}

bool vm_snapshot_disks_prepare(VMSnapshot *s, Error **errp)
{
    BlockBackend *blk;

    if (s->config.disks != SNAPSHOT_DEVICE_DISKS_RESTORE || !next_disk(NULL)) {
        return true;
    }
    for (blk = next_disk(NULL); blk; blk = next_disk(blk)) {
        if (is_disk_refused(blk, errp)) {
            return false;
        }
    }
    if (!block_migration(s, errp)) {
        return false;
    }
    for (blk = next_disk(NULL); blk; blk = next_disk(blk)) {
        if (!bdrv_is_snapshot_overlay(blk_bs(blk)) &&
            !insert_overlay(s, blk, errp)) {
            return false;
        }
    }
    tell_of_disks(s);
    return true;
}

bool vm_snapshot_disks_refused(const VMSnapshot *s, Error **errp)
{
    BlockBackend *blk;

    if (s->config.disks == SNAPSHOT_DEVICE_DISKS_KEEP) {
        return false;
    }
    for (blk = next_disk(NULL); blk; blk = next_disk(blk)) {
        g_autofree char *device = NULL;

        if (s->config.disks == SNAPSHOT_DEVICE_DISKS_RESTORE &&
            bdrv_is_snapshot_overlay(blk_bs(blk))) {
            if (is_disk_refused(blk, errp)) {
                return true;
            }
            continue;
        }
        device = vm_snapshot_disk_name(blk);
        if (s->config.disks == SNAPSHOT_DEVICE_DISKS_RESTORE) {
            error_setg(errp, "Disk of '%s' was plugged or changed during the "
                       "save", device);
        } else {
            error_setg(errp, "Disk of '%s' is writable, which disks=refuse "
                       "refuses", device);
            error_append_hint(errp, "Make it read-only, or use disks=restore "
                              "or disks=keep.\n");
        }
        return true;
    }
    return false;
}

/* Of a disk before that is on the same node (share-rw=on) */
static SnapshotOverlaySlot *find_slot(const VMSnapshotDisks *disks,
                                      BlockDriverState *bs)
{
    unsigned i;

    for (i = 0; i < disks->n; i++) {
        if (snapshot_overlay_slot_bs(disks->disks[i].slot) == bs) {
            return disks->disks[i].slot;
        }
    }
    return NULL;
}

VMSnapshotDisks *vm_snapshot_disks_save(const VMSnapshot *s)
{
    VMSnapshotDisks *disks;
    BlockBackend *blk;
    unsigned n = 0;

    if (s->config.disks != SNAPSHOT_DEVICE_DISKS_RESTORE) {
        return NULL;
    }
    for (blk = next_disk(NULL); blk; blk = next_disk(blk)) {
        n++;
    }
    disks = g_malloc0(sizeof(*disks) + n * sizeof(disks->disks[0]));
    disks->has_digests = s->config.verify;
    for (blk = next_disk(NULL); blk; blk = next_disk(blk)) {
        Disk *disk = &disks->disks[disks->n];

        disk->blk = blk;
        disk->device = vm_snapshot_disk_name(blk);
        disk->slot = find_slot(disks, blk_bs(blk));
        disk->shared = disk->slot;
        if (!disk->shared) {
            disk->slot = snapshot_overlay_save(blk_bs(blk));
        }
        if (disks->has_digests) {
            disk->digest = snapshot_overlay_digest(blk_bs(blk));
        }
        disks->n++;
    }
    return disks;
}

static bool is_same(const Disk *disk, BlockBackend *blk)
{
    return disk->blk == blk &&
        snapshot_overlay_slot_bs(disk->slot) == blk_bs(blk);
}

/* At least one is another. */
static void tell_which(const VMSnapshotDisks *disks, Error **errp)
{
    BlockBackend *blk;
    unsigned i;

    for (i = 0; i < disks->n; i++) {
        blk = next_disk(NULL);
        while (blk && !is_same(&disks->disks[i], blk)) {
            blk = next_disk(blk);
        }
        if (!blk) {
            error_setg(errp, "Disk of '%s' is not the one that was saved",
                       disks->disks[i].device);
            return;
        }
    }
    for (blk = next_disk(NULL); blk; blk = next_disk(blk)) {
        g_autofree char *device = vm_snapshot_disk_name(blk);

        for (i = 0; i < disks->n && !is_same(&disks->disks[i], blk); i++) {
            /* Go on */
        }
        if (i == disks->n) {
            error_setg(errp, "Disk of '%s' was not there, or was read-only, "
                       "at the save", device);
            return;
        }
    }
    g_assert_not_reached();
}

bool vm_snapshot_disks_match(const VMSnapshotDisks *disks, Error **errp)
{
    BlockBackend *blk;
    unsigned n = 0;

    if (!disks) {
        return true;
    }
    for (blk = next_disk(NULL); blk; blk = next_disk(blk)) {
        if (n == disks->n || !is_same(&disks->disks[n], blk)) {
            break;
        }
        n++;
    }
    if (blk || n < disks->n) {
        tell_which(disks, errp);
        return false;
    }
    return true;
}

uint64_t vm_snapshot_disks_restore(VMSnapshotDisks *disks)
{
    uint64_t clusters = 0;
    unsigned i;

    for (i = 0; i < disks->n; i++) {
        if (!disks->disks[i].shared) {
            clusters += snapshot_overlay_restore(disks->disks[i].slot);
        }
    }
    return clusters;
}

/* Does a device before this one use the same node? */
static bool is_shared(BlockBackend *blk)
{
    BlockBackend *other = next_disk(NULL);

    while (other != blk && blk_bs(other) != blk_bs(blk)) {
        other = next_disk(other);
    }
    return other != blk;
}

bool vm_snapshot_disks_foreach(const VMSnapshotDisks *disks,
                               VMSnapshotDiskFunc *func, void *opaque,
                               Error **errp)
{
    BlockBackend *blk;
    unsigned i = 0;

    for (blk = next_disk(NULL); blk; blk = next_disk(blk), i++) {
        g_autofree char *device = NULL;

        if (!bdrv_is_snapshot_overlay(blk_bs(blk)) || is_shared(blk)) {
            continue;
        }
        device = vm_snapshot_disk_name(blk);
        if (!func(device, blk_bs(blk), disks ? disks->disks[i].slot : NULL,
                  opaque, errp)) {
            return false;
        }
    }
    return true;
}

void vm_snapshot_disks_verify(const VMSnapshotDisks *disks,
                              VMSnapshotDiskDiffers *differs, void *opaque)
{
    unsigned i;

    for (i = 0; disks && disks->has_digests && i < disks->n; i++) {
        const Disk *disk = &disks->disks[i];

        if (disk->digest !=
            snapshot_overlay_digest(snapshot_overlay_slot_bs(disk->slot))) {
            differs(disk->device, opaque);
        }
    }
}

void vm_snapshot_disks_free(VMSnapshotDisks *disks)
{
    unsigned i;

    for (i = 0; disks && i < disks->n; i++) {
        Disk *disk = &disks->disks[i];
        BlockDriverState *bs = NULL;

        g_free(disk->device);
        if (disk->shared) {
            continue;
        }
        /* Requests may be in flight: vCPUs may run. */
        bs = snapshot_overlay_slot_bs(disk->slot);
        if (bs) {
            bdrv_ref(bs);
            bdrv_drained_begin(bs);
        }
        snapshot_overlay_discard(disk->slot);
        if (bs) {
            bdrv_drained_end(bs);
            bdrv_unref(bs);
        }
    }
    g_free(disks);
}

SnapshotDeviceDiskList *vm_snapshot_disks_query(void)
{
    SnapshotDeviceDiskList *list = NULL, **tail = &list;
    BlockBackend *blk;

    for (blk = next_disk(NULL); blk; blk = next_disk(blk)) {
        BlockStatsSpecificSnapshotOverlay stats;
        SnapshotDeviceDisk *disk;

        if (!bdrv_is_snapshot_overlay(blk_bs(blk))) {
            continue;
        }
        snapshot_overlay_query(blk_bs(blk), &stats);
        disk = g_new0(SnapshotDeviceDisk, 1);
        disk->device = vm_snapshot_disk_name(blk);
        disk->node_name = g_strdup(bdrv_get_node_name(blk_bs(blk)));
        disk->clusters = stats.clusters;
        disk->zeroed_areas = stats.zeroed_areas;
        disk->memory_bytes = stats.memory_bytes;
        disk->spilled_bytes = stats.spilled_bytes;
        QAPI_LIST_APPEND(tail, disk);
    }
    return list;
}
