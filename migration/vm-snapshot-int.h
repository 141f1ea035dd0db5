/*
 * The snapshot engine: what its files have in common
 *
 * A file calls those that stand after it here, and none before it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_VM_SNAPSHOT_INT_H
#define MIGRATION_VM_SNAPSHOT_INT_H

#include "qemu/thread.h"
#include "migration/vm-snapshot.h"
#include "device-state.h"
#include "plug-log.h"
#include "ram-snapshot.h"

/* Restores that the percentiles of x-query-snapshot-device are taken over. */
#define VM_SNAPSHOT_TIMES 1024

typedef struct VMSnapshotDisks VMSnapshotDisks;

/** SnapshotTouched: writes what the first run from a file touches */
typedef struct SnapshotTouched SnapshotTouched;

typedef struct VMSnapshotSlot {
    RAMSnapshot *ram;           /* NULL in an empty slot */
    DeviceStateImage *devices;
    PlugMark *plugs;            /* which devices there were */
    VMSnapshotDisks *disks;     /* NULL if they do not go back */
    SnapshotFileReady *ready;   /* of a file: its guest waits for inputs */
    SnapshotTouched *touched;   /* of a file: its first run is to come */
    bool suspended;             /* the guest slept (ACPI S3) */
    bool virtio;                /* the machine has devices of it */
    DeviceStateWay way;         /* of the last restore, or to be tried */
    uint64_t restores;
} VMSnapshotSlot;

/* What becomes of a command; vm_snapshot_set_state() knows the legal steps. */
typedef enum VMSnapshotRequestState {
    REQUEST_IDLE,
    REQUEST_ON_VCPU,        /* a work item of @requester carries it out */
    REQUEST_IN_MAIN_LOOP,   /* @bh carries it out, and vCPUs are held */
    REQUEST_RUNNING,        /* it is being carried out */
    REQUEST_COMMITTING,     /* none: a job writes disks to their images */
    REQUEST__MAX,
} VMSnapshotRequestState;

struct VMSnapshot {
    Object parent_obj;

    VMSnapshotConfig config;
    VMSnapshotSlot *slots;
    RAMSnapshotStore *store;

    /* The guest's request, of vm-snapshot-request.c alone */
    VMSnapshotRequestState state;
    QEMUBH *bh;
    VMSnapshotOp op;
    unsigned slot;
    int64_t since;
    CPUState *requester;
    bool visiting;              /* see vm_snapshot_visit() */
    bool parked;                /* no vCPU runs, the guest's clocks stand */
    bool half_done;             /* a restore has failed after it had begun */
    char *last_refusal;         /* told the host already */
    int64_t report_again;       /* not before this time, by get_clock() */

    QemuMutex publishing;       /* of a file: see vm-snapshot-export.c */
    char *load;                 /* file to start from, or NULL */
    char *touched_list;         /* of what of it is touched, or NULL */
    SnapshotTouched *touched;   /* of the run that there is, or NULL */
    char *overlay_dir;          /* or NULL: the overlay's default */
    Notifier machine_done;      /* to tell of disks */
    Error *migration_blocker;   /* once disks are in memory */
    Error *run_blocker;         /* vm_snapshot_block_migration()'s, or NULL */
    bool told_of_disks;         /* that they are */

    bool warned;                /* of devices that are not saved */
    uint64_t restores;
    uint64_t ways[DEVICE_STATE_WAYS];   /* how many of them went which way */
    char *reset_reason;                 /* of the last that reset something */
    uint64_t last_pages;
    uint64_t times[VM_SNAPSHOT_TIMES];  /* ns; a ring, by @restores */

    uint64_t verified;          /* restores */
    uint64_t mismatched;        /* of them */
    SnapshotDeviceMismatches *mismatches;       /* sums */
};

/*
 * vm-snapshot.c: the order of things.  All is called with the BQL held, and
 * after vm_snapshot_refused() has returned 0.
 */

/**
 * vm_snapshot_save, vm_snapshot_restore: as vm_snapshot_run() documents it
 * @since: when it was asked for, by get_clock()
 *
 * For the main loop.  The vCPUs are stopped, and resumed as they were.
 */
int vm_snapshot_save(VMSnapshot *s, unsigned slot, Error **errp);
int vm_snapshot_restore(VMSnapshot *s, unsigned slot, int64_t since,
                        Error **errp);

