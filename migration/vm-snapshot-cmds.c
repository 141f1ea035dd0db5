/*
 * QMP and HMP commands of the snapshot device
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "migration/vm-snapshot.h"
#include "monitor/hmp.h"
#include "monitor/monitor.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-migration.h"
#include "qobject/qdict.h"

static VMSnapshot *find_engine(Error **errp)
{
    Object *obj = object_resolve_path_type("", TYPE_VM_SNAPSHOT, NULL);

    if (!obj) {
        error_setg(errp, "The machine has no snapshot device");
        error_append_hint(errp, "Start QEMU with '-device snapshot'.\n");
        return NULL;
    }
    return VM_SNAPSHOT(obj);
}

static void run(VMSnapshotOp op, uint32_t slot, Error **errp)
{
    VMSnapshot *s = find_engine(errp);

    if (s) {
        vm_snapshot_run(s, op, slot, errp);
    }
}

void qmp_x_snapshot_device_save(uint32_t slot, Error **errp)
{
    run(VM_SNAPSHOT_SAVE, slot, errp);
}

void qmp_x_snapshot_device_restore(uint32_t slot, Error **errp)
{
    run(VM_SNAPSHOT_RESTORE, slot, errp);
}

void qmp_x_snapshot_device_discard(uint32_t slot, Error **errp)
{
    run(VM_SNAPSHOT_DISCARD, slot, errp);
}

SnapshotDeviceInfo *qmp_x_query_snapshot_device(Error **errp)
{
    VMSnapshot *s = find_engine(errp);

    return s ? vm_snapshot_query(s) : NULL;
}

static void hmp_run(Monitor *mon, const QDict *qdict, VMSnapshotOp op)
{
    int64_t slot = qdict_get_try_int(qdict, "slot", 0);
    Error *err = NULL;

    if (slot < 0 || slot > UINT32_MAX) {
        error_setg(&err, "There is no slot %" PRId64, slot);
    } else {
        run(op, slot, &err);
    }
    hmp_handle_error(mon, err);
}

void hmp_x_snapshot_device_save(Monitor *mon, const QDict *qdict)
{
    hmp_run(mon, qdict, VM_SNAPSHOT_SAVE);
}

void hmp_x_snapshot_device_restore(Monitor *mon, const QDict *qdict)
{
    hmp_run(mon, qdict, VM_SNAPSHOT_RESTORE);
}

void hmp_x_snapshot_device_discard(Monitor *mon, const QDict *qdict)
{
    hmp_run(mon, qdict, VM_SNAPSHOT_DISCARD);
}

void hmp_info_snapshot_device(Monitor *mon, const QDict *qdict)
{
    Error *err = NULL;
    g_autoptr(SnapshotDeviceInfo) info = qmp_x_query_snapshot_device(&err);
    SnapshotDeviceSlotList *l;

    if (hmp_handle_error(mon, err)) {
        return;
    }
    monitor_printf(mon, "ram: %s, slots: %u\n",
                   SnapshotDeviceRam_str(info->ram), info->slots);
    for (l = info->saved; l; l = l->next) {
        monitor_printf(mon, "slot %u: RAM %" PRIu64 " KiB, devices %" PRIu64
                       " bytes, %" PRIu64 " restores\n", l->value->slot,
                       l->value->ram_size / 1024, l->value->device_size,
                       l->value->restores);
    }
    if (info->restores) {
        monitor_printf(mon, "restores: %" PRIu64 ", last: %" PRIu64 " pages, %"
                       PRIu64 " ns, p50: %" PRIu64 " ns, p99: %" PRIu64
                       " ns\n", info->restores, info->last_pages,
                       info->last_ns, info->p50_ns, info->p99_ns);
    }
}
