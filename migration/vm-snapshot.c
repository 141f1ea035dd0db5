/*
 * The snapshot engine: save the whole running machine and put it back
 *
 * The order of things in a save and in a restore.  How RAM is put back is in
 * ram-snapshot.c, CPUs and devices are device-state.c's.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/error-report.h"
#include "qemu/timer.h"
#include "qapi/error.h"
#include "qapi/qapi-events-migration.h"
#include "qapi/qapi-events-run-state.h"
#include "block/block.h"
#include "exec/tcg-coverage.h"
#include "hw/core/cpu.h"
#include "hw/virtio/virtio.h"
#include "migration/global_state.h"
#include "monitor/qdev.h"
#include "system/cpu-timers.h"
#include "system/cpus.h"
#include "system/kvm.h"
#include "system/reset.h"
#include "system/runstate.h"
#include "trace.h"
#include "vm-snapshot-int.h"

/*
 * vm_stop() and vm_start() without their events: thousands of them a second
 * would tell a management application nothing.
 *
 * Returns: false with @errp set if a disk is busy.  vm_snapshot_resume() with
 * @was has to follow in any case.
 */
static bool vm_snapshot_quiesce(RunState state, RunState *was, Error **errp)
{
    *was = runstate_get();

    if (runstate_is_live(*was)) {
        vm_set_suspended(*was == RUN_STATE_SUSPENDED);
        runstate_set(state);
        cpu_disable_ticks();
        if (*was == RUN_STATE_RUNNING) {
            pause_all_vcpus();
        }
        vm_state_notify(0, state);
    }
    return vm_snapshot_drain_begin(errp);
}

static void vm_snapshot_resume(RunState was)
{
    bdrv_drain_all_end();
    if (runstate_is_live(was)) {
        RunState state = vm_get_suspended() ? RUN_STATE_SUSPENDED
                                            : RUN_STATE_RUNNING;

        cpu_enable_ticks();
        runstate_set(state);
        vm_state_notify(1, state);
        vm_set_suspended(false);
    }
    resume_all_vcpus();
}

/* Neither the old state nor the new: the guest must not run again. */
static void vm_snapshot_stop_for_good(VMSnapshot *s, RunState was)
{
    s->half_done = true;
    bdrv_drain_all_end();
    if (!runstate_needs_reset()) {
        runstate_set(RUN_STATE_INTERNAL_ERROR);
    }
    if (runstate_is_live(was)) {
        qapi_event_send_stop();
    }
}

void vm_snapshot_clear_slot(VMSnapshotSlot *slot)
{
    ram_snapshot_free(slot->ram);
    qemu_device_state_free(slot->devices);
    plug_mark_free(slot->plugs);
    vm_snapshot_disks_free(slot->disks);
    qapi_free_SnapshotFileReady(slot->ready);
    snapshot_touched_free(slot->touched);
    *slot = (VMSnapshotSlot) { };
}

static void vm_snapshot_warn_unsaved(VMSnapshot *s)
{
    g_autoptr(strList) list = vm_snapshot_unsaved();
    strList *l;

    for (l = s->warned ? NULL : list; l; l = l->next) {
        warn_report("snapshot: %s has no migration state: restores leave it "
                    "as it is", l->value);
    }
    s->warned = true;
}

/*
 * Is it enough to put back what changed?  Then a reset of the machine, which
 * writes ROMs and more to RAM, need not come before.  A new generation changes
 * what was put back, for good.
 */
static bool vm_snapshot_may_load_in_place(const VMSnapshot *s)
{
    return ram_snapshot_store_mode(s->store) == SNAPSHOT_DEVICE_RAM_DIRTY &&
        !s->config.new_generation;
}

/* All that a slot holds beside RAM and devices; what was in it is freed. */
static void vm_snapshot_set_slot(VMSnapshot *s, unsigned n,
                                 const VMSnapshotSlot *images)
{
    VMSnapshotSlot *slot = &s->slots[n];
    bool several;

    vm_snapshot_clear_slot(slot);
    *slot = *images;
    slot->plugs = plug_mark_new();
    slot->disks = vm_snapshot_disks_save(s);
    slot->way = vm_snapshot_may_load_in_place(s) ? DEVICE_STATE_IN_PLACE
                                                 : DEVICE_STATE_RESET_MACHINE;
    slot->virtio = object_resolve_path_type("", TYPE_VIRTIO_DEVICE, &several) ||
        several;
}