/** vm_snapshot_discard: empty a slot; vCPUs may run */
void vm_snapshot_discard(VMSnapshot *s, unsigned slot);

/** vm_snapshot_clear_slot: free what a slot holds, if anything */
void vm_snapshot_clear_slot(VMSnapshotSlot *slot);

/** vm_snapshot_verify_slot: as vm_snapshot_verify() */
SnapshotDeviceMismatches *vm_snapshot_verify_slot(VMSnapshot *s, unsigned slot,
                                                  Error **errp);

/** vm_snapshot_move_slot: to another, whose snapshot is freed */
void vm_snapshot_move_slot(VMSnapshot *s, unsigned from, unsigned to);

typedef bool VMSnapshotFillFunc(VMSnapshot *s, VMSnapshotSlot *slot,
                                void *opaque, Error **errp);

/**
 * vm_snapshot_fill: put into a slot what was not saved by this machine
 * @func: sets @slot->ram and what belongs to it; if it returns false, what it
 *        did set is freed
 *
 * Disks, and the devices that there are, are taken to be those of now.
 *
 * Returns: false with @errp set, and the slot as it was
 */
bool vm_snapshot_fill(VMSnapshot *s, unsigned slot, VMSnapshotFillFunc *func,
                      void *opaque, Error **errp);

typedef bool VMSnapshotVisitFunc(void *opaque, Error **errp);

/**
 * vm_snapshot_visit: make the machine for a moment what is in a slot
 * @func: called then; its @errp is this one's
 *
 * For what a device tells of itself only while it is in that state.  Neither
 * the guest nor the host notices, but for the time that a save and two
 * restores take.
 *
 * Returns: false with @errp set if @func does, or the slot cannot be loaded
 */
bool vm_snapshot_visit(VMSnapshot *s, unsigned slot, VMSnapshotVisitFunc *func,
                       void *opaque, Error **errp);

/**
 * vm_snapshot_restore_on_vcpu: restore in place, on a vCPU's thread
 *
 * No thread is woken, nothing is drained: vm_snapshot_needs_drain() is false.
 * @self is between two instructions, and no other vCPU is in cpu_exec().
 *
 * Returns: false if the main loop has to do it all, or to tell why not;
 * @s->half_done is set if the machine has changed already
 */
bool vm_snapshot_restore_on_vcpu(VMSnapshot *s, unsigned slot, int64_t since,
                                 CPUState *self);

/** vm_snapshot_restore_parked: as vm_snapshot_put_back_parked() */
bool vm_snapshot_restore_parked(VMSnapshot *s, unsigned slot);

/**
 * vm_snapshot_start_clocks: let the guest's clocks go on
 *
 * Those that vm_snapshot_restore_on_vcpu() stops: the run state is that of a
 * machine that runs, the BQL is held.
 */
void vm_snapshot_start_clocks(void);

/**
 * vm_snapshot_engine: the engine of the machine, or NULL
 *
 * In vm-snapshot-request.c.  With the BQL held.  It lives as long as its owner.
 */
VMSnapshot *vm_snapshot_engine(void);

/* vm-snapshot-check.c: why not */

/**
 * vm_snapshot_refused: why an operation must not begin at all
 *
 * Returns: 0, or with @errp set -EINVAL, -ENOENT or -ENOTSUP as
 * vm_snapshot_run() does
 */
int vm_snapshot_refused(const VMSnapshot *s, VMSnapshotOp op, unsigned slot,
                        Error **errp);

/**
 * vm_snapshot_is_half_done: is the machine neither an old one nor a new one?
 *
 * Then a restore has to reset it first, and the guest must not run.
 */
bool vm_snapshot_is_half_done(const VMSnapshot *s, Error **errp);

/**
 * vm_snapshot_cannot_save: is there something that could not be put back?
 *
 * To be asked with the vCPUs stopped: while they are being stopped, the BQL is
 * not held, and devices may come and go.
 */
bool vm_snapshot_cannot_save(const VMSnapshot *s, Error **errp);

/**
 * vm_snapshot_unsaved: the user's devices that have no migration state
 *
 * QEMU migrates a machine with such devices without a word.  Of those that
 * belong to a board it is known that they need none.
 */
strList *vm_snapshot_unsaved(void);

/* vm-snapshot-commit.c: write disks to their images */

typedef void VMSnapshotCommitDone(VMSnapshot *s);

