/*
 * QMP and HMP commands of the snapshot device
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/job.h"
#include "monitor/hmp.h"
#include "monitor/monitor.h"
#include "qapi/clone-visitor.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-migration.h"
#include "qapi/qapi-visit-migration.h"
#include "qobject/qdict.h"
#include "vm-snapshot-int.h"

static VMSnapshot *find_engine(Error **errp)
{
    VMSnapshot *s = vm_snapshot_engine();

    if (!s) {
        error_setg(errp, "The machine has no snapshot device");
        error_append_hint(errp, "Start QEMU with '-device snapshot'.\n");
    }
    return s;
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

SnapshotDeviceMismatches *qmp_x_snapshot_device_verify(uint32_t slot,
                                                      Error **errp)
{
    VMSnapshot *s = find_engine(errp);

    return s ? vm_snapshot_verify(s, slot, errp) : NULL;
}

void qmp_x_snapshot_device_commit(const char *job_id, bool has_slot,
                                  uint32_t slot, Error **errp)
{
    VMSnapshot *s = find_engine(errp);

    if (s) {
        vm_snapshot_commit(s, job_id, JOB_MANUAL_DISMISS,
                           has_slot ? (int64_t)slot : -1, errp);
    }
}

void qmp_x_snapshot_device_export(const char *job_id, uint32_t slot,
                                  const char *file, const char *base,
                                  bool has_speed, uint64_t speed, Error **errp)
{
    VMSnapshot *s = find_engine(errp);

    if (s) {
        vm_snapshot_export(s, job_id, JOB_MANUAL_DISMISS, slot, file, base,
                           has_speed ? speed : 0, errp);
    }
}

void qmp_x_snapshot_device_import(uint32_t slot, const char *file,
                                  const char *touched, bool has_check,
                                  bool check, Error **errp)
{
    VMSnapshot *s = find_engine(errp);

    if (s) {
        vm_snapshot_import(s, slot, file, touched, has_check && check, errp);
    }
}

static int compare_times(const void *a, const void *b)
{
    uint64_t ta = *(const uint64_t *)a, tb = *(const uint64_t *)b;

    return (ta > tb) - (ta < tb);
}

static SnapshotDeviceInfo *query(const VMSnapshot *s)
{
    SnapshotDeviceInfo *info = g_new0(SnapshotDeviceInfo, 1);
    SnapshotDeviceSlotList **tail = &info->saved;
    unsigned i, n = MIN(s->restores, VM_SNAPSHOT_TIMES);

    info->ram = vm_snapshot_ram(s);
    info->slots = s->config.slots;
    info->restores = s->restores;
    info->device_resets = s->ways[DEVICE_STATE_RESET_DEVICES];
    info->machine_resets = s->ways[DEVICE_STATE_RESET_MACHINE];
    info->reset_reason = g_strdup(s->reset_reason);
    for (i = 0; i < s->config.slots; i++) {
        const VMSnapshotSlot *slot = &s->slots[i];
        SnapshotDeviceSlot *item;

        if (!slot->ram) {
            continue;
        }
        item = g_new0(SnapshotDeviceSlot, 1);
        item->slot = i;
        item->ram_size = ram_snapshot_size(slot->ram);
        item->device_size = qemu_device_state_size(slot->devices);
        item->restores = slot->restores;
        QAPI_LIST_APPEND(tail, item);
    }
    info->disks = vm_snapshot_disks_query();
    info->unsaved = vm_snapshot_unsaved();
    info->verify = s->config.verify;
    info->verified = s->verified;
    info->mismatched = s->mismatched;
    info->mismatches = QAPI_CLONE(SnapshotDeviceMismatches, s->mismatches);
    if (n) {
        g_autofree uint64_t *sorted = g_memdup2(s->times, n * sizeof(*sorted));

        qsort(sorted, n, sizeof(*sorted), compare_times);
        info->last_pages = s->last_pages;
        info->last_ns = vm_snapshot_last_ns(s);
        info->p50_ns = sorted[n / 2];
        info->p99_ns = sorted[n * 99 / 100];
    }
    return info;
}

SnapshotDeviceInfo *qmp_x_query_snapshot_device(Error **errp)
{
    VMSnapshot *s = find_engine(errp);

    return s ? query(s) : NULL;
}

static bool hmp_slot(const QDict *qdict, uint32_t *slot, Error **errp)
{
    int64_t n = qdict_get_try_int(qdict, "slot", 0);

    *slot = n;
    if (*slot != n) {
        error_setg(errp, "There is no slot %" PRId64, n);
        return false;
    }
    return true;
}

static void hmp_run(Monitor *mon, const QDict *qdict, VMSnapshotOp op)
{
    Error *err = NULL;
    uint32_t slot;

    if (hmp_slot(qdict, &slot, &err)) {
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

/* Wait for a job to end, and tell how. */
static void finish_job(Job *job, Error **errp)
{
    JOB_LOCK_GUARD();
    job_ref_locked(job);
    if (job_finish_sync_locked(job, NULL, NULL) < 0) {
        error_propagate(errp, error_copy(job->err));
    }
    job_unref_locked(job);
}