static int vm_snapshot_save_quiesced(VMSnapshot *s, unsigned n, Error **errp)
{
    g_autoptr(RAMSnapshot) ram = NULL;
    g_autoptr(DeviceStateImage) devices = NULL;
    int64_t t_devices = get_clock(), t_ram;
    VMSnapshotSlot images = { };

    if (vm_snapshot_cannot_save(s, errp) ||
        vm_snapshot_disks_refused(s, errp)) {
        return -ENOTSUP;
    }
    devices = qemu_device_state_save(errp);
    if (!devices) {
        return -ENOTSUP;
    }
    t_ram = get_clock();
    ram = ram_snapshot_save(s->store, errp);
    if (!ram) {
        return -ENOMEM;
    }
    trace_vm_snapshot_save(n, ram_snapshot_size(ram),
                           qemu_device_state_size(devices),
                           t_ram - t_devices, get_clock() - t_ram);
    images.ram = g_steal_pointer(&ram);
    images.devices = g_steal_pointer(&devices);
    images.suspended = vm_get_suspended();
    vm_snapshot_set_slot(s, n, &images);
    return 0;
}

int vm_snapshot_save(VMSnapshot *s, unsigned n, Error **errp)
{
    RunState was;
    int ret = -ETIMEDOUT;

    /* What is refused in any case need not be prepared for. */
    if (vm_snapshot_cannot_save(s, errp) ||
        !vm_snapshot_disks_prepare(s, errp)) {
        return -ENOTSUP;
    }
    /* Loading the section that holds it fails if it is empty. */
    global_state_store();
    if (vm_snapshot_quiesce(RUN_STATE_SAVE_VM, &was, errp)) {
        ret = vm_snapshot_save_quiesced(s, n, errp);
    }
    if (!ret) {
        vm_snapshot_warn_unsaved(s);
        s->config.done(s->config.opaque, VM_SNAPSHOT_SAVE, n, 0);
    }
    vm_snapshot_resume(was);
    return ret;
}

void vm_snapshot_move_slot(VMSnapshot *s, unsigned from, unsigned to)
{
    vm_snapshot_clear_slot(&s->slots[to]);
    s->slots[to] = s->slots[from];
    s->slots[from] = (VMSnapshotSlot) { };
}

bool vm_snapshot_fill(VMSnapshot *s, unsigned n, VMSnapshotFillFunc *func,
                      void *opaque, Error **errp)
{
    VMSnapshotSlot images = { };
    RunState was;
    bool ok = false;

    if (vm_snapshot_cannot_save(s, errp) ||
        !vm_snapshot_disks_prepare(s, errp)) {
        return false;
    }
    if (vm_snapshot_quiesce(RUN_STATE_SAVE_VM, &was, errp)) {
        ok = !vm_snapshot_disks_refused(s, errp) &&
            func(s, &images, opaque, errp);
    }
    if (ok) {
        vm_snapshot_set_slot(s, n, &images);
    } else {
        vm_snapshot_clear_slot(&images);
    }
    vm_snapshot_resume(was);
    return ok;
}

/* A restore is over; when its parts began is by get_clock(). */
static void vm_snapshot_count(VMSnapshot *s, unsigned n, int64_t since,
                              int64_t stop, int64_t load, int64_t start)
{
    VMSnapshotSlot *slot = &s->slots[n];
    const char *reason = qemu_device_state_reason(slot->devices);
    int64_t end = get_clock();

    s->times[s->restores++ % VM_SNAPSHOT_TIMES] = end - since;
    slot->restores++;
    s->ways[slot->way]++;
    if (slot->way != DEVICE_STATE_IN_PLACE && reason &&
        g_strcmp0(reason, s->reset_reason)) {
        g_free(s->reset_reason);
        s->reset_reason = g_strdup(reason);
    }
    trace_vm_snapshot_restore(n, stop - since, load - stop, start - load,
                              end - start);
}