/**
 * vm_snapshot_commit_start: as vm_snapshot_commit() documents it
 * @slot: that has a snapshot; -1: the present content
 * @done: called in the main loop when the job has ended
 */
struct Job *vm_snapshot_commit_start(VMSnapshot *s, const char *job_id,
                                     int flags, int slot,
                                     VMSnapshotCommitDone *done, Error **errp);

/**
 * vm_snapshot_matches: is the machine made of what it was made of at the save?
 * @errp: set to what came, went or was changed
 */
bool vm_snapshot_matches(const VMSnapshotSlot *slot, Error **errp);

/* vm-snapshot-export.c: write a slot to a file */

/** vm_snapshot_export_start: as vm_snapshot_export(); the slot is there */
struct Job *vm_snapshot_export_start(VMSnapshot *s, const char *job_id,
                                     int flags, unsigned slot,
                                     const char *file, const char *base,
                                     uint64_t speed, Error **errp);

/* vm-snapshot-import.c: make a slot of a file */

/**
 * vm_snapshot_open: as vm_snapshot_import()
 * @touched: name of a list of what of the file is touched, or NULL
 * @is_stream: set if it is a file of QEMU's own migration: then nobody knows
 *             whether devices can be loaded from it before that was tried
 */
bool vm_snapshot_open(VMSnapshot *s, unsigned slot, const char *file,
                      const char *touched, bool check, bool *is_stream,
                      Error **errp);

/* vm-snapshot-touched.c: read ahead what the first run from a file touched */

/**
 * snapshot_touched_begin: @slot, whose run is to be looked at, was restored
 */
void snapshot_touched_begin(VMSnapshot *s, VMSnapshotSlot *slot);

/**
 * snapshot_touched_end: the run ends with a restore of @slot, which is to come
 *
 * There is one.  Writes the list, if the guest has run.
 */
void snapshot_touched_end(VMSnapshot *s, const VMSnapshotSlot *slot);

/** snapshot_touched_free: write nothing; NULL is allowed */
void snapshot_touched_free(SnapshotTouched *t);

/* vm-snapshot-fingerprint.c: what a machine is made of */

/** vm_snapshot_fingerprint_init: called once, before the guest runs */
void vm_snapshot_fingerprint_init(void);

/**
 * vm_snapshot_fingerprint: what a file can only be loaded into
 *
 * Returns: lines that name devices and what they are made of, in an order that
 * is the same in a machine made alike; the caller owns the list
 */
strList *vm_snapshot_fingerprint(void);

/*
 * vm-snapshot-disks.c: let disks go back.  With disks=keep and disks=refuse,
 * there is nothing to save or restore: a VMSnapshotDisks is NULL.
 */

/**
 * vm_snapshot_disk_name: what the user calls the device that uses a disk
 *
 * Returns: its id, else its path; empty if there is none; the caller owns it
 */
char *vm_snapshot_disk_name(BlockBackend *blk);

/**
 * vm_snapshot_disks_init: say, once all devices are there, what becomes of
 * disks
 */
void vm_snapshot_disks_init(VMSnapshot *s);

void vm_snapshot_disks_finalize(VMSnapshot *s);

/**
 * vm_snapshot_disks_prepare: put an overlay on each writable disk without one
 *
 * Called in the main loop with the BQL held and nothing drained, as it drains
 * and polls.  The guest sees no difference, so that overlays stay where they
 * are, and a migration stays blocked, if this or the save fails.
 *
 * Returns: false with @errp set if there is a disk that could not be put back
 */
bool vm_snapshot_disks_prepare(VMSnapshot *s, Error **errp);

/**
 * vm_snapshot_disks_refused: is there a disk that forbids a save?
 *
 * To be asked with the machine quiesced: what vm_snapshot_disks_prepare()
 * found may have changed while the vCPUs were being stopped.
 */
bool vm_snapshot_disks_refused(const VMSnapshot *s, Error **errp);

/**
 * vm_snapshot_disks_save: remember the content of all writable disks
 *
 * After vm_snapshot_disks_refused() has returned false, with all drained.
 * Takes time for what was written since the last save or restore.
 *
 * Returns: for vm_snapshot_disks_free(); cannot fail
 */
VMSnapshotDisks *vm_snapshot_disks_save(const VMSnapshot *s);

