/*
 * Bring disks, and what devices have still to do, to rest for a snapshot
 *
 * No section of a device's state describes a request that is half done, nor
 * does any tell of a bottom half.  Both have to end before a save; and before a
 * restore, which they would reach into.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/main-loop.h"
#include "qapi/error.h"
#include "block/aio-wait.h"
#include "block/block.h"
#include "qom/object.h"
#include "system/block-backend.h"
#include "system/iothread.h"
#include "system/tpm.h"
#include "trace.h"
#include "vm-snapshot-int.h"

/*
 * Each ends one part of a request at least.  LSI 53C895A and ESP transfer
 * 128 KiB in a part.
 */
#define MAX_ROUNDS 1000

/* Of the event loop within a round: bottom halves that follow on each other */
#define MAX_POLLS 1000

static void do_nothing(void *opaque)
{
}

/*
 * Those that are scheduled last are called first, so that ours is called
 * before others of the same pass; but a second one, in a pass after them.
 */
static int call_bottom_halves(Object *obj, void *opaque)
{
    IOThread *iothread = (IOThread *)object_dynamic_cast(obj, TYPE_IOTHREAD);
    unsigned i;

    for (i = 0; iothread && i < 2; i++) {
        aio_wait_bh_oneshot(iothread_get_aio_context(iothread), do_nothing,
                            NULL);
    }
    return 0;
}

static void settle(void)
{
    AioContext *ctx = qemu_get_aio_context();
    unsigned i;

    for (i = 0; i < MAX_POLLS; i++) {
        object_child_foreach(object_get_objects_root(), call_bottom_halves,
                             NULL);
        if (!aio_bh_pending(ctx)) {
            break;
        }
        aio_poll(ctx, false);
    }
}

static bool is_busy(Error **errp)
{
    const char *name = aio_bh_pending(qemu_get_aio_context());
    BlockBackend *blk;

    for (blk = blk_all_next(NULL); blk; blk = blk_all_next(blk)) {
        if (!blk_is_idle(blk)) {
            g_autofree char *id = vm_snapshot_disk_name(blk);

            error_setg(errp, "A disk is busy: requests of '%s' do not come to "
                       "an end", *id ? id : blk_name(blk));
            return true;
        }
    }
    if (name) {
        error_setg(errp, "A device is busy: %s() is called again and again",
                   name);
    }
    return name;
}

bool vm_snapshot_drain_begin(Error **errp)
{
    unsigned i = 0;

    while (true) {
        bdrv_drain_all_begin();
        /* A restore would reset its device, which waits for ever. */
        if (!tpm_finish_request(errp)) {
            return false;
        }
        settle();
        if (!is_busy(NULL)) {
            break;
        }
        if (++i == MAX_ROUNDS) {
            return !is_busy(errp);
        }
        bdrv_drain_all_end();
    }
    if (i) {
        trace_vm_snapshot_drain(i);
    }
    return true;
}

bool vm_snapshot_needs_drain(void)
{
    AioContext *ctx = qemu_get_aio_context();
    BlockBackend *blk;

    for (blk = blk_all_next(NULL); blk; blk = blk_all_next(blk)) {
        if (blk_get_aio_context(blk) != ctx || !blk_is_idle(blk)) {
            return true;
        }
    }
    return aio_bh_pending(ctx);
}
