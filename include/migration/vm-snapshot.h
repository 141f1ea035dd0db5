/*
 * The snapshot engine: save the whole running machine and put it back
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_VM_SNAPSHOT_H
#define MIGRATION_VM_SNAPSHOT_H

#include "qapi/qapi-types-migration.h"
#include "qom/object.h"

/**
 * VMSnapshot: the engine with its slots
 *
 * It is the QOM child of the device that lets the guest use it.  All of a
 * machine is saved, so that there can be only one.
 */
#define TYPE_VM_SNAPSHOT "vm-snapshot"
OBJECT_DECLARE_SIMPLE_TYPE(VMSnapshot, VM_SNAPSHOT)

/** VM_SNAPSHOT_SLOTS_MAX: an engine has 1 to this many slots */
#define VM_SNAPSHOT_SLOTS_MAX 64

typedef enum VMSnapshotOp {
    VM_SNAPSHOT_SAVE,
    VM_SNAPSHOT_RESTORE,
    VM_SNAPSHOT_DISCARD,
} VMSnapshotOp;

/**
 * VMSnapshotDone: called when an operation has ended
 * @opaque: as given to vm_snapshot_new()
 * @op: the operation
 * @slot: that it was carried out on
 * @ret: 0 or what vm_snapshot_run() returns; the host's own failures are told
 *       to the host alone
 *
 * Called with the BQL held, in the main loop or on a vCPU's thread, before the
 * vCPUs run again.
 */
typedef void VMSnapshotDone(void *opaque, VMSnapshotOp op, unsigned slot,
                            int ret);

/**
 * VMSnapshotReady: does the guest of a slot wait for inputs?
 *
 * For a file of the slot.  Called in the main loop with the BQL held.
 *
 * Returns: what it needs to wait on in another process, or NULL; the caller
 * owns it
 */
typedef SnapshotFileReady *VMSnapshotReady(void *opaque, unsigned slot);

/**
 * VMSnapshotLoading: the machine begins with a slot of another process
 * @ready: what VMSnapshotReady returned there, or NULL
 *
 * Called before the restore, as VMSnapshotReady.
 */
typedef void VMSnapshotLoading(void *opaque, const SnapshotFileReady *ready);

typedef struct VMSnapshotConfig {
    unsigned slots;             /* at most VM_SNAPSHOT_SLOTS_MAX */
    SnapshotDeviceRam ram;      /* how RAM is put back */
    const char *file;           /* for the RAM images, or NULL: in memory */
    SnapshotDeviceDisks disks;  /* what becomes of those that are writable */
    uint64_t overlay_size;      /* most bytes in memory of each; 0: default */
    const char *overlay_dir;    /* for what is more, or NULL: default */
    bool new_generation;        /* tell the guest that it was restored */
    uint32_t verify;            /* every so many restores; 0: never */
    const char *load;           /* file to start from, or NULL */
    const char *touched;        /* as vm_snapshot_import()'s, or NULL */
    unsigned load_slot;         /* that it is put into */
    VMSnapshotDone *done;
    VMSnapshotReady *ready;
    VMSnapshotLoading *loading;
    void *opaque;
} VMSnapshotConfig;

/**
 * vm_snapshot_new: create the engine
 * @parent: owner; object_unparent() ends the engine
 * @config: read during the call only
 * @errp: set if a value is out of range, the file cannot be created or the
 *        machine has an engine already
 *
 * Returns: the engine, a reference of @parent's
 */
VMSnapshot *vm_snapshot_new(Object *parent, const VMSnapshotConfig *config,
                            Error **errp);

/**
 * vm_snapshot_request: start an operation from a register access
 *
 * Called with the BQL held.  The calling vCPU, if it is one, stops after the
 * instruction that it is in, and is held there, whoever resumes vCPUs.  The
 * operation runs in the main loop, or on that vCPU's thread, with all vCPUs
 * stopped; then they run on.  It ends with the done callback,
 * failures are reported to the host too.
 *
 * Returns: 0, or -EBUSY if an operation is under way
 */
int vm_snapshot_request(VMSnapshot *s, VMSnapshotOp op, unsigned slot);

/**
 * vm_snapshot_cancel: forget a request that has not started
 *
 * For a reset: whoever made the request is no more.  The BQL is held.
 */
void vm_snapshot_cancel(VMSnapshot *s);

/**
 * vm_snapshot_park: let the machine wait where a save or restore has left it
 *
 * For the done callback.  The vCPUs are held and the guest's clocks stand
 * until vm_snapshot_unpark(), whatever the host's user stops and continues.
 * Operations are possible meanwhile; the machine is parked after them, too.
 */
void vm_snapshot_park(VMSnapshot *s);

/**
 * vm_snapshot_put_back_parked: undo what has changed while the machine waited
 *
 * What comes from outside (packets, keys) reaches devices of a machine that is
 * parked.  Called with the BQL held, in the main loop or on the thread of a
 * vCPU.  Not counted as a restore.
 *
 * Returns: false if it takes a restore of @slot by vm_snapshot_run(), which has
 * to follow: the machine may be neither the one nor the other until then
 */
bool vm_snapshot_put_back_parked(VMSnapshot *s, unsigned slot);