/**
 * vm_snapshot_disks_match: are the writable disks those that were saved?
 *
 * Called with the BQL held, on any thread.
 *
 * Returns: false with @errp set if one is another, has another medium or root
 * node, went or came
 */
bool vm_snapshot_disks_match(const VMSnapshotDisks *disks, Error **errp);

/**
 * vm_snapshot_disks_restore: put the content of disks back
 * @disks: that match
 *
 * Called with the BQL held, on any thread, with no request in flight.  Takes
 * time for what was written since the last save or restore.  Cannot fail.
 *
 * Returns: the number of clusters, or of areas that were zeroed as a whole,
 * that were put back
 */
uint64_t vm_snapshot_disks_restore(VMSnapshotDisks *disks);

struct SnapshotOverlaySlot;

/**
 * VMSnapshotDiskFunc: called for an overlay that a device uses
 * @device: the device, to tell of it
 * @slot: what a slot has of it, or NULL
 */
typedef bool VMSnapshotDiskFunc(const char *device, BlockDriverState *bs,
                                struct SnapshotOverlaySlot *slot, void *opaque,
                                Error **errp);

/**
 * vm_snapshot_disks_foreach: call a function for each overlay, once
 * @disks: that match; or NULL, to be called without slots
 *
 * Returns: true, or false if @func has returned that
 */
bool vm_snapshot_disks_foreach(const VMSnapshotDisks *disks,
                               VMSnapshotDiskFunc *func, void *opaque,
                               Error **errp);

typedef void VMSnapshotDiskDiffers(const char *device, void *opaque);

/**
 * vm_snapshot_disks_verify: call @differs for each disk whose content is not
 * what was saved
 * @disks: that match
 *
 * Called as vm_snapshot_disks_restore().  Finds nothing unless verify= was set
 * at the save, and not what differs in the file of an overlay.
 */
void vm_snapshot_disks_verify(const VMSnapshotDisks *disks,
                              VMSnapshotDiskDiffers *differs, void *opaque);

/**
 * vm_snapshot_disks_unblock: allow migrations again, if nothing of any disk is
 * in memory only, and there is no slot of it
 */
void vm_snapshot_disks_unblock(VMSnapshot *s);

/** vm_snapshot_disks_free: in the main loop, as it drains; NULL is allowed */
void vm_snapshot_disks_free(VMSnapshotDisks *disks);

/** vm_snapshot_disks_query: disks with overlays; the caller owns the list */
SnapshotDeviceDiskList *vm_snapshot_disks_query(void);

/* vm-snapshot-drain.c: bring disks, and what devices have to do, to rest */

/**
 * vm_snapshot_drain_begin: bdrv_drain_all_begin() until nothing goes on
 *
 * A drained section alone is not enough.  A BlockBackend in it holds back the
 * next part of a request that a device carries out in parts; and what
 * completes a request, or goes on with it, may be a bottom half.  So sections
 * are begun and ended, and bottom halves called, until there are no requests
 * and no bottom halves.
 *
 * Called in the main loop with the BQL held, the vCPUs and the virtual clock
 * stopped.  bdrv_drain_all_end() has to follow in any case.
 *
 * Returns: false with @errp set if requests follow on each other without end,
 * as those do which a device finds by itself in the guest's memory
 */
bool vm_snapshot_drain_begin(Error **errp);

/**
 * vm_snapshot_needs_drain: does a request or a bottom half have to end first,
 * or may another thread begin with one at any time?
 *
 * Called with the BQL held, the vCPUs may run.
 */
bool vm_snapshot_needs_drain(void);

/* vm-snapshot-verify.c: is the machine as it was saved? */

/**
 * vm_snapshot_compare: compare the machine with an image of it
 * @ram: an image for which ram_snapshot_matches() holds
 * @devices: an image for which qemu_device_state_matches() holds
 * @disks: for which vm_snapshot_disks_match() holds
 * @sum: what is found is added to it; may be NULL
 *
 * The vCPUs are stopped and the BQL is held.  The machine is not changed.
 *
 * Returns: what differs, to be freed with
 * qapi_free_SnapshotDeviceMismatches()
 */
SnapshotDeviceMismatches *vm_snapshot_compare(const RAMSnapshot *ram,
                                              const DeviceStateImage *devices,
                                              const VMSnapshotDisks *disks,
                                              SnapshotDeviceMismatches *sum);

#endif /* MIGRATION_VM_SNAPSHOT_INT_H */
