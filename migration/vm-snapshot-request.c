/*
 * The snapshot engine: who carries a command out, and in which thread
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/error-report.h"
#include "qemu/job.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "qapi/error.h"
#include "hw/core/cpu.h"
#include "migration/blocker.h"
#include "migration/misc.h"
#include "migration/vm-snapshot-state.h"
#include "system/cpu-timers.h"
#include "system/cpus.h"
#include "system/kvm.h"
#include "system/runstate.h"
#include "system/tcg.h"
#include "vm-snapshot-int.h"

static void vm_snapshot_set_state(VMSnapshot *s, VMSnapshotRequestState to)
{
    static const uint8_t steps[REQUEST__MAX] = {
        [REQUEST_IDLE] = BIT(REQUEST_ON_VCPU) | BIT(REQUEST_IN_MAIN_LOOP) |
                         BIT(REQUEST_RUNNING) | BIT(REQUEST_COMMITTING),
        /* A request is carried out, or forgotten in a reset. */
        [REQUEST_ON_VCPU] = BIT(REQUEST_RUNNING) | BIT(REQUEST_IDLE),
        [REQUEST_IN_MAIN_LOOP] = BIT(REQUEST_RUNNING) | BIT(REQUEST_IDLE),
        /* A vCPU may have to leave it to the main loop. */
        [REQUEST_RUNNING] = BIT(REQUEST_IDLE) | BIT(REQUEST_IN_MAIN_LOOP),
        [REQUEST_COMMITTING] = BIT(REQUEST_IDLE),
    };

    g_assert(steps[s->state] & BIT(to));
    s->state = to;
}

/* Is there a request of the guest's that nobody has begun to carry out? */
static bool vm_snapshot_is_requested(const VMSnapshot *s)
{
    return s->state == REQUEST_ON_VCPU || s->state == REQUEST_IN_MAIN_LOOP;
}

/*
 * A restore may be carried out on the vCPU, in its thread, if nothing but vCPUs
 * and the main loop, which the BQL keeps away, touches the machine: no thread
 * or request of the block layer, and no bottom half that would be called later.
 * And only in place, as the last one was: a reset may need the main loop, and
 * so may vCPUs that have stopped for what the guest asks the machine for.
 *
 * With KVM, only a vCPU's own thread can get at its state while no vCPU was
 * told to stop; and a guest's notification of virtio may be in an ioeventfd,
 * which nothing tells of until the main loop has read it.
 */
static bool vm_snapshot_can_stay_on_vcpu(const VMSnapshot *s, unsigned n)
{
    const VMSnapshotSlot *slot = &s->slots[n];

    return !vm_snapshot_refused(s, VM_SNAPSHOT_RESTORE, n, NULL) &&
        (tcg_enabled() || (kvm_enabled() && !CPU_NEXT(first_cpu) &&
                           !slot->virtio)) &&
        runstate_is_running() && !slot->suspended &&
        !qemu_guest_requests_pending() &&
        slot->way == DEVICE_STATE_IN_PLACE && !vm_snapshot_needs_drain();
}

static void vm_snapshot_hold_vcpus(void)
{
    CPUState *cpu;

    CPU_FOREACH(cpu) {
        cpu_hold(cpu);
    }
}

static void vm_snapshot_release_vcpus(void)
{
    CPUState *cpu;

    CPU_FOREACH(cpu) {
        cpu_release(cpu);
    }
}

static void vm_snapshot_on_vcpu(CPUState *self, run_on_cpu_data data)
{
    VMSnapshot *s = data.host_ptr;

    /* Cancelled, or the main loop was first? */
    if (s->state != REQUEST_ON_VCPU || s->requester != self) {
        return;
    }
    vm_snapshot_set_state(s, REQUEST_RUNNING);
    if (vm_snapshot_can_stay_on_vcpu(s, s->slot) &&
        vm_snapshot_restore_on_vcpu(s, s->slot, s->since, self)) {
        vm_snapshot_set_state(s, REQUEST_IDLE);
        return;
    }
    /* The main loop has to do it all, or to tell why not. */
    vm_snapshot_hold_vcpus();
    vm_snapshot_set_state(s, REQUEST_IN_MAIN_LOOP);
    qemu_bh_schedule(s->bh);
}

/* As above, where each vCPU has a thread: in an exclusive section. */
static void vm_snapshot_on_vcpu_exclusive(CPUState *self, run_on_cpu_data data)
{
    BQL_LOCK_GUARD();
    vm_snapshot_on_vcpu(self, data);
}