void hmp_x_snapshot_device_commit(Monitor *mon, const QDict *qdict)
{
    Error *err = NULL;
    VMSnapshot *s = find_engine(&err);
    bool has_slot = qdict_haskey(qdict, "slot");
    Job *job = NULL;
    uint32_t slot;

    if (s && hmp_slot(qdict, &slot, &err)) {
        job = vm_snapshot_commit(s, "x-snapshot-device-commit", JOB_DEFAULT,
                                 has_slot ? (int64_t)slot : -1, &err);
    }
    if (job) {
        finish_job(job, &err);
    }
    hmp_handle_error(mon, err);
}

void hmp_x_snapshot_device_export(Monitor *mon, const QDict *qdict)
{
    Error *err = NULL;
    VMSnapshot *s = find_engine(&err);
    Job *job = NULL;
    uint32_t slot;

    if (s && hmp_slot(qdict, &slot, &err)) {
        job = vm_snapshot_export(s, "x-snapshot-device-export", JOB_DEFAULT,
                                 slot, qdict_get_str(qdict, "file"),
                                 qdict_get_try_str(qdict, "base"), 0, &err);
    }
    if (job) {
        finish_job(job, &err);
    }
    hmp_handle_error(mon, err);
}

void hmp_x_snapshot_device_import(Monitor *mon, const QDict *qdict)
{
    Error *err = NULL;
    uint32_t slot;

    if (hmp_slot(qdict, &slot, &err)) {
        qmp_x_snapshot_device_import(slot, qdict_get_str(qdict, "file"),
                                     qdict_get_try_str(qdict, "touched"), true,
                                     qdict_get_try_bool(qdict, "check", false),
                                     &err);
    }
    hmp_handle_error(mon, err);
}

static void print_mismatches(Monitor *mon, const SnapshotDeviceMismatches *m)
{
    const SnapshotDevicePageList *p;
    const SnapshotDeviceFieldList *f;
    const strList *d;

    monitor_printf(mon, "pages that differ: %" PRIu64 ", fields that differ: %"
                   PRIu64 "\n", m->pages, m->fields);
    for (d = m->disks; d; d = d->next) {
        monitor_printf(mon, "  disk of %s\n", d->value);
    }
    for (p = m->ram; p; p = p->next) {
        monitor_printf(mon, "  %s: page 0x%" PRIx64 ", byte 0x%x, %" PRIu64
                       " times\n", p->value->block, p->value->offset,
                       p->value->byte, p->value->count);
    }
    for (f = m->devices; f; f = f->next) {
        const SnapshotDeviceField *field = f->value;

        monitor_printf(mon, "  %s, %u: %s, byte 0x%" PRIx64 ": saved %s, found "
                       "%s, %" PRIu64 " times\n", field->section,
                       field->instance, field->field ?: "all", field->offset,
                       field->saved, field->found, field->count);
    }
}

void hmp_x_snapshot_device_verify(Monitor *mon, const QDict *qdict)
{
    g_autoptr(SnapshotDeviceMismatches) m = NULL;
    Error *err = NULL;
    uint32_t slot;

    if (hmp_slot(qdict, &slot, &err)) {
        m = qmp_x_snapshot_device_verify(slot, &err);
    }
    if (!hmp_handle_error(mon, err)) {
        print_mismatches(mon, m);
    }
}

void hmp_info_snapshot_device(Monitor *mon, const QDict *qdict)
{
    Error *err = NULL;
    g_autoptr(SnapshotDeviceInfo) info = qmp_x_query_snapshot_device(&err);
    SnapshotDeviceSlotList *l;
    SnapshotDeviceDiskList *d;
    strList *u;

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
    for (d = info->disks; d; d = d->next) {
        monitor_printf(mon, "disk of '%s': %" PRIu64 " clusters and %" PRIu64
                       " areas written, %" PRIu64 " KiB in memory, %" PRIu64
                       " KiB in a file\n", d->value->device,
                       d->value->clusters, d->value->zeroed_areas,
                       d->value->memory_bytes / 1024,
                       d->value->spilled_bytes / 1024);
    }
    for (u = info->unsaved; u; u = u->next) {
        monitor_printf(mon, "not saved: %s\n", u->value);
    }
    if (info->restores) {
        monitor_printf(mon, "restores: %" PRIu64 ", last: %" PRIu64 " pages, %"
                       PRIu64 " ns, p50: %" PRIu64 " ns, p99: %" PRIu64
                       " ns\n", info->restores, info->last_pages,
                       info->last_ns, info->p50_ns, info->p99_ns);
    }
    if (info->device_resets || info->machine_resets) {
        monitor_printf(mon, "of them %" PRIu64 " had to reset devices, %" PRIu64
                       " the machine; last for %s\n", info->device_resets,
                       info->machine_resets, info->reset_reason ?: "RAM");
    }
    if (info->verify) {
        monitor_printf(mon, "verified: %" PRIu64 " restores, every %u, %" PRIu64
                       " with mismatches\n", info->verified, info->verify,
                       info->mismatched);
        print_mismatches(mon, info->mismatches);
    }
}
