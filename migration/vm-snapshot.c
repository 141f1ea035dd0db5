/*
 * The snapshot engine: save the whole running machine and put it back
 *
 * The order of things in a save and in a restore.  How RAM is put back is in
 * ram-snapshot.c, CPUs and devices are savevm.c's.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "qapi/error.h"
#include "qapi/clone-visitor.h"
#include "qapi/qapi-events-migration.h"
#include "qapi/qapi-events-run-state.h"
#include "qapi/qapi-types-migration.h"
#include "qapi/qapi-visit-migration.h"
#include "block/block.h"
#include "hw/core/cpu.h"
#include "hw/qdev-core.h"
#include "hw/virtio/virtio.h"
#include "migration/global_state.h"
#include "migration/misc.h"
#include "migration/vm-snapshot.h"
#include "migration/vm-snapshot-state.h"
#include "system/block-backend.h"
#include "system/cpu-timers.h"
#include "system/cpus.h"
#include "system/kvm.h"
#include "system/replay.h"
#include "system/reset.h"
#include "system/runstate.h"
#include "system/tcg.h"
#include "monitor/qdev.h"
#include "migration.h"
#include "plug-log.h"
#include "ram-snapshot.h"
#include "savevm.h"
#include "trace.h"
#include "vm-snapshot-drain.h"
#include "vm-snapshot-verify.h"

/* Restores that the percentiles of x-query-snapshot-device are taken over. */
#define RESTORE_TIMES 1024

typedef struct VMSnapshotSlot {
    RAMSnapshot *ram;           /* NULL in an empty slot */
    DeviceStateImage *devices;
    PlugMark *plugs;            /* which devices there were */
    bool suspended;             /* the guest slept (ACPI S3) */
    bool virtio;                /* the machine has devices of it */
    uint64_t restores;
} VMSnapshotSlot;

/* What becomes of a command; the legal steps are in steps[]. */
typedef enum VMSnapshotState {
    STATE_IDLE,
    STATE_ON_VCPU,      /* asked for; a work item of @requester does it */
    STATE_IN_MAIN_LOOP, /* asked for; @bh carries it out, and vCPUs are held */
    STATE_RUNNING,      /* it is being carried out */
    STATE_HALF_DONE,    /* @bh has to finish what a vCPU began; all are held */
    STATE__MAX,
} VMSnapshotState;

struct VMSnapshot {
    Object parent_obj;

    VMSnapshotConfig config;
    VMSnapshotSlot *slots;
    RAMSnapshotStore *store;

    VMSnapshotState state;
    QEMUBH *bh;

    /* A request made by vm_snapshot_request() */
    VMSnapshotOp op;
    unsigned slot;
    int64_t since;
    CPUState *requester;

    bool warned;                /* of devices that are not saved */
    char *last_refusal;         /* told the host already */
    int64_t report_again;       /* not before this time, by get_clock() */
    uint64_t restores;
    uint64_t last_pages;
    uint64_t times[RESTORE_TIMES];      /* ns; a ring, by @restores */

    uint64_t verified;          /* restores */
    uint64_t mismatched;        /* of them */
    SnapshotDeviceMismatches *mismatches;       /* sums */
};

static void vm_snapshot_set_state(VMSnapshot *s, VMSnapshotState to)
{
    static const uint8_t steps[STATE__MAX] = {
        [STATE_IDLE] = BIT(STATE_ON_VCPU) | BIT(STATE_IN_MAIN_LOOP) |
                       BIT(STATE_RUNNING),
        /* A request is carried out, or forgotten in a reset. */
        [STATE_ON_VCPU] = BIT(STATE_RUNNING) | BIT(STATE_IDLE),
        [STATE_IN_MAIN_LOOP] = BIT(STATE_RUNNING) | BIT(STATE_IDLE),
        [STATE_HALF_DONE] = BIT(STATE_RUNNING) | BIT(STATE_IDLE),
        /* A vCPU may have to leave it to the main loop. */
        [STATE_RUNNING] = BIT(STATE_IDLE) | BIT(STATE_IN_MAIN_LOOP) |
                          BIT(STATE_HALF_DONE),
    };

    g_assert(steps[s->state] & BIT(to));
    s->state = to;
}