static int vm_snapshot_do(VMSnapshot *s, VMSnapshotOp op, unsigned n,
                          int64_t since, Error **errp)
{
    int ret = vm_snapshot_refused(s, op, n, errp);

    vm_snapshot_set_state(s, REQUEST_RUNNING);
    if (!ret && op == VM_SNAPSHOT_SAVE) {
        ret = vm_snapshot_save(s, n, errp);
    } else if (!ret && op == VM_SNAPSHOT_RESTORE) {
        ret = vm_snapshot_restore(s, n, since, errp);
    } else if (!ret) {
        vm_snapshot_discard(s, n);
    }
    vm_snapshot_set_state(s, REQUEST_IDLE);
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

/* The guest must not run in a machine that is neither the old nor the new. */
static void vm_snapshot_stop_if_half_done(const VMSnapshot *s)
{
    if (s->half_done && !runstate_needs_reset()) {
        /* Its user may have paused it, and may continue it. */
        vm_stop_force_state(RUN_STATE_INTERNAL_ERROR);
    }
}

/* Nothing is left of a request that was cancelled but the vCPUs to release. */
static void vm_snapshot_bh(void *opaque)
{
    VMSnapshot *s = opaque;
    Error *err = NULL;
    int ret;

    qemu_bh_cancel(s->bh);
    if (vm_snapshot_is_requested(s) && runstate_check(RUN_STATE_SHUTDOWN)) {
        /* QEMU ends, and so may what a restore relies on. */
        vm_snapshot_set_state(s, REQUEST_IDLE);
    } else if (vm_snapshot_is_requested(s)) {
        ret = vm_snapshot_do(s, s->op, s->slot, s->since, &err);
        if (ret) {
            vm_snapshot_report(s, err);
            vm_snapshot_stop_if_half_done(s);
            s->config.done(s->config.opaque, s->op, s->slot, ret);
        }
    }
    if (!s->parked) {
        vm_snapshot_release_vcpus();
    }
}

int vm_snapshot_request(VMSnapshot *s, VMSnapshotOp op, unsigned slot)
{
    if (s->state != REQUEST_IDLE) {
        return -EBUSY;
    }
    s->op = op;
    s->slot = slot;
    s->since = get_clock();
    s->requester = current_cpu;
    if (op == VM_SNAPSHOT_RESTORE && current_cpu &&
        vm_snapshot_can_stay_on_vcpu(s, slot)) {
        vm_snapshot_set_state(s, REQUEST_ON_VCPU);
        if (qemu_tcg_mttcg_enabled() && CPU_NEXT(first_cpu)) {
            async_safe_run_on_cpu(current_cpu, vm_snapshot_on_vcpu_exclusive,
                                  RUN_ON_CPU_HOST_PTR(s));
        } else {
            async_run_on_cpu(current_cpu, vm_snapshot_on_vcpu,
                             RUN_ON_CPU_HOST_PTR(s));
        }
    } else {
        vm_snapshot_set_state(s, REQUEST_IN_MAIN_LOOP);
        if (current_cpu) {
            cpu_hold(current_cpu);
        }
        qemu_bh_schedule(s->bh);
    }
    return 0;
}

void vm_snapshot_cancel(VMSnapshot *s)
{
    if (vm_snapshot_is_requested(s)) {
        vm_snapshot_set_state(s, REQUEST_IDLE);
    }
    /* In a reset, all that a restore has left is gone. */
    s->half_done = false;
}

void vm_snapshot_park(VMSnapshot *s)
{
    s->parked = true;
    /* The user may continue the machine. */
    cpu_hold_ticks();
    vm_snapshot_hold_vcpus();
}

bool vm_snapshot_put_back_parked(VMSnapshot *s, unsigned slot)
{
    bool ok;

    if (s->state != REQUEST_IDLE || !s->parked ||
        vm_snapshot_refused(s, VM_SNAPSHOT_RESTORE, slot, NULL)) {
        return false;
    }
    vm_snapshot_set_state(s, REQUEST_RUNNING);
    ok = vm_snapshot_restore_parked(s, slot);
    vm_snapshot_set_state(s, REQUEST_IDLE);
    return ok;
}

void vm_snapshot_unpark(VMSnapshot *s)
{
    CPUState *cpu;

    if (!s->parked) {
        return;
    }
    vm_snapshot_stop_if_half_done(s);
    s->parked = false;
    cpu_release_ticks();
    if (kvm_enabled()) {
        /* Its TSCs have gone on. */
        cpu_synchronize_all_post_init();
    }
    if (runstate_is_live(runstate_get())) {
        vm_snapshot_start_clocks();
    }
    CPU_FOREACH(cpu) {
        cpu->held = false;
    }
}

/* What the guest has asked for comes before what the host asks for. */
static bool vm_snapshot_end_request(VMSnapshot *s, Error **errp)
{
    if (s->state == REQUEST_RUNNING) {
        error_setg(errp, "A command of the guest's is being carried out");
        return false;
    }
    if (s->state == REQUEST_COMMITTING) {
        error_setg(errp, "A commit of disks to their images is under way");
        return false;
    }
    /*
     * In a machine saved or restored now, the store that made the request
     * would have been executed and had no effect.
     */
    if (vm_snapshot_is_requested(s)) {
        vm_snapshot_bh(s);
    }
    return true;
}

int vm_snapshot_run(VMSnapshot *s, VMSnapshotOp op, unsigned slot,
                    Error **errp)
{
    int64_t since = get_clock();

    return vm_snapshot_end_request(s, errp) ?
        vm_snapshot_do(s, op, slot, since, errp) : -EBUSY;
}

SnapshotDeviceMismatches *vm_snapshot_verify(VMSnapshot *s, unsigned slot,
                                             Error **errp)
{
    SnapshotDeviceMismatches *m;

    if (!vm_snapshot_end_request(s, errp) ||
        vm_snapshot_refused(s, VM_SNAPSHOT_RESTORE, slot, errp)) {
        return NULL;
    }
    vm_snapshot_set_state(s, REQUEST_RUNNING);
    m = vm_snapshot_verify_slot(s, slot, errp);
    vm_snapshot_set_state(s, REQUEST_IDLE);
    return m;
}

static void vm_snapshot_committed(VMSnapshot *s)
{
    vm_snapshot_disks_unblock(s);
    vm_snapshot_set_state(s, REQUEST_IDLE);
    object_unref(OBJECT(s));
}

Job *vm_snapshot_commit(VMSnapshot *s, const char *job_id, int flags,
                        int64_t slot, Error **errp)
{
    VMSnapshotOp as = slot < 0 ? VM_SNAPSHOT_SAVE : VM_SNAPSHOT_RESTORE;
    Job *job;

    if (!vm_snapshot_end_request(s, errp) ||
        (slot < 0 && vm_snapshot_is_half_done(s, errp)) ||
        vm_snapshot_refused(s, as, MAX(slot, 0), errp)) {
        return NULL;
    }
    vm_snapshot_set_state(s, REQUEST_COMMITTING);
    object_ref(OBJECT(s));
    job = vm_snapshot_commit_start(s, job_id, flags, slot,
                                   vm_snapshot_committed, errp);
    if (!job) {
        vm_snapshot_committed(s);
    }
    return job;
}

Job *vm_snapshot_export(VMSnapshot *s, const char *job_id, int flags,
                        unsigned slot, const char *file, const char *base,
                        uint64_t speed, Error **errp)
{
    Job *job;

    if (!vm_snapshot_end_request(s, errp) ||
        vm_snapshot_refused(s, VM_SNAPSHOT_RESTORE, slot, errp)) {
        return NULL;
    }
    vm_snapshot_set_state(s, REQUEST_RUNNING);
    job = vm_snapshot_export_start(s, job_id, flags, slot, file, base, speed,
                                   errp);
    vm_snapshot_set_state(s, REQUEST_IDLE);
    return job;
}

static bool nothing(void *opaque, Error **errp)
{
    return true;
}

/*
 * What nobody can check before, a stream that QEMU has written, is loaded now,
 * in a slot of its own, and the machine put back.
 */
static bool vm_snapshot_do_import(VMSnapshot *s, unsigned slot,
                                  const char *file, const char *touched,
                                  bool check, Error **errp)
{
    const unsigned trial = s->config.slots + 1;
    bool is_stream;

    if (!vm_snapshot_open(s, trial, file, touched, check, &is_stream, errp)) {
        return false;
    }
    if (is_stream && !vm_snapshot_visit(s, trial, nothing, NULL, errp)) {
        error_prepend(errp, "'%s' cannot be loaded: ", file);
        vm_snapshot_clear_slot(&s->slots[trial]);
        return false;
    }
    vm_snapshot_move_slot(s, trial, slot);
    /* Whoever relied on what the slot had has lost it, as by a save. */
    s->config.done(s->config.opaque, VM_SNAPSHOT_SAVE, slot, 0);
    return true;
}

bool vm_snapshot_import(VMSnapshot *s, unsigned slot, const char *file,
                        const char *touched, bool check, Error **errp)
{
    ERRP_GUARD();
    bool ok;

    if (!vm_snapshot_end_request(s, errp) ||
        vm_snapshot_refused(s, VM_SNAPSHOT_SAVE, slot, errp)) {
        return false;
    }
    vm_snapshot_set_state(s, REQUEST_RUNNING);
    ok = vm_snapshot_do_import(s, slot, file, touched, check, errp);
    vm_snapshot_set_state(s, REQUEST_IDLE);
    return ok;
}

static bool vm_snapshot_load_file(VMSnapshot *s, Error **errp)
{
    const unsigned slot = s->config.load_slot;
    bool is_stream, ok;

    if (vm_snapshot_refused(s, VM_SNAPSHOT_SAVE, slot, errp)) {
        return false;
    }
    vm_snapshot_set_state(s, REQUEST_RUNNING);
    ok = vm_snapshot_open(s, slot, s->load, s->touched_list, false, &is_stream,
                          errp);
    vm_snapshot_set_state(s, REQUEST_IDLE);
    if (!ok) {
        return false;
    }
    s->config.loading(s->config.opaque, s->slots[slot].ready);
    return !vm_snapshot_run(s, VM_SNAPSHOT_RESTORE, slot, errp);
}

bool vm_snapshot_load_at_start(Error **errp)
{
    VMSnapshot *s = vm_snapshot_engine();
    ERRP_GUARD();

    if (!s) {
        return true;
    }
    vm_snapshot_fingerprint_init();
    if (s->load && !vm_snapshot_load_file(s, errp)) {
        error_prepend(errp, "-device snapshot,load=: ");
        return false;
    }
    return true;
}

bool vm_snapshot_block_migration(VMSnapshot *s, Error *reason, Error **errp)
{
    s->run_blocker = reason;
    return !migrate_add_blocker_internal(&s->run_blocker, errp);
}

void vm_snapshot_unblock_migration(VMSnapshot *s)
{
    migrate_del_blocker(&s->run_blocker);
}

bool vm_snapshot_in_progress(const VMSnapshot *s)
{
    return s->state == REQUEST_RUNNING;
}

bool vm_snapshot_for_others(const VMSnapshot *s)
{
    return s->visiting && !qemu_device_state_in_memory();
}

OBJECT_DEFINE_SIMPLE_TYPE(VMSnapshot, vm_snapshot, VM_SNAPSHOT, OBJECT)

/* There is one for the whole machine, if any. */
static VMSnapshot *the_engine;

VMSnapshot *vm_snapshot_engine(void)
{
    return the_engine;
}

bool vm_snapshot_restore_is_exact(void)
{
    return qemu_device_state_in_memory() && !the_engine->config.new_generation;
}

bool vm_snapshot_disks_go_back(void)
{
    return qemu_device_state_in_memory() &&
        the_engine->config.disks == SNAPSHOT_DEVICE_DISKS_RESTORE;
}

VMSnapshot *vm_snapshot_new(Object *parent, const VMSnapshotConfig *config,
                            Error **errp)
{
    VMSnapshot *s;

    if (the_engine) {
        error_setg(errp, "The machine has a snapshot device already");
        return NULL;
    }
    if (config->touched && !config->load) {
        error_setg(errp, "touched= is of the file of load=, and there is none");
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
    s->config.overlay_dir = NULL;
    s->config.load = s->config.touched = NULL;
    s->load = g_strdup(config->load);
    s->touched_list = g_strdup(config->touched);
    s->overlay_dir = g_strdup(config->overlay_dir);
    /* One more for vm_snapshot_visit(), and one to try files */
    s->slots = g_new0(VMSnapshotSlot, config->slots + 2);
    the_engine = s;
    object_property_add_child(parent, "engine", OBJECT(s));
    object_unref(OBJECT(s));
    vm_snapshot_disks_init(s);
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
    qemu_mutex_init(&s->publishing);
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
    qemu_mutex_destroy(&s->publishing);
    for (i = 0; i < s->config.slots; i++) {
        vm_snapshot_clear_slot(&s->slots[i]);
    }
    g_free(s->slots);
    if (s->store) {
        plug_log_stop();
    }
    ram_snapshot_store_free(s->store);
    vm_snapshot_unblock_migration(s);
    vm_snapshot_disks_finalize(s);
    snapshot_touched_free(s->touched);
    g_free(s->load);
    g_free(s->touched_list);
    g_free(s->last_refusal);
    g_free(s->reset_reason);
    qapi_free_SnapshotDeviceMismatches(s->mismatches);
}

static void vm_snapshot_class_init(ObjectClass *class, void *data)
{
}