/* Has all been put back?  The guest cannot see the answer. */
static void vm_snapshot_loaded(VMSnapshot *s, unsigned n)
{
    VMSnapshotSlot *slot = &s->slots[n];
    g_autoptr(SnapshotDeviceMismatches) m = NULL;

    if (slot->touched) {
        snapshot_touched_begin(s, slot);
    }
    qdev_forget_unplug_requests();
    qemu_forget_guest_requests();
    tcg_coverage_restored();
    if (!s->config.verify || (s->restores + 1) % s->config.verify) {
        return;
    }
    m = vm_snapshot_compare(slot->ram, slot->devices, slot->disks,
                            s->mismatches);
    /* KVM's TSCs have gone on meanwhile. */
    cpu_synchronize_all_post_init();
    s->verified++;
    if (m->pages || m->fields || m->disks) {
        s->mismatched++;
        qapi_event_send_snapshot_device_mismatch(n, m);
    }
}

bool vm_snapshot_matches(const VMSnapshotSlot *slot, Error **errp)
{
    return plug_mark_matches(slot->plugs, errp) &&
        vm_snapshot_disks_match(slot->disks, errp) &&
        ram_snapshot_matches(slot->ram, errp) &&
        qemu_device_state_matches(slot->devices, errp);
}

/*
 * What came from a file was loaded for the first time: from now on it is this
 * machine that is put back, with what follows the host as it is here.
 */
static bool vm_snapshot_opened(VMSnapshot *s, VMSnapshotSlot *slot,
                               Error **errp)
{
    DeviceStateImage *devices;

    if (!qemu_device_state_opened(slot->devices)) {
        return true;
    }
    if (qemu_device_state_is_stream(slot->devices)) {
        /* Only what was loaded tells. */
        slot->suspended = vm_get_suspended();
    }
    devices = qemu_device_state_save(errp);
    if (!devices) {
        return false;
    }
    qemu_device_state_free(slot->devices);
    slot->devices = devices;
    return true;
}

/*
 * Put RAM, disks, CPUs and devices back, after a reset of what slot->way says.
 *
 * What devices derive from RAM and disks they derive from them as they were
 * saved, so that these go first.  Reset writes ROMs to RAM: it goes before.
 */
static bool vm_snapshot_load_way(VMSnapshot *s, unsigned n, Error **errp)
{
    VMSnapshotSlot *slot = &s->slots[n];
    bool all = slot->way == DEVICE_STATE_RESET_MACHINE, ok;
    int64_t t_ram, t_disks, t_devices;
    uint64_t pages = 0;

    if (all) {
        qemu_system_reset(SHUTDOWN_CAUSE_SNAPSHOT_LOAD);
    } else if (slot->way == DEVICE_STATE_RESET_DEVICES &&
               !qemu_device_state_reset(slot->devices)) {
        return false;
    }
    /* Images are of no use to a machine that a reset made another one. */
    if (slot->way != DEVICE_STATE_IN_PLACE &&
        !vm_snapshot_matches(slot, errp)) {
        return false;
    }
    t_ram = get_clock();
    if (!ram_snapshot_restore(slot->ram, &pages, errp)) {
        return false;
    }
    t_disks = t_devices = get_clock();
    if (slot->disks) {
        uint64_t clusters = vm_snapshot_disks_restore(slot->disks);

        t_devices = get_clock();
        trace_vm_snapshot_disks_restore(clusters, t_devices - t_disks);
    }
    ok = all ? qemu_device_state_load(slot->devices, errp) &&
               vm_snapshot_opened(s, slot, errp)
             : qemu_device_state_load_changed(slot->devices);
    s->last_pages += pages;
    trace_vm_snapshot_load(n, pages, t_disks - t_ram, slot->way,
                           get_clock() - t_devices);
    return ok;
}

/* Once the guest has changed, an error leaves nothing to go back to. */
static bool vm_snapshot_load(VMSnapshot *s, unsigned n, Error **errp)
{
    VMSnapshotSlot *slot = &s->slots[n];

    if (vm_snapshot_may_load_in_place(s) && !s->half_done) {
        slot->way = qemu_device_state_choose(slot->devices);
        if (slot->way != DEVICE_STATE_RESET_MACHINE &&
            vm_snapshot_load_way(s, n, NULL)) {
            return true;
        }
    }
    slot->way = DEVICE_STATE_RESET_MACHINE;
    return vm_snapshot_load_way(s, n, errp);
}