/* There is one for the whole machine, if any. */
static const VMSnapshot *the_engine;

bool vm_snapshot_restore_is_exact(void)
{
    return qemu_device_state_in_memory() && !the_engine->config.new_generation;
}

static bool vm_snapshot_not_now(Error **errp)
{
    if (replay_mode != REPLAY_MODE_NONE) {
        error_setg(errp, "Record/replay is active");
    } else if (migration_is_running() || migration_in_incoming_postcopy()) {
        error_setg(errp, "A migration is in progress");
    } else if (runstate_check(RUN_STATE_INMIGRATE) ||
               runstate_check(RUN_STATE_FINISH_MIGRATE) ||
               runstate_check(RUN_STATE_POSTMIGRATE) ||
               runstate_check(RUN_STATE_COLO)) {
        error_setg(errp, "The machine is being, or was, migrated (%s)",
                   RunState_str(runstate_get()));
    } else {
        return false;
    }
    return true;
}

static bool vm_snapshot_has_writable_disk(Error **errp)
{
    BlockBackend *blk;

    for (blk = blk_all_next(NULL); blk; blk = blk_all_next(blk)) {
        if (blk_get_attached_dev(blk) && blk_is_inserted(blk) &&
            blk_supports_write_perm(blk)) {
            g_autofree char *id = blk_get_attached_dev_id(blk);

            error_setg(errp, "Disk of '%s' is writable, and a restore does "
                       "not put back what is written to it", id);
            error_append_hint(errp, "Make it read-only, or accept that with "
                              "allow-writable-disks=on.\n");
            return true;
        }
    }
    return false;
}

static bool vm_snapshot_cannot_save(VMSnapshot *s, Error **errp)
{
    if (runstate_needs_reset()) {
        error_setg(errp, "The machine is stopped until its next reset (%s)",
                   RunState_str(runstate_get()));
        return true;
    }
    if (!s->config.allow_writable_disks &&
        vm_snapshot_has_writable_disk(errp)) {
        return true;
    }
    return migration_is_blocked(errp) || qemu_device_state_blocked(errp) ||
        ram_snapshot_blocked(s->store, errp);
}

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
static void vm_snapshot_stop_for_good(RunState was)
{
    bdrv_drain_all_end();
    if (!runstate_needs_reset()) {
        runstate_set(RUN_STATE_INTERNAL_ERROR);
    }
    if (runstate_is_live(was)) {
        qapi_event_send_stop();
    }
}

static void vm_snapshot_clear_slot(VMSnapshotSlot *slot)
{
    ram_snapshot_free(slot->ram);
    qemu_device_state_free(slot->devices);
    plug_mark_free(slot->plugs);
    *slot = (VMSnapshotSlot) { };
}

/* They have no state of their own, or it is in the section of a controller. */
static const char *const stateless[] = {
    "floppy", "ide-cd", "ide-cf", "ide-hd", "isa-debug-exit", "isa-debugcon",
    "loader", "pc-dimm", "virtconsole", "virtserialport",
};

static int has_section(Object *obj, void *opaque)
{
    return qemu_device_state_has(obj);
}

static int add_unsaved(Object *obj, void *opaque)
{
    g_autofree char *path = object_get_canonical_path(obj);
    const char *type = object_get_typename(obj);
    strList **list = opaque;
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(stateless); i++) {
        if (!strcmp(type, stateless[i])) {
            return 0;
        }
    }
    if (!has_section(obj, NULL) &&
        !object_child_foreach_recursive(obj, has_section, NULL)) {
        QAPI_LIST_PREPEND(*list, g_strdup_printf("%s (%s)", type, path));
    }
    return 0;
}