/**
 * vm_snapshot_unpark: let a machine that is parked go on
 *
 * One that vm_snapshot_put_back_parked() has left half way is stopped for good.
 *
 * Called in the main loop with the BQL held.  The vCPUs go on with the next
 * resume_all_vcpus(), which is not called: this may be a reset or a restore,
 * that goes before.
 */
void vm_snapshot_unpark(VMSnapshot *s);

/**
 * vm_snapshot_block_migration: refuse migrations, but not saves
 * @reason: taken over in any case
 *
 * Until vm_snapshot_unblock_migration(), which may be called in any case.
 *
 * Returns: false with @errp set if a migration is under way
 */
bool vm_snapshot_block_migration(VMSnapshot *s, Error *reason, Error **errp);
void vm_snapshot_unblock_migration(VMSnapshot *s);

/**
 * vm_snapshot_run: carry an operation out
 *
 * Called in the main loop with the BQL held; a request of the guest's that has
 * not started is carried out before it.  A machine that was running runs on
 * afterwards, one that was stopped stays so.
 *
 * Returns: 0, or with @errp set and nothing changed
 *   -ENOENT    there is no snapshot in the slot
 *   -EINVAL    there is no such slot
 *   -ENOTSUP   the machine cannot be saved, or not now
 *   -ESTALE    RAM, devices or disks are not those that were saved
 *   -ENOMEM    the host lacks memory for it
 *   -EBUSY     an operation is under way on a vCPU's thread, or a disk is busy
 *   -EIO       the restore failed half way: the machine is stopped for good
 */
int vm_snapshot_run(VMSnapshot *s, VMSnapshotOp op, unsigned slot,
                    Error **errp);

/**
 * vm_snapshot_verify: compare the machine with a slot
 *
 * As vm_snapshot_run(), but nothing is changed in any case.
 *
 * Returns: what differs, to be freed with
 * qapi_free_SnapshotDeviceMismatches(), or NULL with @errp set
 */
SnapshotDeviceMismatches *vm_snapshot_verify(VMSnapshot *s, unsigned slot,
                                             Error **errp);

/**
 * vm_snapshot_commit: write the content of disks to their images
 * @job_id: of the job that does that
 * @flags: of job_create()
 * @slot: whose content it is; -1: what the guest sees
 *
 * As vm_snapshot_run(), but returns when the job has begun.  The machine is
 * stopped until its end, and all other operations fail with -EBUSY.
 *
 * Returns: the job, a reference of its own; or NULL with @errp set and nothing
 * changed
 */
struct Job *vm_snapshot_commit(VMSnapshot *s, const char *job_id, int flags,
                               int64_t slot, Error **errp);

/**
 * vm_snapshot_export: write a slot to a file
 * @job_id: of the job that does that
 * @flags: of job_create()
 * @file: that is replaced when all is written; or /dev/fdset/N, to be written
 *        to in place
 * @base: of which the file is to have only what differs, or NULL
 * @speed: bytes a second at most, 0: no limit
 *
 * As vm_snapshot_run(), but returns when the job has begun.  Without @base,
 * the machine is stopped for some milliseconds before.  Whatever becomes of
 * the slot and of the machine then, the file has what was in the slot.
 *
 * Returns: the job, a reference of its own; or NULL with @errp set and nothing
 * changed
 */
struct Job *vm_snapshot_export(VMSnapshot *s, const char *job_id, int flags,
                               unsigned slot, const char *file,
                               const char *base, uint64_t speed, Error **errp);

/**
 * vm_snapshot_import: put into a slot what is in a file
 * @file: that vm_snapshot_export() wrote, on a machine that is made as this
 *        one; or /dev/fdset/N.  It must stay as it is as long as the slot, or
 *        RAM, has something of it
 * @touched: name of a list of what of it is read ahead, or NULL.  If there is
 *           none, what the run that begins with the slot's first restore
 *           touches is listed there at the run's end: the next restore or
 *           export without a base, or when QEMU is told to end
 * @check: read all of it, and compare sums
 *
 * As vm_snapshot_run(); but for the slot, the machine is as it was.
 *
 * Returns: false with @errp set and nothing changed
 */
bool vm_snapshot_import(VMSnapshot *s, unsigned slot, const char *file,
                        const char *touched, bool check, Error **errp);

/** vm_snapshot_restores: how often the slot was restored since its save */
uint64_t vm_snapshot_restores(const VMSnapshot *s, unsigned slot);

/** vm_snapshot_last_ns: time that the last restore took, in ns */
uint64_t vm_snapshot_last_ns(const VMSnapshot *s);

/** vm_snapshot_ram: how RAM is put back, never "auto" */
SnapshotDeviceRam vm_snapshot_ram(const VMSnapshot *s);

/** vm_snapshot_last_pages: pages that it put back, 0 if not counted */
uint64_t vm_snapshot_last_pages(const VMSnapshot *s);

/**
 * vm_snapshot_in_progress: is the state of the machine being saved or loaded
 * for a snapshot of this engine?
 *
 * For devices' VMState: what is not to be put back by a restore.
 */
bool vm_snapshot_in_progress(const VMSnapshot *s);

/**
 * vm_snapshot_for_others: is state being saved for a QEMU without the device?
 *
 * For the device's own VMState.
 */
bool vm_snapshot_for_others(const VMSnapshot *s);

#endif /* MIGRATION_VM_SNAPSHOT_H */