/* With the vCPUs stopped, see vm_snapshot_cannot_save(). */
static int vm_snapshot_prepare(VMSnapshot *s, unsigned n, Error **errp)
{
    VMSnapshotSlot *slot = &s->slots[n];

    if (!vm_snapshot_matches(slot, errp)) {
        return -ESTALE;
    }
    return ram_snapshot_prepare(slot->ram, errp) ? 0 : -ENOMEM;
}

int vm_snapshot_restore(VMSnapshot *s, unsigned n, int64_t since, Error **errp)
{
    VMSnapshotSlot *slot = &s->slots[n];
    int64_t t_stop = get_clock(), t_load, t_start;
    RunState was;
    int ret = -ETIMEDOUT;

    s->last_pages = 0;
    if (vm_snapshot_quiesce(RUN_STATE_RESTORE_VM, &was, errp)) {
        ret = vm_snapshot_prepare(s, n, errp);
    }
    if (ret) {
        vm_snapshot_resume(was);
        return ret;
    }
    if (s->touched) {
        snapshot_touched_end(s, slot);
    }
    t_load = get_clock();
    if (!vm_snapshot_load(s, n, errp)) {
        ram_snapshot_cancel(slot->ram);
        vm_snapshot_stop_for_good(s, was);
        return -EIO;
    }
    vm_snapshot_loaded(s, n);
    t_start = get_clock();
    s->half_done = false;

    vm_set_suspended(slot->suspended);
    if (runstate_needs_reset()) {
        /* As after a reset: the state that forbade to run on is gone. */
        runstate_set(RUN_STATE_PRELAUNCH);
    }
    s->config.done(s->config.opaque, VM_SNAPSHOT_RESTORE, n, 0);
    vm_snapshot_resume(was);
    vm_snapshot_count(s, n, since, t_stop, t_load, t_start);
    return 0;
}

/* Those of KVM are read from it when they stop, and set when they go on. */
static void vm_snapshot_stop_clocks(void)
{
    cpu_disable_ticks();
    if (kvm_enabled()) {
        runstate_set(RUN_STATE_RESTORE_VM);
        vm_clock_notify(false, RUN_STATE_RESTORE_VM);
    }
}

void vm_snapshot_start_clocks(void)
{
    cpu_enable_ticks();
    if (kvm_enabled()) {
        vm_clock_notify(true, RUN_STATE_RUNNING);
    }
}

/* Returns: false, with the machine as it was unless s->half_done is set */
static bool vm_snapshot_load_in_place(VMSnapshot *s, unsigned n)
{
    VMSnapshotSlot *slot = &s->slots[n];

    slot->way = qemu_device_state_choose(slot->devices);
    if (slot->way == DEVICE_STATE_IN_PLACE) {
        s->half_done = !vm_snapshot_load_way(s, n, NULL);
        if (!s->half_done) {
            vm_snapshot_loaded(s, n);
        }
        return !s->half_done;
    }
    if (slot->way == DEVICE_STATE_RESET_DEVICES) {
        qemu_device_state_unchoose(slot->devices);
    }
    return false;
}

bool vm_snapshot_restore_on_vcpu(VMSnapshot *s, unsigned n, int64_t since,
                                 CPUState *self)
{
    int64_t t_stop = get_clock(), t_load, t_start;
    CPUState *cpu;
    bool ok;

    if (vm_snapshot_prepare(s, n, NULL)) {
        return false;
    }
    vm_snapshot_stop_clocks();
    if (s->touched) {
        snapshot_touched_end(s, &s->slots[n]);
    }
    t_load = get_clock();
    s->last_pages = 0;
    ok = vm_snapshot_load_in_place(s, n);
    t_start = get_clock();
    if (ok) {
        s->config.done(s->config.opaque, VM_SNAPSHOT_RESTORE, n, 0);
    }
    if (kvm_enabled()) {
        runstate_set(RUN_STATE_RUNNING);
    }
    if (!s->parked) {
        vm_snapshot_start_clocks();
    }
    if (!ok) {
        return false;
    }

    CPU_FOREACH(cpu) {
        if (cpu != self && !cpu_thread_is_idle(cpu)) {
            qemu_cpu_kick(cpu);
        }
    }
    vm_snapshot_count(s, n, since, t_stop, t_load, t_start);
    return true;
}