/*
 * QEMU migrates a machine with devices that have no migration state, without a
 * word.  Of those that belong to a board it is known that they need none.
 */
static strList *vm_snapshot_unsaved(void)
{
    strList *list = NULL;

    object_child_foreach(machine_get_container("peripheral"), add_unsaved,
                         &list);
    object_child_foreach(machine_get_container("peripheral-anon"), add_unsaved,
                         &list);
    return list;
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

static bool vm_snapshot_has_virtio(void)
{
    bool several;

    return object_resolve_path_type("", TYPE_VIRTIO_DEVICE, &several) ||
        several;
}

/*
 * What may be refused is found out with the vCPUs stopped: while they are being
 * stopped, the BQL is not held, and devices may come and go.
 */
static int vm_snapshot_save_quiesced(VMSnapshot *s, unsigned n, Error **errp)
{
    g_autoptr(RAMSnapshot) ram = NULL;
    g_autoptr(DeviceStateImage) devices = NULL;
    int64_t t_devices = get_clock(), t_ram;
    VMSnapshotSlot *slot = &s->slots[n];

    if (vm_snapshot_cannot_save(s, errp)) {
        return -ENOTSUP;
    }
    devices = qemu_device_state_save(vm_snapshot_follows_host, errp);
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
    vm_snapshot_clear_slot(slot);
    slot->ram = g_steal_pointer(&ram);
    slot->devices = g_steal_pointer(&devices);
    slot->plugs = plug_mark_new();
    slot->suspended = vm_get_suspended();
    slot->virtio = vm_snapshot_has_virtio();
    vm_snapshot_warn_unsaved(s);
    s->config.done(s->config.opaque, VM_SNAPSHOT_SAVE, 0);
    return 0;
}

static int vm_snapshot_save(VMSnapshot *s, unsigned n, Error **errp)
{
    RunState was;
    int ret = -EBUSY;

    if (vm_snapshot_not_now(errp)) {
        return -ENOTSUP;
    }
    /* Loading the section that holds it fails if it is empty. */
    global_state_store();
    if (vm_snapshot_quiesce(RUN_STATE_SAVE_VM, &was, errp)) {
        ret = vm_snapshot_save_quiesced(s, n, errp);
    }
    vm_snapshot_resume(was);
    return ret;
}

static void vm_snapshot_count(VMSnapshot *s, VMSnapshotSlot *slot, int64_t ns)
{
    s->times[s->restores++ % RESTORE_TIMES] = ns;
    slot->restores++;
}

/* Is it enough to put back what changed, in a machine that was not reset? */
static bool vm_snapshot_is_incremental(const VMSnapshot *s,
                                       const VMSnapshotSlot *slot)
{
    return ram_snapshot_store_mode(s->store) == SNAPSHOT_DEVICE_RAM_DIRTY &&
        qemu_device_state_in_place(slot->devices);
}

/* Has all been put back?  The guest cannot see the answer. */
static void vm_snapshot_loaded(VMSnapshot *s, unsigned n)
{
    const VMSnapshotSlot *slot = &s->slots[n];
    g_autoptr(SnapshotDeviceMismatches) m = NULL;

    qdev_forget_unplug_requests();
    if (!s->config.verify || (s->restores + 1) % s->config.verify) {
        return;
    }
    m = vm_snapshot_compare(slot->ram, slot->devices, s->mismatches);
    /* KVM's TSCs have gone on meanwhile. */
    cpu_synchronize_all_post_init();
    s->verified++;
    if (m->pages || m->fields) {
        s->mismatched++;
        qapi_event_send_snapshot_device_mismatch(n, m);
    }
}

/* Is the machine made of what it was made of at the save? */
static bool vm_snapshot_matches(const VMSnapshotSlot *slot, Error **errp)
{
    return plug_mark_matches(slot->plugs, errp) &&
        ram_snapshot_matches(slot->ram, errp) &&
        qemu_device_state_matches(slot->devices, errp);
}

/*
 * Put back what changed, after qemu_device_state_check().
 *
 * Returns: false if that was not enough, and a reset and everything has to
 *          follow
 */
static bool vm_snapshot_load_changed(VMSnapshot *s, unsigned n)
{
    VMSnapshotSlot *slot = &s->slots[n];
    int64_t t_ram = get_clock(), t_devices;
    uint64_t pages = 0;
    bool ok;

    if (!ram_snapshot_restore(slot->ram, &pages, NULL)) {
        return false;
    }
    t_devices = get_clock();
    ok = qemu_device_state_load_changed(slot->devices);
    s->last_pages += pages;
    trace_vm_snapshot_load(n, pages, t_devices - t_ram, false,
                           get_clock() - t_devices);
    if (ok) {
        vm_snapshot_loaded(s, n);
    }
    return ok;
}

/*
 * Once the guest has changed, an error leaves nothing to go back to.
 *
 * What devices derive from RAM they derive from it as it was saved, so that
 * RAM goes first.  Reset writes ROMs to RAM: it goes before.
 */
static bool vm_snapshot_load(VMSnapshot *s, unsigned n, Error **errp)
{
    VMSnapshotSlot *slot = &s->slots[n];
    int64_t t_ram, t_devices;
    uint64_t pages = 0;

    if (vm_snapshot_is_incremental(s, slot) &&
        qemu_device_state_check(slot->devices) &&
        vm_snapshot_load_changed(s, n)) {
        return true;
    }
    qemu_system_reset(SHUTDOWN_CAUSE_SNAPSHOT_LOAD);
    /* Images are of no use to a machine that a reset made another one. */
    if (!vm_snapshot_matches(slot, errp)) {
        return false;
    }
    t_ram = get_clock();
    if (!ram_snapshot_restore(slot->ram, &pages, errp)) {
        return false;
    }
    s->last_pages += pages;
    t_devices = get_clock();
    if (!qemu_device_state_load(slot->devices, errp)) {
        return false;
    }
    trace_vm_snapshot_load(n, pages, t_devices - t_ram, true,
                           get_clock() - t_devices);
    vm_snapshot_loaded(s, n);
    return true;
}

/* With the vCPUs stopped, see vm_snapshot_save_quiesced(). */
static int vm_snapshot_prepare(VMSnapshot *s, unsigned n, Error **errp)
{
    VMSnapshotSlot *slot = &s->slots[n];

    if (!vm_snapshot_matches(slot, errp)) {
        return -ESTALE;
    }
    return ram_snapshot_prepare(slot->ram, errp) ? 0 : -ENOMEM;
}

static int vm_snapshot_restore(VMSnapshot *s, unsigned n, int64_t since,
                               Error **errp)
{
    VMSnapshotSlot *slot = &s->slots[n];
    int64_t t_stop = get_clock(), t_load, t_start, t_end;
    RunState was;
    int ret = -EBUSY;

    if (!slot->ram) {
        error_setg(errp, "There is no snapshot in slot %u", n);
        return -ENOENT;
    }
    if (vm_snapshot_not_now(errp)) {
        return -ENOTSUP;
    }
    s->last_pages = 0;
    if (vm_snapshot_quiesce(RUN_STATE_RESTORE_VM, &was, errp)) {
        ret = vm_snapshot_prepare(s, n, errp);
    }
    if (ret) {
        vm_snapshot_resume(was);
        return ret;
    }
    t_load = get_clock();
    if (!vm_snapshot_load(s, n, errp)) {
        ram_snapshot_cancel(slot->ram);
        vm_snapshot_stop_for_good(was);
        return -EIO;
    }
    t_start = get_clock();

    vm_set_suspended(slot->suspended);
    if (runstate_needs_reset()) {
        /* As after a reset: the state that forbade to run on is gone. */
        runstate_set(RUN_STATE_PRELAUNCH);
    }
    s->config.done(s->config.opaque, VM_SNAPSHOT_RESTORE, 0);
    vm_snapshot_resume(was);
    t_end = get_clock();
    vm_snapshot_count(s, slot, t_end - since);
    trace_vm_snapshot_restore(n, t_stop - since, t_load - t_stop,
                              t_start - t_load, t_end - t_start);
    return 0;
}

/*
 * A restore may be carried out on a vCPU's own thread if nothing but the vCPUs
 * and the main loop, which the BQL keeps away, touches the machine: no thread
 * or request of the block layer, and no bottom half that would be called later.
 *
 * With KVM, only a vCPU's own thread can get at its state while no vCPU was
 * told to stop; and a guest's notification of virtio may be in an ioeventfd,
 * which nothing tells of until the main loop has read it.
 */
static bool vm_snapshot_can_stay_on_vcpu(const VMSnapshot *s, unsigned n)
{
    const VMSnapshotSlot *slot = &s->slots[n];

    return (tcg_enabled() || (kvm_enabled() && !CPU_NEXT(first_cpu) &&
                              !slot->virtio)) &&
        runstate_is_running() && slot->ram &&
        !slot->suspended && vm_snapshot_is_incremental(s, slot) &&
        !vm_snapshot_not_now(NULL) && !vm_snapshot_needs_drain();
}

/* Clocks stand still.  Those of KVM are read from it, and set afterwards. */
static void vm_snapshot_stop_on_vcpu(void)
{
    cpu_disable_ticks();
    if (kvm_enabled()) {
        runstate_set(RUN_STATE_RESTORE_VM);
        vm_clock_notify(false, RUN_STATE_RESTORE_VM);
    }
}

static void vm_snapshot_start_on_vcpu(void)
{
    cpu_enable_ticks();
    if (kvm_enabled()) {
        runstate_set(RUN_STATE_RUNNING);
        vm_clock_notify(true, RUN_STATE_RUNNING);
    }
}

/*
 * The short way of a restore: no thread is woken, nothing drained.
 * The BQL is held, this vCPU is between two instructions, and no other is in
 * cpu_exec().
 *
 * Returns: false if the main loop has to do it all; @half_done then tells if
 *          the machine has changed already
 */
static bool vm_snapshot_restore_on_vcpu(VMSnapshot *s, CPUState *self,
                                        bool *half_done)
{
    int64_t t_stop = get_clock(), t_load, t_start, t_end;
    CPUState *cpu;
    bool ok = false;

    if (!vm_snapshot_can_stay_on_vcpu(s, s->slot) ||
        vm_snapshot_prepare(s, s->slot, NULL)) {
        return false;
    }

    vm_snapshot_stop_on_vcpu();
    t_load = get_clock();
    s->last_pages = 0;
    if (qemu_device_state_check(s->slots[s->slot].devices)) {
        ok = vm_snapshot_load_changed(s, s->slot);
        *half_done = !ok;
    }
    t_start = get_clock();
    vm_snapshot_start_on_vcpu();
    if (!ok) {
        return false;
    }

    s->config.done(s->config.opaque, VM_SNAPSHOT_RESTORE, 0);
    CPU_FOREACH(cpu) {
        if (cpu != self && !cpu_thread_is_idle(cpu)) {
            qemu_cpu_kick(cpu);
        }
    }
    t_end = get_clock();
    vm_snapshot_count(s, &s->slots[s->slot], t_end - s->since);
    trace_vm_snapshot_restore(s->slot, t_stop - s->since, t_load - t_stop,
                              t_start - t_load, t_end - t_start);
    return true;
}

static void vm_snapshot_on_vcpu(CPUState *self, run_on_cpu_data data)
{
    VMSnapshot *s = data.host_ptr;
    bool half_done = false;
    CPUState *cpu;

    /* Cancelled, or the main loop was first? */
    if (s->state != STATE_ON_VCPU || s->requester != self) {
        return;
    }
    vm_snapshot_set_state(s, STATE_RUNNING);
    if (vm_snapshot_restore_on_vcpu(s, self, &half_done)) {
        vm_snapshot_set_state(s, STATE_IDLE);
        return;
    }
    /* The main loop has to do it all, or to tell why not. */
    CPU_FOREACH(cpu) {
        cpu_hold(cpu);
    }
    vm_snapshot_set_state(s, half_done ? STATE_HALF_DONE : STATE_IN_MAIN_LOOP);
    qemu_bh_schedule(s->bh);
}

/* As above, where each vCPU has a thread: in an exclusive section. */
static void vm_snapshot_on_vcpu_exclusive(CPUState *self, run_on_cpu_data data)
{
    BQL_LOCK_GUARD();
    vm_snapshot_on_vcpu(self, data);
}

/* vCPUs may run: nothing of a snapshot is theirs. */
static int vm_snapshot_discard(VMSnapshot *s, unsigned n, Error **errp)
{
    if (!s->slots[n].ram) {
        error_setg(errp, "There is no snapshot in slot %u", n);
        return -ENOENT;
    }
    vm_snapshot_clear_slot(&s->slots[n]);
    s->config.done(s->config.opaque, VM_SNAPSHOT_DISCARD, 0);
    trace_vm_snapshot_discard(n);
    return 0;
}

static int vm_snapshot_do(VMSnapshot *s, VMSnapshotOp op, unsigned n,
                          int64_t since, Error **errp)
{
    int ret = -EINVAL;

    if (n >= s->config.slots) {
        error_setg(errp, "There is no slot %u: the device has %u", n,
                   s->config.slots);
        return ret;
    }

    vm_snapshot_set_state(s, STATE_RUNNING);
    switch (op) {
    case VM_SNAPSHOT_SAVE:
        ret = vm_snapshot_save(s, n, errp);
        break;
    case VM_SNAPSHOT_RESTORE:
        ret = vm_snapshot_restore(s, n, since, errp);
        break;
    case VM_SNAPSHOT_DISCARD:
        ret = vm_snapshot_discard(s, n, errp);
        break;
    }
    vm_snapshot_set_state(s, STATE_IDLE);
    return ret;
}

/* A guest that repeats its mistakes must not fill the host's log. */
static void vm_snapshot_report(VMSnapshot *s, Error *err)
{
    int64_t now = get_clock();

    if (now >= s->report_again &&
        g_strcmp0(s->last_refusal, error_get_pretty(err))) {
        s->report_again = now + NANOSECONDS_PER_SECOND;
        g_free(s->last_refusal);
        s->last_refusal = g_strdup(error_get_pretty(err));
        warn_reportf_err(err, "snapshot: the guest's command failed: ");
    } else {
        error_free(err);
    }
}

/* Nothing is left of a request that was cancelled but the vCPUs to release. */
static void vm_snapshot_bh(void *opaque)
{
    VMSnapshot *s = opaque;
    bool half_done = s->state == STATE_HALF_DONE;
    Error *err = NULL;
    CPUState *cpu;
    int ret;

    qemu_bh_cancel(s->bh);
    if (s->state != STATE_IDLE && runstate_check(RUN_STATE_SHUTDOWN)) {
        /* QEMU ends, and so may what a restore relies on. */
        vm_snapshot_set_state(s, STATE_IDLE);
    } else if (s->state != STATE_IDLE) {
        ret = vm_snapshot_do(s, s->op, s->slot, s->since, &err);
        if (ret) {
            vm_snapshot_report(s, err);
            if (half_done) {
                vm_stop(RUN_STATE_INTERNAL_ERROR);
            }
            s->config.done(s->config.opaque, s->op, ret);
        }
    }
    CPU_FOREACH(cpu) {
        cpu_release(cpu);
    }
}

int vm_snapshot_request(VMSnapshot *s, VMSnapshotOp op, unsigned slot)
{
    if (s->state != STATE_IDLE) {
        return -EBUSY;
    }
    s->op = op;
    s->slot = slot;
    s->since = get_clock();
    s->requester = current_cpu;
    if (op == VM_SNAPSHOT_RESTORE && current_cpu &&
        vm_snapshot_can_stay_on_vcpu(s, slot)) {
        vm_snapshot_set_state(s, STATE_ON_VCPU);
        if (qemu_tcg_mttcg_enabled() && CPU_NEXT(first_cpu)) {
            async_safe_run_on_cpu(current_cpu, vm_snapshot_on_vcpu_exclusive,
                                  RUN_ON_CPU_HOST_PTR(s));
        } else {
            async_run_on_cpu(current_cpu, vm_snapshot_on_vcpu,
                             RUN_ON_CPU_HOST_PTR(s));
        }
    } else {
        vm_snapshot_set_state(s, STATE_IN_MAIN_LOOP);
        if (current_cpu) {
            cpu_hold(current_cpu);
        }
        qemu_bh_schedule(s->bh);
    }
    return 0;
}

void vm_snapshot_cancel(VMSnapshot *s)
{
    if (s->state != STATE_RUNNING && s->state != STATE_IDLE) {
        vm_snapshot_set_state(s, STATE_IDLE);
    }
}

int vm_snapshot_run(VMSnapshot *s, VMSnapshotOp op, unsigned slot,
                    Error **errp)
{
    int64_t since = get_clock();

    if (s->state == STATE_RUNNING) {
        error_setg(errp, "A command of the guest's is being carried out");
        return -EBUSY;
    }
    /*
     * The guest's request comes first: in a machine saved or restored now,
     * the store that made it would have been executed and had no effect.
     */
    if (s->state != STATE_IDLE) {
        vm_snapshot_bh(s);
    }
    return vm_snapshot_do(s, op, slot, since, errp);
}

SnapshotDeviceMismatches *vm_snapshot_verify(VMSnapshot *s, unsigned n,
                                             Error **errp)
{
    const VMSnapshotSlot *slot;
    SnapshotDeviceMismatches *m = NULL;
    RunState was;

    if (s->state == STATE_RUNNING) {
        error_setg(errp, "A command of the guest's is being carried out");
        return NULL;
    }
    if (s->state != STATE_IDLE) {
        vm_snapshot_bh(s);
    }
    if (n >= s->config.slots) {
        error_setg(errp, "There is no slot %u: the device has %u", n,
                   s->config.slots);
        return NULL;
    }
    slot = &s->slots[n];
    if (!slot->ram) {
        error_setg(errp, "There is no snapshot in slot %u", n);
        return NULL;
    }
    if (vm_snapshot_not_now(errp)) {
        return NULL;
    }
    vm_snapshot_set_state(s, STATE_RUNNING);
    if (vm_snapshot_quiesce(RUN_STATE_SAVE_VM, &was, errp) &&
        vm_snapshot_matches(slot, errp)) {
        m = vm_snapshot_compare(slot->ram, slot->devices, NULL);
    }
    vm_snapshot_resume(was);
    vm_snapshot_set_state(s, STATE_IDLE);
    return m;
}

uint64_t vm_snapshot_restores(const VMSnapshot *s, unsigned slot)
{
    return slot < s->config.slots ? s->slots[slot].restores : 0;
}

uint64_t vm_snapshot_last_ns(const VMSnapshot *s)
{
    return s->restores ? s->times[(s->restores - 1) % RESTORE_TIMES] : 0;
}

uint64_t vm_snapshot_last_pages(const VMSnapshot *s)
{
    return s->last_pages;
}

SnapshotDeviceRam vm_snapshot_ram(const VMSnapshot *s)
{
    return ram_snapshot_store_mode(s->store);
}

bool vm_snapshot_in_progress(const VMSnapshot *s)
{
    return s->state == STATE_RUNNING;
}

static int compare_times(const void *a, const void *b)
{
    uint64_t ta = *(const uint64_t *)a, tb = *(const uint64_t *)b;

    return (ta > tb) - (ta < tb);
}

SnapshotDeviceInfo *vm_snapshot_query(const VMSnapshot *s)
{
    SnapshotDeviceInfo *info = g_new0(SnapshotDeviceInfo, 1);
    SnapshotDeviceSlotList **tail = &info->saved;
    unsigned i, n = MIN(s->restores, RESTORE_TIMES);

    info->ram = vm_snapshot_ram(s);
    info->slots = s->config.slots;
    info->restores = s->restores;
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
    info->unsaved = vm_snapshot_unsaved();
    info->verify = s->config.verify;
    info->verified = s->verified;
    info->mismatched = s->mismatched;
    info->mismatches = QAPI_CLONE(SnapshotDeviceMismatches, s->mismatches);
    if (n) {
        g_autofree uint64_t *sorted = g_memdup2(s->times, n * sizeof(*sorted));

        qsort(sorted, n, sizeof(*sorted), compare_times);
        info->last_pages = vm_snapshot_last_pages(s);
        info->last_ns = vm_snapshot_last_ns(s);
        info->p50_ns = sorted[n / 2];
        info->p99_ns = sorted[n * 99 / 100];
    }
    return info;
}

VMSnapshot *vm_snapshot_new(Object *parent, const VMSnapshotConfig *config,
                            Error **errp)
{
    VMSnapshot *s;

    if (object_resolve_path_type("", TYPE_VM_SNAPSHOT, NULL)) {
        error_setg(errp, "The machine has a snapshot device already");
        return NULL;
    }
    if (!config->slots || config->slots > VM_SNAPSHOT_SLOTS_MAX) {
        error_setg(errp, "slots=%u is not between 1 and %u", config->slots,
                   VM_SNAPSHOT_SLOTS_MAX);
        return NULL;
    }

    s = VM_SNAPSHOT(object_new(TYPE_VM_SNAPSHOT));
    s->store = ram_snapshot_store_new(config->ram, config->file, errp);
    if (!s->store) {
        object_unref(OBJECT(s));
        return NULL;
    }
    plug_log_start();
    s->config = *config;
    s->config.file = NULL;
    s->slots = g_new0(VMSnapshotSlot, config->slots);
    the_engine = s;
    object_property_add_child(parent, "engine", OBJECT(s));
    object_unref(OBJECT(s));
    return s;
}

static void vm_snapshot_init(Object *obj)
{
    VMSnapshot *s = VM_SNAPSHOT(obj);

    /*
     * Not in the main context: aio_poll() nested in a device's handler, or in
     * a reset, must not run it.
     */
    s->bh = aio_bh_new(iohandler_get_aio_context(), vm_snapshot_bh, s);
    s->mismatches = g_new0(SnapshotDeviceMismatches, 1);
}

static void vm_snapshot_finalize(Object *obj)
{
    VMSnapshot *s = VM_SNAPSHOT(obj);
    unsigned i;

    if (the_engine == s) {
        the_engine = NULL;
    }
    qemu_bh_delete(s->bh);
    for (i = 0; i < s->config.slots; i++) {
        vm_snapshot_clear_slot(&s->slots[i]);
    }
    g_free(s->slots);
    if (s->store) {
        plug_log_stop();
    }
    ram_snapshot_store_free(s->store);
    g_free(s->last_refusal);
    qapi_free_SnapshotDeviceMismatches(s->mismatches);
}

static const TypeInfo vm_snapshot_types[] = {
    {
        .name = TYPE_VM_SNAPSHOT,
        .parent = TYPE_OBJECT,
        .instance_size = sizeof(VMSnapshot),
        .instance_init = vm_snapshot_init,
        .instance_finalize = vm_snapshot_finalize,
    }
};

DEFINE_TYPES(vm_snapshot_types)
