/*
 * The snapshot engine: write the content of disks to their images
 *
 * A job, as that takes long.  The overlays are drained and the machine is
 * stopped until its end, and the engine does nothing else.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/job.h"
#include "qapi/error.h"
#include "block/aio.h"
#include "block/block_int.h"
#include "block/snapshot-overlay.h"
#include "system/runstate.h"
#include "vm-snapshot-int.h"

typedef struct CommitDisk {
    char *device;
    SnapshotOverlayCommit *commit;
    SnapshotOverlaySlot *slot;          /* to be committed; NULL: the present */
    SnapshotOverlaySlot *present;       /* to go back to, with @slot */
} CommitDisk;

typedef struct CommitJob {
    Job common;
    VMSnapshot *s;
    VMSnapshotCommitDone *done;
    GArray *disks;                      /* of CommitDisk */
    bool was_live;                      /* the machine */
    Notifier shutdown;
} CommitJob;

static CommitDisk *nth_disk(CommitJob *job, guint i)
{
    return &g_array_index(job->disks, CommitDisk, i);
}

/* All is drained: there is nothing in flight. */
static void go_to_slots(CommitJob *job)
{
    for (guint i = 0; i < job->disks->len; i++) {
        CommitDisk *disk = nth_disk(job, i);

        if (disk->slot) {
            disk->present =
                snapshot_overlay_save(snapshot_overlay_slot_bs(disk->slot));
            snapshot_overlay_restore(disk->slot);
        }
    }
}

/* QEMU ends, and ends jobs on its way: the machine must not go on then. */
static void on_shutdown(Notifier *notifier, void *opaque)
{
    CommitJob *job = container_of(notifier, CommitJob, shutdown);

    job->was_live = false;
}

/* Let all be as it was before the job. */
static void end_commits(CommitJob *job)
{
    for (guint i = 0; i < job->disks->len; i++) {
        CommitDisk *disk = nth_disk(job, i);

        if (disk->present) {
            snapshot_overlay_restore(disk->present);
            snapshot_overlay_discard(disk->present);
        }
        snapshot_overlay_commit_end(disk->commit);
        g_free(disk->device);
    }
    g_array_unref(job->disks);
    notifier_remove(&job->shutdown);
    /* A reset may have come meanwhile; else somebody has started it already. */
    if (job->was_live && (runstate_check(RUN_STATE_PAUSED) ||
                          runstate_check(RUN_STATE_PRELAUNCH))) {
        vm_start();
    }
}

static int coroutine_fn commit_disk(CommitJob *job, const CommitDisk *disk,
                                    Error **errp)
{
    int64_t n;
    ERRP_GUARD();

    do {
        /* The main loop goes on meanwhile; pauses are here. */
        job_sleep_ns(&job->common, 0);
        if (job_is_cancelled(&job->common)) {
            error_setg(errp, "The commit was cancelled: the image of '%s' has "
                       "part of the content only", disk->device);
            return -ECANCELED;
        }
        n = snapshot_overlay_co_commit(disk->commit, errp);
        if (n < 0) {
            error_prepend(errp, "The image of '%s' has part of the content "
                          "only: ", disk->device);
            return n;
        }
        job_progress_update(&job->common, n);
    } while (n);
    return 0;
}

static int coroutine_fn commit_run(Job *common, Error **errp)
{
    CommitJob *job = container_of(common, CommitJob, common);
    int ret = 0;

    for (guint i = 0; i < job->disks->len && ret == 0; i++) {
        ret = commit_disk(job, nth_disk(job, i), errp);
    }
    return ret;
}

static void commit_clean(Job *common)
{
    CommitJob *job = container_of(common, CommitJob, common);

    end_commits(job);
    job->done(job->s);
}

static const JobDriver commit_driver = {
    .instance_size = sizeof(CommitJob),
    .job_type      = JOB_TYPE_SNAPSHOT_DEVICE_COMMIT,
    .run           = commit_run,
    .clean         = commit_clean,
};

static bool begin_disk(const char *device, BlockDriverState *bs,
                       SnapshotOverlaySlot *slot, void *opaque, Error **errp)
{
    CommitJob *job = opaque;
    CommitDisk disk = { .slot = slot };
    ERRP_GUARD();

    disk.commit = snapshot_overlay_commit_begin(bs, &job->common, errp);
    if (!disk.commit) {
        error_prepend(errp, "Disk of '%s' cannot be committed: ", device);
        return false;
    }
    disk.device = g_strdup(device);
    g_array_append_val(job->disks, disk);
    return true;
}

static bool begin_commits(CommitJob *job, const VMSnapshotDisks *disks,
                          Error **errp)
{
    uint64_t bytes = 0;

    if (!vm_snapshot_disks_foreach(disks, begin_disk, job, errp)) {
        return false;
    }
    go_to_slots(job);
    for (guint i = 0; i < job->disks->len; i++) {
        bytes += snapshot_overlay_commit_bytes(nth_disk(job, i)->commit);
    }
    job_progress_set_remaining(&job->common, bytes);
    return true;
}

Job *vm_snapshot_commit_start(VMSnapshot *s, const char *job_id, int flags,
                              int slot, VMSnapshotCommitDone *done,
                              Error **errp)
{
    const VMSnapshotDisks *disks = slot < 0 ? NULL : s->slots[slot].disks;
    CommitJob *job;

    if (s->config.disks != SNAPSHOT_DEVICE_DISKS_RESTORE) {
        error_setg(errp, "With disks=%s, nothing of disks is in memory: there "
                   "is nothing to commit",
                   SnapshotDeviceDisks_str(s->config.disks));
        error_append_hint(errp, "Use disks=restore to keep in memory what the "
                          "guest writes.\n");
        return NULL;
    }
    if (!vm_snapshot_disks_match(disks, errp)) {
        return NULL;
    }
    job = job_create(job_id, &commit_driver, NULL, qemu_get_aio_context(),
                     flags, NULL, NULL, errp);
    if (!job) {
        return NULL;
    }
    job->s = s;
    job->done = done;
    job->disks = g_array_new(false, false, sizeof(CommitDisk));
    job->was_live = runstate_is_live(runstate_get());
    job->shutdown.notify = on_shutdown;
    qemu_register_shutdown_notifier(&job->shutdown);
    vm_stop(RUN_STATE_PAUSED);
    if (!begin_commits(job, disks, errp)) {
        end_commits(job);
        job_early_fail(&job->common);
        return NULL;
    }
    job_start(&job->common);
    return &job->common;
}