bool vm_snapshot_restore_parked(VMSnapshot *s, unsigned n)
{
    return vm_snapshot_may_load_in_place(s) && !s->half_done &&
        !vm_snapshot_needs_drain() && !vm_snapshot_prepare(s, n, NULL) &&
        vm_snapshot_load_in_place(s, n);
}

/*
 * Returns: false with @errp set; and @lost if the machine could not be put back
 */
static bool vm_snapshot_visit_quiesced(VMSnapshot *s, unsigned n,
                                       VMSnapshotVisitFunc *func, void *opaque,
                                       bool *lost, Error **errp)
{
    const unsigned present = s->config.slots;   /* a slot of this alone */
    ERRP_GUARD();
    bool ok;

    if (vm_snapshot_prepare(s, n, errp)) {
        return false;
    }
    /* All of RAM may be read now, and is put back. */
    if (s->touched) {
        snapshot_touched_end(s, &s->slots[present]);
    }
    ok = !vm_snapshot_save_quiesced(s, present, errp);
    if (ok) {
        s->visiting = true;
        ok = vm_snapshot_load(s, n, errp);
        /* Then the present is not to be put back in place. */
        s->half_done = !ok;
        ok = ok && func(opaque, errp);
        s->visiting = false;
        *lost = vm_snapshot_prepare(s, present, ok ? errp : NULL) ||
            !vm_snapshot_load(s, present, ok ? errp : NULL);
        if (*lost && !ok) {
            error_prepend(errp, "The machine is lost, for it could not be put "
                          "back after this: ");
        }
        vm_snapshot_clear_slot(&s->slots[present]);
    }
    ram_snapshot_cancel(s->slots[n].ram);
    return ok && !*lost;
}

bool vm_snapshot_visit(VMSnapshot *s, unsigned n, VMSnapshotVisitFunc *func,
                       void *opaque, Error **errp)
{
    const uint64_t last_pages = s->last_pages;
    RunState was;
    bool lost = false, ok;

    if (vm_snapshot_cannot_save(s, errp) ||
        !vm_snapshot_disks_prepare(s, errp)) {
        return false;
    }
    global_state_store();
    ok = vm_snapshot_quiesce(RUN_STATE_SAVE_VM, &was, errp) &&
        vm_snapshot_visit_quiesced(s, n, func, opaque, &lost, errp);
    /* The guest can read how many a restore took. */
    s->last_pages = last_pages;
    if (lost) {
        vm_snapshot_stop_for_good(s, was);
    } else {
        vm_snapshot_resume(was);
    }
    return ok;
}

void vm_snapshot_discard(VMSnapshot *s, unsigned n)
{
    vm_snapshot_clear_slot(&s->slots[n]);
    vm_snapshot_disks_unblock(s);
    s->config.done(s->config.opaque, VM_SNAPSHOT_DISCARD, n, 0);
    trace_vm_snapshot_discard(n);
}

SnapshotDeviceMismatches *vm_snapshot_verify_slot(VMSnapshot *s, unsigned n,
                                                  Error **errp)
{
    const VMSnapshotSlot *slot = &s->slots[n];
    SnapshotDeviceMismatches *m = NULL;
    RunState was;

    if (vm_snapshot_quiesce(RUN_STATE_SAVE_VM, &was, errp) &&
        vm_snapshot_matches(slot, errp)) {
        m = vm_snapshot_compare(slot->ram, slot->devices, slot->disks, NULL);
    }
    vm_snapshot_resume(was);
    return m;
}

uint64_t vm_snapshot_restores(const VMSnapshot *s, unsigned slot)
{
    return slot < s->config.slots ? s->slots[slot].restores : 0;
}

uint64_t vm_snapshot_last_ns(const VMSnapshot *s)
{
    return s->restores ? s->times[(s->restores - 1) % VM_SNAPSHOT_TIMES] : 0;
}

uint64_t vm_snapshot_last_pages(const VMSnapshot *s)
{
    return s->last_pages;
}

SnapshotDeviceRam vm_snapshot_ram(const VMSnapshot *s)
{
    return ram_snapshot_store_mode(s->store);
}
